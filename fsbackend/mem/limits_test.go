package mem

import (
	"bytes"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

const root = fsbackendtest.Root

func newTree(t *testing.T, config Config) (*FS, *fsbackendtest.Client) {
	t.Helper()
	f, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := check(f); err != nil {
			t.Error(err)
		}
	})
	return f, &fsbackendtest.Client{R: fsbackend.Resolve(f)}
}

func TestValidate(t *testing.T) {
	for _, config := range []Config{{MaxBytes: -1}, {MaxInodes: -1}} {
		if _, err := New(config); err == nil {
			t.Errorf("New accepts %+v", config)
		}
	}
}

func TestByteLimit(t *testing.T) {
	f, c := newTree(t, Config{MaxBytes: 64 << 10})
	file, errno := c.Create(root, "f", unix.O_RDWR, 0o644)
	if errno != 0 {
		t.Fatal(errno)
	}
	n, errno := c.Write(file.NodeId, file.Fh, 0, make([]byte, 100<<10), unix.O_RDWR)
	if errno != 0 || n < 48<<10 || n > 64<<10 {
		t.Errorf("WRITE of 100 KiB where 64 KiB are allowed took %d bytes, %v, expected nearly 64 KiB", n, errno)
	}
	if _, errno := c.Write(file.NodeId, file.Fh, 1<<30, []byte("x"), unix.O_RDWR); errno != unix.ENOSPC {
		t.Errorf("WRITE where all is full: %v, expected ENOSPC", errno)
	}
	if errno := c.Fallocate(file.NodeId, file.Fh, 0, 1<<62, 0); errno != unix.ENOSPC {
		t.Errorf("FALLOCATE of 2^62 bytes: %v, expected ENOSPC", errno)
	}
	if st, errno := c.Statfs(root); errno != 0 || st.Bfree != 0 || st.Blocks != 16 {
		t.Errorf("STATFS of a full tree: %+v, %v, expected none of 16 blocks free", st, errno)
	}
	for errno = 0; errno == 0; {
		errno = c.Setxattr(root, fmt.Sprint("user.", f.bytes.Load()), make([]byte, 100), 0)
	}
	if errno != unix.ENOSPC {
		t.Errorf("SETXATTR where all is full: %v, expected ENOSPC", errno)
	}
	for i := 0; errno != 0 && i < 100; i++ {
		_, errno = c.Symlink(root, fmt.Sprint(i), strings.Repeat("x", 4000))
	}
	if errno != unix.ENOSPC {
		t.Errorf("SYMLINK where all is full: %v, expected ENOSPC", errno)
	}
	if errno := c.Truncate(file.NodeId, 0); errno != 0 {
		t.Fatal(errno)
	}
	if st, _ := c.Statfs(root); st.Bfree < 12 {
		t.Errorf("%d of 16 blocks are free after the file was truncated", st.Bfree)
	}
}

func TestInodeLimit(t *testing.T) {
	_, c := newTree(t, Config{MaxInodes: 3})
	for i, expected := range []fsbackend.Errno{0, 0, unix.ENOSPC} {
		if _, errno := c.Mkdir(root, fmt.Sprint(i), 0o755); errno != expected {
			t.Errorf("MKDIR %d of at most 2: %v, expected %v", i, errno, expected)
		}
	}
	if st, errno := c.Statfs(root); errno != 0 || st.Files != 3 || st.Ffree != 0 {
		t.Errorf("STATFS: %+v, %v, expected none of 3 inodes free", st, errno)
	}
	if errno := c.Rename(root, "0", root, "2", unix.RENAME_WHITEOUT); errno != unix.ENOSPC {
		t.Errorf("RENAME_WHITEOUT without an inode left: %v, expected ENOSPC", errno)
	}
	if _, errno := c.Lookup(root, "0"); errno != 0 {
		t.Errorf("LOOKUP after the RENAME_WHITEOUT that failed: %v", errno)
	}
}

