package vhostuser_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
)

func TestMain(m *testing.M) {
	// The first connection makes package net open its epoll descriptors, which would count as a leak.
	fe, back, err := vhosttest.Pair()
	if err != nil {
		panic(err)
	}
	_ = fe.Close()
	_ = back.Close()
	goleak.VerifyTestMain(m)
}

const (
	testFeatures = vhostuser.VIRTIO_F_VERSION_1 | vhostuser.VIRTIO_F_INDIRECT_DESC | vhostuser.VIRTIO_F_EVENT_IDX
	allFeatures  = testFeatures | vhostuser.VHOST_USER_F_PROTOCOL_FEATURES
	progress     = 7 // what fakeDevice adds to a ring's base while it runs
)

// fakeDevice records what a session tells it, and checks that the session keeps to Device's contract.
type fakeDevice struct {
	queues int
	config []byte
	fail   func(format string, args ...any)
	memory *guestmem.Memory

	mu       sync.Mutex
	calls    []string
	rings    []fakeRing
	held     *guestmem.Map // as a worker with requests in flight would hold it
	busy     bool          // MemoryChanged finds requests in flight
	startErr error
	stopErr  error
	memErr   error
}

type fakeRing struct {
	running, enabled bool
	config           vhostuser.QueueConfig
	call, err        *sys.FD
}

func newFakeDevice(fail func(string, ...any)) *fakeDevice {
	d := &fakeDevice{queues: 2, fail: fail, memory: guestmem.New()}
	d.rings = make([]fakeRing, d.queues)
	d.held = d.memory.Acquire()
	return d
}

// record notes a call; the returned function ends it.
func (d *fakeDevice) record(format string, args ...any) func() {
	d.mu.Lock()
	d.calls = append(d.calls, fmt.Sprintf(format, args...))
	return d.mu.Unlock
}

func (d *fakeDevice) ring(i int) *fakeRing {
	if i < 0 || i >= len(d.rings) {
		d.fail("ring %d was named, the device has %d", i, len(d.rings))
		return new(fakeRing)
	}
	return &d.rings[i]
}

func isOpen(fd *sys.FD) bool {
	_, err := unix.FcntlInt(uintptr(fd.Int()), unix.F_GETFD, 0)
	return err == nil
}

func (d *fakeDevice) Features() uint64    { return testFeatures }
func (d *fakeDevice) NumQueues() int      { return d.queues }
func (d *fakeDevice) ConfigSpace() []byte { return d.config }

func (d *fakeDevice) SetFeatures(v uint64) {
	defer d.record("features %#x", v)()
	if v&^testFeatures != 0 {
		d.fail("features %#x were not offered", v)
	}
}

func (d *fakeDevice) StartQueue(i int, q vhostuser.QueueConfig) error {
	kick := "no kick"
	if q.Kick != nil {
		kick = "kick"
	}
	defer d.record("start %d num %d base %d %s", i, q.Num, q.Base, kick)()
	r := d.ring(i)
	if r.running {
		d.fail("ring %d was started twice", i)
	}
	if q.Num == 0 || q.Kick != nil && !isOpen(q.Kick) {
		d.fail("ring %d was started with %+v", i, q)
	}
	if d.startErr != nil {
		return d.startErr
	}
	m := d.memory.Acquire()
	defer m.Release()
	if _, err := m.User(q.DescUserAddr, 16*uint64(q.Num)); err != nil {
		return err
	}
	r.running, r.config = true, q
	return nil
}

func (d *fakeDevice) EnableQueue(i int, enabled bool) {
	defer d.record("enable %d %v", i, enabled)()
	r := d.ring(i)
	if r.enabled == enabled {
		d.fail("ring %d was told enabled %v twice", i, enabled)
	}
	r.enabled = enabled
}

func (d *fakeDevice) StopQueue(i int) (uint32, error) {
	defer d.record("stop %d", i)()
	r := d.ring(i)
	if !r.running {
		d.fail("ring %d was stopped, which does not run", i)
	}
	if r.config.Kick != nil && !isOpen(r.config.Kick) {
		d.fail("ring %d's kick was closed before the ring was stopped", i)
	}
	r.running = false
	return r.config.Base + progress, d.stopErr
}

