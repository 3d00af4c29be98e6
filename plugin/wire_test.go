package plugin

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

var someAttr = Attr{
	Ino: 7, Size: 4, Blocks: 8, Atime: Time{1, 2}, Mtime: Time{-3, 4}, Ctime: Time{5, 6}, Mode: 0o100644, Nlink: 1,
	UID: 1000, GID: 1001, RdevMajor: 8, RdevMinor: 9,
}

func someRequests() []Request {
	return []Request{
		{Op: OpNumLayers, ID: 1, Data: "ZGF0YQ==", Path: "/srv/image"},
		{Op: OpLoad, ID: 2, Layer: 1, Index: 2, Data: "", Path: "rootfs/"},
		{Op: OpCleanup, ID: 3, Layer: 1},
		{Op: OpStatat, ID: 4, Layer: 1, Path: "."},
		{Op: OpOpendir, ID: 6, Layer: 1, Path: "dir"},
		{Op: OpReaddir, ID: 7, Layer: 1, Dir: 5, Cookie: 6, Size: MaxBytes, Flags: ReaddirPlus},
		{Op: OpClosedir, ID: 8, Layer: 1, Dir: 5},
		{Op: OpOpenat, ID: 9, Layer: 1, Path: "dir/file"},
		{Op: OpListxattr, ID: 10, Layer: 1, Path: "dir"},
		{Op: OpGetxattr, ID: 11, Layer: 1, Path: "dir", Name: "user.x"},
		{Op: OpReadlinkat, ID: 12, Layer: 1, Path: "dir/link"},
		{Op: OpLookup, ID: 13, Layer: 1, Path: "dir/file"},
		{Op: OpOpen, ID: 14, Layer: 1, Path: "dir/file"},
		{Op: OpCancel, ID: 15, Target: 14},
		{Op: OpRelease, ID: 1<<64 - 1},
	}
}

func someReplies() []Reply {
	return []Reply{
		{Op: OpNumLayers, ID: 1, Layers: 3},
		{Op: OpLoad, ID: 2, Flags: LayerACL | LayerStableIno, Dev: 77},
		{Op: OpCleanup, ID: 3},
		{Op: OpStatat, ID: 4, Attr: someAttr},
		{Op: OpOpendir, ID: 6, Dir: 5},
		{Op: OpReaddir, ID: 7, EOF: true, Entries: []DirEntry{
			{Name: ".", Type: 4, Ino: 1, Cookie: 1}, {Name: "file", Type: 8, Ino: 7, Cookie: 2, Attr: &someAttr}, {Name: strings.Repeat("n", MaxName), Cookie: 3},
		}},
		{Op: OpReaddir, ID: 7, Entries: []DirEntry{}},
		{Op: OpClosedir, ID: 8},
		{Op: OpOpenat, ID: 9, Attr: someAttr},
		{Op: OpListxattr, ID: 10, Bytes: []byte("user.x\x00user.y\x00")},
		{Op: OpGetxattr, ID: 11, Bytes: []byte{0, 1, 2}},
		{Op: OpReadlinkat, ID: 12, Bytes: []byte("../target")},
		{Op: OpLookup, ID: 13},
		{Op: OpOpen, ID: 14},
		{Op: OpRelease, ID: 16},
		{Op: OpStatat, ID: 4, Errno: syscall.ENOENT},
	}
}

func TestRequests(t *testing.T) {
	for _, q := range someRequests() {
		b, err := q.Append([]byte("x"))
		if err != nil {
			t.Fatalf("%v: %v", q.Op, err)
		}
		got, err := ParseRequest(b[1:])
		if err != nil || got != q {
			t.Errorf("%v came back as %+v, %v, expected %+v", q.Op, got, err, q)
		}
		for n := range len(b) - 1 {
			if _, err := ParseRequest(b[1:][:n]); err == nil {
				t.Errorf("the first %d of %d bytes of %v pass", n, len(b)-1, q.Op)
			}
		}
		if _, err := ParseRequest(append(bytes.Clone(b[1:]), 0)); err == nil {
			t.Errorf("%v with a byte too many passes", q.Op)
		}
	}
}

