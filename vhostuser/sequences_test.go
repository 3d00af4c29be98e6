package vhostuser_test

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
)

func withConfig(d *fakeDevice, _ *vhostuser.Config) { d.config = make([]byte, 40) }

// What the device is told at each stage of a front-end's life.
const (
	calls        = "call 0 true; call 1 true"
	acknowledged = "features 0x130000000"
	enables      = "enable 0 true; enable 1 true"
	disables     = "enable 0 false; enable 1 false"
	getBases     = "stop 0; call 0 false; stop 1; call 1 false"
	reset        = "reset"
	memory       = "memory"

	qemuRealize = "call 0 true; err 0 true; call 1 true; err 1 true"
	crosvmStart = "call 0 true; start 0 num 1024 base 0 kick; enable 0 true; call 1 true; start 1 num 1024 base 0 kick; enable 1 true"
	umlStart    = "start 0 num 1024 base 0 kick; enable 0 true; start 1 num 1024 base 0 kick; enable 1 true"
)

func starts(base int) string {
	return fmt.Sprintf("start 0 num 1024 base %d kick; start 1 num 1024 base %[1]d kick", base)
}

func cloudHypervisorStart(base int) string {
	return fmt.Sprintf("%s; call 0 true; start 0 num 512 base %d kick; call 1 true; start 1 num 512 base %[2]d kick; %s", memory, base, enables)
}

func story(parts ...string) string { return strings.Join(parts, "; ") }

// qemuStory is a QEMU's from realize to a running guest, and then more.
func qemuStory(resetAtRealize bool, more ...string) string {
	parts := []string{qemuRealize}
	if resetAtRealize {
		parts = append(parts, reset)
	}
	parts = append(parts, calls, acknowledged, memory, memory, starts(0), enables, calls)
	return story(append(parts, more...)...)
}

var outcomes = map[string]struct{ state, story string }{
	"QEMU 7.2 boot":                        {"recxk recxk", qemuStory(false)},
	"QEMU 7.2 reboot":                      {"recxk recxk", qemuStory(false, disables, getBases, calls, calls, acknowledged, starts(0), enables, calls)},
	"QEMU 7.2 stop and cont":               {"recxk recxk", qemuStory(false, disables, getBases, calls, calls, acknowledged, starts(progress), enables, calls)},
	"QEMU 7.2 memory hotplug":              {"recxk recxk", qemuStory(false, memory, memory)},
	"QEMU 10 boot":                         {"recxk recxk", qemuStory(true)},
	"QEMU 10 reboot":                       {"recxk recxk", qemuStory(true, disables, getBases, calls, reset, calls, acknowledged, starts(0), enables, calls)},
	"QEMU 10 stop and cont":                {"recxk recxk", qemuStory(true, disables, getBases, calls, calls, acknowledged, starts(progress), enables, calls)},
	"QEMU 10 memory hotplug":               {"recxk recxk", qemuStory(true, memory, memory)},
	"QEMU 11.1 boot":                       {"recxk recxk", qemuStory(true)},
	"QEMU 11.1 reboot":                     {"recxk recxk", qemuStory(true, disables, getBases, calls, reset, reset, reset, calls, acknowledged, starts(0), enables, calls)},
	"QEMU 11.1 stop and cont":              {"recxk recxk", qemuStory(true, disables, getBases, calls, calls, acknowledged, starts(progress), enables, calls)},
	"QEMU 11.1 memory hotplug":             {"recxk recxk", qemuStory(true, memory, memory)},
	"Cloud Hypervisor boot":                {"rec-k rec-k", story(acknowledged, cloudHypervisorStart(0))},
	"Cloud Hypervisor pause and resume":    {"rec-k rec-k", story(acknowledged, cloudHypervisorStart(0), disables, enables)},
	"Cloud Hypervisor snapshot and resume": {"rec-k rec-k", story(acknowledged, cloudHypervisorStart(0), disables, getBases, cloudHypervisorStart(progress))},
	"Cloud Hypervisor memory hotplug":      {"rec-k rec-k", story(acknowledged, cloudHypervisorStart(0), memory)},
	"Cloud Hypervisor reset":               {"----- -----", story(acknowledged, cloudHypervisorStart(0), disables, getBases)},
	"crosvm boot":                          {"rec-k rec-k", story("features 0x120000000", memory, crosvmStart)},
	"crosvm reset":                         {"rec-k rec-k", story("features 0x120000000", memory, crosvmStart, "enable 0 false; stop 0; call 0 false; enable 1 false; stop 1; call 1 false", memory, crosvmStart)},
	"User-Mode Linux boot":                 {"rec-k rec-k", story(acknowledged, memory, calls, umlStart)},
	"User-Mode Linux unbind":               {"r-c-k r-c-k", story(acknowledged, memory, calls, umlStart, "enable 1 false; enable 0 false")},
	// The rings are described anew without GET_VRING_BASE: each is stopped once and started once, with all of the new.
	"User-Mode Linux rebind": {"rec-k rec-k", story(acknowledged, memory, calls, umlStart, "enable 1 false; enable 0 false", memory, "call 0 true; stop 0; call 1 true; stop 1", umlStart)},
}

