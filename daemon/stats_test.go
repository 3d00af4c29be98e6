package daemon

import (
	"io"
	"os"
	"os/exec"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/virtiofs"
)

// The server's buckets are the API's: neither may import the other.
func TestLatencyBounds(t *testing.T) {
	if fuseserver.LatencyBounds != api.LatencyBounds {
		t.Errorf("fuseserver.LatencyBounds are %v, expected the API's, %v", fuseserver.LatencyBounds, api.LatencyBounds)
	}
}

// fill sets every number in v to another one.
func fill(v reflect.Value, next *uint64) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), next)
		}
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i), next)
		}
	case reflect.Uint64:
		*next++
		v.SetUint(*next)
	case reflect.Int:
		*next++
		v.SetInt(int64(*next))
	}
}

// numbers returns every number in v and how often it is there.
func numbers(v reflect.Value, found map[uint64]int) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			numbers(v.Field(i), found)
		}
	case reflect.Array, reflect.Slice:
		for i := range v.Len() {
			numbers(v.Index(i), found)
		}
	case reflect.Map:
		for _, key := range v.MapKeys() {
			numbers(v.MapIndex(key), found)
		}
	case reflect.Uint64:
		found[v.Uint()]++
	case reflect.Int:
		found[uint64(v.Int())]++
	}
}

// Every count of the device gets to the API, and none twice.
func TestShareStatsLeaveNothingOut(t *testing.T) {
	d := virtiofs.Stats{Queues: make([]virtiofs.QueueStats, 1)}
	d.Requests.Ops = []fuseserver.OpStats{{Opcode: fuseproto.FUSE_READ, Errors: map[fuseserver.Errno]uint64{unix.EIO: 999}}}
	last := uint64(1000)
	fill(reflect.ValueOf(&d).Elem(), &last)
	fill(reflect.ValueOf(&d.Queues[0]).Elem(), &last)
	op := &d.Requests.Ops[0]
	fill(reflect.ValueOf(op).Elem(), &last)

	want := make(map[uint64]int)
	d.FrontEnds = 0 // is api.Share's
	numbers(reflect.ValueOf(d), want)
	got := make(map[uint64]int)
	numbers(reflect.ValueOf(shareStats("tag", d)), got)
	delete(want, 0)
	delete(got, 0) // an index
	if !reflect.DeepEqual(got, want) {
		t.Errorf("numbers %v, expected %v", got, want)
	}
}

func TestShareStats(t *testing.T) {
	d := virtiofs.Stats{
		Queues:   []virtiofs.QueueStats{{Size: 128}, {Size: 256, Depth: 3, Kicks: 4, Polls: 5, Notifications: 6, PollWindow: 7, PollHits: 8, PollMisses: 9, PollTime: 10}},
		Relieved: 12, SlowOpcodes: 13, Avoided: 14,
		Abandoned: 2,
		Requests: fuseserver.Snapshot{
			Ops: []fuseserver.OpStats{
				{Count: 1, Errors: map[fuseserver.Errno]uint64{unix.ENOSYS: 1}},
				{Opcode: fuseproto.FUSE_LOOKUP, Count: 9, Nanoseconds: 70, Errors: map[fuseserver.Errno]uint64{unix.ENOENT: 2, 0: 1, 41: 1}},
				{Opcode: fuseproto.FUSE_COPY_FILE_RANGE_64, Count: 1},
			},
			BytesRead: 10, BytesWritten: 11,
			Faults:  fuseserver.Faults{Malformed: 7},
			Backend: fsbackend.Stats{Inodes: 5, Tiers: fsbackend.InodeTiers{OPath: 1, Handle: 2, Name: 3}, FDs: fsbackend.FDs{OPath: 4, Open: 5, Mount: 6, Lock: 7}},
		},
	}
	d.Requests.Ops[1].Latency[2] = 9
	s := shareStats("data", d)
	if s.Tag != "data" || s.BytesRead != 10 || s.BytesWritten != 11 || s.Inodes != 5 {
		t.Errorf("%+v", s)
	}
	for _, tt := range []struct {
		name      string
		got, want any
	}{
		{"queues", s.Queues, []api.QueueStats{{Index: 0, Size: 128}, {Index: 1, Size: 256, Depth: 3, Kicks: 4, Notifications: 6, Polls: 5, PollWindow: 7, PollHits: 8, PollMisses: 9, PollNanoseconds: 10}}},
		{"calls", []uint64{s.Relieved, uint64(s.SlowOps), s.Avoided}, []uint64{12, 13, 14}},
		{"descriptors", s.FDs, map[string]uint64{"opath": 4, "open": 5, "mount": 6, "lock": 7}},
		{"tiers", s.InodeTiers, map[string]uint64{"opath": 1, "handle": 2, "name": 3}},
		{"errors of what is unknown", s.Ops[0].Errors, map[string]uint64{"ENOSYS": 1}},
		{"errors", s.Ops[1].Errors, map[string]uint64{"ENOENT": 2, "OTHER": 2}},
		{"faults", []uint64{s.Faults["malformed"], s.Faults["abandoned"]}, []uint64{7, 2}},
	} {
		if !reflect.DeepEqual(tt.got, tt.want) {
			t.Errorf("%s: %v, expected %v", tt.name, tt.got, tt.want)
		}
	}
	lookup := s.Ops[1]
	if lookup.Count != 9 || lookup.Nanoseconds != 70 || len(lookup.Latency) != len(api.LatencyBounds)+1 || lookup.Latency[2] != 9 {
		t.Errorf("LOOKUP: %+v", lookup)
	}
	var names []string
	for _, op := range s.Ops {
		names = append(names, op.Op)
	}
	if got := strings.Join(names, " "); got != "UNKNOWN LOOKUP COPY_FILE_RANGE_64" {
		t.Errorf("opcodes %s", got)
	}
}