func (d *fakeDevice) SetCall(i int, fd *sys.FD) {
	defer d.record("call %d %v", i, fd != nil)()
	r := d.ring(i)
	_ = r.call.Close()
	r.call = fd
}

func (d *fakeDevice) SetErr(i int, fd *sys.FD) {
	defer d.record("err %d %v", i, fd != nil)()
	r := d.ring(i)
	_ = r.err.Close()
	r.err = fd
}

func (d *fakeDevice) MemoryChanged() error {
	defer d.record("memory")()
	if !d.busy {
		d.rebind()
	}
	return d.memErr
}

// rebind is what a device does when no request uses the old Map. d.mu is held.
func (d *fakeDevice) rebind() {
	d.held.Release()
	d.held = d.memory.Acquire()
}

func (d *fakeDevice) Reset() {
	defer d.record("reset")()
	for i := range d.rings {
		if d.rings[i].running || d.rings[i].enabled {
			d.fail("Reset came while ring %d was running or enabled", i)
		}
	}
}

// history returns the calls since the last history.
func (d *fakeDevice) history() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	calls := d.calls
	d.calls = nil
	return strings.Join(calls, "; ")
}

// state describes the rings: r running, e enabled, c call, x err, k kick.
func (d *fakeDevice) state() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var b strings.Builder
	for i := range d.rings {
		r := &d.rings[i]
		if i > 0 {
			b.WriteByte(' ')
		}
		for _, flag := range []struct {
			on   bool
			name byte
		}{{r.running, 'r'}, {r.enabled, 'e'}, {r.call != nil, 'c'}, {r.err != nil, 'x'}, {r.running && r.config.Kick != nil, 'k'}} {
			if !flag.on {
				flag.name = '-'
			}
			b.WriteByte(flag.name)
		}
	}
	return b.String()
}

// checkGivenBack fails unless the session left the device as it found it.
func (d *fakeDevice) checkGivenBack() {
	if got := d.state(); got != "----- -----" {
		d.fail("after the session the rings are %q", got)
	}
	m := d.memory.Acquire()
	defer m.Release()
	for _, addr := range []uint64{0, 0x1000, 0xc0000, 0xc4f000, 0x100000000} {
		if _, err := m.Translate(nil, addr, 1); err == nil {
			d.fail("after the session guest address %#x is mapped", addr)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rebind() // what was busy is over
	d.held.Release()
}

// openFDs counts this process's descriptors.
func openFDs(tb testing.TB) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(entries)
}

// checkLeaks fails the test if at its end it has more descriptors, goroutines or mapped guest memory than now.
func checkLeaks(t testing.TB) {
	before := openFDs(t)
	t.Cleanup(func() {
		if after := openFDs(t); after != before {
			t.Errorf("%d file descriptors are open, %d were before", after, before)
		}
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(maps), "memfd:guest") {
			t.Errorf("guest memory is still mapped")
		}
		goleak.VerifyNone(t)
	})
}

// session is one Serve with its front-end.
type session struct {
	*vhosttest.FrontEnd
	t      testing.TB
	dev    *fakeDevice
	log    strings.Builder // read after end
	cancel context.CancelFunc
	result chan error
	ended  bool
}

// serve starts a session. set, if not nil, changes the device and the configuration before.
func serve(t testing.TB, set func(*fakeDevice, *vhostuser.Config)) *session {
	t.Helper()
	fe, back, err := vhosttest.Pair()
	if err != nil {
		t.Fatal(err)
	}
	s := &session{FrontEnd: fe, t: t, dev: newFakeDevice(t.Errorf), result: make(chan error, 1)}
	cfg := vhostuser.Config{Device: s.dev, Memory: s.dev.memory, Log: slog.New(slog.NewTextHandler(&s.log, nil))}
	if set != nil {
		set(s.dev, &cfg)
	}
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(context.Background())
	go func() { s.result <- vhostuser.Serve(ctx, back, cfg) }()
	t.Cleanup(func() { _ = s.end() })
	return s
}

