package vhostuser_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
)

func TestValidate(t *testing.T) {
	dev := newFakeDevice(t.Errorf)
	for _, c := range []struct {
		want string
		cfg  vhostuser.Config
	}{
		{"no Device", vhostuser.Config{Memory: guestmem.New()}},
		{"no Memory", vhostuser.Config{Device: dev}},
		{"DrainTimeout", vhostuser.Config{Device: dev, Memory: guestmem.New(), DrainTimeout: -1}},
		{"0 queues", vhostuser.Config{Device: &fakeDevice{}, Memory: guestmem.New()}},
		{"257 queues", vhostuser.Config{Device: &fakeDevice{queues: 257}, Memory: guestmem.New()}},
	} {
		fe, back, err := vhosttest.Pair()
		if err != nil {
			t.Fatal(err)
		}
		if err := vhostuser.Serve(t.Context(), back, c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("Serve returned %v, expected %q", err, c.want)
		}
		_ = fe.Close()
	}
	if err := (&vhostuser.Config{Device: dev, Memory: dev.memory}).Validate(); err != nil {
		t.Error(err)
	}
}

func TestOrderlyDisconnect(t *testing.T) {
	checkLeaks(t)
	s, _ := running(t, nil)
	s.must(s.Tell(vhostuser.VHOST_USER_SET_BACKEND_REQ_FD, nil, eventFD(t)))
	s.must(s.SetVringErr(1, eventFD(t)))
	s.dev.history()
	if err := s.end(); err != nil {
		t.Errorf("session ended with %v, expected nil", err)
	}
	want := "enable 0 false; stop 0; call 0 false; err 0 false; call 1 false; err 1 false; memory"
	if got := s.dev.history(); got != want {
		t.Errorf("device was told\n\t%q, expected\n\t%q", got, want)
	}
}

func TestContextEndsSession(t *testing.T) {
	t.Run("while it waits for a message", func(t *testing.T) {
		checkLeaks(t)
		s, _ := running(t, nil)
		s.cancel()
		if err := s.wait(); err != context.Canceled {
			t.Errorf("session ended with %v", err)
		}
	})
	t.Run("while nobody reads its answers", func(t *testing.T) {
		checkLeaks(t)
		s := serve(t, nil)
		// The front-end writes until the back-end, whose answers fill the socket, reads no more.
		full := make(chan struct{})
		go func() {
			defer close(full)
			msg := vhosttest.Message(vhostuser.VHOST_USER_GET_FEATURES, vhostuser.Version, nil)
			for s.Write(msg) == nil {
			}
		}()
		waitBlocked(t)
		s.cancel()
		if err := s.wait(); err != context.Canceled {
			t.Errorf("session ended with %v", err)
		}
		<-full
	})
	t.Run("while it waits for requests", func(t *testing.T) {
		checkLeaks(t)
		s := negotiated(t, func(_ *fakeDevice, c *vhostuser.Config) { c.DrainTimeout = time.Hour })
		r := region(t, 0)
		s.must(s.AddMemReg(r))
		s.dev.setBusy(true)
		s.must(s.Send(vhostuser.VHOST_USER_REM_MEM_REG, vhosttest.MemReg(r.MemRegion), true))
		s.dev.await("memory; memory")
		s.cancel()
		if err := s.wait(); err != context.Canceled {
			t.Errorf("session ended with %v", err)
		}
	})
	t.Run("before it starts", func(t *testing.T) {
		checkLeaks(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		fe, back, err := vhosttest.Pair()
		if err != nil {
			t.Fatal(err)
		}
		defer fe.Close()
		dev := newFakeDevice(t.Errorf)
		if err := vhostuser.Serve(ctx, back, vhostuser.Config{Device: dev, Memory: dev.memory}); err != context.Canceled {
			t.Errorf("Serve returned %v", err)
		}
		dev.checkGivenBack()
	})
}

func TestAnyOrderStartsRing(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			checkLeaks(t)
			s := negotiated(t, nil)
			s.must(s.SetFeatures(allFeatures))
			r := testRing(t, 0)
			addr := vhostuser.VringAddr{Desc: r.Desc, Avail: r.Avail, Used: r.Used}
			steps := []func() error{
				func() error { return s.AddMemReg(region(t, 0)) },
				func() error { return s.Tell(vhostuser.VHOST_USER_SET_VRING_NUM, vhosttest.State(0, r.Num)) },
				func() error { return s.Tell(vhostuser.VHOST_USER_SET_VRING_ADDR, vhostuser.Append(nil, addr)) },
				func() error { return s.SetVringKick(0, r.Kick) },
				func() error { return s.SetVringEnable(0, true) },
				func() error { return s.SetVringCall(0, r.Call) },
			}
			rand.New(rand.NewPCG(seed, 0)).Shuffle(len(steps), func(i, j int) { steps[i], steps[j] = steps[j], steps[i] })
			for _, step := range steps {
				s.must(step())
			}
			if got := s.dev.state(); got != "rec-k -----" {
				t.Errorf("rings are %q", got)
			}
			if n := strings.Count(s.dev.history(), "start"); n != 1 {
				t.Errorf("ring was started %d times", n)
			}
		})
	}
}

