package testguest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
)

// Daemon is a running virtio-fs server.
type Daemon struct {
	p      *process
	socket string
	tag    string
}

// Tag is the tag of the share that a Daemon serves.
const Tag = "sluice"

// StartDaemon starts a server of the directory share and waits until it listens. The socket is made in scratch, whose path must be short
// enough for a Unix socket. The options every test needs are added to args.
func StartDaemon(ctx context.Context, program, scratch, share string, args ...string) (*Daemon, error) {
	socket := filepath.Join(scratch, "fs.sock")
	args = append([]string{"--socket-path", socket, "--shared-dir", share, "--tag", Tag, "--sandbox", "none"}, args...)
	p, err := startProcess(filepath.Base(program), exec.Command(program, args...), true)
	if err != nil {
		return nil, err
	}
	if err := p.log.await(ctx, "Waiting for vhost-user socket connection"); err != nil {
		p.kill()
		return nil, fmt.Errorf("%s: %w\n%s", program, err, p.log)
	}
	return &Daemon{p: p, socket: socket, tag: Tag}, nil
}

// Device is what a guest needs to know of the daemon.
func (d *Daemon) Device() Device { return Device{Socket: d.socket, Tag: d.tag} }

// Wait waits for the daemon to end by itself; nil means with status 0.
func (d *Daemon) Wait(ctx context.Context) error { return d.p.wait(ctx) }

// Exited is closed when the daemon has ended.
func (d *Daemon) Exited() <-chan struct{} { return d.p.exited }

// Close kills the daemon.
func (d *Daemon) Close() { d.p.kill() }

// Log is the end of what the daemon has written.
func (d *Daemon) Log() string { return d.p.log.String() }

// PID is the daemon's process id.
func (d *Daemon) PID() int { return d.p.cmd.Process.Pid }

// Usage is what a daemon holds at one moment.
type Usage struct {
	FDs int
	// RSS is resident memory in bytes that is the daemon's alone: pages of the guest's, which it maps, and of its own program
	// come and go with what the guest does.
	RSS int64
}

// Usage reads the daemon's usage from /proc.
func (d *Daemon) Usage() (Usage, error) {
	proc := filepath.Join("/proc", strconv.Itoa(d.PID()))
	fds, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		return Usage{}, err
	}
	statm, err := os.ReadFile(filepath.Join(proc, "statm"))
	if err != nil {
		return Usage{}, err
	}
	// resident and shared pages, the second and third number of proc(5)'s statm
	var size, resident, shared int64
	if _, err := fmt.Sscan(string(statm), &size, &resident, &shared); err != nil {
		return Usage{}, fmt.Errorf("read statm: %w", err)
	}
	return Usage{FDs: len(fds), RSS: (resident - shared) * int64(os.Getpagesize())}, nil
}