// negotiated is serve and then what every front-end does first, with all offered features.
func negotiated(t testing.TB, set func(*fakeDevice, *vhostuser.Config)) *session {
	t.Helper()
	s := serve(t, set)
	if _, err := s.GetFeatures(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Negotiate(); err != nil {
		t.Fatal(err)
	}
	s.NeedReply = true
	return s
}

// wait returns Serve's error without closing the connection first.
func (s *session) wait() error {
	s.t.Helper()
	s.ended = true
	select {
	case err := <-s.result:
		_ = s.Close()
		s.cancel()
		s.dev.checkGivenBack()
		return err
	case <-time.After(30 * time.Second):
		s.t.Fatal("session did not end")
		return nil
	}
}

// end disconnects and returns Serve's error.
func (s *session) end() error {
	s.t.Helper()
	if s.ended {
		return nil
	}
	_ = s.Close()
	return s.wait()
}

// must fails the test on an error of a step.
func (s *session) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// refused fails the test unless err is the back-end's refusal.
func (s *session) refused(err error) {
	s.t.Helper()
	var ack *vhosttest.AckError
	if !errors.As(err, &ack) {
		s.t.Fatalf("got %v, expected a failed acknowledgement", err)
	}
}

// brokenBy fails the test unless the session ended because of req.
func (s *session) brokenBy(req vhostuser.Request) {
	s.t.Helper()
	err := s.wait()
	var broken *vhostuser.ProtocolError
	if !errors.As(err, &broken) {
		s.t.Fatalf("session ended with %v, expected a ProtocolError", err)
	}
	if broken.Request != req {
		s.t.Errorf("error is about %v, expected %v: %v", broken.Request, req, err)
	}
}

// sync waits until the session has carried out all that was sent, as QEMU does.
func (s *session) sync() {
	s.t.Helper()
	if _, err := s.GetFeatures(); err != nil {
		s.t.Fatal(err)
	}
}

// calls fails the test unless the device was told just want since the last time.
func (s *session) calls(want string) {
	s.t.Helper()
	s.sync()
	if got := s.dev.history(); got != want {
		s.t.Errorf("device was told\n\t%q, expected\n\t%q", got, want)
	}
}

func eventFD(t testing.TB) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

const (
	memSize = 1 << 20
	memUser = 0x7000_0000_0000
)

// region is a megabyte of guest memory at guest-physical gpa.
func region(t testing.TB, gpa uint64) vhosttest.Region {
	t.Helper()
	m, err := vhosttest.NewMemory(memSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return vhosttest.Region{MemRegion: vhostuser.MemRegion{GuestPhysAddr: gpa, Size: memSize, UserAddr: memUser + gpa}, FD: m.FD()}
}

// testRing is a ring of 128 descriptors in the region at 0.
func testRing(t testing.TB, index uint64) vhosttest.Ring {
	t.Helper()
	base := memUser + index*0x10000
	return vhosttest.Ring{Num: 128, Desc: base, Avail: base + 0x4000, Used: base + 0x5000, Kick: eventFD(t), Call: eventFD(t)}
}

// running is negotiated and then memory and ring 0, started and enabled; the device's history is empty.
func running(t testing.TB, set func(*fakeDevice, *vhostuser.Config)) (*session, vhosttest.Ring) {
	t.Helper()
	s := negotiated(t, set)
	s.must(s.SetFeatures(allFeatures))
	s.must(s.AddMemReg(region(t, 0)))
	r := testRing(t, 0)
	s.must(s.SetupRing(0, r))
	s.must(s.SetVringEnable(0, true))
	s.dev.history()
	return s, r
}

// setBusy says whether requests in flight hold the memory Map of before; when they no longer do the device lets go.
func (d *fakeDevice) setBusy(busy bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.busy = busy
	if !busy {
		d.rebind()
	}
}

// await returns when the device has been told just want since the last history.
func (d *fakeDevice) await(want string) {
	deadline := time.Now().Add(30 * time.Second)
	for {
		d.mu.Lock()
		got := strings.Join(d.calls, "; ")
		d.mu.Unlock()
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			d.fail("device was told %q, expected %q", got, want)
			return
		}
		runtime.Gosched()
	}
}

// waitBlocked returns when the session's answers fill the socket, so that the session waits in a write.
func waitBlocked(t testing.TB) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		stack := make([]byte, 1<<20)
		stack = stack[:runtime.Stack(stack, true)]
		for goroutine := range bytes.SplitSeq(stack, []byte("\n\n")) {
			if bytes.Contains(goroutine, []byte("vhostuser.(*conn).reply")) && bytes.Contains(goroutine, []byte("waitWrite")) {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("session does not block")
		}
		runtime.Gosched()
	}
}
