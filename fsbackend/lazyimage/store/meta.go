package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits of what EncodeMeta takes and DecodeMeta returns.
const (
	// MaxMeta is the longest encoding, in bytes.
	MaxMeta = 512 << 20
	// MaxLayers is how many layers an image may have: as many as an overlay of Linux has lower directories.
	MaxLayers = 500
	// MaxPath is the longest Entry.Path, in bytes: a longer one could not be named in one system call.
	MaxPath = unix.PathMax - 1

	maxName    = unix.NAME_MAX
	maxTarget  = unix.PathMax - 1
	maxXattr   = 64 << 10 // XATTR_SIZE_MAX
	maxSize    = 1 << 62
	maxMajor   = 1<<12 - 1 // of the 32 bits that a device number has with Linux
	maxMinor   = 1<<20 - 1
	digestName = "sha256:"
)

// The encoding, all of it little-endian: a header; for each layer its own header, chunks, entries, spans and extended attributes, as
// records of fixed size; then all strings and all values, each in the order in which the records count their bytes. Nothing
// points anywhere but a hard link's and a span's index, so that what is read is never read twice.
const (
	metaMagic   = 0x4d4c5553 // "SULM"
	metaVersion = 1

	metaHeaderSize  = 4 + 4 + 4 + 4 + 8 + 8         // magic, version, layers, 0, strings, values
	layerHeaderSize = 4 + 4 + 8 + 4 + 4 + 4 + 4     // digest, 0, size, chunks, entries, spans, xattrs
	chunkSize       = DigestSize + 4                // digest, size
	entrySize       = 2 + 2 + 4*3 + 8 + 4 + 8 + 4*6 // path, flags, mode, uid, gid, mtime, size, rdev, target, spans, xattrs, link
	spanSize        = 8 + 4                         // off, chunk
	xattrSize       = 4 + 4                         // name, value

	flagHardlink = 1
)

var le = binary.LittleEndian

// EncodeMeta encodes layers for DecodeMeta. What an entry's type has no use for (the size of a directory, the mode of a hard link's
// further name) is left out; an error says what else is not as the doc comments have it.
func EncodeMeta(layers []Layer) ([]byte, error) {
	if len(layers) > MaxLayers {
		return nil, fmt.Errorf("encode an image of %d layers: expected at most %d", len(layers), MaxLayers)
	}
	e := encoder{records: make([]byte, metaHeaderSize)}
	for i := range layers {
		l := &layers[i]
		links, err := l.links()
		if err == nil {
			err = l.verify(links)
		}
		if err != nil {
			return nil, fmt.Errorf("encode layer %d: %w", i, err)
		}
		e.layer(l, links)
	}
	if n := len(e.records) + len(e.strings) + len(e.values); n > MaxMeta {
		return nil, fmt.Errorf("encode an image: its description takes %d bytes, expected at most %d", n, MaxMeta)
	}
	return e.finish(len(layers)), nil
}

type encoder struct {
	records, strings, values []byte
}

// finish puts the header in front of what there is.
func (e *encoder) finish(layers int) []byte {
	h := e.records[:0]
	h = le.AppendUint32(h, metaMagic)
	h = le.AppendUint32(h, metaVersion)
	h = le.AppendUint32(h, uint32(layers))
	h = le.AppendUint32(h, 0)
	h = le.AppendUint64(h, uint64(len(e.strings)))
	le.AppendUint64(h, uint64(len(e.values)))
	return append(append(e.records, e.strings...), e.values...)
}

// links returns where the hard links of l lead, by their numbers.
func (l *Layer) links() (map[int]uint32, error) {
	links := make(map[int]uint32)
	for i := range l.Entries {
		if l.Entries[i].Hardlink {
			links[i] = 0
		}
	}
	if len(links) == 0 {
		return links, nil
	}
	byPath := make(map[string]uint32)
	for i := range l.Entries {
		if !l.Entries[i].Hardlink {
			byPath[l.Entries[i].Path] = uint32(i)
		}
	}
	for i := range links {
		x := &l.Entries[i]
		to, ok := byPath[x.Target]
		if !ok {
			return nil, fmt.Errorf("%q is another name of %q, which is not there, or a hard link itself", x.Path, x.Target)
		}
		links[i] = to
	}
	return links, nil
}