func TestReplies(t *testing.T) {
	for _, a := range someReplies() {
		b, err := a.Append(nil)
		if err != nil {
			t.Fatalf("%v: %v", a.Op, err)
		}
		got, err := ParseReply(b)
		if err != nil || !reflect.DeepEqual(got, a) {
			t.Errorf("%v came back as %+v, %v, expected %+v", a.Op, got, err, a)
		}
		for n := range len(b) {
			if _, err := ParseReply(b[:n]); err == nil {
				t.Errorf("the first %d of %d bytes of %v pass", n, len(b), a.Op)
			}
		}
	}
}

// TestBytes compares messages with docs/layer-plugins.md, byte by byte.
func TestBytes(t *testing.T) {
	page, err := os.ReadFile("../docs/layer-plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	inPage := make(map[string]bool)
	for line := range strings.Lines(string(page)) {
		if code, ok := strings.CutPrefix(line, "    "); ok {
			inPage[strings.Join(strings.Fields(code), "")] = true
		}
	}
	for _, message := range []interface{ Append([]byte) ([]byte, error) }{
		&Request{Op: OpNumLayers, ID: 1, Path: "srv/image"},
		&Reply{Op: OpNumLayers, ID: 1, Layers: 3},
		&Request{Op: OpLoad, ID: 2, Layer: 1, Index: 2, Path: "srv/image"},
		&Reply{Op: OpLoad, ID: 2, Flags: LayerXattr},
		&Request{Op: OpStatat, ID: 5, Layer: 1, Path: "etc"},
		&Reply{Op: OpStatat, ID: 5, Errno: syscall.ENOENT},
		&Request{Op: OpOpenat, ID: 6, Layer: 1, Path: "a"},
		&Reply{Op: OpOpenat, ID: 6, Attr: Attr{Ino: 7, Size: 4, Blocks: 8, Mtime: Time{Sec: 1_700_000_000}, Mode: 0o100644, Nlink: 1, UID: 1000, GID: 1000}},
		&Request{Op: OpReaddir, ID: 9, Layer: 1, Dir: 1, Size: MaxBytes, Flags: ReaddirPlus},
		&Reply{Op: OpReaddir, ID: 9, EOF: true, Entries: []DirEntry{{Name: "a", Type: 8, Ino: 7, Cookie: 1}}},
		&Request{Op: OpCancel, ID: 10, Target: 6},
	} {
		b, err := message.Append(nil)
		if s := hex.EncodeToString(b); err != nil || !inPage[s] {
			t.Errorf("%+v is %s (%v), which is not in docs/layer-plugins.md", message, s, err)
		}
	}
	for op := OpNumLayers; op < opEnd; op++ {
		if row := fmt.Sprintf("| %d | `%s` |", op, op); !strings.Contains(string(page), row) {
			t.Errorf("docs/layer-plugins.md has no row %s", row)
		}
	}
}

// TestBrokenMessages changes one thing about messages that are right.
func TestBrokenMessages(t *testing.T) {
	request := func(q Request) []byte { b, _ := q.Append(nil); return b }
	reply := func(a Reply) []byte { b, _ := a.Append(nil); return b }
	patch := func(b []byte, at int, v ...byte) []byte { copy(b[at:], v); return b }
	stat := Request{Op: OpStatat, ID: 1, Layer: 1, Path: "a/b"}
	for _, tt := range []struct {
		name string
		b    []byte
		want string
	}{
		{"size", patch(request(stat), 0, 200), "its size is 200"},
		{"operation 0", patch(request(stat), 4, 0), "operation 0 is not known"},
		{"operation 99", patch(request(stat), 4, 99), "operation 99 is not known"},
		{"reply as request", reply(Reply{Op: OpCleanup}), "its kind is 1"},
		{"reserved", patch(request(stat), 20, 1), "reserved"},
		{"empty name", patch(request(stat), 26, '/'), "or one below it"},
		{"NUL", patch(request(stat), 26, 0), "or one below it"},
		{"dots", patch(request(Request{Op: OpStatat, Path: "xx/b"}), 26, '.', '.'), "or one below it"},
		{"absolute", patch(request(Request{Op: OpStatat, Path: "xx"}), 26, '/'), "or one below it"},
		{"size of a listing", patch(request(Request{Op: OpReaddir, Size: MaxBytes}), 40, 1, 0, 0, 0), "1 bytes: expected"},
		{"NUL in the data", patch(request(Request{Op: OpNumLayers, Data: "x"}), 26, 0), "without a NUL"},
		{"attribute without a name", patch(request(Request{Op: OpGetxattr, Path: "a", Name: "n"}), 27, 0, 0), ""},
	} {
		if _, err := ParseRequest(tt.b); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("request, %s: %v, expected an error with %q", tt.name, err, tt.want)
		}
	}
	entry := Reply{Op: OpReaddir, Entries: []DirEntry{{Name: "ab", Cookie: 1}}}
	for _, tt := range []struct {
		name string
		b    []byte
		want string
	}{
		{"errno", patch(reply(Reply{Op: OpCleanup}), 16, 0, 2), "its errno is 512"},
		{"request as reply", request(stat), "its kind is 0"},
		{"no layers", reply(Reply{Op: OpNumLayers}), "0 layers"},
		{"too many layers", reply(Reply{Op: OpNumLayers, Layers: 1 << 30}), "layers, expected"},
		{"layer flags", reply(Reply{Op: OpLoad, Flags: 1 << 9}), "not known"},
		{"listing's flags", patch(reply(entry), 24, 2), "flags 0x2"},
		{"listing's count", patch(reply(entry), 28, 0xff, 0xff, 0xff, 0xff), "entries in"},
		{"cookie", patch(reply(entry), 40, 0), "cookie 0"},
		{"entry's flags", patch(reply(entry), 49, 2), "entry flags"},
		{"entry's name", patch(reply(entry), 56, '/'), "cannot be in a directory"},
	} {
		if _, err := ParseReply(tt.b); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("reply, %s: %v, expected an error with %q", tt.name, err, tt.want)
		}
	}
	if _, err := (&Reply{Op: OpGetxattr, Bytes: make([]byte, MaxBytes+1)}).Append(nil); err != syscall.E2BIG {
		t.Errorf("a value of %d bytes: %v, expected E2BIG", MaxBytes+1, err)
	}
	if _, err := (&Request{Op: OpStatat, Path: "../x"}).Append(nil); err == nil {
		t.Error("a request for ../x is made")
	}
}

