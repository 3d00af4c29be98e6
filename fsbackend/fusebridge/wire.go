package fusebridge

import (
	"bytes"
	"math"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// decode copies the front of b to v; b is at least as long as v.
func decode[T any](b []byte, v *T) { copy(bytesOf(v), b) }

// maxErrno is the largest errno that a program may answer: those above are the kernel's own (include/linux/errno.h, and
// fs/fuse/dev.c, fuse_dev_do_write).
const maxErrno = 511

// errnoOf is what the guest gets of a reply's error, which is 0 or a negative errno.
func errnoOf(status int32) fsbackend.Errno {
	if status > 0 || status < -maxErrno {
		return unix.EIO
	}
	return fsbackend.Errno(-status)
}

// validType says whether a mode has one of the file types.
func validType(mode uint32) bool {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK:
		return true
	}
	return false
}

// checkAttr says whether attributes can be a file's, as fs/fuse/dir.c, fuse_invalid_attr, and completes them: what only /dev/fuse
// has a use for goes, and a number that there is none of is filled in. A file without links may be one that is open still.
func checkAttr(a *fuseproto.Attr, id uint64) bool {
	if !validType(a.Mode) || a.Size > math.MaxInt64 {
		return false
	}
	a.Flags = 0 // a submount's root, or DAX
	if a.Ino == 0 {
		a.Ino = id
	}
	// A nanosecond beyond the second is a kernel's trap.
	for _, nsec := range []*uint32{&a.Atimensec, &a.Mtimensec, &a.Ctimensec} {
		*nsec = min(*nsec, 999_999_999)
	}
	return true
}

// checkName says whether name may be in a directory.
func checkName(name []byte) bool {
	return len(name) > 0 && len(name) <= 255 && bytes.IndexByte(name, '/') < 0 && bytes.IndexByte(name, 0) < 0
}

func isDots(name []byte) bool { return string(name) == "." || string(name) == ".." }

const (
	direntSize   = 24
	entryOutSize = 128
)

// A dirent is an entry of a reply to READDIR or READDIRPLUS; its name is in the reply.
type dirent struct {
	entry fuseproto.EntryOut // READDIRPLUS
	head  fuseproto.Dirent
	name  []byte
}

// next takes the first entry off a reply. ok is false at the end, and bad says that it is no such reply: fs/fuse/readdir.c,
// parse_dirfile. An entry cut off at the end is left out.
func (d *dirent) next(reply []byte, plus bool) (rest []byte, ok, bad bool) {
	fixed := direntSize
	if plus {
		fixed += entryOutSize
	}
	if len(reply) < fixed {
		return nil, false, false
	}
	at := 0
	if plus {
		decode(reply, &d.entry)
		at = entryOutSize
	}
	decode(reply[at:], &d.head)
	if d.head.Namelen == 0 || d.head.Namelen > 255 || d.head.Off == 0 {
		return nil, false, true
	}
	end := fixed + int(d.head.Namelen)
	if end > len(reply) {
		return nil, false, false
	}
	d.name = reply[fixed:end]
	if !checkName(d.name) {
		return nil, false, true
	}
	return reply[min((end+7)&^7, len(reply)):], true, false
}
