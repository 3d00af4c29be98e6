package plugin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"syscall"
)

// Limits of the protocol. A message beyond one of them ends the connection.
const (
	// Proto is the version of the protocol that this package speaks.
	Proto = 1
	// MaxMessage is the size of the largest message, in bytes, with its header.
	MaxMessage = 64 << 10
	// MaxRequests is how many requests may wait for their replies at a time.
	MaxRequests = 64
	// MaxPath and MaxName are the lengths of the longest path, and of the longest of its names, in bytes.
	MaxPath = 4095
	MaxName = 255
	// MaxLayers is how many layers one entry of lowerdir may be.
	MaxLayers = 128
	// MaxErrno is the largest errno in a reply.
	MaxErrno = 511
	// MaxBytes is the size of the largest value, list of names or target of a link, in bytes.
	MaxBytes = MaxMessage - headerSize
)

// headerSize is what every message begins with, in bytes: size, op, kind, id, arg and a reserved word.
const headerSize = 24

// Kinds of messages.
const (
	kindRequest = 0
	kindReply   = 1
)

// Op says what a request asks for. Most are the operations of fuse-overlayfs's struct data_source, version 1.
type Op uint16

// The operations.
const (
	OpNumLayers Op = iota + 1
	OpLoad
	OpCleanup
	OpStatat
	OpOpendir
	OpReaddir
	OpClosedir
	OpOpenat
	OpListxattr
	OpGetxattr
	OpReadlinkat
	OpLookup
	OpOpen
	OpCancel
	OpRelease
	opEnd
)

var opNames = [opEnd]string{
	OpNumLayers: "num_of_layers", OpLoad: "load_data_source", OpCleanup: "cleanup", OpStatat: "statat",
	OpOpendir: "opendir", OpReaddir: "readdir", OpClosedir: "closedir", OpOpenat: "openat", OpListxattr: "listxattr",
	OpGetxattr: "getxattr", OpReadlinkat: "readlinkat", OpLookup: "lookup", OpOpen: "open", OpCancel: "cancel", OpRelease: "release",
}

// String returns the operation's name as hellos have it.
func (o Op) String() string {
	if o == 0 || o >= opEnd {
		return fmt.Sprintf("Op(%d)", uint16(o))
	}
	return opNames[o]
}

// HasFile says whether a reply to the operation may carry a descriptor.
func (o Op) HasFile() bool { return o == OpOpenat || o == OpLoad }

// Request is a message to a plug-in. Which of the fields below Layer matter depends on Op.
type Request struct {
	Op Op
	ID uint64
	// Layer is the number that load_data_source gives the layer and that the others name it by; 0 for the entry as a whole.
	Layer uint32

	Data   string // num_of_layers, load_data_source: DATA of //NAME/DATA/PATH
	Path   string // those: PATH; others: a path below the layer's root, which is "."
	Name   string // getxattr
	Index  uint32 // load_data_source: which of the layers, 0 is the uppermost
	Flags  uint32 // openat: open(2) flags; readdir: ReaddirPlus
	Dir    uint64 // readdir, closedir
	Cookie uint64 // readdir: the entry to go on after, 0 for the first one
	Size   uint32 // readdir: the most that the reply may have beyond its header, in bytes
	Target uint64 // cancel: ID of the request that nobody waits for any more
}

// ReaddirPlus in Request.Flags asks for attributes with the entries, where they cost little.
const ReaddirPlus = 1

// Reply is the answer to the request with its ID. Which of the fields below Errno matter depends on Op; none does beside an Errno.
type Reply struct {
	Op    Op
	ID    uint64
	Errno syscall.Errno

	Layers  uint32     // num_of_layers
	Flags   uint32     // load_data_source: Layer…
	Dev     uint64     // load_data_source: st_dev, 0 if Sluice is to make one up
	Attr    Attr       // statat, openat
	Dir     uint64     // opendir
	Entries []DirEntry // readdir
	EOF     bool       // readdir: there are no more
	Bytes   []byte     // listxattr, getxattr, readlinkat; a part of the message
}

// Flags of a layer.
const (
	// LayerACL says that the layer has POSIX ACLs (support_acls).
	LayerACL = 1 << iota
	// LayerStableIno says that Attr.Ino is not 0 and stays a file's as long as the layer is the same (get_nfs_filehandle).
	LayerStableIno
	// LayerXattr says that the layer has extended attributes: without it, none is asked for.
	LayerXattr
	// LayerDirectory says that the reply carries a directory's descriptor, in which the layer's files appear when they are looked up.
	LayerDirectory

	layerFlags = LayerACL | LayerStableIno | LayerXattr | LayerDirectory
)