func TestLinkLimit(t *testing.T) {
	f, c := newTree(t, Config{})
	file, errno := c.Create(root, "f", unix.O_RDWR, 0o644)
	if errno != 0 {
		t.Fatal(errno)
	}
	f.nodes[file.NodeId].nlink = MaxLinks
	f.root.nlink = MaxLinks
	if _, errno := c.Link(file.NodeId, root, "g"); errno != unix.EMLINK {
		t.Errorf("LINK of a file with %d links: %v, expected EMLINK", MaxLinks, errno)
	}
	if _, errno := c.Mkdir(root, "d", 0o755); errno != unix.EMLINK {
		t.Errorf("MKDIR in a directory with %d links: %v, expected EMLINK", MaxLinks, errno)
	}
	f.nodes[file.NodeId].nlink, f.root.nlink = 1, 2
}

// TestShortSource has guest memory vanish under a WRITE: what was copied before the fault must not show up beyond the end
// of the file, where a later truncation would let the guest find it.
func TestShortSource(t *testing.T) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	page := os.Getpagesize()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.Pwrite(fd, bytes.Repeat([]byte{0xee}, page), 0); err != nil {
		t.Fatal(err)
	}
	guest, err := unix.Mmap(fd, 0, 2*page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(guest) }()

	_, c := newTree(t, Config{}) // its check looks at the bytes beyond the size
	file, errno := c.Create(root, "f", unix.O_RDWR, 0o644)
	if errno != 0 {
		t.Fatal(errno)
	}
	n, errno := c.Write(file.NodeId, file.Fh, 100, guest, unix.O_RDWR)
	if errno != 0 || int(n) != pageSize-100 {
		t.Errorf("WRITE whose memory ends in its second page took %d bytes, %v, expected the first page's %d", n, errno, pageSize-100)
	}
	if attr, errno := c.Getattr(file.NodeId); errno != 0 || attr.Size != pageSize {
		t.Errorf("size is %d, %v, expected %d", attr.Size, errno, pageSize)
	}
	if n, errno := c.Write(file.NodeId, file.Fh, 0, guest[page:], unix.O_RDWR); errno != unix.EFAULT {
		t.Errorf("WRITE from memory that is gone: %d, %v, expected EFAULT", n, errno)
	}
	f := c.R.Backend.(*FS)
	read := &fuseproto.ReadIn{Fh: file.Fh}
	read.NodeId = file.NodeId
	if errno := f.Read(new(fsbackend.Context), read, fsbackendtest.NewSink(guest[page:], 0)); errno != unix.EFAULT {
		t.Errorf("READ to memory that is gone: %v, expected EFAULT", errno)
	}
}

func TestFeatures(t *testing.T) {
	f, c := newTree(t, Config{Now: func() time.Time { return time.Unix(42, 7) }})
	f.Init(fsbackend.Features{Flags: fuseproto.FUSE_DONT_MASK | fuseproto.FUSE_HANDLE_KILLPRIV_V2})
	ctx := &fsbackend.Context{Secctx: []fsbackend.Secctx{{Name: fsbackend.MakeName("security.capability"), Value: []byte("caps")}}}
	in := &fuseproto.CreateIn{Flags: unix.O_RDWR, Mode: 0o777, Umask: 0o027}
	in.NodeId = root
	var out fuseproto.CreateOut
	if errno := f.Create(ctx, in, fsbackend.MakeName("f"), &out); errno != 0 {
		t.Fatal(errno)
	}
	if out.Mode&0o7777 != 0o750 || out.Mtime != 42 || out.Mtimensec != 7 {
		t.Errorf("mode %#o, mtime %d.%d, expected 0750 by the umask, 42.7 by the clock", out.Mode&0o7777, out.Mtime, out.Mtimensec)
	}
	if value, _, errno := c.Getxattr(out.NodeId, "security.capability", 100); errno != 0 || string(value) != "caps" {
		t.Errorf("the new file's security context is %q, %v", value, errno)
	}
	if _, errno := c.Write(out.NodeId, out.Fh, 0, []byte("x"), unix.O_RDWR); errno != 0 {
		t.Fatal(errno)
	}
	if _, _, errno := c.Getxattr(out.NodeId, "security.capability", 100); errno != unix.ENODATA {
		t.Errorf("capabilities after a WRITE: %v, expected ENODATA", errno)
	}
	ctx.Secctx[0].Name = fsbackend.MakeName("nowhere")
	if errno := f.Create(ctx, in, fsbackend.MakeName("g"), &out); errno != unix.EOPNOTSUPP {
		t.Errorf("CREATE with a security context that cannot be kept: %v, expected EOPNOTSUPP", errno)
	}
	if _, errno := c.Lookup(root, "g"); errno != unix.ENOENT {
		t.Errorf("LOOKUP after the CREATE that failed: %v, expected ENOENT", errno)
	}
}