func TestSequences(t *testing.T) {
	if n := len(vhosttest.Sequences()); n != len(outcomes) {
		t.Errorf("%d sequences, %d outcomes", n, len(outcomes))
	}
	for _, seq := range vhosttest.Sequences() {
		t.Run(seq.Name, func(t *testing.T) {
			checkLeaks(t)
			s := serve(t, withConfig)
			s.must(s.Play(seq))
			s.sync()
			want := outcomes[seq.Name]
			if got := s.dev.state(); got != want.state {
				t.Errorf("rings are %q, expected %q", got, want.state)
			}
			s.calls(want.story)
			if err := s.end(); err != nil {
				t.Errorf("session ended with %v", err)
			}
			if s.log.Len() > 0 {
				t.Errorf("session logged of a legal sequence:\n%s", &s.log)
			}
		})
	}
}

// TestSequencesCutShort has the front-end die after each message of each sequence, with and without a torn message.
func TestSequencesCutShort(t *testing.T) {
	for _, seq := range vhosttest.Sequences() {
		t.Run(seq.Name, func(t *testing.T) {
			checkLeaks(t)
			steps := seq.Steps
			for n := range steps {
				seq.Steps = steps[:n]
				s := serve(t, withConfig)
				s.must(s.Play(seq))
				if n%2 == 0 {
					if err := s.end(); err != nil {
						t.Errorf("after %d messages session ended with %v, expected nil", n, err)
					}
					continue
				}
				torn := vhosttest.Message(steps[n].Request, vhostuser.Version, steps[n].Payload)
				s.must(s.Write(torn[:len(torn)-1], eventFD(t)))
				if err := s.end(); !errors.As(err, new(*vhostuser.ProtocolError)) {
					t.Errorf("torn after %d messages session ended with %v, expected a ProtocolError", n, err)
				}
			}
		})
	}
}

// TestListeningBackEnd plays a sequence over a socket in the file system, one session after another on the same device.
func TestListeningBackEnd(t *testing.T) {
	checkLeaks(t)
	path := filepath.Join(t.TempDir(), "fs.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dev := newFakeDevice(t.Errorf)
	for range 2 {
		for _, seq := range vhosttest.Sequences() {
			fe, err := vhosttest.Dial(path)
			if err != nil {
				t.Fatal(err)
			}
			back, err := l.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			result := make(chan error, 1)
			go func() {
				result <- vhostuser.Serve(t.Context(), back, vhostuser.Config{Device: dev, Memory: dev.memory})
			}()
			if err := fe.Play(seq); err != nil {
				t.Error(err)
			}
			if got, want := len(fe.Memory().Bytes), seq.MemorySize; got != want {
				t.Errorf("%s has %d bytes of memory, expected %d", seq.Name, got, want)
			}
			_ = fe.Close()
			if err := <-result; err != nil {
				t.Errorf("%s: session ended with %v", seq.Name, err)
			}
		}
	}
	dev.checkGivenBack()
	if _, err := vhosttest.Dial(path + ".none"); err == nil {
		t.Error("connected to a socket that does not exist")
	}
}
