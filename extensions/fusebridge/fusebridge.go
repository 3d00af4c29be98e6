// Package fusebridge is the extension that serves FUSE programs, whatever their language: outside the sandbox it starts, confines
// and supervises the program, inside it speaks FUSE with it (fsbackend/fusebridge). docs/fuse-programs.md is its manual.
package fusebridge

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fusebridge"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/program"
	"github.com/sluicefs/sluice/seccomp"
)

// Name is the extension's.
const Name = "fuse"

// Extension serves FUSE programs. It has no state.
type Extension struct{}

var _ extensions.Checker = Extension{}

// Name implements extensions.Extension.
func (Extension) Name() string { return Name }

// TryHandleMount implements extensions.Extension: it serves what names it only.
func (Extension) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, extensions.Options, error) {
	return nil, extensions.Options{}, nil
}

// SeccompRules implements extensions.Extension: messages over the program's socket, and what passthrough calls for mount=private.
func (Extension) SeccompRules() seccomp.Rules {
	rules := seccomp.Passthrough(seccomp.PassthroughOptions{Writable: true, Xattr: true, SwitchIDs: true, Locks: true, Opens: true}).Rules
	rules.Add(socketRules)
	return rules
}

// socketRules are the calls for a program's socket and its line.
var socketRules = seccomp.Rules{
	"fcntl":      seccomp.Or{seccomp.PerArg{1: seccomp.Int32(unix.F_GETFL)}, seccomp.PerArg{1: seccomp.Int32(unix.F_SETFL)}}, // Go's os
	"getsockopt": seccomp.PerArg{1: seccomp.Int32(unix.SOL_SOCKET), 2: seccomp.Int32(unix.SO_SNDBUF)},
	"ppoll":      seccomp.MatchAll{}, // there is room for a request, or a message from a program that rests
	"recvmsg":    seccomp.MatchAll{}, // replies
	"sendmsg":    seccomp.PerArg{2: seccomp.Int32(unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL)},
	"sendto":     seccomp.PerArg{3: seccomp.Int32(unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL), 4: seccomp.EqualTo(0)},
	"setsockopt": seccomp.PerArg{1: seccomp.Int32(unix.SOL_SOCKET), 2: seccomp.Int32(unix.SO_RCVTIMEO)},
	"shutdown":   seccomp.MatchAll{}, // a program that breaks the protocol
}

// given is what the half inside is told.
type given struct {
	Program     string            `json:"program"`
	Timeout     time.Duration     `json:"timeout"`
	RestartWait time.Duration     `json:"restart_wait"`
	MaxWrite    int               `json:"max_write"`
	Parallel    bool              `json:"parallel_lookups,omitempty"`
	Owner       *fuseproto.Caller `json:"owner,omitempty"`
	// Mounted says that the line brings directories that the program has mounted, and not sockets.
	Mounted bool `json:"mounted,omitempty"`
}

// fileCaps are the capabilities that a program has that runs as root: what it takes to keep files of all users. Not among them is
// CAP_MKNOD, with which it could make itself a device.
var fileCaps = capSet(unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER, unix.CAP_FSETID,
	unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SETFCAP)

func capSet(numbers ...int) (s uint64) {
	for _, n := range numbers {
		s |= 1 << n
	}
	return s
}

// CheckMount implements extensions.Checker.
func (Extension) CheckMount(_ *extensions.Checking, m extensions.Mount) error {
	_, err := parseOptions(m)
	return err
}

// OpenOutside implements extensions.Hosted: it starts the program.
func (Extension) OpenOutside(ctx context.Context, out *extensions.Outside, m extensions.Mount) (*extensions.Given, error) {
	o, err := parseOptions(m)
	if err != nil {
		return nil, err
	}
	c := o.config(out.Log, m.ReadOnly)
	g := given{Program: c.Name, Timeout: o.timeout, RestartWait: o.restartWait, MaxWrite: o.maxWrite, Parallel: o.parallelLookups(), Owner: o.owner, Mounted: o.private}
	var file *os.File
	if o.private {
		file, err = o.startMounted(ctx, out, c)
	} else {
		file, err = startLine(ctx, out, c)
	}
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(g)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &extensions.Given{Data: data, Files: []*os.File{file}}, nil
}

// config is the program to start.
func (o *options) config(log *slog.Logger, readOnly bool) program.Config {
	c := program.Config{
		Name: filepath.Base(o.args[0]), Args: o.at(fmt.Sprintf("/dev/fd/%d", program.FD)), Env: append(program.DefaultEnv(), o.env...),
		Dir: o.dir, Credential: o.credential, Log: log,
		Confine: program.Confinement{
			None: o.unconfined, Network: o.network, Seccomp: !o.noSeccomp,
			ReadOnly: readOnly && !o.unconfined || len(o.writable) > 0, Writable: o.writable, Mount: o.private,
		},
	}
	if o.credential == nil {
		c.Confine.Caps = fileCaps
	}
	if c.Confine.ReadOnly && !slices.ContainsFunc(o.writable, inTmp) {
		for _, path := range hidden(o.args) {
			log.Warn("the program will not find a file that its command names: where files are read-only it has an empty /tmp of its own; expected it outside of /tmp, or write= with a directory in /tmp",
				"program", c.Name, "path", path)
		}
	}
	return c
}

