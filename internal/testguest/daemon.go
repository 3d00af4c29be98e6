package testguest

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Daemon is a running virtio-fs server.
type Daemon struct {
	p      *process
	socket string
	tag    string
}

// Tag is the tag of the share that a Daemon serves.
const Tag = "sluice"

// DaemonConfig says how to start a Daemon.
type DaemonConfig struct {
	Program string
	Scratch string // a directory for the socket, whose path must be short enough for a Unix socket
	Share   string // the directory to serve; "" where Args say what is served
	Shares  bool   // Args say what is served, in any number of shares with their own sockets and tags
	UID     uint32 // the user, and group, to run as
	Args    []string
	CPUs    []int // the CPUs it may run on; empty means those that this process may
	// Output, if set, also gets what the daemon writes, of which its log keeps the end.
	Output io.Writer
	// Surroundings names the sandbox and user among Args and UID, should the daemon be traced.
	Surroundings string
}

// StartDaemon starts a server and waits until it listens.
func StartDaemon(ctx context.Context, cfg DaemonConfig) (*Daemon, error) {
	socket := filepath.Join(cfg.Scratch, "fs.sock")
	var args []string
	if !cfg.Shares {
		args = []string{"--socket-path", socket, "--tag", Tag}
	}
	if cfg.Share != "" {
		args = append(args, "--shared-dir", cfg.Share)
	}
	more, err := TraceArgs(cfg.Surroundings, cfg.UID, cfg.Args)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(cfg.Program, append(args, more...)...)
	if cfg.UID != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: cfg.UID, Gid: cfg.UID}}
	}
	p, err := startProcessOn(cfg.CPUs, cfg.Output, filepath.Base(cfg.Program), cmd, true)
	if err != nil {
		return nil, err
	}
	if err := p.log.await(ctx, "Waiting for vhost-user socket connection"); err != nil {
		p.kill()
		return nil, fmt.Errorf("%s: %w\n%s", cfg.Program, err, p.log)
	}
	return &Daemon{p: p, socket: socket, tag: Tag}, nil
}

// Device is what a guest needs to know of the daemon.
func (d *Daemon) Device() Device { return Device{Socket: d.socket, Tag: d.tag} }

// Wait waits for the daemon to end by itself; nil means with status 0.
func (d *Daemon) Wait(ctx context.Context) error { return d.p.wait(ctx) }

// Ended waits for the daemon to end by itself in any way.
func (d *Daemon) Ended(ctx context.Context) error {
	select {
	case <-d.p.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Exited is closed when the daemon has ended.
func (d *Daemon) Exited() <-chan struct{} { return d.p.exited }

// Close kills the daemon; one that is traced ends in good order, if it can.
func (d *Daemon) Close() {
	if TraceDir() != "" {
		_ = d.p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-d.p.exited:
		case <-time.After(10 * time.Second):
		}
	}
	d.p.kill()
}

// Log is the end of what the daemon has written.
func (d *Daemon) Log() string { return d.p.log.String() }

// PID is the process id of what was started.
func (d *Daemon) PID() int { return d.p.cmd.Process.Pid }

// Server is the process id of what serves: PID's child, if it has one.
func (d *Daemon) Server() int {
	pids := d.PIDs()
	return pids[min(1, len(pids)-1)]
}

// PIDs are the process ids of what was started, first, and of all processes that it has started in turn.
func (d *Daemon) PIDs() []int {
	pids := []int{d.PID()}
	for i := 0; i < len(pids); i++ {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[i]))
		for _, path := range tasks {
			// A thread that has ended since has no children.
			text, _ := os.ReadFile(path)
			for child := range strings.FieldsSeq(string(text)) {
				if pid, err := strconv.Atoi(child); err == nil {
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids
}

// Usage is what a daemon holds at one moment.
type Usage struct {
	FDs int
	// RSS is resident memory in bytes that is the daemon's alone: pages of the guest's, which it maps, and of its own program
	// come and go with what the guest does.
	RSS int64
}

// Usage reads the usage of the process that serves from /proc.
func (d *Daemon) Usage() (Usage, error) { return UsageOf(d.Server()) }

// UsageOf reads a process's usage from /proc.
func UsageOf(pid int) (Usage, error) {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
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