func TestChangeOfRunningRing(t *testing.T) {
	checkLeaks(t)
	s, r := running(t, nil)
	addr := vhostuser.VringAddr{Desc: r.Desc, Avail: r.Avail, Used: r.Used}

	t.Log("the same addresses, as when dirty logging is switched")
	addr.Flags, addr.Log = 1, 0x1000
	s.must(s.Tell(vhostuser.VHOST_USER_SET_VRING_ADDR, vhostuser.Append(nil, addr)))
	s.calls("")

	t.Log("enabled: at once")
	s.must(s.Tell(vhostuser.VHOST_USER_SET_VRING_NUM, vhosttest.State(0, 64)))
	s.calls("stop 0; start 0 num 64 base 7 kick")
	s.must(s.Tell(vhostuser.VHOST_USER_SET_VRING_BASE, vhosttest.State(0, 5)))
	s.calls("stop 0; start 0 num 64 base 5 kick")
	addr.Used += 4096
	s.must(s.Tell(vhostuser.VHOST_USER_SET_VRING_ADDR, vhostuser.Append(nil, addr)))
	s.calls("stop 0; start 0 num 64 base 12 kick")
	s.must(s.SetVringKick(0, eventFD(t)))
	s.calls("stop 0; start 0 num 64 base 19 kick")

	t.Log("disabled: once all is there")
	s.must(s.SetVringEnable(0, false))
	s.must(s.Tell(vhostuser.VHOST_USER_SET_VRING_NUM, vhosttest.State(0, 128)))
	s.must(s.Tell(vhostuser.VHOST_USER_SET_VRING_BASE, vhosttest.State(0, 0)))
	addr.Used -= 4096
	s.must(s.Tell(vhostuser.VHOST_USER_SET_VRING_ADDR, vhostuser.Append(nil, addr)))
	s.calls("enable 0 false; stop 0")
	s.must(s.SetVringKick(0, -1))
	s.calls("start 0 num 128 base 0 no kick")
	s.must(s.Tell(vhostuser.VHOST_USER_SET_VRING_BASE, vhosttest.State(0, 3)))
	s.must(s.SetVringEnable(0, true))
	s.calls("stop 0; enable 0 true; start 0 num 128 base 3 no kick")
}

func TestBaseLastsUntilNextStart(t *testing.T) {
	checkLeaks(t)
	s, r := running(t, nil)
	base, err := s.GetVringBase(0)
	s.must(err)
	again, err := s.GetVringBase(0) // of a stopped ring: the same
	s.must(err)
	if base != progress || again != base {
		t.Errorf("bases are %d and %d, expected %d twice", base, again, progress)
	}
	s.dev.history()
	s.must(s.SetVringKick(0, r.Kick))
	s.calls("start 0 num 128 base 7 kick")
}

func TestFeaturesWithoutProtocolFeaturesEnableAll(t *testing.T) {
	checkLeaks(t)
	s, _ := running(t, nil)
	s.must(s.SetFeatures(testFeatures))
	s.calls("features 0x130000000; enable 1 true")
	s.must(s.Tell(vhostuser.VHOST_USER_RESET_OWNER, nil))
	s.calls("enable 0 false; enable 1 false")
}

func TestResetDeviceStopsRings(t *testing.T) {
	checkLeaks(t)
	s, r := running(t, nil)
	s.must(s.SetupRing(1, testRing(t, 1)))
	s.must(s.SetVringEnable(1, true))
	s.dev.history()
	s.must(s.Tell(vhostuser.VHOST_USER_RESET_DEVICE, nil))
	s.calls("enable 0 false; enable 1 false; stop 0; stop 1; reset")
	if got := s.dev.state(); got != "--c-- --c--" {
		t.Errorf("rings are %q, expected call descriptors only", got)
	}
	// What was said of the rings is forgotten.
	s.must(s.SetVringKick(0, r.Kick))
	s.must(s.SetVringEnable(0, true))
	s.calls("enable 0 true")
	s.must(s.Tell(vhostuser.VHOST_USER_RESET_DEVICE, nil))
	s.calls("enable 0 false; reset")
	r.Base = 4
	s.must(s.SetupRing(0, r))
	s.calls("start 0 num 128 base 4 kick; call 0 true")
	s.must(s.end())
}