// Attr is what a plug-in says of a file: struct stat.
type Attr struct {
	Ino                 uint64 // 0: Sluice makes one up
	Size                uint64 // bytes
	Blocks              uint64 // of 512 bytes
	Atime, Mtime, Ctime Time
	Mode                uint32 // with S_IFMT
	Nlink               uint32
	UID, GID            uint32
	// RdevMajor and RdevMinor are a device's; 0 and 0 of a character device are a whiteout.
	RdevMajor, RdevMinor uint32
}

// Time is a time since 1970.
type Time struct {
	Sec  int64
	Nsec uint32 // below 1e9
}

// DirEntry is a name in a listing.
type DirEntry struct {
	Name   string
	Type   uint8  // DT_*, 0 if it is not known
	Ino    uint64 // 0 if it is not known
	Cookie uint64 // set by Serve
	// Attr is what statat would answer of it; nil leaves that to be asked.
	Attr *Attr
}

const (
	attrSize  = 88
	entrySize = 24 // without attributes and name
	// entryAttr in an entry says that its attributes follow.
	entryAttr = 1
	eofFlag   = 1
)

var le = binary.LittleEndian

func appendString(b []byte, s string) []byte {
	return append(le.AppendUint16(b, uint16(len(s))), s...)
}

func appendAttr(b []byte, a *Attr) []byte {
	for _, v := range []uint64{a.Ino, a.Size, a.Blocks, uint64(a.Atime.Sec), uint64(a.Mtime.Sec), uint64(a.Ctime.Sec)} {
		b = le.AppendUint64(b, v)
	}
	for _, v := range []uint32{a.Atime.Nsec, a.Mtime.Nsec, a.Ctime.Nsec, a.Mode, a.Nlink, a.UID, a.GID, a.RdevMajor, a.RdevMinor, 0} {
		b = le.AppendUint32(b, v)
	}
	return b
}

// begin appends a header whose size end fills in.
func begin(b []byte, op Op, kind uint16, id uint64, arg uint32) []byte {
	b = le.AppendUint32(b, 0)
	b = le.AppendUint16(b, uint16(op))
	b = le.AppendUint16(b, kind)
	b = le.AppendUint64(b, id)
	b = le.AppendUint32(b, arg)
	return le.AppendUint32(b, 0)
}

func end(b []byte, start int) ([]byte, error) {
	if len(b)-start > MaxMessage {
		return b[:start], syscall.E2BIG
	}
	le.PutUint32(b[start:], uint32(len(b)-start))
	return b, nil
}

// Append appends the message to b. It fails with E2BIG if that is larger than MaxMessage, and says which field it cannot carry.
func (r *Request) Append(b []byte) ([]byte, error) {
	if err := r.check(); err != nil {
		return b, err
	}
	start := len(b)
	b = begin(b, r.Op, kindRequest, r.ID, r.Layer)
	switch r.Op {
	case OpNumLayers:
		b = appendString(appendString(b, r.Data), r.Path)
	case OpLoad:
		b = appendString(appendString(le.AppendUint32(b, r.Index), r.Data), r.Path)
	case OpStatat, OpOpendir, OpListxattr, OpReadlinkat, OpLookup, OpOpen:
		b = appendString(b, r.Path)
	case OpOpenat:
		b = appendString(le.AppendUint32(b, r.Flags), r.Path)
	case OpGetxattr:
		b = appendString(appendString(b, r.Path), r.Name)
	case OpReaddir:
		b = le.AppendUint64(le.AppendUint64(b, r.Dir), r.Cookie)
		b = le.AppendUint32(le.AppendUint32(b, r.Size), r.Flags)
	case OpClosedir:
		b = le.AppendUint64(b, r.Dir)
	case OpCancel:
		b = le.AppendUint64(b, r.Target)
	}
	return end(b, start)
}

// check says which field is out of bounds.
func (r *Request) check() error {
	switch r.Op {
	case OpNumLayers, OpLoad:
		for what, s := range map[string]string{"data": r.Data, "path": r.Path} {
			if len(s) > MaxPath || strings.IndexByte(s, 0) >= 0 {
				return fmt.Errorf("%s with %s of %d bytes: expected at most %d, without a NUL", r.Op, what, len(s), MaxPath)
			}
		}
	case OpStatat, OpOpendir, OpListxattr, OpReadlinkat, OpLookup, OpOpen, OpOpenat, OpGetxattr:
		if !ValidPath(r.Path) {
			return fmt.Errorf("%s with path %.100q: expected \".\", or one below it", r.Op, r.Path)
		}
		if r.Op == OpGetxattr && (r.Name == "" || len(r.Name) > MaxName || strings.IndexByte(r.Name, 0) >= 0) {
			return fmt.Errorf("%s with name %.100q: expected 1 to %d bytes, without a NUL", r.Op, r.Name, MaxName)
		}
	case OpReaddir:
		if r.Size < entrySize+attrSize+MaxName+8 || r.Size > MaxBytes {
			return fmt.Errorf("%s of %d bytes: expected %d to %d", r.Op, r.Size, entrySize+attrSize+MaxName+8, MaxBytes)
		}
	}
	return nil
}