func TestShareState(t *testing.T) {
	var d virtiofs.Stats
	is := func(want string) {
		t.Helper()
		if got := shareState(d); got != want {
			t.Errorf("state %s, expected %s", got, want)
		}
	}
	is(api.StateWaiting)
	d.Connected = true
	is(api.StateConnected)
	d.Requests.Session = true
	is(api.StateServing)
	d.Connected = false // the session's end is on its way
	is(api.StateWaiting)
}

func TestImageStats(t *testing.T) {
	errs := func(n uint64) map[string]uint64 { return map[string]uint64{"network": n} }
	got := imageStats([]api.ImageStats{
		{Tag: "b", Path: "/", Size: 1, Hits: 1},
		{
			Tag: "a", Path: "/x", Size: 1, Fetched: 2, Requests: 3, Bytes: 4, Hits: 5, HitBytes: 6, Misses: 7, MissBytes: 8, Verified: 9, Corrupt: 10,
			FetchErrors: errs(11), ReadErrors: errs(12), CacheBytes: 13, CacheBudget: 14,
		},
		{Tag: "a", Path: "/", Requests: 20},
		{
			Tag: "a", Path: "/x", Size: 10, Fetched: 20, Requests: 30, Bytes: 40, Hits: 50, HitBytes: 60, Misses: 70, MissBytes: 80, Verified: 90, Corrupt: 100,
			FetchErrors: errs(110), CacheBytes: 5, CacheBudget: 600,
		},
	})
	want := []api.ImageStats{
		{Tag: "a", Path: "/", Images: 1, Requests: 20},
		{
			Tag: "a", Path: "/x", Images: 2, Size: 11, Fetched: 22, Requests: 33, Bytes: 44, Hits: 55, HitBytes: 66, Misses: 77, MissBytes: 88, Verified: 99, Corrupt: 110,
			FetchErrors: errs(121), ReadErrors: errs(12), CacheBytes: 13, CacheBudget: 14,
		},
		{Tag: "b", Path: "/", Images: 1, Size: 1, Hits: 1},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("they add up to %+v, expected %+v", got, want)
	}
	if got := imageStats(nil); got != nil {
		t.Errorf("of none: %+v", got)
	}
}

func TestProcessStats(t *testing.T) {
	runtime.GC() // or what other tests have left could go meanwhile
	before := processStats()
	ballast := make([]byte, 32<<20)
	quit := make(chan struct{})
	var ready [64]chan struct{}
	for i := range ready {
		ready[i] = make(chan struct{})
		go func() {
			runtime.LockOSThread() // no thread twice
			close(ready[i])
			<-quit
		}()
	}
	for i := range ready {
		<-ready[i]
	}
	after := processStats()
	close(quit)
	// A few of another test's may have ended meanwhile.
	if n := after.Goroutines - before.Goroutines; n < len(ready)/2 {
		t.Errorf("%d goroutines more, expected %d", n, len(ready))
	}
	if after.Threads <= len(ready) || before.Threads < 1 {
		t.Errorf("%d threads, and %d with %d locked ones", before.Threads, after.Threads, len(ready))
	}
	if n := int64(after.HeapBytes) - int64(before.HeapBytes); n < 16<<20 {
		t.Errorf("%d bytes of heap more, expected %d", n, len(ballast))
	}
	runtime.KeepAlive(ballast)
}

func TestCountProcess(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fewer, threads, err := countProcess(startCat(t))
	if threads != 1 || err != nil {
		t.Errorf("%d threads, %v, expected 1", threads, err)
	}
	more, _, err := countProcess(startCat(t, null, null))
	if more-fewer != 2 || fewer < 3 || err != nil {
		t.Errorf("%d descriptors, and %d with two more, %v", fewer, more, err)
	}
	if _, threads, err := countProcess(os.Getpid()); threads < 2 || err != nil {
		t.Errorf("%d threads of our own, %v", threads, err)
	}
	if _, _, err := countProcess(1 << 30); err == nil {
		t.Error("a process that is not there was counted")
	}
}

// startCat starts a cat with more files open and returns its pid once its own start is behind it.
func startCat(t *testing.T, files ...*os.File) int {
	t.Helper()
	cmd := exec.Command("cat")
	cmd.ExtraFiles = files
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	if _, err := in.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}
