package lazyimage

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// counting is n bytes that say where they are.
func counting(n int) string {
	b := make([]byte, n)
	for i := 0; i+4 <= n; i += 4 {
		binary.LittleEndian.PutUint32(b[i:], uint32(i))
	}
	return string(b)
}

// inline makes one READ where it may not sleep.
func (i *image) inline(node, fh, off uint64, n int) ([]byte, fsbackend.Errno) {
	return i.once(&fsbackend.Context{}, node, fh, off, n)
}

func (i *image) once(c *fsbackend.Context, node, fh, off uint64, n int) ([]byte, fsbackend.Errno) {
	b := make([]byte, n)
	dst := fsbackendtest.NewSink(b, 0)
	in := &fuseproto.ReadIn{Fh: fh, Offset: off, Size: uint32(n)}
	in.NodeId = node
	errno := i.R.Read(c, in, dst)
	return b[:dst.Written()], errno
}

func (i *image) opened(t testing.TB, p string) (node, fh uint64) {
	t.Helper()
	node = i.walk(t, p).NodeId
	fh, errno := i.Open(node, unix.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	return node, fh
}

// chunked is an image of one file, "f", of n bytes in chunks of some size.
func chunked(t testing.TB, n, chunk int, cfg Config) *image {
	s := new(fake)
	s.add(t, pack(t, file{"f", counting(n), tar.Header{}}), chunk)
	cfg.Merge = true
	return open(t, s, cfg)
}

// What is not here is never waited for on a thread that may not sleep, and what is here never needs another one.
func TestReadMayBlock(t *testing.T) {
	i := chunked(t, 64<<10, 4096, Config{ReadAhead: -1})
	node, fh := i.opened(t, "f")
	data := counting(64 << 10)
	if b, errno := i.inline(node, fh, 0, 100); errno != fsbackend.ErrMayBlock || len(b) > 0 {
		t.Errorf("of nothing: %d bytes, %v", len(b), errno)
	}
	if i.store.fetched() != 0 {
		t.Error("a chunk was asked for where nobody may wait")
	}
	if b, errno := i.Read(node, fh, 100, 50); errno != 0 || string(b) != data[100:150] {
		t.Errorf("%d bytes, %v", len(b), errno)
	}
	if i.store.fetched() != 1 {
		t.Errorf("%d chunks were asked for, expected 1", i.store.fetched())
	}
	if b, errno := i.inline(node, fh, 50, 4046); errno != 0 || string(b) != data[50:4096] {
		t.Errorf("of an open chunk: %d bytes, %v", len(b), errno)
	}
	// Up to where the next chunk is missing it is read; the next call is for the rest.
	if b, errno := i.inline(node, fh, 4000, 4096); errno != fsbackend.ErrMayBlock || string(b) != data[4000:4096] {
		t.Errorf("of an open chunk and a missing one: %d bytes, %v", len(b), errno)
	}
	if b, errno := i.Read(node, fh, 0, 1<<20); errno != 0 || string(b) != data {
		t.Errorf("all: %d bytes, %v", len(b), errno)
	}
	if i.store.fetched() != 16 {
		t.Errorf("%d chunks were asked for, expected 16", i.store.fetched())
	}
}

// T-D2, T-D13: readers of one chunk at once ask for it once, and a small READ for one chunk.
func TestOneRequest(t *testing.T) {
	i := chunked(t, 1<<20, 64<<10, Config{ReadAhead: -1})
	begun, arrived := make(chan struct{}), make(chan struct{})
	i.store.hook = func(int, uint32) error {
		close(begun)
		<-arrived
		return nil
	}
	node, fh := i.opened(t, "f")
	var group sync.WaitGroup
	for n := range 8 {
		group.Go(func() {
			off := uint64(3*64<<10 + n*4096)
			if b, errno := i.Read(node, fh, off, 4096); errno != 0 || string(b) != counting(1 << 20)[off:off+4096] {
				t.Errorf("%d bytes, %v", len(b), errno)
			}
		})
	}
	<-begun
	// Who is not waited for any more does not wait.
	cancel := make(chan struct{})
	close(cancel)
	if _, errno := i.once(&fsbackend.Context{MayBlock: true, Cancel: cancel}, node, fh, 3*64<<10, 10); errno != unix.EINTR {
		t.Errorf("cancelled: %v", errno)
	}
	close(arrived)
	group.Wait()
	if n := i.store.fetched(); n != 1 {
		t.Errorf("the chunk was asked for %d times", n)
	}
}

// Errors are EIO for who needs that chunk, and gone when the chunk can be had.
func TestReadErrors(t *testing.T) {
	i := chunked(t, 8192, 4096, Config{ReadAhead: -1})
	node, fh := i.opened(t, "f")
	var fail error
	i.store.hook = func(_ int, index uint32) error {
		if index == 1 {
			return fail
		}
		return nil
	}
	for _, fail = range []error{store.ErrUnavailable, store.ErrCorrupt, errBroken} {
		if b, errno := i.Read(node, fh, 0, 8192); errno != unix.EIO {
			t.Errorf("%v: %d bytes, %v, expected EIO", fail, len(b), errno)
		}
		if b, errno := i.Read(node, fh, 0, 4096); errno != 0 || len(b) != 4096 {
			t.Errorf("the other chunk: %d bytes, %v", len(b), errno)
		}
	}
	fail = nil
	good := i.store.data[0][1]
	for _, bad := range [][]byte{good[:4095], append(slices.Clone(good), 0), nil} {
		i.store.data[0][1] = bad
		if b, errno := i.Read(node, fh, 4096, 10); errno != unix.EIO || len(b) > 0 {
			t.Errorf("a chunk of %d bytes: %d, %v, expected EIO", len(bad), len(b), errno)
		}
	}
	i.store.data[0][1] = good
	if b, errno := i.Read(node, fh, 0, 8192); errno != 0 || string(b) != counting(8192) {
		t.Errorf("repaired: %d bytes, %v", len(b), errno)
	}
	// One that somebody cuts off is asked for again.
	s := i.fs.chunks.pin(1)
	if err := s.file.Truncate(100); err != nil {
		t.Fatal(err)
	}
	i.fs.chunks.unpin(s)
	if b, errno := i.Read(node, fh, 4096, 4096); errno != unix.EIO {
		t.Errorf("cut off: %d bytes, %v, expected EIO", len(b), errno)
	}
	if b, errno := i.Read(node, fh, 0, 8192); errno != 0 || string(b) != counting(8192) {
		t.Errorf("after that: %d bytes, %v", len(b), errno)
	}
	// And so is one that is, while others read it, once they are done.
	s = i.fs.chunks.pin(1)
	_ = s.file.Truncate(100)
	if _, errno := i.Read(node, fh, 4096, 4096); errno != unix.EIO {
		t.Errorf("cut off and in use: %v, expected EIO", errno)
	}
	i.fs.chunks.unpin(s)
	if _, errno := i.Read(node, fh, 4096, 4096); errno != unix.EIO {
		t.Errorf("cut off: %v, expected EIO", errno)
	}
	if b, errno := i.Read(node, fh, 0, 8192); errno != 0 || string(b) != counting(8192) {
		t.Errorf("after that: %d bytes, %v", len(b), errno)
	}
}

// The budget of descriptors holds whoever reads what, and the data is right.
func TestChunkCache(t *testing.T) {
	const size, chunk, budget = 256 << 10, 4096, 5
	i := chunked(t, size, chunk, Config{MaxFDs: budget})
	data := counting(size)
	node, fh := i.opened(t, "f")
	var group sync.WaitGroup
	for n := range 6 {
		group.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(n)))
			for range 300 {
				off := rnd.IntN(size)
				length := rnd.IntN(3*chunk) + 1
				b, errno := i.Read(node, fh, uint64(off), length)
				if errno != 0 || string(b) != data[off:min(off+length, size)] {
					t.Errorf("READ of %d at %d: %d bytes, %v", length, off, len(b), errno)
					return
				}
			}
		})
	}
	group.Wait()
	i.fs.tasks.Wait()
	if n := i.fs.chunks.open.Load(); n > budget || n < 1 {
		t.Errorf("%d descriptors are open, expected 1 to %d", n, budget)
	}
	for n := range i.fs.chunks.slots {
		if p := i.fs.chunks.slots[n].pins.Load(); p != 0 && p != busy {
			t.Errorf("slot %d has %d pins", n, p)
		}
	}
	if len(i.fs.chunks.flights) > 0 || i.fs.chunks.ahead != 0 {
		t.Errorf("%d flights are left, %d ahead", len(i.fs.chunks.flights), i.fs.chunks.ahead)
	}
}

