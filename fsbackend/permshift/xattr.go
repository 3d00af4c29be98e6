package permshift

import (
	"bytes"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// Getxattr implements fsbackend.XattrReader.
func (f *FS) Getxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	if hidden(name) {
		return 0, unix.ENODATA
	}
	return f.Forward.Getxattr(c, in, name, dst)
}

// Setxattr implements fsbackend.XattrWriter.
func (f *FS) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) fsbackend.Errno {
	if hidden(name) {
		return unix.EPERM
	}
	return f.Forward.Setxattr(c, in, name, value)
}

// Removexattr implements fsbackend.XattrWriter.
func (f *FS) Removexattr(c *fsbackend.Context, node uint64, name fsbackend.Name) fsbackend.Errno {
	if hidden(name) {
		return unix.ENODATA
	}
	return f.Forward.Removexattr(c, node, name)
}

// nameList is room for the longest list there is (Linux include/uapi/linux/limits.h, XATTR_LIST_MAX).
type nameList struct {
	in   fuseproto.GetxattrIn
	sink fsbackend.Sink
	iov  [1]unix.Iovec
	buf  [64 << 10]byte
}

var nameLists = sync.Pool{New: func() any { return new(nameList) }}

// Listxattr implements fsbackend.XattrReader.
func (f *FS) Listxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	l := nameLists.Get().(*nameList)
	defer nameLists.Put(l)
	l.in = *in
	l.in.Size = uint32(len(l.buf))
	l.iov[0] = sys.MakeIovec(l.buf[:])
	l.sink.Reset(l.iov[:], 0, uint64(len(l.buf)))
	if _, errno := f.Forward.Listxattr(c, &l.in, &l.sink); errno != fsbackend.OK {
		return 0, errno
	}
	shown := l.buf[:0]
	for rest := l.buf[:l.sink.Written()]; len(rest) > 0; {
		name, behind, _ := bytes.Cut(rest, []byte{0})
		if !hidden(name) {
			shown = append(append(shown, name...), 0)
		}
		rest = behind
	}
	switch {
	case dst.Len() == 0:
	case len(shown) > dst.Len():
		return 0, unix.ERANGE
	case dst.Write(shown) < len(shown):
		return 0, unix.EFAULT
	}
	return uint32(len(shown)), fsbackend.OK
}
