package lazyimage

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/fuseproto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a Store of layers in memory.
type fake struct {
	layers []store.Layer
	data   [][][]byte // by layer and chunk

	// hook, unless nil, is called for each chunk that is asked for, and its error is the answer.
	hook func(layer int, index uint32) error

	mu     sync.Mutex
	asked  map[string]int // by "layer index"
	notes  []string
	status store.Status
	failed error // Status's

	prefetched  chan struct{} // closed when it is; nil is at once
	unreachable error         // Reach's
	closed      bool
}

func (s *fake) Layers(context.Context) ([]store.Layer, error) { return s.layers, nil }

func (s *fake) Chunk(ctx context.Context, layer int, index uint32) (*os.File, error) {
	s.mu.Lock()
	if s.asked == nil {
		s.asked = make(map[string]int)
	}
	s.asked[fmt.Sprint(layer, " ", index)]++
	s.mu.Unlock()
	if s.hook != nil {
		if err := s.hook(layer, index); err != nil {
			return nil, err
		}
	}
	return memfile(s.data[layer][index])
}

func memfile(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("chunk", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "chunk")
	_, err = f.Write(b)
	return f, err
}

// fetched is how many chunks have been asked for, the same one more than once counted as often.
func (s *fake) fetched() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, times := range s.asked {
		n += times
	}
	return n
}

func (s *fake) Status(context.Context, int) (store.Status, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status, s.failed
}

func (s *fake) Prefetched(ctx context.Context) error {
	if s.prefetched == nil {
		return nil
	}
	select {
	case <-s.prefetched:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *fake) Reach(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unreachable
}

func (s *fake) Note(layer int, path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notes = append(s.notes, fmt.Sprint(layer, " ", path))
}

func (s *fake) Close() error {
	s.closed = true
	return nil
}

// add makes a layer of a tar file, whose contents it cuts into chunks of at most chunk bytes.
func (s *fake) add(t testing.TB, packed []byte, chunk int) {
	t.Helper()
	digest := sha256.Sum256(packed)
	l := store.Layer{Digest: fmt.Sprintf("sha256:%x", digest), Size: int64(len(packed))}
	var data [][]byte
	r := tar.NewReader(bytes.NewReader(packed))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		x := store.Entry{
			Path: strings.Trim(path.Clean("/"+h.Name), "/"), Mode: uint32(h.Mode) & 0o7777, UID: uint32(h.Uid), GID: uint32(h.Gid),
			MtimeSec: h.ModTime.Unix(), MtimeNsec: uint32(h.ModTime.Nanosecond()),
			RdevMajor: uint32(h.Devmajor), RdevMinor: uint32(h.Devminor), Target: strings.TrimPrefix(h.Linkname, "./"),
		}
		switch h.Typeflag {
		case tar.TypeReg:
			x.Mode |= unix.S_IFREG
			x.Size = uint64(h.Size)
		case tar.TypeDir:
			x.Mode |= unix.S_IFDIR
		case tar.TypeSymlink:
			x.Mode |= unix.S_IFLNK
			x.Target = h.Linkname
		case tar.TypeLink:
			x.Hardlink = true
		case tar.TypeFifo:
			x.Mode |= unix.S_IFIFO
		case tar.TypeChar:
			x.Mode |= unix.S_IFCHR
		case tar.TypeBlock:
			x.Mode |= unix.S_IFBLK
		}
		for _, record := range slices.Sorted(maps.Keys(h.PAXRecords)) {
			if name, ok := strings.CutPrefix(record, "SCHILY.xattr."); ok {
				x.Xattrs = append(x.Xattrs, store.Xattr{Name: name, Value: []byte(h.PAXRecords[record])})
			}
		}
		for off := uint64(0); ; {
			b := make([]byte, chunk)
			n, err := io.ReadFull(r, b)
			if n > 0 {
				x.Chunks = append(x.Chunks, store.Span{Off: off, Len: uint64(n), Chunk: uint32(len(l.Chunks))})
				l.Chunks = append(l.Chunks, store.Chunk{Digest: sha256.Sum256(b[:n]), Size: uint32(n)})
				data = append(data, b[:n])
				off += uint64(n)
			}
			if err != nil {
				break
			}
		}
		l.Entries = append(l.Entries, x)
	}
	s.layers, s.data = append(s.layers, l), append(s.data, data)
}

// wire passes the layers through the encoding, which checks them.
func (s *fake) wire(t testing.TB) *fake {
	t.Helper()
	b, err := store.EncodeMeta(s.layers)
	if err != nil {
		t.Fatal(err)
	}
	if s.layers, err = store.DecodeMeta(b); err != nil {
		t.Fatal(err)
	}
	return s
}