// TestStrict holds the tree to what other backends need not do.
func TestStrict(t *testing.T) {
	f, c := newTree(t, Config{})
	file, errno := c.Create(root, "f", unix.O_RDWR, 0o644)
	if errno != 0 {
		t.Fatal(errno)
	}
	if errno := c.Unlink(root, "f"); errno != 0 {
		t.Fatal(errno)
	}
	f.Forget(file.NodeId, 1)
	if _, errno := c.Getattr(file.NodeId); errno != unix.ESTALE {
		t.Errorf("GETATTR of an open file that is forgotten: %v, expected ESTALE", errno)
	}
	if n, errno := c.Write(file.NodeId, file.Fh, 0, []byte("x"), unix.O_RDWR); n != 1 || errno != 0 {
		t.Errorf("WRITE to an open file that is forgotten: %d, %v, expected 1 byte", n, errno)
	}
	c.Release(file.NodeId, file.Fh)
	if len(f.nodes) != 1 || f.bytes.Load() != 0 {
		t.Errorf("%d nodes and %d bytes are left after RELEASE, expected the root", len(f.nodes), f.bytes.Load())
	}
	if err := f.WriteFile("linked", nil); err != nil {
		t.Fatal(err)
	}
	e, _ := c.Lookup(root, "linked")
	f.Forget(e.NodeId, 1)
	if _, errno := c.Getattr(e.NodeId); errno != unix.ESTALE {
		t.Errorf("GETATTR of a forgotten file: %v, expected ESTALE", errno)
	}
}

func TestPaths(t *testing.T) {
	f, _ := newTree(t, Config{MaxBytes: 1 << 20})
	if err := f.WriteFile("a/b/c", []byte("deep")); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteFile("a/b/c", []byte("new")); err != nil {
		t.Fatal(err)
	}
	if got, err := f.ReadFile("a/b/c"); err != nil || string(got) != "new" {
		t.Errorf("ReadFile: %q, %v", got, err)
	}
	for _, path := range []string{"", "/a", "a/../b", "a/b/c/d", "a/b"} {
		if err := f.WriteFile(path, nil); err == nil {
			t.Errorf("WriteFile(%q) succeeds", path)
		}
	}
	for _, path := range []string{"none", "a", "a/b/c/d"} {
		if _, err := f.ReadFile(path); err == nil {
			t.Errorf("ReadFile(%q) succeeds", path)
		}
	}
	if err := f.WriteFile("big", make([]byte, 2<<20)); err == nil {
		t.Error("WriteFile of more than the limit succeeds")
	}
}

func BenchmarkRead4K(b *testing.B) {
	f, err := New(Config{})
	if err != nil {
		b.Fatal(err)
	}
	if err := f.WriteFile("f", make([]byte, 1<<20)); err != nil {
		b.Fatal(err)
	}
	c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
	e, _ := c.Lookup(root, "f")
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		b.Fatal(errno)
	}
	r := newReader(e.NodeId, fh)
	b.ReportAllocs()
	b.SetBytes(4096)
	for b.Loop() {
		if errno := r.read(f); errno != 0 {
			b.Fatal(errno)
		}
	}
}