// Where every slot is in use, a chunk is read all the same, and closed after.
func TestChunkCacheFull(t *testing.T) {
	i := chunked(t, 16<<10, 4096, Config{MaxFDs: 1, ReadAhead: -1})
	node, fh := i.opened(t, "f")
	if _, errno := i.Read(node, fh, 0, 1); errno != 0 {
		t.Fatal(errno)
	}
	s := i.fs.chunks.pin(0)
	if b, errno := i.Read(node, fh, 4000, 8192); errno != 0 || string(b) != counting(16 << 10)[4000:4000+8192] {
		t.Errorf("%d bytes, %v", len(b), errno)
	}
	i.fs.tasks.Wait()
	if n := i.fs.chunks.open.Load(); n != 1 {
		t.Errorf("%d descriptors are open, expected 1", n)
	}
	if i.fs.chunks.pin(0) != s {
		t.Error("a chunk in use was put out")
	}
	i.fs.chunks.unpin(s)
	i.fs.chunks.unpin(s)
	if _, errno := i.Read(node, fh, 4096, 1); errno != 0 || i.fs.chunks.pin(0) != nil {
		t.Errorf("the one not in use stays: %v", errno)
	}
}

// The clock puts out what has not been used of late.
func TestChunkCacheRecency(t *testing.T) {
	i := chunked(t, 100*4096, 4096, Config{MaxFDs: 10, ReadAhead: -1})
	node, fh := i.opened(t, "f")
	for n := uint64(1); n < 100; n++ {
		for _, off := range []uint64{n * 4096, 0} {
			if _, errno := i.Read(node, fh, off, 1); errno != 0 {
				t.Fatal(errno)
			}
		}
	}
	if n := i.store.asked["0 0"]; n > 15 {
		t.Errorf("what is used all the time was fetched %d times", n)
	}
	if n := i.store.asked["0 50"]; n != 1 {
		t.Errorf("what is used once was fetched %d times", n)
	}
}

