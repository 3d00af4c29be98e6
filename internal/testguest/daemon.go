package testguest

import (
	"bytes"
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
	RSS int64 // bytes
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
	fields := bytes.Fields(statm)
	if len(fields) < 2 {
		return Usage{}, fmt.Errorf("read statm: %q", statm)
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	if err != nil {
		return Usage{}, fmt.Errorf("read statm: %w", err)
	}
	return Usage{FDs: len(fds), RSS: pages * int64(os.Getpagesize())}, nil
}