// verify says what of l is not as the doc comments have it.
func (l *Layer) verify(links map[int]uint32) error {
	if err := l.check(); err != nil {
		return err
	}
	for i := range l.Entries {
		x := l.Entries[i].needed()
		if err := x.check(l, links[i]); err != nil {
			return err
		}
	}
	return nil
}

// layer encodes l, which has been verified.
func (e *encoder) layer(l *Layer, links map[int]uint32) {
	spans, xattrs := 0, 0
	for i := range l.Entries {
		x := l.Entries[i].needed()
		spans += len(x.Chunks)
		xattrs += len(x.Xattrs)
	}
	r := e.records
	e.strings = append(e.strings, l.Digest...)
	r = le.AppendUint32(r, uint32(len(l.Digest)))
	r = le.AppendUint32(r, 0)
	r = le.AppendUint64(r, uint64(l.Size))
	for _, n := range []int{len(l.Chunks), len(l.Entries), spans, xattrs} {
		r = le.AppendUint32(r, uint32(n))
	}
	for i := range l.Chunks {
		r = append(r, l.Chunks[i].Digest[:]...)
		r = le.AppendUint32(r, l.Chunks[i].Size)
	}
	for i := range l.Entries {
		x, flags := l.Entries[i].needed(), uint16(0)
		if x.Hardlink {
			flags |= flagHardlink
		}
		e.strings = append(append(e.strings, x.Path...), x.Target...)
		r = le.AppendUint16(r, uint16(len(x.Path)))
		r = le.AppendUint16(r, flags)
		r = le.AppendUint32(r, x.Mode)
		r = le.AppendUint32(r, x.UID)
		r = le.AppendUint32(r, x.GID)
		r = le.AppendUint64(r, uint64(x.MtimeSec))
		r = le.AppendUint32(r, x.MtimeNsec)
		r = le.AppendUint64(r, x.Size)
		for _, n := range []uint32{x.RdevMajor, x.RdevMinor, uint32(len(x.Target)), uint32(len(x.Chunks)), uint32(len(x.Xattrs)), links[i]} {
			r = le.AppendUint32(r, n)
		}
	}
	for i := range l.Entries {
		for _, s := range l.Entries[i].needed().Chunks {
			r = le.AppendUint64(r, s.Off)
			r = le.AppendUint32(r, s.Chunk)
		}
	}
	for i := range l.Entries {
		for _, a := range l.Entries[i].needed().Xattrs {
			e.strings = append(e.strings, a.Name...)
			e.values = append(e.values, a.Value...)
			r = le.AppendUint32(r, uint32(len(a.Name)))
			r = le.AppendUint32(r, uint32(len(a.Value)))
		}
	}
	e.records = r
}

// needed is the entry with what its type has use for.
func (x *Entry) needed() Entry {
	if x.Hardlink {
		return Entry{Path: x.Path, Hardlink: true}
	}
	n := *x
	switch x.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.Target, n.RdevMajor, n.RdevMinor = "", 0, 0
	case unix.S_IFLNK:
		n.Size, n.Chunks, n.RdevMajor, n.RdevMinor = 0, nil, 0, 0
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Size, n.Chunks, n.Target = 0, nil, ""
	default:
		n.Size, n.Chunks, n.Target, n.RdevMajor, n.RdevMinor = 0, nil, "", 0, 0
	}
	return n
}

// check is of what a layer says beside its entries.
func (l *Layer) check() error {
	if len(l.Digest) > len(digestName)+2*DigestSize || !strings.HasPrefix(l.Digest, digestName) {
		return fmt.Errorf("a layer with the digest %.80q: expected %q and 64 digits", l.Digest, digestName)
	}
	if hex := l.Digest[len(digestName):]; len(hex) != 2*DigestSize || strings.Trim(hex, "0123456789abcdef") != "" {
		return fmt.Errorf("a layer with the digest %q: expected %q and 64 hexadecimal digits", l.Digest, digestName)
	}
	if l.Size < 0 {
		return fmt.Errorf("a layer of %d bytes", l.Size)
	}
	for i := range l.Chunks {
		if n := l.Chunks[i].Size; n == 0 || n > MaxChunk {
			return fmt.Errorf("chunk %d of %d bytes: expected 1 to %d", i, n, MaxChunk)
		}
	}
	return nil
}