// Who reads in order has the next chunks asked for before it comes to them; who does not, has none.
func TestReadAhead(t *testing.T) {
	const chunk, chunks = 64 << 10, 64
	ahead := func(i *image) []int {
		i.fs.tasks.Wait()
		var got []int
		for n := range chunks {
			if i.fs.chunks.at[n].Load() != 0 {
				got = append(got, n)
			}
		}
		return got
	}
	i := chunked(t, chunk*chunks, chunk, Config{ReadAhead: 256 << 10})
	node, fh := i.opened(t, "f")
	read := func(off uint64, n int) {
		t.Helper()
		b, errno := i.Read(node, fh, off, n)
		if errno != 0 || len(b) != n {
			t.Fatalf("%d bytes, %v", len(b), errno)
		}
	}
	read(0, chunk)
	if got := ahead(i); len(got) != 1 {
		t.Errorf("after one READ %v are here", got)
	}
	read(chunk, chunk)
	if got := ahead(i); len(got) != 4 {
		t.Errorf("after two %v are here, expected twice as much ahead as was read in order", got)
	}
	read(2*chunk, chunk)
	read(3*chunk, chunk)
	read(4*chunk, chunk)
	if got := ahead(i); len(got) != 9 {
		t.Errorf("after five %v are here, expected ReadAhead ahead", got)
	}
	before := i.store.fetched()
	for n := uint64(5); n < chunks; n++ {
		if _, errno := i.inline(node, fh, n*chunk, chunk); errno != 0 {
			t.Errorf("READ of chunk %d, which should be here: %v", n, errno)
			break
		}
		i.fs.tasks.Wait()
	}
	if n := i.store.fetched(); n != chunks || before >= chunks {
		t.Errorf("%d chunks were asked for, expected each once", n)
	}

	i = chunked(t, chunk*chunks, chunk, Config{})
	node, fh = i.opened(t, "f")
	for _, n := range []uint64{50, 3, 40, 20, 0, 60} {
		read(n*chunk+5, 4096)
	}
	if got := ahead(i); !slices.Equal(got, []int{0, 3, 20, 40, 50, 60}) {
		t.Errorf("of READs here and there, %v are here", got)
	}
	// Two READs at a time, in either order, are in order.
	i = chunked(t, chunk*chunks, chunk, Config{})
	node, fh = i.opened(t, "f")
	for n := uint64(0); n < 10; n += 2 {
		read((n+1)*chunk, chunk)
		read(n*chunk, chunk)
	}
	if got := ahead(i); len(got) <= 10 {
		t.Errorf("of READs somewhat out of order, %v are here", got)
	}
}

