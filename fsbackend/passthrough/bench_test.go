package passthrough

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// floored is an operation beside the system calls that it cannot do without.
type floored struct {
	name  string
	limit float64 // how many times the floor the whole server may take for it: issue "The fastest virtio-fs server"
	op    func(i int)
	floor func(i int)
	after func() // undoes, unmeasured, what a round has done
	round int    // calls in a round, if not benchRound
}

// benchRound is how many calls of an operation are measured at a time, between as many of its floor's.
const benchRound = 256

// flooredOps are the operations of a guest on a share of its own.
func flooredOps(b *testing.B) []floored {
	dir := b.TempDir()
	for i := range benchRound {
		writeFile(b, fmt.Sprintf("%s/many/file%04d.go", dir, i))
	}
	for i := range 1000 {
		writeFile(b, fmt.Sprintf("%s/listed/some_file_%04d.txt", dir, i))
	}
	if err := os.WriteFile(dir+"/file", make([]byte, 1<<20), 0o644); err != nil {
		b.Fatal(err)
	}
	g := newGuest(b, Config{Dir: dir})
	ok := func(what string, e fsbackend.Errno) {
		if e != fsbackend.OK {
			b.Fatalf("%s: %v", what, e)
		}
	}
	ctx := &fsbackend.Context{}
	f := new(floorCalls)
	openFD := func(path string, flags int) int {
		fd, err := unix.Open(dir+"/"+path, flags|unix.O_CLOEXEC, 0)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = unix.Close(fd) })
		return fd
	}
	var (
		node   = g.lookup("file").NodeId
		many   = g.lookup("many").NodeId
		listed = g.lookup("listed").NodeId
		fh     = g.open(node, unix.O_RDWR)
		dirfh  = g.opendir(listed)
		names  = make([]fsbackend.Name, benchRound)
		fresh  = make([]fsbackend.Name, benchRound)
		nodes  = make([]uint64, benchRound)
		rootFD = openFD("", unix.O_PATH)
		manyFD = openFD("many", unix.O_PATH)
		fileFD = openFD("file", unix.O_PATH)
		rwFD   = openFD("file", unix.O_RDWR)
		listFD = openFD("listed", unix.O_RDONLY)
		file   = fsbackend.MakeName("file")
	)
	for i := range names {
		names[i] = fsbackend.MakeName(fmt.Sprintf("file%04d.go", i))
		fresh[i] = fsbackend.MakeName(fmt.Sprintf("new%04d.o", i))
	}
	for e := range slices.Values(g.readdir(listed, true, 32<<10)) {
		if e.entry.NodeId != 0 {
			g.lookup("listed/" + e.name) // known, and in use
		}
	}
	cname := func(n fsbackend.Name) []byte { return n[:len(n)+1] }
	procfd := g.fs.procfd.Int()
	var (
		get    fuseproto.GetattrIn
		attr   fuseproto.AttrOut
		entry  fuseproto.EntryOut
		open   fuseproto.OpenIn
		opened fuseproto.OpenOut
		rel    fuseproto.ReleaseIn
		read   fuseproto.ReadIn
		write  fuseproto.WriteIn
		create fuseproto.CreateIn
		made   fuseproto.CreateOut
		dirent fsbackend.DirList
		sink   fsbackend.Sink
		src    fsbackend.Source
		iov    = make([]unix.Iovec, 8)
		page   = make([]byte, 32<<10)
	)
	get.NodeId, open.NodeId, rel.NodeId = node, node, node
	open.Flags = unix.O_RDWR
	read.NodeId, read.Fh, read.Size = node, fh, 4096
	write.NodeId, write.Fh, write.Size = node, fh, 4096
	create.NodeId, create.Flags, create.Mode = rootID, unix.O_RDWR|unix.O_EXCL, 0o644
	dirent.Plus = true
	// list reads the large directory in replies of size bytes.
	list := func(size int) func(int) {
		return func(int) {
			for off := uint64(0); ; off = lastOffset(page[:dirent.Written()]) {
				for i := range iov {
					iov[i] = sys.MakeIovec(page[i<<12:][:4096])
				}
				dirent.Reset(iov, 0, uint64(size))
				var in fuseproto.ReadIn
				in.NodeId, in.Fh, in.Offset, in.Size = listed, dirfh, off, uint32(size)
				ok("READDIRPLUS", g.fs.Readdirplus(ctx, &in, &dirent))
				if dirent.Written() == 0 {
					return
				}
			}
		}
	}
	forgetMany := func() {
		for _, n := range nodes {
			g.fs.Forget(n, 1)
		}
	}
	return []floored{
		{
			name: "getattr", limit: 3.0,
			op:    func(int) { ok("GETATTR", g.fs.Getattr(ctx, &get, &attr)) },
			floor: func(int) { f.statxFD(fileFD) },
		},
		{
			name: "lookup-known", limit: 1.8,
			op:    func(int) { ok("LOOKUP", g.fs.Lookup(ctx, rootID, file, &entry)) },
			floor: func(int) { f.fstatat(rootFD, cname(file)) },
		},
		{
			name: "lookup-first", limit: 2.0,
			op: func(i int) {
				ok("LOOKUP", g.fs.Lookup(ctx, many, names[i], &entry))
				nodes[i] = entry.NodeId
			},
			floor: func(i int) {
				fd := f.openat(manyFD, cname(names[i]), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
				f.statxFD(fd)
				f.close(fd)
			},
			after: forgetMany,
		},
		{
			name: "lookup-first+forget", limit: 2.0,
			op: func(i int) {
				ok("LOOKUP", g.fs.Lookup(ctx, many, names[i], &entry))
				g.fs.Forget(entry.NodeId, 1)
			},
			floor: func(i int) {
				fd := f.openat(manyFD, cname(names[i]), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
				f.statxFD(fd)
				f.close(fd)
			},
		},
		{
			name: "open+release", limit: 1.5,
			op: func(int) {
				ok("OPEN", g.fs.Open(ctx, &open, &opened))
				rel.Fh = opened.Fh
				g.fs.Release(ctx, &rel)
			},
			floor: func(int) { f.close(f.reopen(procfd, fileFD, unix.O_RDWR|unix.O_CLOEXEC)) },
		},
		{
			name: "read4k", limit: 1.4,
			op: func(i int) {
				iov[0] = sys.MakeIovec(page[:4096])
				sink.Reset(iov[:1], 0, 4096)
				read.Offset = uint64(i) << 12
				e := g.fs.Read(ctx, &read, &sink)
				if e == fsbackend.ErrMayBlock { // may be said of a cached page, too
					e = g.fs.Read(&g.ctx, &read, &sink)
				}
				ok("READ", e)
			},
			floor: func(i int) { f.vectored(unix.SYS_PREADV, rwFD, uint64(i)<<12) },
		},
		{
			name: "write4k", limit: 1.3,
			op: func(i int) {
				iov[0] = sys.MakeIovec(page[:4096])
				src.Reset(iov[:1], 0, 4096)
				write.Offset = uint64(i) << 12
				_, e := g.fs.Write(ctx, &write, &src)
				ok("WRITE", e)
			},
			floor: func(i int) { f.vectored(unix.SYS_PWRITEV, rwFD, uint64(i)<<12) },
		},
		{name: "readdirplus-1000", limit: 1.6, round: 1, op: list(32 << 10), floor: func(int) { f.list(listFD) }},
		{name: "readdirplus-1000-4k", round: 1, op: list(4 << 10), floor: func(int) { f.list(listFD) }},
		{
			name: "create+unlink", limit: 4,
			op: func(i int) {
				made = fuseproto.CreateOut{}
				ok("CREATE", g.fs.Create(ctx, &create, fresh[i], &made))
				rel := rel
				rel.NodeId, rel.Fh = made.NodeId, made.Fh
				g.fs.Release(ctx, &rel)
				ok("UNLINK", g.fs.Unlink(ctx, rootID, fresh[i]))
				g.fs.Forget(made.NodeId, 1)
			},
			floor: func(i int) {
				fd := f.openat(rootFD, cname(fresh[i]), unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
				f.fstat(fd)
				f.close(fd)
				f.unlinkat(rootFD, cname(fresh[i]), 0)
			},
		},
		{
			name: "mkdir+rmdir",
			op: func(i int) {
				var in fuseproto.MkdirIn
				in.NodeId, in.Mode = rootID, 0o755
				ok("MKDIR", g.fs.Mkdir(ctx, &in, fresh[i], &entry))
				ok("RMDIR", g.fs.Rmdir(ctx, rootID, fresh[i]))
				g.fs.Forget(entry.NodeId, 1)
			},
			floor: func(i int) {
				f.mkdirat(rootFD, cname(fresh[i]))
				f.fstatat(rootFD, cname(fresh[i]))
				f.unlinkat(rootFD, cname(fresh[i]), unix.AT_REMOVEDIR)
			},
		},
	}
}

func writeFile(b *testing.B, path string) {
	b.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil && !os.IsExist(err) {
		b.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(path), 0o644); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkFloor has a guest's operations take turns with the bare system calls that they cannot do without, so that what else the
// machine does is the same for both. Times are the thread's CPU time for one operation, by lower quartiles; x-floor is how many times
// what the bare calls take, by the median of the pairs.
func BenchmarkFloor(b *testing.B) {
	for _, o := range flooredOps(b) {
		b.Run(o.name, func(b *testing.B) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			round := max(o.round, 1)
			if o.round == 0 {
				round = benchRound
			}
			measure := func(f func(int)) time.Duration {
				begin := threadTime()
				for i := range round {
					f(i)
				}
				return threadTime() - begin
			}
			var ops, floors []time.Duration
			var ratios []float64
			for b.Loop() {
				floor := measure(o.floor)
				op := measure(o.op)
				if o.after != nil {
					o.after()
				}
				ops, floors = append(ops, op), append(floors, floor)
				ratios = append(ratios, float64(op)/float64(floor))
			}
			quartile := func(list []time.Duration) float64 {
				slices.Sort(list)
				return float64(list[len(list)/4]) / float64(round)
			}
			slices.Sort(ratios)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(quartile(ops), "cpu-ns/op")
			b.ReportMetric(quartile(floors), "floor-ns/op")
			b.ReportMetric(ratios[len(ratios)/2], "x-floor")
		})
	}
}

// BenchmarkThreads has two threads, each in a directory and with files of its own, at work alone and at the same time, in turns. The
// unit x-alone is how much more CPU time an operation takes when the other thread is at work, too: what they share costs.
func BenchmarkThreads(b *testing.B) {
	g := newGuest(b, Config{Dir: fastDir(b)})
	type worker struct {
		ctx       fsbackend.Context
		dir, node uint64
		names     [64]fsbackend.Name
	}
	var workers [2]*worker
	for i := range workers {
		w := &worker{ctx: fsbackend.Context{Shard: uint8(i)}, dir: g.mkdir(rootID, fmt.Sprint("dir", i)).NodeId}
		for j := range w.names {
			name := fmt.Sprint("file", j)
			g.write(fmt.Sprintf("dir%d/%s", i, name), "")
			w.names[j] = fsbackend.MakeName(name)
		}
		workers[i] = w
	}
	for _, w := range workers {
		var entry fuseproto.EntryOut
		if e := g.fs.Lookup(&w.ctx, w.dir, w.names[0], &entry); e != fsbackend.OK {
			b.Fatal(e)
		}
		w.node = entry.NodeId
	}
	ops := []struct {
		name string
		run  func(w *worker, i int) fsbackend.Errno
	}{
		{"getattr", func(w *worker, _ int) fsbackend.Errno {
			var in fuseproto.GetattrIn
			var out fuseproto.AttrOut
			in.NodeId = w.node
			return g.fs.Getattr(&w.ctx, &in, &out)
		}},
		{"lookup-first+forget", func(w *worker, i int) fsbackend.Errno {
			var entry fuseproto.EntryOut
			e := g.fs.Lookup(&w.ctx, w.dir, w.names[1+i%(len(w.names)-1)], &entry)
			g.fs.Forget(entry.NodeId, 1)
			return e
		}},
		{"open+release", func(w *worker, _ int) fsbackend.Errno {
			var in fuseproto.OpenIn
			var out fuseproto.OpenOut
			in.NodeId = w.node
			e := g.fs.Open(&w.ctx, &in, &out)
			var rel fuseproto.ReleaseIn
			rel.NodeId, rel.Fh = w.node, out.Fh
			g.fs.Release(&w.ctx, &rel)
			return e
		}},
	}
	for _, o := range ops {
		b.Run(o.name, func(b *testing.B) {
			const calls = 2000
			run := func(w *worker) time.Duration {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				begin := threadTime()
				for i := range calls {
					if e := o.run(w, i); e != fsbackend.OK {
						b.Error(e)
						break
					}
				}
				return threadTime() - begin
			}
			var alone []time.Duration
			var ratios []float64
			for b.Loop() {
				one := run(workers[0])
				var other time.Duration
				var both sync.WaitGroup
				both.Go(func() { other = run(workers[1]) })
				two := run(workers[0])
				both.Wait()
				alone = append(alone, one)
				ratios = append(ratios, float64(two+other)/2/float64(one))
			}
			slices.Sort(alone)
			slices.Sort(ratios)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(alone[len(alone)/4])/calls, "cpu-ns/op")
			b.ReportMetric(ratios[len(ratios)/2], "x-alone")
		})
	}
}