// check is of what x says beside where it leads as a hard link, which is link.
func (x *Entry) check(l *Layer, link uint32) error {
	if err := checkPath(x.Path); err != nil {
		return err
	}
	if x.Hardlink {
		if uint64(link) >= uint64(len(l.Entries)) || x.Path == "" {
			return fmt.Errorf("%q is another name of nothing", x.Path)
		}
		if to := &l.Entries[link]; to.Hardlink || to.Mode&unix.S_IFMT == unix.S_IFDIR {
			return fmt.Errorf("%q is another name of %q: expected a file that is neither a directory nor a hard link itself", x.Path, to.Path)
		}
		return nil
	}
	if link != 0 {
		return fmt.Errorf("%q is no hard link, and leads to entry %d", x.Path, link)
	}
	var size, device bool
	switch typ := x.Mode & unix.S_IFMT; typ {
	case unix.S_IFREG:
		size = true
	case unix.S_IFCHR, unix.S_IFBLK:
		device = true
	case unix.S_IFDIR, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFLNK:
		if (typ == unix.S_IFLNK) != (x.Target != "") || len(x.Target) > maxTarget || strings.IndexByte(x.Target, 0) >= 0 {
			return fmt.Errorf("%q of type %#o points to %.80q: expected 1 to %d bytes without a NUL for a symbolic link", x.Path, typ, x.Target, maxTarget)
		}
	default:
		return fmt.Errorf("%q has the mode %#o, which is of no type", x.Path, x.Mode)
	}
	switch {
	case x.Mode&^(unix.S_IFMT|0o7777) != 0:
		return fmt.Errorf("%q has the mode %#o", x.Path, x.Mode)
	case x.Path == "" && x.Mode&unix.S_IFMT != unix.S_IFDIR:
		return errors.New("the root is no directory")
	case x.MtimeNsec >= 1e9:
		return fmt.Errorf("%q was changed %d ns into a second", x.Path, x.MtimeNsec)
	case x.Size > maxSize || !size && (x.Size != 0 || len(x.Chunks) != 0):
		return fmt.Errorf("%q of mode %#o has %d bytes in %d chunks", x.Path, x.Mode, x.Size, len(x.Chunks))
	case x.RdevMajor > maxMajor || x.RdevMinor > maxMinor || !device && (x.RdevMajor != 0 || x.RdevMinor != 0):
		return fmt.Errorf("%q of mode %#o has the device number %d:%d", x.Path, x.Mode, x.RdevMajor, x.RdevMinor)
	case x.Target != "" && x.Mode&unix.S_IFMT != unix.S_IFLNK:
		return fmt.Errorf("%q of mode %#o points to %.80q", x.Path, x.Mode, x.Target)
	}
	return errors.Join(x.checkChunks(l), x.checkXattrs())
}

func (x *Entry) checkChunks(l *Layer) error {
	end := uint64(0)
	for _, s := range x.Chunks {
		if uint64(s.Chunk) >= uint64(len(l.Chunks)) {
			return fmt.Errorf("%q consists of chunk %d of %d", x.Path, s.Chunk, len(l.Chunks))
		}
		if s.Len != uint64(l.Chunks[s.Chunk].Size) || s.Off < end || s.Off > x.Size || s.Len > x.Size-s.Off {
			return fmt.Errorf("%q of %d bytes has %d of a chunk of %d at %d, behind %d", x.Path, x.Size, s.Len, l.Chunks[s.Chunk].Size, s.Off, end)
		}
		end = s.Off + s.Len
	}
	return nil
}

func (x *Entry) checkXattrs() error {
	for i := range x.Xattrs {
		a := &x.Xattrs[i]
		if len(a.Name) == 0 || len(a.Name) > maxName || strings.IndexByte(a.Name, 0) >= 0 || len(a.Value) > maxXattr {
			return fmt.Errorf("%q has the extended attribute %.80q of %d bytes", x.Path, a.Name, len(a.Value))
		}
		if i > 0 && x.Xattrs[i-1].Name >= a.Name {
			return fmt.Errorf("%q has the extended attribute %q behind %q: expected them in order, each once", x.Path, a.Name, x.Xattrs[i-1].Name)
		}
	}
	return nil
}

