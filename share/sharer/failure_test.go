package sharer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicefs/sluice/control"
	"github.com/sluicefs/sluice/control/client"
)

// play is a sandbox's life, of which each act can fail. All share what is in dir.
type play struct {
	dir      string
	pause    Container
	app      Container
	readOnly Mount // of pause
	writable Mount // of app, the same source
	file     Mount // of app
}

func newPlay(dir string) *play {
	return &play{
		dir:      dir,
		pause:    Container{ID: "pause", RootFs: RootFs{Target: filepath.Join(dir, "root")}},
		app:      Container{ID: "app"},
		readOnly: Mount{Source: filepath.Join(dir, "data"), Destination: "/data", Type: "bind", ReadOnly: true},
		writable: Mount{Source: filepath.Join(dir, "data"), Destination: "/data", Type: "bind"},
		file:     Mount{Source: filepath.Join(dir, "hosts"), Destination: "/etc/hosts", Type: "bind", ReadOnly: true},
	}
}

// stage makes what is shared.
func stage(t *testing.T) string {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "data", "x"), "x")
	write(t, filepath.Join(dir, "root", "bin", "sh"), "sh")
	write(t, filepath.Join(dir, "certs", "ca"), "ca")
	write(t, filepath.Join(dir, "hosts"), "127.0.0.1 localhost")
	return dir
}

func (p *play) mounts() []string { return []string{filepath.Join(p.dir, "certs")} }

type act struct {
	name string
	do   func(context.Context, *Sandbox) error
	// ends: a failure may leave less than before, and is repeated.
	ends bool
}

func (p *play) acts() []act {
	share := func(c *Container, m *Mount) func(context.Context, *Sandbox) error {
		return func(ctx context.Context, s *Sandbox) error { _, err := s.ShareFile(ctx, c, m); return err }
	}
	unshare := func(c *Container, m *Mount) func(context.Context, *Sandbox) error {
		return func(ctx context.Context, s *Sandbox) error { return s.UnshareFile(ctx, c, m) }
	}
	return []act{
		{name: "Prepare", do: func(ctx context.Context, s *Sandbox) error { return s.Prepare(ctx) }},
		{name: "ShareRootFilesystem", do: func(ctx context.Context, s *Sandbox) error {
			_, err := s.ShareRootFilesystem(ctx, &p.pause)
			return err
		}},
		{name: "ShareFile read-only", do: share(&p.pause, &p.readOnly)},
		{name: "ShareFile writable", do: share(&p.app, &p.writable)},
		{name: "ShareFile of a file", do: share(&p.app, &p.file)},
		{name: "UnshareFile writable", do: unshare(&p.app, &p.writable), ends: true},
		{name: "UnshareFile read-only", do: unshare(&p.pause, &p.readOnly), ends: true},
		{name: "UnshareRootFilesystem", do: func(ctx context.Context, s *Sandbox) error { return s.UnshareRootFilesystem(ctx, &p.pause) }, ends: true},
		{name: "Cleanup", do: func(ctx context.Context, s *Sandbox) error { return s.Cleanup(ctx) }, ends: true},
	}
}

// surroundings are where a sandbox can be: what there is to compare, and how to make one.
type surroundings struct {
	open  func(t *testing.T, c Config, f *faults) *Sandbox
	state func(t *testing.T, host string) string
}

// failEachStep makes each step of each act fail, one at a time.
func failEachStep(t *testing.T, world func(t *testing.T) surroundings) {
	dir := stage(t)
	acts := len(newPlay(dir).acts())
	steps := 0
	for i := range acts {
		for _, after := range []bool{false, true} {
			for n := 1; ; n++ {
				if !failStep(t, dir, world(t), i, n, after) {
					break
				}
				steps++
			}
		}
	}
	if steps < 2*acts {
		t.Errorf("only %d steps could fail", steps)
	}
}

// failStep makes step n of act i fail, and says whether there is such a step.
func failStep(t *testing.T, dir string, w surroundings, i, n int, after bool) bool {
	ctx := t.Context()
	p, f := newPlay(dir), &faults{}
	host := t.TempDir()
	s := w.open(t, Config{HostDir: host, SandboxBindMounts: p.mounts()}, f)
	nothing := w.state(t, host)
	acts := p.acts()
	for _, a := range acts[:i] {
		if err := a.do(ctx, s); err != nil {
			t.Fatalf("%s: %v", a.name, err)
		}
	}
	before, a := w.state(t, host), acts[i]
	f.reset(n, after)
	err := a.do(ctx, s)
	taken := f.steps()
	if taken < n {
		f.reset(0, false)
		if err != nil {
			t.Fatalf("%s without a failure: %v", a.name, err)
		}
		if err := s.Cleanup(ctx); err != nil {
			t.Error(err)
		}
		return false
	}
	what := fmt.Sprintf("%s, failed at step %d, %s (done: %v)", a.name, n, f.name(n), after)
	f.reset(0, false)
	if err != nil && !errors.Is(err, errInjected) {
		t.Errorf("%s: error %v, want the injected one", what, err)
	}
	if now := w.state(t, host); err != nil && !a.ends && now != before {
		t.Errorf("%s: before\n%s\nafter\n%s", what, before, now)
	}
	// Whatever has failed can be done again, and the play goes on to its end.
	for _, a := range acts[i:] {
		if err := a.do(ctx, s); err != nil {
			t.Errorf("%s: %s afterwards: %v", what, a.name, err)
		}
	}
	if now := w.state(t, host); now != nothing {
		t.Errorf("%s: left at the end\n%s", what, now)
	}
	return true
}