// What is fetched ahead is bounded, and what is wanted does not wait for it.
func TestReadAheadIsBounded(t *testing.T) {
	const chunk, chunks = 4096, 256
	i := chunked(t, chunk*chunks, chunk, Config{})
	node, fh := i.opened(t, "f")
	read := func(off uint64, n int) {
		if _, errno := i.Read(node, fh, off, n); errno != 0 {
			t.Error(errno)
		}
	}
	read(0, chunk)
	hold := make(chan struct{})
	i.store.hook = func(_ int, index uint32) error {
		if index > 64 {
			<-hold
		}
		return nil
	}
	read(chunk, 64*chunk)
	read(0, chunk) // the same again: nothing more
	i.fs.chunks.mu.Lock()
	flights, counted := len(i.fs.chunks.flights), i.fs.chunks.ahead
	i.fs.chunks.mu.Unlock()
	if flights != maxAhead || counted != maxAhead {
		t.Errorf("%d chunks are fetched ahead, counted as %d, expected %d", flights, counted, maxAhead)
	}
	done := make(chan struct{})
	go func() { // joins one of them
		read(66*chunk, 10)
		close(done)
	}()
	close(hold)
	<-done
	i.fs.tasks.Wait()
	if i.store.asked["0 66"] != 1 {
		t.Errorf("a chunk that was on its way was asked for %d times", i.store.asked["0 66"])
	}
}

// T-D11: files of more than 4 GiB that are mostly holes.
func TestSparse(t *testing.T) {
	const size = 5<<30 + 100
	s := new(fake)
	s.add(t, pack(t, file{"f", counting(3 * 4096), tar.Header{}}), 4096)
	x := &s.layers[0].Entries[0]
	x.Size = size
	offsets := []uint64{4096, 8192, 5<<30 - 4000}
	for n := range x.Chunks {
		x.Chunks[n].Off = offsets[n]
	}
	i := open(t, s, Config{Merge: true})
	want := func(off, n uint64) []byte {
		b := make([]byte, n)
		for c, at := range offsets {
			if from, to := max(at, off), min(at+4096, off+n); from < to {
				copy(b[from-off:to-off], counting(3 * 4096)[uint64(c)*4096+from-at:])
			}
		}
		return b
	}
	node, fh := i.opened(t, "f")
	if e := i.walk(t, "f"); e.Size != size || e.Blocks != 3*8 {
		t.Errorf("it is of %d bytes in %d blocks", e.Size, e.Blocks)
	}
	if b, errno := i.inline(node, fh, 1<<32, 1<<20); errno != 0 || !bytes.Equal(b, make([]byte, 1<<20)) {
		t.Errorf("of a hole: %d bytes, %v", len(b), errno)
	}
	for _, tt := range [][2]uint64{{0, 20000}, {4095, 2}, {4000, 5000}, {12287, 2}, {12288, 4096}, {5<<30 - 8000, 10000}, {5<<30 + 96, 4}, {5<<30 + 50, 1}} {
		n := min(tt[1], size-tt[0])
		if b, errno := i.Read(node, fh, tt[0], int(tt[1])); errno != 0 || !bytes.Equal(b, want(tt[0], n)) {
			t.Errorf("READ of %d at %d: %d bytes, %v", tt[1], tt[0], len(b), errno)
		}
	}
	if b, errno := i.Read(node, fh, size, 10); errno != 0 || len(b) != 0 {
		t.Errorf("READ behind the end: %d bytes, %v", len(b), errno)
	}
	for _, tt := range []struct {
		off    uint64
		whence uint32
		want   uint64
		errno  fsbackend.Errno
	}{
		{0, unix.SEEK_DATA, 4096, 0},
		{5000, unix.SEEK_DATA, 5000, 0},
		{12288, unix.SEEK_DATA, 5<<30 - 4000, 0},
		{5<<30 + 96, unix.SEEK_DATA, 0, unix.ENXIO},
		{size, unix.SEEK_DATA, 0, unix.ENXIO},
		{0, unix.SEEK_HOLE, 0, 0},
		{4096, unix.SEEK_HOLE, 12288, 0},
		{5<<30 - 1, unix.SEEK_HOLE, 5<<30 + 96, 0},
		{size - 1, unix.SEEK_HOLE, size - 1, 0},
		{size, unix.SEEK_HOLE, 0, unix.ENXIO},
	} {
		if got, errno := i.Lseek(node, fh, tt.off, tt.whence); got != tt.want || errno != tt.errno {
			t.Errorf("LSEEK of %d, %d: %d, %v, expected %d, %v", tt.off, tt.whence, got, errno, tt.want, tt.errno)
		}
	}
	whole := chunked(t, 10000, 4096, Config{})
	node, fh = whole.opened(t, "f")
	for whence, want := range map[uint32]uint64{unix.SEEK_DATA: 5000, unix.SEEK_HOLE: 10000} {
		if got, errno := whole.Lseek(node, fh, 5000, whence); got != want || errno != 0 {
			t.Errorf("LSEEK in a file without holes: %d, %v", got, errno)
		}
	}
}

