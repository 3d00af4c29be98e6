package fsbackend

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// Listing is a DirList into memory of its own, for a wrapper that has a look at what the backend below lists, or changes it. Validities
// are as the backend has said them. It is large: keep it in a sync.Pool.
type Listing struct {
	DirList
	iov [1]unix.Iovec
	buf [64 << 10]byte
}

// Begin makes room for a READDIR, or a READDIRPLUS with plus, of at most size bytes, and returns how many it can be.
func (l *Listing) Begin(plus bool, size int) uint32 {
	size = min(size, len(l.buf))
	l.iov[0] = sys.MakeIovec(l.buf[:size])
	l.DirList.Reset(l.iov[:], 0, uint64(size))
	l.Plus, l.raw = plus, true
	return uint32(size)
}

// Each calls do with each entry in turn, until it returns false: entry is nil in a READDIR. It reports false where the backend has put
// in what is no entry, which then ends it. Nothing that do is given may be kept.
func (l *Listing) Each(do func(entry *fuseproto.EntryOut, d fuseproto.Dirent, name []byte) bool) bool {
	head := 0
	var entry *fuseproto.EntryOut
	if l.Plus {
		head, entry = direntplusSize-direntSize, &l.entry
	}
	for rest := l.buf[:l.Written()]; len(rest) > 0; {
		if len(rest) < head+direntSize {
			return false
		}
		b := rest[head:]
		d := fuseproto.Dirent{
			Ino: binary.NativeEndian.Uint64(b), Off: binary.NativeEndian.Uint64(b[8:]),
			Namelen: binary.NativeEndian.Uint32(b[16:]), Type: binary.NativeEndian.Uint32(b[20:]),
		}
		if d.Namelen == 0 || d.Namelen > unix.NAME_MAX || l.size(int(d.Namelen)) > len(rest) {
			return false
		}
		if entry != nil {
			copy(entryBytes(entry), rest)
		}
		if !do(entry, d, b[direntSize:][:d.Namelen]) {
			return true
		}
		rest = rest[l.size(int(d.Namelen)):]
	}
	return true
}