func graftWorld(t *testing.T) surroundings {
	d := newDaemon(t)
	return surroundings{
		open: func(t *testing.T, c Config, f *faults) *Sandbox {
			c.Backend = Grafts{Daemon: faultyGrafter{d, f}, Tag: guestTag}
			return newTestSandbox(t, c, faultySystem{faults: f})
		},
		state: func(t *testing.T, host string) string { return fmt.Sprint(grafted(t, d)) + "\n" + tree(t, host) },
	}
}

func TestFailureAtEachStepWithGrafts(t *testing.T) { failEachStep(t, graftWorld) }

func bindWorld(*testing.T) surroundings {
	return surroundings{
		open: func(t *testing.T, c Config, f *faults) *Sandbox {
			c.Backend = BindMounts{}
			return newTestSandbox(t, c, faultySystem{faults: f})
		},
		state: func(t *testing.T, host string) string {
			return strings.Join(mountsBelow(t, host), "\n") + "\n" + tree(t, host)
		},
	}
}

func TestFailureAtEachStepWithBindMounts(t *testing.T) {
	if inPrivateMounts(t) {
		failEachStep(t, bindWorld)
	}
}

// The victim's arguments are in its environment, "STEP HOSTDIR DIR SOCKET"; without a socket it makes bind mounts.
func victim() {
	fields := strings.Fields(os.Getenv(victimEnv))
	if len(fields) == 3 {
		fields = append(fields, "")
	}
	at, err := strconv.Atoi(fields[0])
	if err != nil {
		panic(err)
	}
	p, f := newPlay(fields[2]), &faults{kill: true, at: at}
	c := Config{ID: "pod1", HostDir: fields[1], Backend: BindMounts{}, SandboxBindMounts: p.mounts()}
	if fields[3] != "" {
		daemon, err := client.New(client.Config{Socket: fields[3]})
		if err != nil {
			panic(err)
		}
		c.Backend = Grafts{Daemon: faultyGrafter{daemon, f}, Tag: guestTag}
	}
	s, err := newSandbox(c, faultySystem{faults: f})
	if err != nil {
		panic(err)
	}
	for _, a := range p.acts() {
		if err := a.do(context.Background(), s); err != nil {
			panic(a.name + ": " + err.Error())
		}
	}
	os.Exit(0)
}

// killEachStep kills a process at each step of its play. Cleanup of another then leaves nothing, at once or after it has gone on
// with the play.
func killEachStep(t *testing.T, socket string, w surroundings) {
	dir := stage(t)
	n := 1
	for ; ; n++ {
		host := t.TempDir()
		nothing := w.state(t, host)
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), victimEnv+"="+strings.Join([]string{strconv.Itoa(n), host, dir, socket}, " "))
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
			p := newPlay(dir)
			s := w.open(t, Config{HostDir: host, SandboxBindMounts: p.mounts()}, &faults{})
			if n%2 == 0 {
				for _, a := range p.acts()[:5] {
					if err := a.do(t.Context(), s); err != nil {
						t.Errorf("after a kill at step %d: %s: %v", n, a.name, err)
					}
				}
			}
			for range 2 {
				if err := s.Cleanup(t.Context()); err != nil {
					t.Errorf("after a kill at step %d: %v", n, err)
				}
			}
			if now := w.state(t, host); now != nothing {
				t.Fatalf("after a kill at step %d there is left\n%s", n, now)
			}
			continue
		}
		if err != nil {
			t.Fatalf("victim of step %d: %v\n%s", n, err, out)
		}
		break
	}
	if n < 20 {
		t.Errorf("the victim had %d steps only", n)
	}
}

func TestKillAtEachStepWithGrafts(t *testing.T) {
	d := newDaemon(t)
	socket := filepath.Join(t.TempDir(), "control.sock")
	server, err := control.New(control.Config{Daemon: d, Unix: control.UnixListener{Path: socket}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx) }()
	defer func() {
		cancel()
		<-done
	}()
	killEachStep(t, socket, surroundings{
		open: func(t *testing.T, c Config, f *faults) *Sandbox {
			daemon, err := client.New(client.Config{Socket: socket})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { daemon.Close() })
			c.Backend = Grafts{Daemon: faultyGrafter{daemon, f}, Tag: guestTag}
			return newTestSandbox(t, c, faultySystem{faults: f})
		},
		state: func(t *testing.T, host string) string { return fmt.Sprint(grafted(t, d)) + "\n" + tree(t, host) },
	})
}

func TestKillAtEachStepWithBindMounts(t *testing.T) {
	if inPrivateMounts(t) {
		killEachStep(t, "", bindWorld(t))
	}
}