// What a guest does often costs no allocation.
func TestDoesNotAllocate(t *testing.T) {
	s := new(fake)
	s.add(t, pack(t, file{"dir/f", counting(64 << 10), tar.Header{}}, file{"dir/g", "", tar.Header{}}), 16<<10)
	i := open(t, s, Config{Merge: true})
	dir := i.walk(t, "dir").NodeId
	node, fh := i.opened(t, "dir/f")
	dh, errno := i.Opendir(dir)
	if _, e := i.Read(node, fh, 0, 64<<10); errno != 0 || e != 0 {
		t.Fatal(errno, e)
	}
	ctx := &fsbackend.Context{}
	name, missing := fsbackend.MakeName("f"), fsbackend.MakeName("x")
	attrIn, attrOut := &fuseproto.GetattrIn{}, &fuseproto.AttrOut{}
	attrIn.NodeId = node
	out := &fuseproto.EntryOut{}
	buf := make([]byte, 64<<10)
	iov := make([]unix.Iovec, 1)
	dst, list := new(fsbackend.Sink), &fsbackend.DirList{Plus: true}
	readIn, dirIn := &fuseproto.ReadIn{Fh: fh, Size: 40 << 10}, &fuseproto.ReadIn{Fh: dh}
	readIn.NodeId, dirIn.NodeId = node, dir
	xattrIn := &fuseproto.GetxattrIn{}
	xattrIn.NodeId = node
	for what, call := range map[string]func() fsbackend.Errno{
		"LOOKUP":            func() fsbackend.Errno { return i.fs.Lookup(ctx, dir, name, out) },
		"LOOKUP of no name": func() fsbackend.Errno { return i.fs.Lookup(ctx, dir, missing, out) ^ unix.ENOENT },
		"GETATTR":           func() fsbackend.Errno { return i.fs.Getattr(ctx, attrIn, attrOut) },
		"LISTXATTR":         func() fsbackend.Errno { _, errno := i.fs.Listxattr(ctx, xattrIn, dst); return errno },
		"READ over a border": func() fsbackend.Errno {
			iov[0] = sys.MakeIovec(buf)
			dst.Reset(iov, 0, 40<<10)
			readIn.Offset = (readIn.Offset + 4096) % (20 << 10)
			return i.fs.Read(ctx, readIn, dst)
		},
		"READDIRPLUS": func() fsbackend.Errno {
			iov[0] = sys.MakeIovec(buf)
			list.Reset(iov, 0, 4096)
			return i.fs.Readdirplus(ctx, dirIn, list)
		},
	} {
		var errno fsbackend.Errno
		if n := testing.AllocsPerRun(200, func() { errno = call() }); n != 0 || errno != 0 {
			t.Errorf("%s: %v allocations, %v", what, n, errno)
		}
	}
	if dst.Written() != 40<<10 || list.Written() == 0 {
		t.Errorf("%d bytes read, %d listed", dst.Written(), list.Written())
	}
}