// checkPath says what is wrong with an Entry.Path.
func checkPath(p string) error {
	if p == "" {
		return nil
	}
	if len(p) > MaxPath {
		return fmt.Errorf("a path of %d bytes: expected at most %d", len(p), MaxPath)
	}
	for rest, more := p, true; more; {
		var name string
		name, rest, more = strings.Cut(rest, "/")
		if name == "" || name == "." || name == ".." || len(name) > maxName || strings.IndexByte(name, 0) >= 0 {
			return fmt.Errorf("the path %.300q is not clean: expected names of 1 to %d bytes between its slashes, none of them a dot or two", p, maxName)
		}
	}
	return nil
}

// DecodeMeta decodes what EncodeMeta has made, or somebody else: it checks what the doc comments say. The result shares no memory
// with b, and takes little more than b does.
func DecodeMeta(b []byte) ([]Layer, error) {
	if len(b) < metaHeaderSize || len(b) > MaxMeta {
		return nil, fmt.Errorf("decode an image's description of %d bytes: expected %d to %d", len(b), metaHeaderSize, MaxMeta)
	}
	if magic, version := le.Uint32(b), le.Uint32(b[4:]); magic != metaMagic || version != metaVersion {
		return nil, fmt.Errorf("decode an image's description: it begins with %#x and version %d, expected %#x and %d (both programs must be of one release)", magic, version, uint32(metaMagic), metaVersion)
	}
	layers, strs, values := le.Uint32(b[8:]), le.Uint64(b[16:]), le.Uint64(b[24:])
	rest := uint64(len(b) - metaHeaderSize)
	if layers > MaxLayers || le.Uint32(b[12:]) != 0 || strs > rest || values > rest-strs {
		return nil, fmt.Errorf("decode an image's description: %d layers, and %d and %d bytes of strings and values in %d", layers, strs, values, rest)
	}
	records := uint64(len(b)) - strs - values
	d := decoder{
		records: b[metaHeaderSize:records],
		strings: string(b[records : records+strs]),
		values:  bytes.Clone(b[records+strs:]),
	}
	all := make([]Layer, layers)
	for i := range all {
		if err := d.layer(&all[i]); err != nil {
			return nil, fmt.Errorf("decode layer %d of an image: %w", i, err)
		}
	}
	if len(d.records) > 0 || len(d.strings) > 0 || len(d.values) > 0 {
		return nil, fmt.Errorf("decode an image's description: %d, %d and %d bytes are left over", len(d.records), len(d.strings), len(d.values))
	}
	return all, nil
}

// decoder is what has not been read yet.
type decoder struct {
	records []byte
	strings string
	values  []byte
}

var errShort = errors.New("it ends too early")

// take returns n records of size bytes.
func (d *decoder) take(n uint32, size int) ([]byte, error) {
	total := uint64(n) * uint64(size)
	if total > uint64(len(d.records)) {
		return nil, errShort
	}
	b := d.records[:total]
	d.records = d.records[total:]
	return b, nil
}

// text returns a string of n bytes.
func (d *decoder) text(n uint32) (string, error) {
	if uint64(n) > uint64(len(d.strings)) {
		return "", errShort
	}
	s := d.strings[:n]
	d.strings = d.strings[n:]
	return s, nil
}

func (d *decoder) value(n uint32) ([]byte, error) {
	if uint64(n) > uint64(len(d.values)) {
		return nil, errShort
	}
	v := d.values[:n:n]
	d.values = d.values[n:]
	return v, nil
}

