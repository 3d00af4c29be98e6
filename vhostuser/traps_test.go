package vhostuser_test

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
)

// The fifteen traps of the field, each of which has cost somebody a bug. Not here, since this package has no part in them:
// 12 (used.len is fuse_out_header.len), 13 (no notification reaches the wire), 15 (what --fd means). Of 8 (GET_VRING_BASE
// must drain with a deadline) the deadline is the device's.

func TestTrap1NoSetOwnerNeeded(t *testing.T) {
	checkLeaks(t)
	s, _ := running(t, nil) // never sends it
	s.must(s.Tell(vhostuser.VHOST_USER_SET_OWNER, nil))
	s.calls("") // and late it does no harm
	if err := s.end(); err != nil {
		t.Error(err)
	}
}

func TestTrap2ReplyFlags(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	// NEED_REPLY on a request with a typed reply changes nothing, in the flags neither. Receive insists on 0x5.
	s.must(s.Send(vhostuser.VHOST_USER_GET_QUEUE_NUM, nil, true))
	got, err := s.Receive(vhostuser.VHOST_USER_GET_QUEUE_NUM)
	if err != nil || !bytes.Equal(got, vhosttest.U64(2)) {
		t.Errorf("reply is % x, error %v, expected 2 queues", got, err)
	}
	if n, err := s.GetQueueNum(); err != nil || n != 2 {
		t.Errorf("%d queues, error %v, expected 2", n, err)
	}
}

func TestTrap3WhatSurvivesStopAndReset(t *testing.T) {
	checkLeaks(t)
	s, r := running(t, nil)
	s.must(s.SetVringErr(0, eventFD(t)))
	if got := s.dev.state(); got != "recxk -----" {
		t.Fatalf("rings are %q before the stop", got)
	}
	s.must(s.SetVringEnable(0, false))
	base, err := s.GetVringBase(0)
	s.must(err)
	if base != progress {
		t.Errorf("base is %d, expected %d", base, progress)
	}
	if got := s.dev.state(); got != "---x- -----" {
		t.Errorf("after GET_VRING_BASE rings are %q, expected the err descriptor only", got)
	}
	s.must(s.SetVringCall(0, r.Call))
	for range 2 {
		s.must(s.Tell(vhostuser.VHOST_USER_RESET_DEVICE, nil))
	}
	if got := s.dev.state(); got != "--cx- -----" {
		t.Errorf("after RESET_DEVICE rings are %q, expected call and err descriptors", got)
	}
	s.dev.history()
	// Memory is not sent again, and that the ring starts at once shows that it is there.
	s.must(s.SetupRing(0, r))
	s.calls("start 0 num 128 base 0 kick; call 0 true")
}

func TestTrap4ResetDeviceBeforeAnything(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	for range 3 {
		s.must(s.Send(vhostuser.VHOST_USER_RESET_DEVICE, nil, false))
	}
	s.calls("reset; reset; reset")
}

func TestTrap5SetLogBaseIsNotAnsweredShort(t *testing.T) {
	checkLeaks(t)
	// Dirty logging is not offered. Whoever sends the message all the same must not be left to wait for 16 bytes.
	s := negotiated(t, nil)
	s.must(s.Send(vhostuser.VHOST_USER_SET_LOG_BASE, make([]byte, 16), false, eventFD(t)))
	s.brokenBy(vhostuser.VHOST_USER_SET_LOG_BASE)
}

func TestTrap6OnlyWhatIsMeantIsOffered(t *testing.T) {
	checkLeaks(t)
	const want = vhostuser.VHOST_USER_PROTOCOL_F_MQ | vhostuser.VHOST_USER_PROTOCOL_F_REPLY_ACK | vhostuser.VHOST_USER_PROTOCOL_F_BACKEND_REQ |
		vhostuser.VHOST_USER_PROTOCOL_F_RESET_DEVICE | vhostuser.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
	s := serve(t, nil)
	got, err := s.Negotiate()
	if err != nil || got != want {
		t.Errorf("offers %#x, error %v, expected %#x", got, err, want)
	}
	s.NeedReply = true
	for _, bit := range []uint64{
		vhostuser.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS, vhostuser.VHOST_USER_PROTOCOL_F_STATUS, vhostuser.VHOST_USER_PROTOCOL_F_XEN_MMAP,
		vhostuser.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES, vhostuser.VHOST_USER_PROTOCOL_F_SHMEM, vhostuser.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN,
	} {
		s.refused(s.SetProtocolFeatures(want | bit))
	}
	s.refused(s.SetFeatures(allFeatures | vhostuser.VIRTIO_F_RING_RESET))
	s.calls("")
}

func TestTrap7RingStartsAtSetVringKick(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	s.must(s.SetFeatures(allFeatures))
	s.must(s.AddMemReg(region(t, 0)))
	s.dev.history()
	// No byte is ever written to the kick descriptor.
	s.must(s.SetupRing(0, testRing(t, 0)))
	s.calls("start 0 num 128 base 0 kick; call 0 true")
	s.must(s.SetVringEnable(0, true))
	s.calls("enable 0 true")
	// One without a kick descriptor is to be polled, and starts too.
	r := testRing(t, 1)
	r.Kick, r.Call = -1, -1
	s.must(s.SetupRing(1, r))
	s.calls("start 1 num 128 base 0 no kick; call 1 false")
}