// The same over the wire, with a fetcher in another goroutine.
func TestOverTheWire(t *testing.T) {
	s := new(fake)
	data := counting(300_000)
	s.add(t, pack(t, file{"f", data, tar.Header{}}), 10_000)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- store.Serve(os.NewFile(uintptr(fds[1]), "fetcher"), s) }()
	client := store.NewClient(store.ClientConfig{Line: &oneSession{f: os.NewFile(uintptr(fds[0]), "server")}})
	f, err := New(context.Background(), Config{Store: client, Merge: true})
	if err != nil {
		t.Fatal(err)
	}
	i := &image{Client: &fsbackendtest.Client{R: fsbackend.Resolve(f)}, fs: f, store: s}
	if got := i.cat(t, "f"); string(got) != data {
		t.Errorf("%d bytes that are not the %d expected", len(got), len(data))
	}
	if got := string(i.cat(t, stateName+"/"+s.layers[0].Digest+".json")); !strings.HasPrefix(got, `{"digest":"sha256:`) {
		t.Errorf("status %q", got)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// oneSession is a Line with one.
type oneSession struct{ f *os.File }

func (l *oneSession) Next(ctx context.Context) (f *os.File, err error) {
	if f, l.f = l.f, nil; f == nil {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return f, nil
}

func BenchmarkRead(b *testing.B) {
	for _, size := range []int{4096, 128 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			i := chunked(b, 4<<20, 256<<10, Config{})
			node, fh := i.opened(b, "f")
			if _, errno := i.Read(node, fh, 0, 4<<20); errno != 0 {
				b.Fatal(errno)
			}
			ctx, buf, iov, dst := &fsbackend.Context{}, make([]byte, size), make([]unix.Iovec, 1), new(fsbackend.Sink)
			in := &fuseproto.ReadIn{Fh: fh, Size: uint32(size)}
			in.NodeId = node
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				iov[0] = sys.MakeIovec(buf)
				dst.Reset(iov, 0, uint64(size))
				in.Offset = (in.Offset + uint64(size)) % (4 << 20)
				if i.fs.Read(ctx, in, dst) != 0 {
					b.Fatal("it is not here")
				}
			}
		})
	}
}

func BenchmarkLookup(b *testing.B) {
	f, err := New(context.Background(), Config{Store: &fake{layers: []store.Layer{many(100_000)}}, Merge: true})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	i := &image{Client: &fsbackendtest.Client{R: fsbackend.Resolve(f)}, fs: f}
	dir := i.walk(b, "usr/lib/package007/part07").NodeId
	name, ctx, out := fsbackend.MakeName("file-7707.so"), &fsbackend.Context{}, new(fuseproto.EntryOut)
	b.ReportAllocs()
	for b.Loop() {
		f.Lookup(ctx, dir, name, out)
	}
	if out.NodeId == 0 {
		b.Fatal("it is not found")
	}
}

// A slot that has become another chunk's between the look and the pin is not the one that was looked for.
func TestPinOfAnothersSlot(t *testing.T) {
	i := chunked(t, 8192, 4096, Config{ReadAhead: -1})
	node, fh := i.opened(t, "f")
	if _, errno := i.Read(node, fh, 0, 1); errno != 0 {
		t.Fatal(errno)
	}
	c := &i.fs.chunks
	c.at[1].Store(c.at[0].Load())
	if s := c.pin(1); s != nil {
		t.Errorf("chunk 1 is the slot of chunk %d", s.chunk)
	}
	c.at[1].Store(0)
	if n := c.slots[0].pins.Load(); n != 0 {
		t.Errorf("%d pins are left", n)
	}
}