func TestRingWaitsForMemory(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	mem := region(t, 0)
	s.must(s.AddMemReg(mem))
	s.must(s.RemMemReg(mem.MemRegion))
	s.must(s.SetupRing(0, testRing(t, 0)))
	s.calls("memory; memory; call 0 true")
	s.must(s.SetMemTable(mem))
	s.calls("memory; start 0 num 128 base 0 kick")
}

func TestFeaturesEnableAllRingsThoughOneFails(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	s.must(s.AddMemReg(region(t, 0)))
	lost := testRing(t, 0)
	lost.Desc += memSize // not in memory
	s.refused(s.SetupRing(0, lost))
	s.must(s.SetupRing(1, testRing(t, 1)))
	s.refused(s.SetFeatures(testFeatures))
	if got := s.dev.state(); got != "-e--- rec-k" {
		t.Errorf("rings are %q", got)
	}
}

func TestReplyAckNegotiatedByTheMessageItself(t *testing.T) {
	checkLeaks(t)
	s := serve(t, nil)
	s.NeedReply = true // as User-Mode Linux sets it there
	if _, err := s.Negotiate(); err != nil {
		t.Fatal(err)
	}
	// Given up again it is not acknowledged either.
	s.must(s.Send(vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES, vhosttest.U64(0), true))
	s.must(s.Send(vhostuser.VHOST_USER_SET_OWNER, nil, true))
	s.sync()
}

func TestStartErrorIsToldAndRetried(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	s.must(s.SetFeatures(allFeatures))
	r := testRing(t, 0)
	r.Desc, r.Avail, r.Used = r.Desc+memSize, r.Avail+memSize, r.Used+memSize
	s.must(s.AddMemReg(region(t, 0)))
	s.refused(s.SetupRing(0, r))
	s.must(s.SetVringCall(0, -1))
	s.refused(s.SetVringEnable(0, true))
	if got := s.dev.state(); got != "-e--- -----" {
		t.Errorf("rings are %q", got)
	}
	// The memory that it lies in comes later.
	s.must(s.AddMemReg(region(t, memSize)))
	if got := s.dev.state(); got != "re--k -----" {
		t.Errorf("rings are %q, expected ring 0 to run", got)
	}
	s.must(s.end())
	if n := strings.Count(s.log.String(), "start ring 0"); n != 2 {
		t.Errorf("failure was logged %d times, expected once for each message refused:\n%s", n, &s.log)
	}
}

func TestStartErrorWithoutAckGoesOn(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, func(d *fakeDevice, _ *vhostuser.Config) { d.startErr = errors.New("no ring today") })
	s.NeedReply = false
	s.must(s.AddMemReg(region(t, 0)))
	s.must(s.SetupRing(0, testRing(t, 0)))
	s.sync()
	s.must(s.end())
	if !strings.Contains(s.log.String(), "no ring today") {
		t.Errorf("failure was not logged: %q", &s.log)
	}
}

func TestMemoryChangesWaitForRequests(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(s *session, r vhosttest.Region) error
	}{
		{"REM_MEM_REG", func(s *session, r vhosttest.Region) error { return s.RemMemReg(r.MemRegion) }},
		{"SET_MEM_TABLE", func(s *session, r vhosttest.Region) error { return s.SetMemTable(r) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkLeaks(t)
			s := negotiated(t, func(_ *fakeDevice, c *vhostuser.Config) { c.DrainTimeout = time.Hour })
			r := region(t, 0)
			s.must(s.AddMemReg(r))
			s.dev.history()
			s.dev.setBusy(true)
			acked := make(chan error, 1)
			go func() { acked <- c.change(s, r) }()
			s.dev.await("memory")
			select {
			case err := <-acked:
				t.Errorf("acknowledged with %v while a request used the memory", err)
			default:
			}
			s.dev.setBusy(false)
			if err := <-acked; err != nil {
				t.Error(err)
			}
		})
		t.Run(c.name+" in vain", func(t *testing.T) {
			checkLeaks(t)
			s := negotiated(t, func(_ *fakeDevice, c *vhostuser.Config) { c.DrainTimeout = time.Millisecond })
			r := region(t, 0)
			s.must(s.AddMemReg(r))
			s.dev.setBusy(true)
			s.refused(c.change(s, r))
			s.dev.setBusy(false)
			s.sync() // goes on
		})
	}
	t.Run("ADD_MEM_REG does not", func(t *testing.T) {
		checkLeaks(t)
		s := negotiated(t, func(_ *fakeDevice, c *vhostuser.Config) { c.DrainTimeout = time.Hour })
		s.must(s.AddMemReg(region(t, 0)))
		s.dev.setBusy(true)
		s.must(s.AddMemReg(region(t, memSize)))
	})
}

