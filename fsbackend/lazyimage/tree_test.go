package lazyimage

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"math"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/fuseproto"
)

func link(to string) tar.Header { return tar.Header{Typeflag: tar.TypeLink, Linkname: to} }
func slink(to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Linkname: to, Mode: 0o777}
}

// layers is an image of tar files, the lowest first.
func layers(t testing.TB, files ...[]file) *fake {
	t.Helper()
	s := new(fake)
	for _, f := range files {
		s.add(t, pack(t, f...), 16)
	}
	return s
}

// T-D11: what a tar file can say of files is what the guest sees.
func TestAttributes(t *testing.T) {
	long, deep := strings.Repeat("\u00fc", 127)+"x", strings.Repeat("deep/", 300)+"file"
	when := time.Unix(1_234_567_890, 123_456_789)
	s := layers(t, []file{
		{"suid", "#!", tar.Header{Mode: 0o6755, Uid: 1000, Gid: 1 << 20, ModTime: when}},
		{"sticky/", "", tar.Header{Mode: 0o1777}},
		{"sticky/name", "", link("suid")},
		{"fifo", "", tar.Header{Typeflag: tar.TypeFifo, Mode: 0o600}},
		{"null", "", tar.Header{Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3}},
		{"disk", "", tar.Header{Typeflag: tar.TypeBlock, Mode: 0o660, Devmajor: 259, Devminor: 0xabcde}},
		{"link", "", slink("no/such\u4e16")},
		{"other link", "", link("link")},
		{"caps", "x", tar.Header{PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00", "SCHILY.xattr.user.b": "", "SCHILY.xattr.user.a": "value"}}},
		{"empty", "", tar.Header{ModTime: time.Unix(-5, 0)}},
		{long, "long", tar.Header{}},
		{deep, "deep", tar.Header{}},
		{"\u4e16\u754c/\xff\n", "odd", tar.Header{}},
	})
	i := open(t, s, Config{Merge: true})

	suid, name := i.walk(t, "suid"), i.walk(t, "sticky/name")
	if suid.Mode != unix.S_IFREG|0o6755 || suid.Uid != 1000 || suid.Gid != 1<<20 || int64(suid.Mtime) != when.Unix() || suid.Mtimensec != 123_456_789 || suid.Ctimensec != suid.Mtimensec {
		t.Errorf("suid is %+v", suid.Attr)
	}
	if suid.Nlink != 2 || name.Attr != suid.Attr || name.NodeId != suid.NodeId || suid.Ino != suid.NodeId {
		t.Errorf("two names of a file are node %d and %d, with %d links", suid.NodeId, name.NodeId, suid.Nlink)
	}
	if l, o := i.walk(t, "link"), i.walk(t, "other link"); l.Ino != o.Ino || l.Nlink != 2 || l.Mode != unix.S_IFLNK|0o777 || l.Size != uint64(len("no/such\u4e16")) {
		t.Errorf("symbolic links are %+v and %+v", l.Attr, o.Attr)
	}
	if target, errno := i.Readlink(i.walk(t, "link").NodeId); target != "no/such\u4e16" || errno != 0 {
		t.Errorf("target %q, %v", target, errno)
	}
	for p, want := range map[string][3]uint64{
		"fifo":   {unix.S_IFIFO | 0o600, 0, 0},
		"null":   {unix.S_IFCHR | 0o666, unix.Mkdev(1, 3), 0},
		"disk":   {unix.S_IFBLK | 0o660, unix.Mkdev(259, 0xabcde), 0},
		"empty":  {unix.S_IFREG | 0o644, 0, 0},
		"sticky": {unix.S_IFDIR | 0o1777, 0, blockSize},
		"caps":   {unix.S_IFREG | 0o644, 0, 1},
	} {
		e := i.walk(t, p)
		if got := [3]uint64{uint64(e.Mode), uint64(e.Rdev), e.Size}; got != want {
			t.Errorf("%s has mode, number and size %#x, expected %#x", p, got, want)
		}
		if e.Blksize != 4096 || e.AttrValid == 0 || e.EntryValid != 0 {
			t.Errorf("%s is %+v", p, e)
		}
	}
	if e := i.walk(t, "empty"); int64(e.Mtime) != -5 || len(i.cat(t, "empty")) != 0 {
		t.Errorf("the empty file is %+v", e.Attr)
	}
	if e := i.walk(t, "sticky"); e.Nlink != 2 || i.walk(t, "deep/deep").Nlink != 3 || i.walk(t, "").Nlink != 2+3 {
		t.Errorf("directories have %d, %d, %d links", e.Nlink, i.walk(t, "deep/deep").Nlink, i.walk(t, "").Nlink)
	}
	if e := i.walk(t, "deep"); e.Mode != unix.S_IFDIR|0o755 || e.Uid != 0 {
		t.Errorf("a directory that is only implied is %+v", e.Attr)
	}
	for p, want := range map[string]string{long: "long", deep: "deep", "\u4e16\u754c/\xff\n": "odd", "sticky/name": "#!"} {
		if got := i.cat(t, p); string(got) != want {
			t.Errorf("%q holds %q, expected %q", p, got, want)
		}
	}

	caps := i.walk(t, "caps").NodeId
	list, n, errno := i.Listxattr(caps, 1000)
	if want := "security.capability\x00user.a\x00user.b\x00"; string(list) != want || int(n) != len(want) || errno != 0 {
		t.Errorf("attributes %q of %d bytes, %v", list, n, errno)
	}
	for name, want := range map[string]string{"security.capability": "\x01\x00\x00\x02\x00", "user.a": "value", "user.b": ""} {
		if got, _, errno := i.Getxattr(caps, name, 100); string(got) != want || errno != 0 {
			t.Errorf("%s is %q, %v", name, got, errno)
		}
	}
	for _, tt := range []struct {
		name  string
		room  int
		size  uint32
		errno fsbackend.Errno
	}{{"user.a", 0, 5, 0}, {"user.a", 4, 0, unix.ERANGE}, {"user.a", 5, 5, 0}, {"user.", 9, 0, unix.ENODATA}, {"user.aa", 9, 0, unix.ENODATA}} {
		if _, n, errno := i.Getxattr(caps, tt.name, tt.room); n != tt.size || errno != tt.errno {
			t.Errorf("GETXATTR of %s with room for %d: %d, %v, expected %d, %v", tt.name, tt.room, n, errno, tt.size, tt.errno)
		}
	}
	if _, n, errno := i.Listxattr(i.walk(t, "empty").NodeId, 0); n != 0 || errno != 0 {
		t.Errorf("attributes of the empty file: %d bytes, %v", n, errno)
	}
	st, errno := i.Statfs(fsbackendtest.Root)
	if errno != 0 || st.Files != uint64(len(i.fs.nodes)) || st.Bfree != 0 || st.NameLen != 255 || st.Blocks != 1 {
		t.Errorf("STATFS: %+v, %v", st, errno)
	}
}

// D10, D11: a single layer shows what it hides, and hides what is not the image's.
func TestSingleLayer(t *testing.T) {
	files := []file{
		{".prefetch.landmark", "\x0f", tar.Header{}},
		{".no.prefetch.landmark", "\x0f", tar.Header{}},
		{"stargz.index.json", "{}", tar.Header{}},
		{".wh..prefetch.landmark", "", tar.Header{}},
		{"dir/.prefetch.landmark", "data", tar.Header{}},
		{"dir/.wh.gone", "", tar.Header{}},
		{"dir/.wh.both", "", tar.Header{}},
		{"dir/both", "here", tar.Header{}},
		{"dir/.wh..wh.plnk/1", "", tar.Header{}},
		{".wh..wh.aufs", "", tar.Header{}},
		{"opaque/.wh..wh..opq", "", tar.Header{}},
		{"opaque/x", "", tar.Header{PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y"}}},
		{"bare/.wh.a", "", tar.Header{}},
		{".wh...", "", tar.Header{}},
		{".wh..", "", tar.Header{}},
		{".wh.", "", tar.Header{}},
	}
	i := open(t, layers(t, nil, files), Config{Layer: 1})
	for p, want := range map[string][]string{"": {"bare", "dir", "opaque"}, "dir": {".prefetch.landmark", "both", "gone"}, "opaque": {"x"}, "bare": {"a"}} {
		if got := i.names(t, p); !slices.Equal(got, want) {
			t.Errorf("%q lists %q, expected %q", p, got, want)
		}
	}
	i.missing(t, ".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json", ".wh..prefetch.landmark", "dir/.wh.gone", "dir/.wh..wh.plnk", "opaque/.wh..wh..opq", ".wh.")
	for _, p := range []string{"dir/gone", "bare/a"} {
		if e := i.walk(t, p); e.Mode != unix.S_IFCHR || e.Rdev != 0 || e.Nlink != 1 {
			t.Errorf("the whiteout %s is %+v", p, e.Attr)
		}
	}
	if got := i.cat(t, "dir/both"); string(got) != "here" {
		t.Errorf("dir/both holds %q", got)
	}
	for mode, want := range map[Opaque]string{
		OpaqueAll: "trusted.overlay.opaque\x00user.overlay.opaque\x00", OpaqueTrusted: "trusted.overlay.opaque\x00", OpaqueUser: "user.overlay.opaque\x00",
	} {
		i := open(t, layers(t, files), Config{Opaque: mode})
		node := i.walk(t, "opaque").NodeId
		list, _, errno := i.Listxattr(node, 1000)
		if string(list) != want || errno != 0 {
			t.Errorf("mode %d: the opaque directory has %q, %v", mode, list, errno)
		}
		for name := range strings.SplitSeq(strings.TrimSuffix(want, "\x00"), "\x00") {
			if v, _, errno := i.Getxattr(node, name, 10); string(v) != "y" || errno != 0 {
				t.Errorf("%s is %q, %v", name, v, errno)
			}
		}
		if list, _, _ := i.Listxattr(i.walk(t, "dir").NodeId, 1000); len(list) > 0 {
			t.Errorf("dir has %q", list)
		}
	}
	merged := open(t, layers(t, files), Config{Merge: true})
	if got := merged.names(t, "dir"); !slices.Equal(got, []string{".prefetch.landmark", "both"}) {
		t.Errorf("merged, dir lists %q", got)
	}
	if list, _, _ := merged.Listxattr(merged.walk(t, "opaque").NodeId, 1000); len(list) > 0 {
		t.Errorf("merged, the opaque directory has %q", list)
	}
}

// What one layer does to those below it, case by case.
func TestMergeCases(t *testing.T) {
	x := tar.Header{}
	lower := []file{{"a/", "", tar.Header{Mode: 0o700, Uid: 7}}, {"a/b", "lower", x}, {"a/c/d", "lower", x}, {"f", "lower", x}, {"g", "", link("f")}}
	for name, tt := range map[string]struct {
		upper []file
		want  string // the whole tree
	}{
		"nothing":                 {nil, "a/ a/b a/c/ a/c/d f g"},
		"whiteout of a file":      {[]file{{".wh.f", "", x}}, "a/ a/b a/c/ a/c/d g"},
		"whiteout of a directory": {[]file{{".wh.a", "", x}}, "f g"},
		"whiteout of nothing":     {[]file{{"x/.wh.y", "", x}, {".wh.z", "", x}}, "a/ a/b a/c/ a/c/d f g"},
		"whiteout and again":      {[]file{{"a/.wh.c", "", x}, {"a/c/n", "upper", x}}, "a/ a/b a/c/ a/c/n f g"},
		"again and whiteout":      {[]file{{"a/c/n", "upper", x}, {"a/.wh.c", "", x}}, "a/ a/b a/c/ a/c/n f g"},
		"opaque":                  {[]file{{"a/n", "upper", x}, {"a/.wh..wh..opq", "", x}}, "a/ a/n f g"},
		"opaque below":            {[]file{{"a/c/.wh..wh..opq", "", x}}, "a/ a/b a/c/ f g"},
		"opaque root":             {[]file{{"n", "upper", x}, {".wh..wh..opq", "", x}}, "n"},
		"opaque file":             {[]file{{"f/.wh..wh..opq", "", x}}, "a/ a/b a/c/ a/c/d f g"},
		"file for a directory":    {[]file{{"a", "upper", x}}, "a f g"},
		"directory for a file":    {[]file{{"f/", "", x}, {"f/n", "", x}}, "a/ a/b a/c/ a/c/d f/ f/n g"},
		"implied for a file":      {[]file{{"f/n", "", x}}, "a/ a/b a/c/ a/c/d f/ f/n g"},
		"file for a file":         {[]file{{"f", "upper", x}}, "a/ a/b a/c/ a/c/d f g"},
		"link for a directory":    {[]file{{"n", "upper", x}, {"a", "", link("n")}}, "a f g n"},
		"file and again":          {[]file{{"n", "one", x}, {"n", "two", x}}, "a/ a/b a/c/ a/c/d f g n"},
		"everything":              {[]file{{".wh.a", "", x}, {".wh.f", "", x}, {".wh.g", "", x}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			i := open(t, layers(t, lower, tt.upper), Config{Merge: true})
			var got []string
			var visit func(p string)
			visit = func(p string) {
				for _, name := range i.names(t, p) {
					at := join(p, name)
					if i.walk(t, at).Mode&unix.S_IFMT == unix.S_IFDIR {
						got = append(got, at+"/")
						visit(at)
					} else {
						got = append(got, at)
					}
				}
			}
			visit("")
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("the tree is\n%s, expected\n%s", s, tt.want)
			}
		})
	}
	i := open(t, layers(t, lower, []file{{"a/n", "", x}, {"f", "upper", x}}), Config{Merge: true})
	if e := i.walk(t, "a"); e.Mode != unix.S_IFDIR|0o700 || e.Uid != 7 {
		t.Errorf("a directory that the upper layer only implies is %+v", e.Attr)
	}
	if f, g := i.walk(t, "f"), i.walk(t, "g"); f.Ino == g.Ino || f.Nlink != 1 || g.Nlink != 1 || string(i.cat(t, "g")) != "lower" || string(i.cat(t, "f")) != "upper" {
		t.Errorf("a name that the upper layer replaced, and the other one: %+v, %+v", f.Attr, g.Attr)
	}
}

// Layers that contradict themselves are errors, not panics.
func TestBadLayers(t *testing.T) {
	x := tar.Header{}
	for name, files := range map[string][]file{
		"file in a file":         {{"a", "", x}, {"a/b", "", x}},
		"file, then in it":       {{"a/b", "", x}, {"a", "", x}},
		"directory and a file":   {{"a/", "", x}, {"a", "", x}},
		"link to a landmark":     {{".prefetch.landmark", "", x}, {"a", "", link(".prefetch.landmark")}},
		"link over a directory":  {{"a/b", "", x}, {"c", "", x}, {"a", "", link("c")}},
		"link in a file":         {{"c", "", x}, {"a", "", x}, {"a/b", "", link("c")}},
		"whiteout in a file":     {{"a", "", x}, {"a/.wh.b", "", x}},
		"opaque mark in a file":  {{"a", "", x}, {"a/.wh..wh..opq", "", x}},
		"more than are allowed":  {{"a", "", x}, {"b", "", x}, {"c", "", x}, {"d", "", x}, {"e", "", x}, {"f", "", x}, {"g", "", x}, {"h", "", x}},
		"deeper than is allowed": {{"a/b/c/d/e/f/g/h", "", x}},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := New(context.Background(), Config{Store: layers(t, files).wire(t), MaxInodes: 8})
			if err == nil {
				_ = f.Close()
				t.Error("it is served")
			}
		})
	}
	for name, cfg := range map[string]Config{
		"no store": {}, "opaque": {Store: new(fake), Opaque: 3}, "layer": {Store: new(fake), Layer: -1}, "both": {Store: new(fake), Merge: true, Layer: 1},
		"open": {Store: new(fake), MaxOpen: defaultMaxOpen + 1}, "no such layer": {Store: layers(t, nil), Layer: 1},
	} {
		if _, err := New(context.Background(), cfg); err == nil {
			t.Errorf("%s: it is served", name)
		}
	}
}

// The same image has the same numbers, however its layers list their files.
func TestNumbersStay(t *testing.T) {
	files := []file{{"b/x", "1", tar.Header{}}, {"a", "2", tar.Header{}}, {"b/a", "", link("a")}, {"c/", "", tar.Header{}}}
	numbers := func(files []file) map[string]uint64 {
		i := open(t, layers(t, files), Config{Merge: true})
		got := make(map[string]uint64)
		for _, p := range []string{"a", "b", "b/x", "b/a", "c", ""} {
			got[p] = i.walk(t, p).Ino
		}
		return got
	}
	one := numbers(files)
	slices.Reverse(files)
	slices.SortStableFunc(files, func(a, b file) int { return int(b.header.Typeflag) - int(a.header.Typeflag) })
	for i := range files { // the target first, or it is no tar file
		if files[i].header.Typeflag == tar.TypeLink {
			files = append(slices.Delete(slices.Clone(files), i, i+1), files[i])
			break
		}
	}
	if two := numbers(files); !reflect.DeepEqual(one, two) {
		t.Errorf("numbers %v, and in another order %v", one, two)
	}
	if one[""] != 1 || one["a"] != one["b/a"] {
		t.Errorf("numbers %v", one)
	}
}

// A guest may give any number for a node, a handle, or an offset.
func TestLies(t *testing.T) {
	i := open(t, layers(t, []file{{"d/f", "data", tar.Header{}}, {"l", "", slink("d")}, {"p", "", tar.Header{Typeflag: tar.TypeFifo}}}), Config{Merge: true})
	f, d, l := i.walk(t, "d/f").NodeId, i.walk(t, "d").NodeId, i.walk(t, "l").NodeId
	state := i.fs.stateRoot()
	nodes := []uint64{0, 1, d, f, l, i.walk(t, "p").NodeId, state, state + 1, state + 2, 1 << 32, 1<<32 + f, 1 << 47, math.MaxUint64}
	fh, errno := i.Open(f, unix.O_RDONLY)
	dh, errno2 := i.Opendir(d)
	if errno != 0 || errno2 != 0 {
		t.Fatal(errno, errno2)
	}
	handles := []uint64{0, fh, dh, fh + 1, fh + 1<<indexBits, 1<<indexBits - 1, 1 << 48, math.MaxUint64}
	offsets := []uint64{0, 1, 4, 1 << 20, math.MaxInt64, math.MaxInt64 + 1, math.MaxUint64}
	known := func(n uint64) bool { return n >= 1 && n <= state+1 }
	for _, node := range nodes {
		want := fsbackend.Errno(unix.ESTALE)
		if known(node) {
			want = 0
		}
		if _, errno := i.Getattr(node); errno != want {
			t.Errorf("GETATTR of %#x: %v, expected %v", node, errno, want)
		}
		if _, errno := i.Statfs(node); errno != want {
			t.Errorf("STATFS of %#x: %v, expected %v", node, errno, want)
		}
		if _, _, errno := i.Listxattr(node, 10); errno != want {
			t.Errorf("LISTXATTR of %#x: %v, expected %v", node, errno, want)
		}
		for _, name := range []string{"f", "nothing", stateName, "sha256:"} {
			if out, errno := i.Lookup(node, name); errno == 0 && out.NodeId != 0 && (node != d || name != "f") && (node != 1 || name != stateName) {
				t.Errorf("LOOKUP of %s in %#x gave %#x", name, node, out.NodeId)
			}
		}
		if target, errno := i.Readlink(node); (errno == 0) != (node == l) || errno == 0 && target != "d" {
			t.Errorf("READLINK of %#x: %q, %v", node, target, errno)
		}
		if h, errno := i.Open(node, unix.O_RDONLY); errno == 0 {
			if node != f && node != state+1 {
				t.Errorf("OPEN of %#x", node)
			}
			i.Release(node, h)
		}
		if h, errno := i.Opendir(node); errno == 0 {
			if node != d && node != 1 && node != state {
				t.Errorf("OPENDIR of %#x", node)
			}
			i.Releasedir(node, h)
		}
		for _, h := range handles {
			for _, off := range offsets {
				b, errno := i.Read(node, h, off, 100)
				if ok := node == f && h == fh; ok != (errno == 0) && off <= math.MaxInt64 || ok && off < 4 && string(b) != "data"[off:] || (!ok || off >= 4) && len(b) > 0 {
					t.Errorf("READ of %#x by %#x at %#x: %q, %v", node, h, off, b, errno)
				}
				list, errno := i.Readdir(node, h, off, 1000, false)
				if ok := node == d && h == dh; ok != (errno == 0) || ok && off > 3 && len(list) > 0 {
					t.Errorf("READDIR of %#x by %#x at %#x: %d entries, %v", node, h, off, len(list), errno)
				}
				for _, whence := range []uint32{unix.SEEK_DATA, unix.SEEK_HOLE, unix.SEEK_SET, 77} {
					n, errno := i.Lseek(node, h, off, whence)
					if errno == 0 && (node != f || h != fh || whence == unix.SEEK_SET || n > 4) {
						t.Errorf("LSEEK of %#x by %#x to %#x gave %#x", node, h, off, n)
					}
				}
			}
			if _, errno := i.GetattrFh(node, h); (errno == 0) != (node == f && h == fh || node == d && h == dh) {
				t.Errorf("GETATTR of %#x by %#x: %v", node, h, errno)
			}
			if (node != f || h != fh) && (node != d || h != dh) {
				i.Release(node, h)
				i.Releasedir(node, h)
			}
		}
	}
	if b, errno := i.Read(f, fh, 0, 10); string(b) != "data" || errno != 0 {
		t.Errorf("after all that the file is %q, %v", b, errno)
	}
}

func TestOpenFilesAreLimited(t *testing.T) {
	i := open(t, layers(t, []file{{"f", "data", tar.Header{}}}), Config{MaxOpen: 3})
	f := i.walk(t, "f").NodeId
	var handles []uint64
	for range 3 {
		fh, errno := i.Open(f, unix.O_RDONLY)
		if errno != 0 {
			t.Fatal(errno)
		}
		handles = append(handles, fh)
	}
	if _, errno := i.Open(f, unix.O_RDONLY); errno != unix.ENFILE {
		t.Errorf("one more: %v", errno)
	}
	if _, errno := i.Opendir(1); errno != unix.ENFILE {
		t.Errorf("a directory more: %v", errno)
	}
	i.Release(f, handles[1])
	again, errno := i.Open(f, unix.O_RDONLY)
	if errno != 0 || again == handles[1] {
		t.Errorf("after RELEASE: handle %#x once more, %v", again, errno)
	}
	i.fs.Reset()
	for _, fh := range append(handles, again) {
		if _, errno := i.Read(f, fh, 0, 1); errno != unix.EBADF {
			t.Errorf("READ after Reset: %v", errno)
		}
	}
	if _, errno := i.Open(f, unix.O_RDONLY); errno != 0 {
		t.Errorf("OPEN after Reset: %v", errno)
	}
}

// Each file is noted once, by its layer's path.
func TestNotes(t *testing.T) {
	i := open(t, layers(t, []file{{"usr/bin/a", "1", tar.Header{}}, {"b", "", link("usr/bin/a")}}, []file{{"usr/c", "2", tar.Header{}}}), Config{Merge: true})
	for _, p := range []string{"usr/c", "usr/bin/a", "usr/c", "b"} {
		i.cat(t, p)
	}
	if want := []string{"1 usr/c", "0 b"}; !slices.Equal(i.store.notes, want) {
		t.Errorf("notes %q, expected %q", i.store.notes, want)
	}
}

// many is a layer of n small files as images have them.
func many(n int) store.Layer {
	l := store.Layer{Digest: "sha256:" + strings.Repeat("ab", 32), Size: 1 << 30}
	for i := range n {
		x := store.Entry{Path: fmt.Sprintf("usr/lib/package%03d/part%02d/file-%d.so", i%700, i%50, i), Mode: unix.S_IFREG | 0o644, MtimeSec: int64(i), Size: 100}
		x.Chunks = []store.Span{{Len: 100, Chunk: uint32(len(l.Chunks))}}
		l.Chunks = append(l.Chunks, store.Chunk{Size: 100})
		l.Entries = append(l.Entries, x)
	}
	return l
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// once is a Store that lets go of its layers.
type once struct{ *fake }

func (s once) Layers(context.Context) ([]store.Layer, error) {
	l := s.layers
	s.layers = nil
	return l, nil
}

func TestBigImage(t *testing.T) {
	const n = 100_000
	s := &fake{layers: []store.Layer{many(n)}}
	full := heap()
	began := time.Now()
	f, err := New(context.Background(), Config{Store: once{s}, Merge: true})
	took := time.Since(began)
	if err != nil {
		t.Fatal(err)
	}
	with := heap()
	entries, nodes := len(f.entries), len(f.nodes)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	runtime.KeepAlive(f)
	f = nil
	held := int64(with) - int64(heap())
	t.Logf("%d files, %d nodes: opened in %v, %d KiB held (%d KiB with the description)", n, nodes, took, held>>10, full>>10)
	if entries < n || held > n*200 {
		t.Errorf("%d entries hold %d bytes, expected at most 200 each", entries, held)
	}
	if took > time.Minute {
		t.Errorf("opened in %v", took)
	}
}

// FuzzLayers has images that somebody made up put together and walked.
func FuzzLayers(f *testing.F) {
	for _, s := range []*fake{
		layers(f, []file{{"a/b", "1", tar.Header{}}, {"c", "", slink("a")}}, []file{{"a/.wh.b", "", tar.Header{}}, {"a/.wh..wh..opq", "", tar.Header{}}, {"d", "x", tar.Header{}}, {"e", "", link("d")}}),
		layers(f, []file{{".wh.a", "", tar.Header{}}, {"a/.wh.b/c", "", tar.Header{}}, {"n", "", tar.Header{Typeflag: tar.TypeChar}}}),
	} {
		b, err := store.EncodeMeta(s.layers)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := store.DecodeMeta(b)
		if err != nil {
			return
		}
		for _, merge := range []bool{true, false} {
			fs, err := New(context.Background(), Config{Store: &fake{layers: l}, Merge: merge, MaxInodes: 1000})
			if err != nil {
				continue
			}
			i := &image{Client: &fsbackendtest.Client{R: fsbackend.Resolve(fs)}, fs: fs}
			seen := 0
			var visit func(p string, at fuseproto.EntryOut)
			visit = func(p string, at fuseproto.EntryOut) {
				seen++
				if at.Ino == 0 || at.Nlink == 0 || at.Mode&unix.S_IFMT == 0 {
					t.Fatalf("%q is %+v", p, at.Attr)
				}
				if at.Mode&unix.S_IFMT != unix.S_IFDIR {
					return
				}
				names := i.names(t, p)
				if !slices.IsSorted(names) || len(slices.Compact(slices.Clone(names))) != len(names) {
					t.Fatalf("%q lists %q", p, names)
				}
				for _, name := range names {
					out := i.walk(t, join(p, name))
					visit(join(p, name), out)
					if n := uint32(out.NodeId - 1); out.Mode&unix.S_IFMT == unix.S_IFDIR && fs.path(n) != join(p, name) {
						t.Fatalf("%q calls itself %q", join(p, name), fs.path(n))
					}
				}
			}
			visit("", i.walk(t, ""))
			if seen < len(fs.entries)+1 {
				t.Fatalf("%d of %d entries are reached", seen, len(fs.entries)+1)
			}
			_ = fs.Close()
		}
	})
}

// T-D10.
func TestStateDirectory(t *testing.T) {
	s := layers(t, []file{{"f", "0123456789abcdefX", tar.Header{}}}, []file{{"g", "data", tar.Header{}}})
	i := open(t, s, Config{Merge: true})
	if got := i.names(t, ""); !slices.Equal(got, []string{"f", "g"}) {
		t.Errorf("the root lists %q", got)
	}
	dir := i.walk(t, stateName)
	if dir.Mode != unix.S_IFDIR|0o500 || dir.Uid != 0 || dir.Gid != 0 || dir.Ino == 0 {
		t.Errorf("the state directory is %+v", dir.Attr)
	}
	names := i.names(t, stateName)
	if want := []string{s.layers[0].Digest + ".json", s.layers[1].Digest + ".json"}; !slices.Equal(names, want) {
		t.Errorf("it lists %q, expected %q", names, want)
	}
	read := func(n int) string {
		t.Helper()
		p := stateName + "/" + names[n]
		e := i.walk(t, p)
		got := string(i.cat(t, p))
		if e.Mode != unix.S_IFREG|0o400 || e.Uid != 0 || e.Size != uint64(len(got)) || e.AttrValid != 0 {
			t.Errorf("%s is %+v, and holds %d bytes", p, e, len(got))
		}
		if _, errno := i.Open(e.NodeId, unix.O_RDWR); errno != unix.EROFS {
			t.Errorf("OPEN for writing: %v", errno)
		}
		return got
	}
	size := s.layers[0].Size
	for _, fetched := range []int64{0, size / 4, size} {
		s.mu.Lock()
		s.status = store.Status{Size: 1, Fetched: fetched}
		s.mu.Unlock()
		want := fmt.Sprintf(`{"digest":%q,"size":%d,"fetchedSize":%d,"fetchedPercent":%v}`+"\n", s.layers[0].Digest, size, fetched, 100*float64(fetched)/float64(size))
		if got := read(0); got != want {
			t.Errorf("status %q, expected %q", got, want)
		}
	}
	// An open file stays as it was opened.
	node := i.walk(t, stateName+"/"+names[0]).NodeId
	fh, errno := i.Open(node, unix.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	before, errno := i.GetattrFh(node, fh)
	s.mu.Lock()
	s.status = store.Status{Fetched: 5, Err: "401 from \"there\""}
	s.mu.Unlock()
	b, errno2 := i.Read(node, fh, 0, 4096)
	after, errno3 := i.GetattrFh(node, fh)
	if errno != 0 || errno2 != 0 || errno3 != 0 || uint64(len(b)) != before.Size || after != before || !bytes.Contains(b, []byte(`Percent":100}`)) {
		t.Errorf("an open file is %q of %d and %d bytes", b, before.Size, after.Size)
	}
	if b, _ := i.Read(node, fh, 10, 5); string(b) != `"sha2` {
		t.Errorf("a part is %q", b)
	}
	i.Release(node, fh)
	if got, want := read(0), `{"error":"401 from \"there\"","digest"`; !strings.HasPrefix(got, want) {
		t.Errorf("status %q, expected %q…", got, want)
	}
	// The last error of reading is there, too, beside what the fetcher says of it.
	s.hook = func(int, uint32) error { return store.ErrCorrupt }
	if _, errno := i.read(i.walk(t, "g").NodeId); errno != unix.EIO {
		t.Errorf("READ: %v", errno)
	}
	if got, want := read(1), `{"error":"read \"g\": the chunk's content is not what its digest says: 401 from \"there\"","digest"`; !strings.HasPrefix(got, want) {
		t.Errorf("status %q, expected %q…", got, want)
	}
	if got := read(0); strings.Contains(got, "read") {
		t.Errorf("the other layer says %q", got)
	}
	s.mu.Lock()
	s.failed = errBroken
	s.mu.Unlock()
	if got := read(0); !strings.Contains(got, `"error":"ask the fetcher: broken"`) || !strings.Contains(got, `"fetchedSize":5,`) {
		t.Errorf("without a fetcher it is %q", got)
	}
	i.missing(t, stateName+"/x", names[0])
	// A single layer has its own alone.
	one := open(t, layers(t, []file{{"f", "", tar.Header{}}}, []file{{stateName + "/x", "", tar.Header{}}}), Config{Layer: 1})
	if got := one.names(t, stateName); !slices.Equal(got, []string{one.store.layers[1].Digest + ".json"}) {
		t.Errorf("of one layer it lists %q", got)
	}
}
