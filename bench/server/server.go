// Package server starts virtio-fs servers to compare: Sluice, the peers, and any of them with other options or of another build.
// Each runs as its users run it, seccomp filter and all, on the CPUs it is given and no other.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sluicefs/sluice/internal/testguest"
)

// Kind says which options a server's program understands.
type Kind string

// The kinds of servers.
const (
	Sluice Kind = "sluice" // bin/sluiced, in its default configuration
	Rust   Kind = "rust"   // virtiofsd 1.14 without a thread pool, which is its fastest, and without a sandbox
	// RustNoHandles is Rust with a file descriptor for each inode instead of a file handle: fewer system calls, and no more
	// inodes than descriptors.
	RustNoHandles Kind = "rust-nofh"
	C             Kind = "c" // the virtiofsd in C that QEMU had until version 8, in its default configuration
)

// kinds are the kinds with where their program is and what starts it.
var kinds = []struct {
	kind    Kind
	program func() (string, error)
	args    func(socket, tag, dir string) []string
}{
	{Sluice, sluiced, func(socket, tag, dir string) []string {
		return []string{"--socket-path", socket, "--tag", tag, "--shared-dir", dir}
	}},
	{Rust, peer("virtiofsd"), rustArgs},
	{RustNoHandles, peer("virtiofsd"), func(socket, tag, dir string) []string {
		return append(rustArgs(socket, tag, dir), "--inode-file-handles=never")
	}},
	{C, peer("virtiofsd-c"), func(socket, _, dir string) []string {
		return []string{"--socket-path=" + socket, "-o", "source=" + dir}
	}},
}

func rustArgs(socket, tag, dir string) []string {
	return []string{
		"--socket-path", socket, "--tag", tag, "--shared-dir", dir, "--thread-pool-size=0", "--sandbox", "none",
	}
}

func sluiced() (string, error) {
	root, err := testguest.ModuleRoot()
	if err != nil {
		return "", err
	}
	program := filepath.Join(root, "bin", "sluiced")
	if _, err := os.Stat(program); err != nil {
		return "", fmt.Errorf("sluiced is not built, run `make build`: %w", err)
	}
	return program, nil
}

func peer(name string) func() (string, error) {
	return func() (string, error) { return testguest.FindPeer(name) }
}

// Kinds returns all kinds of servers.
func Kinds() []Kind {
	all := make([]Kind, len(kinds))
	for i, k := range kinds {
		all[i] = k.kind
	}
	return all
}

// Spec says which server to start, and how.
type Spec struct {
	Name    string // what reports call it
	Kind    Kind
	Program string    // "" means what `make build` or `make peers` makes
	Args    []string  // in addition to those of its kind
	Dir     string    // the directory to serve
	Tag     string    // by which a guest finds it, if it has several; "" means testguest.Tag
	CPUs    []int     // what it may run on; empty means any
	Output  io.Writer // also gets what the server writes; nil means nothing does
}

// Parse reads a server of a command line: [NAME=]KIND[@PROGRAM][,ARG...], as in "sluice", "sluice,--poll-us=0" and
// "before=sluice@/tmp/sluiced". Without a name it is called by the whole text.
func Parse(text string) (Spec, error) {
	s := Spec{Name: text}
	head, rest, more := strings.Cut(text, ",")
	if more {
		s.Args = strings.Split(rest, ",")
	}
	if name, what, named := strings.Cut(head, "="); named {
		s.Name, head = name, what
	}
	kind, program, other := strings.Cut(head, "@")
	s.Kind, s.Program = Kind(kind), program
	switch {
	case !slices.Contains(Kinds(), s.Kind):
		return Spec{}, fmt.Errorf("server %q: unknown kind %q, expected one of %v", text, kind, Kinds())
	case s.Name == "":
		return Spec{}, fmt.Errorf("server %q: its name is empty", text)
	case other && program == "":
		return Spec{}, fmt.Errorf("server %q: a program is expected after the @", text)
	}
	return s, nil
}

// Locate returns s with the file of its program, or an error that says how to get it.
func (s Spec) Locate() (Spec, error) {
	i := slices.Index(Kinds(), s.Kind)
	if i < 0 {
		return s, fmt.Errorf("server %s: unknown kind %q, expected one of %v", s.Name, s.Kind, Kinds())
	}
	if s.Program != "" {
		_, err := os.Stat(s.Program)
		return s, err
	}
	var err error
	if s.Program, err = kinds[i].program(); err != nil {
		return s, fmt.Errorf("server %s: %w", s.Name, err)
	}
	return s, nil
}

// Server is a running server that waits for a front-end, or has one. It ends with its front-end's connection.
type Server struct {
	Spec   Spec
	Socket string

	daemon  *testguest.Daemon
	scratch string
}

// Start starts a server and waits until it listens.
func Start(ctx context.Context, spec Spec) (*Server, error) {
	spec, err := spec.Locate()
	if err != nil {
		return nil, err
	}
	if spec.Dir, err = filepath.Abs(spec.Dir); err != nil {
		return nil, err
	}
	if spec.Tag == "" {
		spec.Tag = testguest.Tag
	}
	scratch, err := os.MkdirTemp("", "sluice-bench-")
	if err != nil {
		return nil, err
	}
	s := &Server{Spec: spec, Socket: filepath.Join(scratch, "fs.sock"), scratch: scratch}
	args := kinds[slices.Index(Kinds(), spec.Kind)].args(s.Socket, spec.Tag, spec.Dir)
	s.daemon, err = testguest.StartDaemon(ctx, testguest.DaemonConfig{
		Program: spec.Program, Scratch: scratch, Shares: true, Args: append(args, spec.Args...), CPUs: spec.CPUs,
		Output: spec.Output,
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("server %s: %w", spec.Name, err), os.RemoveAll(scratch))
	}
	return s, nil
}

// PID is the process id of what was started.
func (s *Server) PID() int { return s.daemon.PID() }

// PIDs are the process ids of the server's processes as of now, PID first: Sluice and the C server have two.
func (s *Server) PIDs() []int { return s.daemon.PIDs() }

// Device is what a guest needs to know of the server. The C server tells no tag; its VMM must.
func (s *Server) Device() testguest.Device {
	return testguest.Device{Socket: s.Socket, Tag: s.Spec.Tag}
}

// Exited is closed when the server has ended.
func (s *Server) Exited() <-chan struct{} { return s.daemon.Exited() }

// Log is the end of what the server has written.
func (s *Server) Log() string { return s.daemon.Log() }

// Stop kills the server and removes its socket.
func (s *Server) Stop() error {
	s.daemon.Close()
	return os.RemoveAll(s.scratch)
}

// Describe says what a server is: its version and its options.
func Describe(ctx context.Context, s Spec) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, s.Program, "--version").CombinedOutput()
	version, _, _ := strings.Cut(string(out), "\n")
	if err != nil || version == "" {
		version = filepath.Base(s.Program) + " of an unknown version"
	}
	if len(s.Args) > 0 {
		version += ", with " + strings.Join(s.Args, " ")
	}
	return version
}
