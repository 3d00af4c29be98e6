package watch

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// raw writes a record as the kernel does: the name ends in at least one NUL, its length is a multiple of 16.
func raw(r record) []byte {
	var b []byte
	b = binary.NativeEndian.AppendUint32(b, uint32(r.wd))
	b = binary.NativeEndian.AppendUint32(b, r.mask)
	b = binary.NativeEndian.AppendUint32(b, r.cookie)
	length := 0
	if r.name != "" {
		length = (len(r.name) + 16) / 16 * 16
	}
	b = binary.NativeEndian.AppendUint32(b, uint32(length))
	b = append(b, r.name...)
	return append(b, make([]byte, length-len(r.name))...)
}

func TestParse(t *testing.T) {
	want := []record{
		{wd: 1, mask: unix.IN_CREATE, name: "a"},
		{wd: -1, mask: unix.IN_Q_OVERFLOW},
		{wd: 2, mask: unix.IN_MOVED_FROM, cookie: 7, name: "sixteen letters!"},
		{wd: 3, mask: unix.IN_MOVED_TO | unix.IN_ISDIR, cookie: 7, name: "new\nline \xff"},
		{wd: 4, mask: unix.IN_DELETE, name: strings.Repeat("n", 255)},
	}
	var b []byte
	for _, r := range want {
		b = append(b, raw(r)...)
	}
	for i, w := range want {
		var r record
		var err error
		if r, b, err = parse(b); err != nil || r != w {
			t.Fatalf("record %d is %+v, %v; expected %+v", i, r, err, w)
		}
	}
	if len(b) != 0 {
		t.Errorf("%d bytes are left", len(b))
	}
	for name, bad := range map[string][]byte{
		"empty":          nil,
		"half a header":  raw(want[0])[:8],
		"half a name":    raw(want[0])[:unix.SizeofInotifyEvent+3],
		"parent":         raw(record{name: ".."}),
		"self":           raw(record{name: "."}),
		"several names":  raw(record{name: "a/b"}),
		"4 GiB of name ": append(bytes.Repeat([]byte{0}, 12), 0xff, 0xff, 0xff, 0xff),
	} {
		if r, _, err := parse(bad); err == nil {
			t.Errorf("%s was read as %+v", name, r)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(raw(record{wd: 1, mask: unix.IN_CREATE, name: "a"}))
	f.Add(append(raw(record{wd: -1, mask: unix.IN_Q_OVERFLOW}), raw(record{wd: 3, mask: unix.IN_MOVED_TO, cookie: 9, name: "b"})...))
	f.Add(raw(record{name: ".."}))
	f.Add(append(raw(record{name: "x"}), 1, 2, 3))
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			r, rest, err := parse(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) {
				t.Fatal("no progress")
			}
			if r.name == "." || r.name == ".." || strings.ContainsAny(r.name, "/\x00") {
				t.Fatalf("name %q", r.name)
			}
			again, left, err := parse(raw(r))
			if err != nil || again != r || len(left) != 0 {
				t.Fatalf("%+v came back as %+v, %d bytes, %v", r, again, len(left), err)
			}
			b = rest
		}
	})
}
