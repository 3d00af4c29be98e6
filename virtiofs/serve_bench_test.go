package virtiofs

import (
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// BenchmarkServe is what a worker does for a request and nothing else: batches of 16 are there when it looks, and the thread
// that serves them offers them, too. The unit cpu-ns/op leaves that out; it is a median over batches.
func BenchmarkServe(b *testing.B) {
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 1<<20), 0o644); err != nil {
		b.Fatal(err)
	}
	host := func() fsbackend.Backend {
		fs, err := passthrough.New(passthrough.Config{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		return fs
	}
	memory := func() fsbackend.Backend { return newMem(b) }
	nop := func(uint64, uint64) call { return call{op: 4095} }
	stat := func(node, _ uint64) call { return getattr(node) }
	lookup := func(uint64, uint64) call {
		return call{op: fuseproto.FUSE_LOOKUP, node: 1, args: body("file"), outArgs: 128}
	}
	read4k := func(node, fh uint64) call { return read(node, fh, 8192, 4096) }
	for _, t := range []struct {
		name    string
		backend func() fsbackend.Backend
		call    func(node, fh uint64) call
	}{
		{"nop", memory, nop},
		{"getattr/mem", memory, stat},
		{"getattr/passthrough", host, stat},
		{"lookup/passthrough", host, lookup},
		{"read4k/mem", memory, read4k},
		{"read4k/passthrough", host, read4k},
	} {
		b.Run(t.name, func(b *testing.B) { benchmarkServe(b, t.backend(), t.call) })
	}
}

func benchmarkServe(b *testing.B, backend fsbackend.Backend, c func(node, fh uint64) call) {
	r := newRig(b, backend, Config{})
	node, fh := r.mount()
	var chains []vqtest.Chain
	for i := range 16 {
		c := c(node, fh)
		header := body(uint32(40+len(c.args)), uint32(c.op), uint64(i+1), c.node, uint32(0), uint32(0), uint32(1), uint32(0))
		chains = append(chains, r.mem.Build(vqtest.Request{Header: header, Args: c.args, OutArgs: c.outArgs, OutData: c.outData}))
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	q, driver := r.device.queues[request], r.queues[request]
	driver.DisableInterrupt()
	t := r.device.pool.get()
	var taken []int64
	for b.Loop() {
		for _, chain := range chains {
			if _, ok := driver.OfferIndirect(chain); !ok {
				b.Fatal("no descriptor is free")
			}
		}
		driver.Kick() // the worker sleeps on
		begin := threadTime(b)
		t, _ = q.serve(t)
		taken = append(taken, threadTime(b)-begin)
		for left := len(chains); left > 0; {
			_, written, ok := driver.Used()
			switch {
			case !ok:
				runtime.Gosched() // the pool has it: RWF_NOWAIT says now and then that it would wait
			case written < 16:
				b.Fatalf("a reply of %d bytes", written)
			default:
				left--
			}
		}
	}
	slices.Sort(taken)
	b.ReportMetric(float64(taken[len(taken)/2])/float64(len(chains)), "cpu-ns/op")
}

func threadTime(b *testing.B) int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		b.Fatal(err)
	}
	return ts.Nano()
}

