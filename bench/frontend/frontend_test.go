package frontend_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sluicefs/sluice/bench/frontend"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/virtiofs"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if dir, err := tree(); err == nil {
			_ = os.RemoveAll(dir)
		}
		os.Exit(code)
	}))
}

// tree is made once, for all tests.
var tree = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "frontend-")
	if err != nil {
		return "", err
	}
	return dir, frontend.MakeTree(dir)
})

// serve serves the tree, as wrap changes it, to one front-end, and returns the socket.
func serve(t *testing.T, dir string, queues int, wrap func(*passthrough.FS) fsbackend.Backend) string {
	t.Helper()
	fs, err := passthrough.New(passthrough.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	server, err := fuseserver.New(fuseserver.Config{Backend: wrap(fs)})
	if err != nil {
		t.Fatal(err)
	}
	device, err := virtiofs.New(virtiofs.Config{Server: server, NumRequestQueues: queues, PollWindow: virtiofs.PollNever})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := l.AcceptUnix()
		if err != nil {
			return // the test has ended without a connection
		}
		defer conn.Close()
		hangUp.Store(func() { _ = conn.CloseWrite() })
		_ = device.Serve(context.Background(), conn)
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-ended
		if err := device.Close(); err != nil {
			t.Errorf("close the device: %v", err)
		}
	})
	return socket
}

// hangUp is a func() that makes the server that was connected to last hang up.
var hangUp atomic.Value

func honest(fs *passthrough.FS) fsbackend.Backend { return fs }

