package pluginlayer

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// tarPlugin is the example in Python, started with Debian's package python3.
func tarPlugin(t *testing.T) *Conn {
	t.Helper()
	return dial(t, Config{Name: "tar", Source: &process{args: []string{"python3", "../../examples/tarlayers/tarlayers.py"}}})
}

func writeTar(t *testing.T, path string, headers ...tar.Header) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	for _, h := range headers {
		data := h.Uname // a place to carry the contents in
		h.Uname, h.Size = "", int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestPython serves the conformance suite's tree from an archive by a plug-in in another language.
func TestPython(t *testing.T) {
	dir := t.TempDir()
	var headers []tar.Header
	for name, f := range suiteTree() {
		h := tar.Header{Name: name, Mode: int64(f.Mode.Perm()), ModTime: f.ModTime, Uname: string(f.Data), Format: tar.FormatPAX}
		if f.Mode.Type() == fs.ModeSymlink {
			h.Typeflag, h.Linkname, h.Uname = tar.TypeSymlink, string(f.Data), ""
		}
		headers = append(headers, h)
	}
	writeTar(t, filepath.Join(dir, "tree.tar"), headers...)
	c := tarPlugin(t)
	fsbackendtest.RunReadOnly(t, fsbackendtest.ReadOnlyConfig{
		New: func(t *testing.T) fsbackend.Backend {
			layers, err := c.Layers(t.Context(), "", strings.TrimPrefix(dir, "/")+"/tree.tar")
			if err != nil {
				t.Fatal(err)
			}
			l, err := layers.Open(t.Context(), 0)
			if err != nil {
				t.Fatal(err)
			}
			return l
		},
		Strict: true,
	})
}

// TestReadsPassThePluginBy is row B5: 100 MiB are read without a read, a write or a message of the plug-in, another process.
func TestReadsPassThePluginBy(t *testing.T) {
	const size = 100 << 20
	path := filepath.Join(t.TempDir(), "large.tar")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := tar.NewWriter(f).WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: size}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("start"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(512+size+1024), f.Close()); err != nil { // the rest are zeros, and the archive's end
		t.Fatal(err)
	}
	c := tarPlugin(t)
	layers, err := c.Layers(t.Context(), "", strings.TrimPrefix(path, "/"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := layers.Open(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client := &fsbackendtest.Client{R: fsbackend.Resolve(l)}
	node, fh := mustOpen(t, client, "file")
	calls := func() string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", c.cfg.Source.(*process).running().Pid))
		if err != nil {
			t.Fatal(err)
		}
		own, _, _ := strings.Cut(string(b), "read_bytes")
		c.current.mu.Lock()
		defer c.current.mu.Unlock()
		return fmt.Sprintf("%srequests: %d", own, c.current.lastID)
	}
	before := calls()
	total, buf := 0, make([]byte, 1<<20)
	for total < size {
		dst := fsbackendtest.NewSink(buf, 0)
		in := &fuseproto.ReadIn{InHeader: fuseproto.InHeader{NodeId: node}, Fh: fh, Offset: uint64(total)}
		if errno := l.(*tree).Read(&fsbackend.Context{}, in, dst); errno != 0 || dst.Written() == 0 {
			t.Fatalf("READ at %d: %d bytes, %v", total, dst.Written(), errno)
		}
		if total == 0 && !bytes.HasPrefix(buf, []byte("start\x00")) {
			t.Errorf("the file begins %q", buf[:10])
		}
		total += dst.Written()
	}
	if after := calls(); after != before {
		t.Errorf("the plug-in did something while the file was read:\n%s\nexpected as before:\n%s", after, before)
	}
}

// TestThreeLayers is row B3: one entry is three layers. The first has a whiteout of each kind for files of the third; to merge
// them is the overlay's.
func TestThreeLayers(t *testing.T) {
	dir := t.TempDir()
	xattr := map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.bytes": "\xff\x01"}
	writeTar(t, filepath.Join(dir, "1.tar"),
		tar.Header{Name: "hidden", Typeflag: tar.TypeChar, Mode: 0o600},
		tar.Header{Name: "dir/.wh.other", Mode: 0o644},
		tar.Header{Name: "opaque/", Typeflag: tar.TypeDir, Mode: 0o755, PAXRecords: xattr},
	)
	writeTar(t, filepath.Join(dir, "2.tar"), tar.Header{Name: "middle", Mode: 0o644, Uname: "second"})
	writeTar(t, filepath.Join(dir, "3.tar"),
		tar.Header{Name: "hidden", Mode: 0o4755, Uid: 7, Gid: 8, ModTime: time.Unix(1e9, 0), Uname: "third"},
		tar.Header{Name: "dir/other", Mode: 0o644, Uname: "other"},
		tar.Header{Name: "dir/link", Typeflag: tar.TypeLink, Linkname: "hidden"},
		tar.Header{Name: "block", Typeflag: tar.TypeBlock, Mode: 0o660, Devmajor: 8, Devminor: 300},
	)
	c := tarPlugin(t)
	layers, err := c.Layers(t.Context(), "", strings.TrimPrefix(dir, "/"))
	if err != nil || layers.Len() != 3 {
		t.Fatalf("%+v, %v, expected 3 layers", layers, err)
	}
	var clients [3]*fsbackendtest.Client
	for i := range clients {
		l, err := layers.Open(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		clients[i] = &fsbackendtest.Client{R: fsbackend.Resolve(l)}
	}
	want := []string{"dir hidden opaque", "middle", "block dir hidden"}
	for i, c := range clients {
		names := c.List(t, fsbackendtest.Root, 4096)
		slices.Sort(names)
		if got := strings.Join(names, " "); got != want[i] {
			t.Errorf("layer %d lists %q, expected %q", i, got, want[i])
		}
	}
	whiteout, errno := clients[0].Lookup(fsbackendtest.Root, "hidden")
	if errno != 0 || whiteout.Mode&unix.S_IFMT != unix.S_IFCHR || whiteout.Rdev != 0 {
		t.Errorf("the whiteout has mode %#o and device %#x, %v", whiteout.Mode, whiteout.Rdev, errno)
	}
	d, _ := clients[0].Lookup(fsbackendtest.Root, "dir")
	if names := clients[0].List(t, d.NodeId, 4096); !slices.Equal(names, []string{".wh.other"}) {
		t.Errorf("the other whiteout is %q", names)
	}
	opaque, _ := clients[0].Lookup(fsbackendtest.Root, "opaque")
	for name, want := range map[string]string{"trusted.overlay.opaque": "y", "user.bytes": "\xff\x01"} {
		if b, _, errno := clients[0].Getxattr(opaque.NodeId, name, 100); string(b) != want || errno != 0 {
			t.Errorf("%s is %q, %v, expected %q", name, b, errno, want)
		}
	}
	f, errno := clients[2].Lookup(fsbackendtest.Root, "hidden")
	if errno != 0 || f.Mode != unix.S_IFREG|0o4755 || f.Uid != 7 || f.Gid != 8 || f.Mtime != 1e9 || f.Nlink != 2 {
		t.Errorf("the file of the third layer is %+v, %v", f.Attr, errno)
	}
	d, _ = clients[2].Lookup(fsbackendtest.Root, "dir")
	if link, errno := clients[2].Lookup(d.NodeId, "link"); errno != 0 || link.Ino != f.Ino {
		t.Errorf("a hard link has inode number %d, %v, expected %d", link.Ino, errno, f.Ino)
	}
	if b, _ := clients[2].Lookup(fsbackendtest.Root, "block"); b.Rdev != uint32(unix.Mkdev(8, 300)) {
		t.Errorf("the device has number %#x, expected %#x", b.Rdev, unix.Mkdev(8, 300))
	}
	node, fh := mustOpen(t, clients[2], "hidden")
	if b, errno := clients[2].Read(node, fh, 0, 10); string(b) != "third" || errno != 0 {
		t.Errorf("READ: %q, %v", b, errno)
	}
	// What another guest opens of the layer are the same pages.
	again, err := layers.Open(t.Context(), 2)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	node2, fh2 := mustOpen(t, &fsbackendtest.Client{R: fsbackend.Resolve(again)}, "hidden")
	var st [2]unix.Stat_t
	for i, h := range []struct {
		t        *tree
		node, fh uint64
	}{{clients[2].R.Backend.(*tree), node, fh}, {again.(*tree), node2, fh2}} {
		open, errno := h.t.pin(h.node, h.fh)
		if errno != 0 {
			t.Fatal(errno)
		}
		errno = sys.Fstat(open.file.Int(), &st[i])
		h.t.unpin(open)
		if errno != 0 {
			t.Fatal(errno)
		}
	}
	if st[0].Ino != st[1].Ino || st[0].Dev != st[1].Dev {
		t.Errorf("two backends read files %d:%d and %d:%d, expected one", st[0].Dev, st[0].Ino, st[1].Dev, st[1].Ino)
	}
	for path, want := range map[string]string{"nowhere": "no such file", strings.TrimPrefix(dir, "/") + "/none.tar": "no such file"} {
		l, err := c.Layers(t.Context(), "", path)
		if err == nil {
			_, err = l.Open(t.Context(), 0)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, expected %q", path, err, want)
		}
	}
	if _, err := c.Layers(t.Context(), "data", "x"); err == nil || !strings.Contains(err.Error(), fmt.Sprint(unix.EINVAL)) {
		t.Errorf("with data: %v", err)
	}
}