// file is one of a tar file. One whose name ends in a slash is a directory.
type file struct {
	name   string
	data   string
	header tar.Header // what is not as usual
}

func pack(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := f.header
		h.Name, h.Size, h.Format = f.name, int64(len(f.data)), tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1_700_000_000, 0)
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(f.name, "/") {
				h.Typeflag = tar.TypeDir
			}
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// image is a backend of layers, in a session.
type image struct {
	*fsbackendtest.Client
	fs    *FS
	store *fake
}

func open(t testing.TB, s *fake, cfg Config) *image {
	t.Helper()
	cfg.Store = s.wire(t)
	f, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil || !s.closed {
			t.Errorf("Close: %v, and the store's: %v", err, s.closed)
		}
		if n := f.chunks.open.Load(); n != 0 {
			t.Errorf("%d descriptors open after Close", n)
		}
	})
	return &image{Client: &fsbackendtest.Client{R: fsbackend.Resolve(f)}, fs: f, store: s}
}

// walk looks the file at p up.
func (i *image) walk(t testing.TB, p string) fuseproto.EntryOut {
	t.Helper()
	out, errno := i.find(p)
	if errno != 0 || out.NodeId == 0 {
		t.Fatalf("LOOKUP along %s: node %d, %v", p, out.NodeId, errno)
	}
	return out
}

func (i *image) find(p string) (out fuseproto.EntryOut, errno fsbackend.Errno) {
	out.NodeId = fsbackendtest.Root
	if p == "" {
		out.Attr, errno = i.Getattr(out.NodeId)
		return out, errno
	}
	for name := range strings.SplitSeq(p, "/") {
		if out, errno = i.Lookup(out.NodeId, name); errno != 0 || out.NodeId == 0 {
			return out, errno
		}
	}
	return out, 0
}

func (i *image) missing(t testing.TB, paths ...string) {
	t.Helper()
	for _, p := range paths {
		if out, errno := i.find(p); errno != unix.ENOENT {
			t.Errorf("LOOKUP along %s: node %d, %v, expected none", p, out.NodeId, errno)
		}
	}
}

// names lists the directory at p.
func (i *image) names(t testing.TB, p string) []string {
	t.Helper()
	node := i.walk(t, p).NodeId
	fh, errno := i.Opendir(node)
	if errno != 0 {
		t.Fatalf("OPENDIR of %s: %v", p, errno)
	}
	defer i.Releasedir(node, fh)
	var names []string
	for off := uint64(0); ; {
		list, errno := i.Readdir(node, fh, off, 4096, off%2 == 0)
		if errno != 0 {
			t.Fatalf("READDIR of %s: %v", p, errno)
		}
		if len(list) == 0 {
			return names
		}
		for _, e := range list {
			if off = e.Off; e.Name != "." && e.Name != ".." {
				names = append(names, e.Name)
			}
		}
	}
}

// cat reads all of a file.
func (i *image) cat(t testing.TB, p string) []byte {
	t.Helper()
	b, errno := i.read(i.walk(t, p).NodeId)
	if errno != 0 {
		t.Fatalf("READ of %s: %v", p, errno)
	}
	return b
}

func (i *image) read(node uint64) ([]byte, fsbackend.Errno) {
	fh, errno := i.Open(node, unix.O_RDONLY)
	if errno != 0 {
		return nil, errno
	}
	defer i.Release(node, fh)
	var all []byte
	for {
		b, errno := i.Read(node, fh, uint64(len(all)), 128<<10)
		if errno != 0 || len(b) == 0 {
			return all, errno
		}
		all = append(all, b...)
	}
}

// The suite.
func TestSuite(t *testing.T) {
	fsbackendtest.RunReadOnly(t, fsbackendtest.ReadOnlyConfig{New: func(t *testing.T) fsbackend.Backend {
		return suiteTree(t, 16<<10, 3)
	}})
}

// suiteTree is a backend of the suite's tree, in chunks of some size, of which so many are kept open.
func suiteTree(t testing.TB, chunk, maxFDs int) *FS {
	t.Helper()
	var files []file
	tree := fsbackendtest.Tree()
	for _, p := range slices.Sorted(maps.Keys(tree)) {
		f := tree[p]
		h := tar.Header{Mode: int64(f.Mode.Perm()), ModTime: f.ModTime}
		data := string(f.Data)
		if f.Mode.Type() == fs.ModeSymlink {
			h.Typeflag, h.Linkname, data = tar.TypeSymlink, data, ""
		}
		files = append(files, file{p, data, h})
	}
	s := new(fake)
	s.add(t, pack(t, files...), chunk)
	f, err := New(context.Background(), Config{Store: s.wire(t), Merge: true, MaxFDs: maxFDs})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

var errBroken = errors.New("broken")