func (d *decoder) layer(l *Layer) error {
	h, err := d.take(1, layerHeaderSize)
	if err != nil {
		return err
	}
	if l.Digest, err = d.text(le.Uint32(h)); err != nil {
		return err
	}
	if le.Uint32(h[4:]) != 0 {
		return errors.New("its header has something where nothing is expected")
	}
	l.Size = int64(le.Uint64(h[8:]))
	spans, xattrs := le.Uint32(h[24:]), le.Uint32(h[28:])
	chunkRecords, err1 := d.take(le.Uint32(h[16:]), chunkSize)
	entryRecords, err2 := d.take(le.Uint32(h[20:]), entrySize)
	spanRecords, err3 := d.take(spans, spanSize)
	xattrRecords, err4 := d.take(xattrs, xattrSize)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return errShort
	}
	l.Chunks = make([]Chunk, len(chunkRecords)/chunkSize)
	for i := range l.Chunks {
		r := chunkRecords[i*chunkSize:]
		copy(l.Chunks[i].Digest[:], r)
		l.Chunks[i].Size = le.Uint32(r[DigestSize:])
	}
	if err := l.check(); err != nil {
		return err
	}
	parts := layerParts{spans: make([]Span, spans), xattrs: make([]Xattr, xattrs), links: make(map[uint32]uint32)}
	l.Entries = make([]Entry, len(entryRecords)/entrySize)
	for i := range l.Entries {
		if err := d.entry(&l.Entries[i], entryRecords[i*entrySize:], uint32(i), &parts); err != nil {
			return err
		}
	}
	if len(parts.spans) > 0 || len(parts.xattrs) > 0 {
		return fmt.Errorf("%d pieces and %d extended attributes are no entry's", len(parts.spans), len(parts.xattrs))
	}
	for i := range l.Entries {
		if err := d.rest(l, &l.Entries[i], &spanRecords, &xattrRecords); err != nil {
			return err
		}
		x := &l.Entries[i]
		link := parts.links[uint32(i)]
		if err := x.check(l, link); err != nil {
			return err
		}
		if x.Hardlink {
			x.Target = l.Entries[link].Path
		}
	}
	return nil
}

// layerParts are what of a layer's spans and extended attributes no entry has been given yet, and where its hard links lead.
type layerParts struct {
	spans  []Span
	xattrs []Xattr
	links  map[uint32]uint32
}

// entry decodes entry number i but for what is in its spans and extended attributes.
func (d *decoder) entry(x *Entry, r []byte, i uint32, parts *layerParts) (err error) {
	flags := le.Uint16(r[2:])
	*x = Entry{
		Mode: le.Uint32(r[4:]), UID: le.Uint32(r[8:]), GID: le.Uint32(r[12:]),
		MtimeSec: int64(le.Uint64(r[16:])), MtimeNsec: le.Uint32(r[24:]),
		Size:      le.Uint64(r[28:]),
		RdevMajor: le.Uint32(r[36:]), RdevMinor: le.Uint32(r[40:]),
		Hardlink: flags&flagHardlink != 0,
	}
	if flags&^flagHardlink != 0 {
		return fmt.Errorf("entry %d has the flags %#x", i, flags)
	}
	if x.Path, err = d.text(uint32(le.Uint16(r))); err != nil {
		return err
	}
	if x.Target, err = d.text(le.Uint32(r[44:])); err != nil {
		return err
	}
	spans, xattrs := le.Uint32(r[48:]), le.Uint32(r[52:])
	if uint64(spans) > uint64(len(parts.spans)) || uint64(xattrs) > uint64(len(parts.xattrs)) {
		return errShort
	}
	if spans > 0 {
		x.Chunks, parts.spans = parts.spans[:spans:spans], parts.spans[spans:]
	}
	if xattrs > 0 {
		x.Xattrs, parts.xattrs = parts.xattrs[:xattrs:xattrs], parts.xattrs[xattrs:]
	}
	if link := le.Uint32(r[56:]); link != 0 {
		parts.links[i] = link
	}
	if x.Hardlink && (x.Target != "" || x.Mode != 0 || x.Size != 0 || spans != 0 || xattrs != 0) {
		return fmt.Errorf("entry %d is another name of a file and says of itself what is that file's to say", i)
	}
	return nil
}

// rest decodes the spans and extended attributes of an entry.
func (d *decoder) rest(l *Layer, x *Entry, spans, xattrs *[]byte) (err error) {
	for i := range x.Chunks {
		s := &x.Chunks[i]
		s.Off, s.Chunk = le.Uint64(*spans), le.Uint32((*spans)[8:])
		*spans = (*spans)[spanSize:]
		if uint64(s.Chunk) < uint64(len(l.Chunks)) {
			s.Len = uint64(l.Chunks[s.Chunk].Size)
		}
	}
	for i := range x.Xattrs {
		a := &x.Xattrs[i]
		if a.Name, err = d.text(le.Uint32(*xattrs)); err != nil {
			return err
		}
		if a.Value, err = d.value(le.Uint32((*xattrs)[4:])); err != nil {
			return err
		}
		*xattrs = (*xattrs)[xattrSize:]
	}
	return nil
}