func TestHello(t *testing.T) {
	h, err := ParseHello([]byte(`{"proto":1,"name":"crfs","ops":["statat","of the future"],"needs":{"network":true},"more":1}`))
	if err != nil || !h.Has(OpStatat) || h.Has(OpOpenat) || !h.Needs.Network {
		t.Errorf("hello is %+v, %v", h, err)
	}
	for text, want := range map[string]string{
		`{"proto":2,"name":"x"}`:   "version 2 of the protocol, expected 1",
		`{"name":"x"}`:             "version 0",
		`{"proto":1,"name":"a/b"}`: `"a/b", expected 1 to 64 letters`,
		`{"proto":1}`:              "its name is",
		`garbage`:                  "expected JSON like",
		`{"proto":1,"name":7}`:     "expected JSON like",
		`"` + strings.Repeat("x", maxHello) + `"`: "expected at most 16384",
	} {
		if _, err := ParseHello([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("hello %.60s: %v, expected an error with %q", text, err, want)
		}
	}
}

func FuzzRequest(f *testing.F) {
	for _, q := range someRequests() {
		b, _ := q.Append(nil)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := ParseRequest(b)
		if err != nil {
			return
		}
		again, err := q.Append(nil)
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x became %+v and %x, %v", b, q, again, err)
		}
	})
}

func FuzzReply(f *testing.F) {
	for _, a := range someReplies() {
		b, _ := a.Append(nil)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ParseReply(b)
		if err != nil {
			return
		}
		again, err := a.Append(nil)
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x became %+v and %x, %v", b, a, again, err)
		}
	})
}

func FuzzHello(f *testing.F) {
	f.Add([]byte(`{"proto":1,"name":"x","ops":["statat"],"needs":{"syscalls":["socket"]},"max_requests":3}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHello(b)
		if err == nil && (h.Proto != Proto || !ValidPluginName(h.Name)) {
			t.Errorf("%q passes as %+v", b, h)
		}
	})
}