// ValidPath says whether p can be asked for: "." for the root, or names joined by slashes, none of them "", "." or "..".
func ValidPath(p string) bool {
	if p == "." {
		return true
	}
	if len(p) > MaxPath {
		return false
	}
	for name := range strings.SplitSeq(p, "/") {
		if !ValidName(name) {
			return false
		}
	}
	return true
}

// ValidName says whether name can be in a directory.
func ValidName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= MaxName && !strings.ContainsAny(name, "/\x00")
}

// listable says whether name can be in a listing.
func listable(name string) bool { return name == "." || name == ".." || ValidName(name) }

// Append appends the message to b. It fails with E2BIG if that is larger than MaxMessage.
func (r *Reply) Append(b []byte) ([]byte, error) {
	start := len(b)
	b = begin(b, r.Op, kindReply, r.ID, uint32(r.Errno))
	if r.Errno != 0 {
		return end(b, start)
	}
	switch r.Op {
	case OpNumLayers:
		b = le.AppendUint32(b, r.Layers)
	case OpLoad:
		b = le.AppendUint64(le.AppendUint32(le.AppendUint32(b, r.Flags), 0), r.Dev)
	case OpStatat, OpOpenat:
		b = appendAttr(b, &r.Attr)
	case OpOpendir:
		b = le.AppendUint64(b, r.Dir)
	case OpReaddir:
		flags := uint32(0)
		if r.EOF {
			flags = eofFlag
		}
		b = le.AppendUint32(le.AppendUint32(b, flags), uint32(len(r.Entries)))
		for i := range r.Entries {
			b = r.Entries[i].append(b)
		}
	case OpListxattr, OpGetxattr, OpReadlinkat:
		b = append(b, r.Bytes...)
	}
	return end(b, start)
}

func (e *DirEntry) append(b []byte) []byte {
	b = le.AppendUint64(le.AppendUint64(b, e.Ino), e.Cookie)
	flags := byte(0)
	if e.Attr != nil {
		flags = entryAttr
	}
	b = append(b, e.Type, flags)
	b = le.AppendUint16(b, uint16(len(e.Name)))
	b = le.AppendUint32(b, 0)
	if e.Attr != nil {
		b = appendAttr(b, e.Attr)
	}
	return append(b, e.Name...)
}

// size is what append adds, in bytes.
func (e *DirEntry) size() int {
	n := entrySize + len(e.Name)
	if e.Attr != nil {
		n += attrSize
	}
	return n
}

var errShort = errors.New("it ends early")

// reader takes a message apart. After the first field that is not there, all others are 0.
type reader struct {
	b   []byte
	err error
}

