package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sluicefs/sluice/bench/guest/guestbench/timing"
	"github.com/sluicefs/sluice/bench/meter"
	"github.com/sluicefs/sluice/bench/server"
	"github.com/sluicefs/sluice/internal/testguest"
)

// entrant is a server with one cache policy, and a device of the guest.
type entrant struct {
	server string // its name in reports
	policy string
	*server.Server
	work string // its directory, relative to the share
	// count, set where requests are to be counted, returns those so far by opcode; it waits until all of a mount that has ended are in it.
	count func(ctx context.Context) (map[string]int, error)
}

// machine is a guest with all entrants as devices, so that they take turns within one boot.
type machine struct {
	share    string // on the host
	entrants []*entrant
	guest    *testguest.Guest
	scratch  string
	close    []func() error
}

// start starts the servers, each with each policy, and boots a guest in front of them.
func (p *plan) start(ctx context.Context, share, initrd string, counting bool) (m *machine, err error) {
	m = &machine{share: share}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	kit, err := testguest.FindKit()
	if err != nil {
		return m, err
	}
	if m.scratch, err = os.MkdirTemp("", "sluice-"); err != nil {
		return m, err
	}
	m.close = append(m.close, func() error { return os.RemoveAll(m.scratch) })
	var devices []testguest.Device
	for _, policy := range p.policies {
		for _, spec := range p.servers {
			e, err := m.startEntrant(ctx, spec, policy, counting)
			if err != nil {
				return m, err
			}
			device, err := m.device(e, spec.Kind == server.C)
			if err != nil {
				return m, err
			}
			devices = append(devices, device)
		}
	}
	m.guest, err = testguest.Boot(ctx, testguest.Config{
		Kind: testguest.UML, Kit: kit, Initrd: initrd, Scratch: m.scratch, Devices: devices, MemMiB: p.memMiB,
		// What people have is closer to this than to ptrace(2), with which a system call takes the guest longer than many a request.
		Params: []string{"seccomp=auto"},
	})
	if err != nil {
		return m, err
	}
	m.close = append(m.close, func() error { m.guest.Close(); return nil })
	return m, nil
}

func (m *machine) startEntrant(ctx context.Context, spec server.Spec, policy string, counting bool) (*entrant, error) {
	e := &entrant{server: spec.Name, policy: policy, work: fmt.Sprintf("work-%s-%s", spec.Name, policy)}
	spec.Dir, spec.Tag = m.share, fmt.Sprintf("%s-%s", spec.Name, policy)
	spec.Args = append(spec.Args[:len(spec.Args):len(spec.Args)], cacheArgs(spec.Kind, policy)...)
	if err := os.MkdirAll(filepath.Join(m.share, e.work), 0o755); err != nil {
		return nil, err
	}
	if counting {
		addCounter(e, &spec, m.scratch)
	}
	var err error
	if e.Server, err = server.Start(ctx, spec); err != nil {
		return nil, err
	}
	m.close = append(m.close, e.Stop)
	m.entrants = append(m.entrants, e)
	return e, nil
}

// cacheArgs are the options for a cache policy.
func cacheArgs(kind server.Kind, policy string) []string {
	if kind != server.C {
		return []string{"--cache=" + policy}
	}
	if policy == never {
		policy = "none"
	}
	return []string{"-o", "cache=" + policy}
}

// Close ends the guest and the servers, in this order.
func (m *machine) Close() error {
	var errs []error
	for i := len(m.close) - 1; i >= 0; i-- {
		errs = append(errs, m.close[i]())
	}
	return errors.Join(errs...)
}

// sample is what one run of a workload took.
type sample struct {
	server, policy, workload string
	round                    int
	elapsed                  time.Duration // by the guest's clock
	serverCPU                time.Duration // of all processes of the server
	guestCPU                 time.Duration // of all processes of the guest, on the host
	ops                      int
	counts                   map[string]int // requests by opcode, kicks and notifications, where they were counted
}

// mountPoint is where in the guest the share is.
const mountPoint = "/mnt"