// connect makes the tree, serves it and connects to it.
func connect(t *testing.T, c frontend.Config, wrap func(*passthrough.FS) fsbackend.Backend) *frontend.FrontEnd {
	t.Helper()
	dir, err := tree()
	if err != nil {
		t.Fatal(err)
	}
	c.Socket = serve(t, dir, max(c.Queues, 1), wrap)
	f, err := frontend.Connect(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestWorkloads(t *testing.T) {
	dir, err := tree()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		config frontend.Config
	}{
		{"pages, asleep", frontend.Config{Depth: 4, Dir: dir}},
		{"pages, polling", frontend.Config{Depth: 4, Wait: frontend.Poll, Dir: dir}},
		{"contiguous, asleep, depth 1", frontend.Config{Layout: frontend.Contiguous}},
		{"contiguous, polling, 2 queues", frontend.Config{Depth: 3, Queues: 2, Layout: frontend.Contiguous, Wait: frontend.Poll}},
		{"pages, asleep, 2 queues", frontend.Config{Depth: 16, Queues: 2, Dir: dir}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := connect(t, tt.config, honest)
			for _, w := range frontend.Workloads() {
				began, ended := false, false
				const ops = 101
				res, err := f.Run(t.Context(), w, frontend.Limit{Ops: ops, Begin: func() { began = true }, End: func() { ended = true }})
				if err != nil {
					t.Fatal(err)
				}
				if res.Ops != ops || res.Requests != ops*uint64(w.Requests) {
					t.Errorf("%s: %d operations with %d requests, expected %d with %d each", w.Name, res.Ops, res.Requests, ops, w.Requests)
				}
				if res.Elapsed <= 0 || res.P50 <= 0 || res.P99 < res.P50 || res.P999 < res.P99 || res.P999 > 2*res.Elapsed {
					t.Errorf("%s: %v with percentiles %v, %v, %v", w.Name, res.Elapsed, res.P50, res.P99, res.P999)
				}
				if tt.config.Wait == frontend.Sleep && (res.Kicks == 0 || res.Notifications == 0) || tt.config.Wait == frontend.Poll && res.Notifications > 2 {
					t.Errorf("%s: %d kicks and %d notifications", w.Name, res.Kicks, res.Notifications)
				}
				if !began || !ended {
					t.Errorf("%s: Begin was called: %t, End was called: %t", w.Name, began, ended)
				}
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	if left, err := os.ReadDir(filepath.Join(dir, "scratch")); err != nil || len(left) > 0 {
		t.Errorf("%d files are left in scratch, %v", len(left), err)
	}
}

func TestNegotiated(t *testing.T) {
	f := connect(t, frontend.Config{}, honest)
	defer f.Close()
	const all = fuseproto.FUSE_INIT_EXT | fuseproto.FUSE_ASYNC_READ | fuseproto.FUSE_BIG_WRITES | fuseproto.FUSE_MAX_PAGES | fuseproto.FUSE_DO_READDIRPLUS |
		fuseproto.FUSE_PARALLEL_DIROPS | fuseproto.FUSE_ATOMIC_O_TRUNC | fuseproto.FUSE_HANDLE_KILLPRIV_V2 | fuseproto.FUSE_SUBMOUNTS
	if got := f.Negotiated(); got&all != all || got&fuseproto.FUSE_OVER_IO_URING != 0 {
		t.Errorf("flags %#x were negotiated, expected %#x to be among them", got, all)
	}
}

// TestColdNamesGoRound looks every name up several times.
func TestColdNamesGoRound(t *testing.T) {
	f := connect(t, frontend.Config{Depth: 8, Wait: frontend.Poll}, honest)
	defer f.Close()
	w, _ := frontend.Find("lookup-cold")
	if res, err := f.Run(t.Context(), w, frontend.Limit{Ops: 50_000}); err != nil || res.Ops != 50_000 {
		t.Errorf("%d lookups, %v", res.Ops, err)
	}
}

func TestTimeAndDepthAndContext(t *testing.T) {
	f := connect(t, frontend.Config{Depth: 8}, honest)
	defer f.Close()
	w, _ := frontend.Find("getattr")
	for depth := range 9 {
		const limit = 20 * time.Millisecond
		if res, err := f.Run(t.Context(), w, frontend.Limit{Time: limit, Depth: depth}); err != nil || res.Ops == 0 || res.Elapsed < limit {
			t.Errorf("depth %d: %d operations in %v, %v", depth, res.Ops, res.Elapsed, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	if res, err := f.Run(ctx, w, frontend.Limit{Time: time.Hour, Begin: cancel}); !errors.Is(err, context.Canceled) || res.Elapsed > time.Minute {
		t.Errorf("ended after %v with %v", res.Elapsed, err)
	}
	if _, err := f.Run(t.Context(), w, frontend.Limit{Ops: 1}); err != nil {
		t.Errorf("after a Run that was cancelled: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	f := connect(t, frontend.Config{Depth: 8, RingSize: 128}, honest)
	defer f.Close()
	getattr, _ := frontend.Find("getattr")
	seq1m, _ := frontend.Find("seq1m")
	for _, tt := range []struct {
		w    frontend.Workload
		l    frontend.Limit
		want string
	}{
		{getattr, frontend.Limit{}, "neither"},
		{getattr, frontend.Limit{Ops: 1, Depth: 9}, "depth 9"},
		{frontend.Workload{Name: "own"}, frontend.Limit{Ops: 1}, "no workload"},
		{seq1m, frontend.Limit{Ops: 1}, "a ring of 128 descriptors has no room for FUSE_READ with 260"},
	} {
		if _, err := f.Run(t.Context(), tt.w, tt.l); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s with %+v: %v, expected %q", tt.w.Name, tt.l, err, tt.want)
		}
	}
	if _, ok := frontend.Find("nothing"); ok {
		t.Error("a workload that is not there was found")
	}
	for _, c := range []frontend.Config{{}, {Socket: "/nowhere", Depth: 5000}, {Socket: "/nowhere", Depth: 64, RingSize: 32}, {Socket: "/nowhere/at/all"}} {
		if _, err := frontend.Connect(t.Context(), c); err == nil {
			t.Errorf("connected with %+v", c)
		}
	}
}

// liar is a server that does not what it says.
type liar struct {
	*passthrough.FS
	getattr bool // fails
	hold    chan struct{}
	once    sync.Once
}

func (l *liar) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	if l.hold != nil {
		<-l.hold
	}
	if l.getattr {
		return syscall.EIO
	}
	errno := l.FS.Getattr(c, in, out)
	out.Size++
	return errno
}

func (l *liar) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	other := *in
	other.Offset ^= 4096
	return l.FS.Read(c, &other, dst)
}

func (l *liar) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, fsbackend.Errno) {
	other := *in
	l.once.Do(func() { other.Offset ^= 4096 }) // one is enough
	return l.FS.Write(c, &other, src)
}

func (l *liar) Statfs(c *fsbackend.Context, node uint64, out *fuseproto.StatfsOut) fsbackend.Errno {
	return fsbackend.OK
}

func TestWrongAnswers(t *testing.T) {
	dir, err := tree()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		workload string
		errno    bool
		dir      string
		want     string
	}{
		{"getattr", true, "", "failed: input/output error (errno 5)"},
		{"getattr", false, "", "FUSE_GETATTR: small file"},
		{"read4k", false, "", "FUSE_READ of 4096 bytes at"},
		{"seq1m", false, "", "FUSE_READ of 1048576 bytes at"},
		{"write4k", false, dir, "clean up: verify what was written at"},
		{"write4k", false, "", "clean up: verify what was written at"},
		{"statfs", false, "", "FUSE_STATFS: 0 blocks"},
	} {
		t.Run(tt.workload, func(t *testing.T) {
			f := connect(t, frontend.Config{Depth: 2, Dir: tt.dir}, func(fs *passthrough.FS) fsbackend.Backend { return &liar{FS: fs, getattr: tt.errno} })
			defer f.Close()
			w, _ := frontend.Find(tt.workload)
			_, err := f.Run(t.Context(), w, frontend.Limit{Ops: 20})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, expected %q", err, tt.want)
			}
			if _, again := f.Run(t.Context(), w, frontend.Limit{Ops: 1}); !errors.Is(again, errors.Unwrap(err)) {
				t.Errorf("once more: %v, expected to hear of %v", again, err)
			}
		})
	}
}

// TestWrittenElsewhere has a server write what it says, but not where the host looks.
func TestWrittenElsewhere(t *testing.T) {
	elsewhere := t.TempDir()
	f, err := os.Create(filepath.Join(elsewhere, "written"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(64<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	fe := connect(t, frontend.Config{Dir: elsewhere}, honest)
	defer fe.Close()
	w, _ := frontend.Find("write128k")
	if _, err := fe.Run(t.Context(), w, frontend.Limit{Ops: 2}); err == nil || !strings.Contains(err.Error(), "is 0x0000000000000000") {
		t.Errorf("%v, expected zeros to be found", err)
	}
}

func TestStall(t *testing.T) {
	for _, wait := range []frontend.Wait{frontend.Sleep, frontend.Poll} {
		l := &liar{hold: make(chan struct{})}
		f := connect(t, frontend.Config{Depth: 2, Wait: wait, Stall: 200 * time.Millisecond}, func(fs *passthrough.FS) fsbackend.Backend {
			l.FS = fs
			return l
		})
		w, _ := frontend.Find("getattr")
		_, err := f.Run(t.Context(), w, frontend.Limit{Ops: 10})
		if !errors.Is(err, frontend.ErrStall) || !strings.Contains(err.Error(), "2 under way") {
			t.Errorf("%v, expected ErrStall with 2 requests under way", err)
		}
		t.Log(err)
		close(l.hold)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestServerGoes has the server hang up in the middle of a Run.
func TestServerGoes(t *testing.T) {
	for _, wait := range []frontend.Wait{frontend.Sleep, frontend.Poll} {
		l := &liar{hold: make(chan struct{})}
		f := connect(t, frontend.Config{Wait: wait, Stall: time.Hour}, func(fs *passthrough.FS) fsbackend.Backend {
			l.FS = fs
			return l
		})
		w, _ := frontend.Find("getattr")
		_, err := f.Run(t.Context(), w, frontend.Limit{Ops: 10, Begin: hangUp.Load().(func())})
		if err == nil || !strings.Contains(err.Error(), "closed the connection") {
			t.Errorf("%v, expected that the server has gone", err)
		}
		close(l.hold)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestMakeTreeAgain(t *testing.T) {
	dir, err := tree()
	if err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(dir, "scratch", "left")
	if err := os.WriteFile(left, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	before, err := os.Stat(data)
	if err != nil || before.Size() != 64<<20 {
		t.Fatalf("data is %v, %v", before, err)
	}
	if err := frontend.MakeTree(dir); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(data)
	if err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("data was made again: %v, %v", after, err)
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("what was left in scratch is still there: %v", err)
	}
	if err := frontend.MakeTree("/dev/null/nowhere"); err == nil {
		t.Error("made a tree in a file")
	}
}