func TestTrap8GetVringBaseStopsBeforeItAnswers(t *testing.T) {
	checkLeaks(t)
	s, _ := running(t, nil)
	base, err := s.GetVringBase(0)
	s.must(err)
	if got, want := s.dev.history(), "stop 0; call 0 false"; got != want || base != progress {
		t.Errorf("at the answer the device was told %q and the base is %d, expected %q and %d", got, base, want, progress)
	}
	// What the device could not drain in time is answered all the same: the front-end waits for it.
	s.dev.mu.Lock()
	s.dev.stopErr = unix.ETIMEDOUT
	s.dev.mu.Unlock()
	s.must(s.SetupRing(0, testRing(t, 0)))
	if base, err := s.GetVringBase(0); err != nil || base != progress {
		t.Errorf("base is %d, error %v, expected %d", base, err, progress)
	}
}

func TestTrap9PipesForDescriptors(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	var channel, call [2]int
	for _, p := range []*[2]int{&channel, &call} {
		s.must(unix.Pipe2(p[:], unix.O_CLOEXEC))
		t.Cleanup(func() { sys.CloseAll(p[:]) })
	}
	s.must(s.Tell(vhostuser.VHOST_USER_SET_BACKEND_REQ_FD, nil, channel[1]))
	s.must(s.Tell(vhostuser.VHOST_USER_SET_BACKEND_REQ_FD, nil, channel[1])) // replaces the one before
	s.must(s.SetVringCall(0, call[1]))
	s.dev.mu.Lock()
	fd := s.dev.rings[0].call.Int()
	n, err := unix.Write(fd, vhosttest.U64(1))
	flags, flagsErr := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	s.dev.mu.Unlock()
	if n != 8 || err != nil {
		t.Errorf("wrote %d bytes to the call pipe, error %v", n, err)
	}
	if flagsErr != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("received descriptor has flags %#x, error %v, expected close-on-exec", flags, flagsErr)
	}
	if n, err := unix.Read(call[0], make([]byte, 16)); n != 8 || err != nil {
		t.Errorf("read %d bytes from the call pipe, error %v, expected 8", n, err)
	}
}

func TestTrap10GetConfigWindows(t *testing.T) {
	checkLeaks(t)
	config := append([]byte("sharename"), make([]byte, 31)...)
	config[36] = 1
	s := negotiated(t, func(d *fakeDevice, _ *vhostuser.Config) { d.config = config })
	space := make([]byte, vhostuser.MaxConfigSpace)
	copy(space, config)
	windows := [][2]uint32{{0, 40}, {0, 44}, {36, 4}, {40, 216}, {255, 1}, {256, 0}, {0, 0}, {0, 256}}
	for size := uint32(1); size <= 36; size++ {
		windows = append(windows, [2]uint32{0, size})
	}
	for _, w := range windows {
		got, err := s.GetConfig(w[0], w[1])
		if err != nil || !bytes.Equal(got, space[w[0]:w[0]+w[1]]) {
			t.Errorf("window at %d of %d bytes is % x, error %v", w[0], w[1], got, err)
		}
	}
	for _, w := range [][2]uint32{{0, 257}, {256, 1}, {1, 256}, {^uint32(0), 2}} {
		got, err := s.Ask(vhostuser.VHOST_USER_GET_CONFIG, vhosttest.Config(w[0], w[1], 0))
		if err != nil || len(got) != 0 {
			t.Errorf("window at %d of %d bytes: reply % x, error %v, expected an empty one", w[0], w[1], got, err)
		}
	}
	// Flags are echoed: crosvm sets 1.
	got, err := s.Ask(vhostuser.VHOST_USER_GET_CONFIG, vhosttest.Config(0, 4, 1))
	if want := append(vhosttest.Config(0, 0, 1), "shar"...); err != nil || len(got) != 16 || !bytes.Equal(got[8:], want[8:]) {
		t.Errorf("reply is % x, error %v, expected flags 1 and the first bytes of the tag", got, err)
	}
}

func TestTrap11ConfigOnlyIfAsked(t *testing.T) {
	checkLeaks(t)
	s := serve(t, func(d *fakeDevice, _ *vhostuser.Config) { d.config = []byte{1} })
	if got, err := s.Negotiate(); err != nil || got&vhostuser.VHOST_USER_PROTOCOL_F_CONFIG == 0 {
		t.Errorf("with a config space %#x is offered, error %v, expected CONFIG", got, err)
	}
	s.must(s.end())
	s = serve(t, nil)
	if got, err := s.Negotiate(); err != nil || got&vhostuser.VHOST_USER_PROTOCOL_F_CONFIG != 0 {
		t.Errorf("without a config space %#x is offered, error %v, expected no CONFIG", got, err)
	}
}

// TestTrap14BaseIsTheFrontEnds: Cloud Hypervisor reconnects to a new back-end with base = avail.idx. Without INFLIGHT_SHMFD
// (not offered) what was in flight cannot be known here; the base must at least be taken as given.
func TestTrap14BaseIsTheFrontEnds(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	s.must(s.SetMemTable(region(t, 0)))
	s.dev.history()
	r := testRing(t, 0)
	r.Base = 0xfff0
	s.must(s.SetupRing(0, r))
	s.calls("start 0 num 128 base 65520 kick; call 0 true")
	r = testRing(t, 1)
	r.Base = 0x8000_8000 // a packed ring's has 32 bits
	s.must(s.SetupRing(1, r))
	s.calls("start 1 num 128 base 2147516416 kick; call 1 true")
}