func TestMemoryErrors(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	r := region(t, 0)
	s.must(s.AddMemReg(r))
	s.refused(s.AddMemReg(r)) // overlaps
	s.refused(s.SetMemTable(r, r))
	short := region(t, 2*memSize)
	short.MmapOffset = memSize // past the end of its file
	s.refused(s.AddMemReg(short))
	s.refused(s.RemMemReg(short.MemRegion))
	pipe := r
	pipe.FD, pipe.GuestPhysAddr, pipe.UserAddr = eventFD(t), 4*memSize, memUser+4*memSize
	s.refused(s.AddMemReg(pipe))
	s.calls("memory") // nothing of it changed anything

	s.dev.mu.Lock()
	s.dev.memErr = errors.New("ring lost its memory")
	s.dev.mu.Unlock()
	s.refused(s.RemMemReg(r.MemRegion))
	s.refused(s.AddMemReg(r))
	s.dev.mu.Lock()
	s.dev.memErr = nil
	s.dev.mu.Unlock()
	s.must(s.RemMemReg(r.MemRegion)) // it was added, whatever the device said
}

func TestRemMemRegToleratesDescriptor(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	r := region(t, 0)
	s.must(s.AddMemReg(r))
	s.must(s.Tell(vhostuser.VHOST_USER_REM_MEM_REG, vhosttest.MemReg(r.MemRegion), r.FD))
}

func TestMaxMemSlots(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	slots, err := s.GetMaxMemSlots()
	if err != nil || slots != guestmem.MaxRegions {
		t.Fatalf("%d slots, error %v", slots, err)
	}
	m, err := vhosttest.NewMemory(4096)
	s.must(err)
	t.Cleanup(m.Close)
	for i := range slots + 1 {
		err := s.AddMemReg(vhosttest.Region{MemRegion: vhostuser.MemRegion{GuestPhysAddr: i << 12, Size: 4096, UserAddr: memUser + i<<12}, FD: m.FD()})
		if i < slots {
			s.must(err)
		} else {
			s.refused(err)
		}
	}
}

func TestSetConfig(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, func(d *fakeDevice, _ *vhostuser.Config) { d.config = make([]byte, 40) })
	s.refused(s.Tell(vhostuser.VHOST_USER_SET_CONFIG, vhosttest.Config(0, 36, 0)))
	s.must(s.Tell(vhostuser.VHOST_USER_SET_CONFIG, vhosttest.Config(0, 36, vhostuser.ConfigMigration)))
}

func TestFrontEndGoneBeforeTheAnswer(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, func(_ *fakeDevice, c *vhostuser.Config) { c.DrainTimeout = time.Hour })
	r := region(t, 0)
	s.must(s.AddMemReg(r))
	s.dev.setBusy(true)
	s.must(s.Send(vhostuser.VHOST_USER_REM_MEM_REG, vhosttest.MemReg(r.MemRegion), true))
	s.dev.await("memory; memory")
	s.must(s.Close())
	s.dev.setBusy(false)
	if err := s.wait(); !errors.Is(err, unix.EPIPE) {
		t.Errorf("session ended with %v, expected EPIPE", err)
	}
}

func TestLogDoesNotFlood(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	for range 1000 {
		s.refused(s.SetVringEnable(99, true))
	}
	s.must(s.end())
	if n := strings.Count(s.log.String(), "\n"); n < 2 || n > 30 {
		t.Errorf("%d lines were logged of 1000 refused messages", n)
	}
}

func TestEveryMessageIsLoggedAtDebug(t *testing.T) {
	checkLeaks(t)
	var log bytes.Buffer
	s := serve(t, func(_ *fakeDevice, c *vhostuser.Config) {
		c.Log = slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	s.must(s.SetVringCall(1, eventFD(t)))
	s.must(s.end())
	if want := `"request":"SET_VRING_CALL","size":8,"fds":1,"need_reply":false`; !strings.Contains(log.String(), want) {
		t.Errorf("log has no %s:\n%s", want, &log)
	}
	// Without a log nothing is said, and nothing breaks.
	s = negotiated(t, func(_ *fakeDevice, c *vhostuser.Config) { c.Log = nil })
	s.refused(s.SetVringEnable(2, true))
}

func TestTruncatedStream(t *testing.T) {
	checkLeaks(t)
	s := serve(t, nil)
	s.must(s.Write(vhosttest.Message(vhostuser.VHOST_USER_SET_FEATURES, vhostuser.Version, vhosttest.U64(0))[:15]))
	s.must(s.CloseWrite())
	if err := s.wait(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("session ended with %v", err)
	}
}