func (r *reader) bytes(n int) []byte {
	if r.err == nil && n > len(r.b) {
		r.err = errShort
	}
	if r.err != nil {
		return nil
	}
	p := r.b[:n:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) u8() uint8 {
	if p := r.bytes(1); p != nil {
		return p[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if p := r.bytes(2); p != nil {
		return le.Uint16(p)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if p := r.bytes(4); p != nil {
		return le.Uint32(p)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if p := r.bytes(8); p != nil {
		return le.Uint64(p)
	}
	return 0
}

func (r *reader) string() string { return string(r.bytes(int(r.u16()))) }

// zero reads a reserved word.
func (r *reader) zero() {
	if r.u32() != 0 && r.err == nil {
		r.err = errors.New("a reserved field is not 0")
	}
}

func (r *reader) attr() (a Attr) {
	a.Ino, a.Size, a.Blocks = r.u64(), r.u64(), r.u64()
	a.Atime.Sec, a.Mtime.Sec, a.Ctime.Sec = int64(r.u64()), int64(r.u64()), int64(r.u64())
	a.Atime.Nsec, a.Mtime.Nsec, a.Ctime.Nsec = r.u32(), r.u32(), r.u32()
	a.Mode, a.Nlink, a.UID, a.GID = r.u32(), r.u32(), r.u32(), r.u32()
	a.RdevMajor, a.RdevMinor = r.u32(), r.u32()
	r.zero()
	return a
}

// header reads the header of a message of the kind and returns its op, id and arg.
func (r *reader) header(kind uint16) (Op, uint64, uint32) {
	all := len(r.b)
	size, op, got, id, arg := r.u32(), Op(r.u16()), r.u16(), r.u64(), r.u32()
	r.zero()
	switch {
	case r.err != nil:
	case all > MaxMessage || int(size) != all:
		r.err = fmt.Errorf("its size is %d in a packet of %d bytes", size, all)
	case got != kind:
		r.err = fmt.Errorf("its kind is %d, expected %d", got, kind)
	case op == 0 || op >= opEnd:
		r.err = fmt.Errorf("its operation %d is not known", uint16(op))
	}
	return op, id, arg
}

// end says what was wrong with a message; it must have nothing more.
func (r *reader) end() error {
	if r.err == nil && len(r.b) > 0 {
		r.err = fmt.Errorf("%d bytes too many", len(r.b))
	}
	return r.err
}

// ParseRequest takes a message from the server apart.
func ParseRequest(b []byte) (Request, error) {
	var q Request
	r := &reader{b: b}
	q.Op, q.ID, q.Layer = r.header(kindRequest)
	switch q.Op {
	case OpNumLayers:
		q.Data, q.Path = r.string(), r.string()
	case OpLoad:
		q.Index, q.Data, q.Path = r.u32(), r.string(), r.string()
	case OpStatat, OpOpendir, OpListxattr, OpReadlinkat, OpLookup, OpOpen:
		q.Path = r.string()
	case OpOpenat:
		q.Flags, q.Path = r.u32(), r.string()
	case OpGetxattr:
		q.Path, q.Name = r.string(), r.string()
	case OpReaddir:
		q.Dir, q.Cookie, q.Size, q.Flags = r.u64(), r.u64(), r.u32(), r.u32()
	case OpClosedir:
		q.Dir = r.u64()
	case OpCancel:
		q.Target = r.u64()
	}
	err := r.end()
	if err == nil {
		err = q.check()
	}
	if err != nil {
		return Request{}, fmt.Errorf("parse request of %d bytes: %w", len(b), err)
	}
	return q, nil
}

// ParseReply takes a message from a plug-in apart. What it says of files is as the plug-in has it; what can be wrong about
// a message as such has been checked.
func ParseReply(b []byte) (Reply, error) {
	var a Reply
	r := &reader{b: b}
	var errno uint32
	a.Op, a.ID, errno = r.header(kindReply)
	a.Errno = syscall.Errno(errno)
	switch {
	case r.err != nil:
	case errno > MaxErrno:
		r.err = fmt.Errorf("its errno is %d, expected at most %d", errno, MaxErrno)
	case errno == 0:
		r.reply(&a)
	}
	if err := r.end(); err != nil {
		return Reply{}, fmt.Errorf("parse reply of %d bytes: %w", len(b), err)
	}
	return a, nil
}

func (r *reader) reply(a *Reply) {
	switch a.Op {
	case OpNumLayers:
		if a.Layers = r.u32(); r.err == nil && (a.Layers == 0 || a.Layers > MaxLayers) {
			r.err = fmt.Errorf("%d layers, expected 1 to %d", a.Layers, MaxLayers)
		}
	case OpLoad:
		a.Flags = r.u32()
		r.zero()
		a.Dev = r.u64()
		if r.err == nil && a.Flags&^layerFlags != 0 {
			r.err = fmt.Errorf("layer flags %#x are not known", a.Flags&^layerFlags)
		}
	case OpStatat, OpOpenat:
		a.Attr = r.attr()
	case OpOpendir:
		a.Dir = r.u64()
	case OpReaddir:
		flags, n := r.u32(), r.u32()
		a.EOF = flags&eofFlag != 0
		if r.err == nil && (flags&^eofFlag != 0 || int(n) > len(r.b)/entrySize) {
			r.err = fmt.Errorf("flags %#x and %d entries in %d bytes", flags, n, len(r.b))
			return
		}
		a.Entries = make([]DirEntry, 0, n)
		for range n {
			a.Entries = append(a.Entries, r.entry())
		}
	case OpListxattr, OpGetxattr, OpReadlinkat:
		a.Bytes = r.bytes(len(r.b))
	}
}

func (r *reader) entry() (e DirEntry) {
	e.Ino, e.Cookie, e.Type = r.u64(), r.u64(), r.u8()
	flags, length := r.u8(), int(r.u16())
	r.zero()
	if flags&entryAttr != 0 {
		a := r.attr()
		e.Attr = &a
	}
	e.Name = string(r.bytes(length))
	switch {
	case r.err != nil:
	case flags&^entryAttr != 0:
		r.err = fmt.Errorf("entry flags %#x are not known", flags)
	case !listable(e.Name):
		r.err = fmt.Errorf("the name %.100q cannot be in a directory", e.Name)
	case e.Cookie == 0:
		r.err = errors.New("an entry has the cookie 0, which is the first entry's own")
	}
	return e
}
