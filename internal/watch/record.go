package watch

import (
	"bytes"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// record is one struct inotify_event of <sys/inotify.h>.
type record struct {
	wd     int32
	mask   uint32
	cookie uint32
	name   string // in the directory that is watched; "" when it is about that directory
}

var errRecord = errors.New("broken inotify record")

// parse takes the first record off b and returns what follows it.
func parse(b []byte) (record, []byte, error) {
	if len(b) < unix.SizeofInotifyEvent {
		return record{}, nil, errRecord
	}
	r := record{
		wd:     int32(binary.NativeEndian.Uint32(b)),
		mask:   binary.NativeEndian.Uint32(b[4:]),
		cookie: binary.NativeEndian.Uint32(b[8:]),
	}
	length := binary.NativeEndian.Uint32(b[12:])
	b = b[unix.SizeofInotifyEvent:]
	if uint64(length) > uint64(len(b)) {
		return record{}, nil, errRecord
	}
	name, rest := b[:length], b[length:]
	if i := bytes.IndexByte(name, 0); i >= 0 {
		name = name[:i]
	}
	// A name becomes a part of a path: what would change the meaning of the path is no name.
	if string(name) == "." || string(name) == ".." || bytes.IndexByte(name, '/') >= 0 {
		return record{}, nil, errRecord
	}
	r.name = string(name)
	return r, rest, nil
}