// run runs a workload with nothing in the caches of the guest.
func (m *machine) run(ctx context.Context, e *entrant, w workload, round int) (sample, error) {
	s := sample{server: e.server, policy: e.policy, workload: w.name, round: round, ops: w.ops}
	fail := func(err error) (sample, error) {
		return s, fmt.Errorf("%s with %s, cache=%s: %w\nThe server says:\n%s", w.name, e.server, e.policy, err, lastLines(e.Log(), 20))
	}
	// A guest whose server has gone may hang for ever.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watched := make(chan struct{})
	defer func() { <-watched }()
	defer cancel(nil)
	go func() {
		defer close(watched)
		select {
		case <-e.Exited():
			cancel(errors.New("the server has ended"))
		case <-ctx.Done():
		}
	}()

	if w.prepare != nil {
		if err := w.prepare(filepath.Join(m.share, e.work), round); err != nil {
			return fail(err)
		}
	}
	var before map[string]int
	var err error
	if e.count != nil {
		if before, err = e.count(ctx); err != nil {
			return fail(err)
		}
	}
	if _, err := m.guest.Sh(ctx, "echo 3 >/proc/sys/vm/drop_caches; mount -t virtiofs "+e.Spec.Tag+" "+mountPoint); err != nil {
		return fail(err)
	}
	serverBefore, errServer := meter.Read(e.PID())
	guestBefore, errGuest := meter.Read(m.guest.PID())
	if err := errors.Join(errServer, errGuest); err != nil {
		return fail(err)
	}
	args := append([]string{"guestbench", "run"}, w.command(mountPoint, filepath.Join(mountPoint, e.work))...)
	r, err := m.guest.Run(ctx, testguest.Command{Args: args, Dir: "/tmp", Env: []string{"PATH=" + guestPath, "HOME=/root"}})
	if err != nil {
		return fail(err)
	}
	if r.Status != 0 {
		return fail(fmt.Errorf("status %d\n%s%s", r.Status, r.Stdout, r.Stderr))
	}
	serverAfter, errServer := meter.Read(e.PID())
	guestAfter, errGuest := meter.Read(m.guest.PID())
	if err := errors.Join(errServer, errGuest); err != nil {
		return fail(err)
	}
	s.serverCPU = serverAfter.Sub(serverBefore).CPU
	// The processes of User-Mode Linux are one for each of the guest's address spaces, most of which have ended by now.
	guest := guestAfter.Sub(guestBefore)
	s.guestCPU = guest.CPU + guest.Ended
	if s.elapsed, err = m.elapsed(ctx, w, r.Stdout); err != nil {
		return fail(err)
	}
	if _, err := m.guest.Sh(ctx, "umount "+mountPoint); err != nil {
		return fail(err)
	}
	if e.count != nil {
		after, err := e.count(ctx)
		if err != nil {
			return fail(err)
		}
		s.counts = difference(after, before)
	}
	return s, nil
}

// lastLines returns the last n lines of text.
func lastLines(text string, n int) string {
	lines := strings.SplitAfter(text, "\n")
	return strings.Join(lines[max(len(lines)-n, 0):], "")
}

// elapsed is the time a workload took: as guestbench says, or fio.
func (m *machine) elapsed(ctx context.Context, w workload, stdout string) (time.Duration, error) {
	var t timing.Timing
	if err := json.Unmarshal([]byte(stdout), &t); err != nil {
		return 0, fmt.Errorf("read guestbench's answer %q: %w", stdout, err)
	}
	if !w.fio {
		if t.Lines != w.lines {
			return 0, fmt.Errorf("it wrote %d lines, expected %d", t.Lines, w.lines)
		}
		return t.Elapsed, nil
	}
	text, err := m.guest.Sh(ctx, "cat "+fioReport)
	if err != nil {
		return 0, err
	}
	done, err := parseFio([]byte(text))
	if err != nil {
		return 0, err
	}
	if done.ios != int64(w.ops) {
		return 0, fmt.Errorf("fio has done %d requests, expected %d", done.ios, w.ops)
	}
	return done.elapsed, nil
}