// inTmp says whether path is one that an empty /tmp hides.
func inTmp(path string) bool { return path == "/tmp" || strings.HasPrefix(path, "/tmp/") }

// hidden are the files that there are of those in /tmp that words name, also behind a '=', a ':' or a ','.
func hidden(words []string) (paths []string) {
	for _, word := range words {
		for _, path := range strings.FieldsFunc(word, func(r rune) bool { return strings.ContainsRune("=:,", r) }) {
			if _, err := os.Lstat(path); inTmp(path) && err == nil {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// startLine starts a program that takes a descriptor for a mount point.
func startLine(ctx context.Context, out *extensions.Outside, c program.Config) (*os.File, error) {
	s, err := program.Start(ctx, c)
	if err != nil {
		return nil, err
	}
	out.OnClose(func() error { return stop(s) })
	actions(out, s)
	return s.Line(), nil
}

// stop stops a program.
func stop(s *program.Supervisor) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return s.Stop(ctx)
}

// status is what the action "program" answers.
type status struct {
	PID      int     `json:"pid"`
	Uptime   float64 `json:"uptime_seconds"`
	Restarts uint64  `json:"restarts"`
	Last     string  `json:"last_end,omitempty"`
}

// actions has operators ask how the program is doing, and have it started again.
func actions(out *extensions.Outside, s *program.Supervisor) {
	if out.Action == nil {
		return
	}
	out.Action("program", func(context.Context, json.RawMessage) (any, error) {
		st := s.Status()
		return status{PID: st.PID, Uptime: st.Uptime.Seconds(), Restarts: st.Restarts, Last: st.Last}, nil
	})
	out.Action("restart", func(context.Context, json.RawMessage) (any, error) {
		s.Restart()
		return struct{}{}, nil
	})
}

// served is a bridge with its line.
type served struct {
	*fusebridge.Bridge
	line *program.Line
}

// Close implements fsbackend.Backend.
func (s *served) Close() error { return errors.Join(s.Bridge.Close(), s.line.Close()) }

// startPatience is how long a program may take until it answers.
const startPatience = 30 * time.Second

// OpenInside implements extensions.Hosted: it speaks FUSE with the program.
func (Extension) OpenInside(in *extensions.Inside, m extensions.Mount, g *extensions.Given) (fsbackend.Backend, extensions.Options, error) {
	var d given
	err := json.Unmarshal(g.Data, &d)
	if err == nil && len(g.Files) != 1 {
		err = fmt.Errorf("%d files from outside: expected one", len(g.Files))
	}
	if err != nil {
		g.Close()
		return nil, extensions.Options{}, fmt.Errorf("FUSE program: %w", err)
	}
	if d.Mounted {
		return openMounted(in, m, &d, program.NewLine(g.Files[0]))
	}
	line := program.NewLine(g.Files[0])
	ctx, cancel := context.WithTimeout(context.Background(), startPatience)
	defer cancel()
	b, err := fusebridge.New(ctx, fusebridge.Config{
		Line: line, Timeout: d.Timeout, StartTimeout: startPatience, RestartWait: d.RestartWait, MaxWrite: d.MaxWrite,
		ParallelLookups: d.Parallel, Owner: d.Owner, Log: in.Log,
	})
	if err != nil {
		// What it has said at its end is on the line, if it has ended.
		ended, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if f, err := line.Next(ended); err == nil {
			_ = f.Close()
		}
		if status := line.State().Status; status != "" {
			err = fmt.Errorf("%w: %s ended with %s", err, d.Program, status)
		}
		return nil, extensions.Options{}, errors.Join(err, line.Close())
	}
	// The bridge has time limits of its own, which come first: a call may wait for the program to be started again, and then for it.
	limit := cmp.Or(d.Timeout, defaultTimeout) + cmp.Or(d.RestartWait, defaultRestartWait) + 5*time.Second
	// What is known is answered on the queue's own thread, and so is, as a disk's answer is waited for, what the program has been answering
	// in no time; the rest asks for another one by ErrMayBlock, of those that are the graft's own.
	return &served{b, line}, extensions.Options{ReadOnly: m.ReadOnly, Inline: true, Timeout: limit}, nil
}

// Defaults of the bridge.
const (
	defaultTimeout     = 30 * time.Second
	defaultRestartWait = 2 * time.Second
)
