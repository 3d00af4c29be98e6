package plugins

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/pluginlayer"
	"github.com/sluicefs/sluice/internal/program"
	"github.com/sluicefs/sluice/plugin"
	"github.com/sluicefs/sluice/seccomp"
)

// Name is what mounts name the extension by; entries of lowerdir name the plug-in instead.
const Name = "plugin"

// Extension serves layers that programs have. Its options are
//
//	name=NAME           the plug-in's
//	data=TEXT, path=…   what the plug-in is asked for, as in //NAME/DATA/PATH
//	programs=FILE:…     executables, instead of those of the daemon
//	layers=all          more than one is as good: what merges them asks for them (extensions.Layered)
type Extension struct {
	// Compiled are plug-ins of a program of one's own. They work in the serving process, behind the filter: what they need of the
	// host they have to bring.
	Compiled []plugin.Plugin
	// Rules are the system calls that those make.
	Rules seccomp.Rules

	mu    sync.Mutex
	found map[string]Set // by the list of programs
}

// Name implements extensions.Extension.
func (*Extension) Name() string { return Name }

// TryHandleMount implements extensions.Extension; it is not asked.
func (*Extension) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, extensions.Options, error) {
	return nil, extensions.Options{}, nil
}

// SeccompRules implements extensions.Extension: what it takes to speak with a program that was started outside. What comes over the
// socket may be descriptors, so there is no read(2) to do with.
func (e *Extension) SeccompRules() seccomp.Rules {
	rules := seccomp.Rules{
		"fcntl": seccomp.Or{ // descriptors that Go's poller waits for
			seccomp.PerArg{1: seccomp.Int32(unix.F_DUPFD_CLOEXEC)},
			seccomp.PerArg{1: seccomp.Int32(unix.F_GETFL)},
			seccomp.PerArg{1: seccomp.Int32(unix.F_SETFL)},
		},
		"getsockopt": seccomp.MatchAll{},
		"recvmsg":    seccomp.MatchAll{},
		"sendmsg":    seccomp.MatchAll{},
		"shutdown":   seccomp.MatchAll{},
	}
	if len(e.Compiled) > 0 {
		rules["socketpair"] = seccomp.MatchAll{}
	}
	rules.Add(e.Rules)
	return rules
}

// entry is an entry of lowerdir that is a plug-in's, //NAME/DATA/PATH: data and path are for the plug-in alone.
type entry struct{ name, data, path string }

// request is what a mount asks for.
type request struct {
	entry    entry
	many     bool
	programs []string // as Config.Lists; nil: the daemon's
}

func parse(m extensions.Mount) (r request, err error) {
	err = m.ParseOptions(map[string]func(string) error{
		"name": func(v string) error { r.entry.name = v; return nil },
		"data": func(v string) error { r.entry.data = v; return nil },
		"path": func(v string) error { r.entry.path = v; return nil },
		"programs": func(v string) error {
			if r.programs = []string{}; v != "" {
				r.programs = []string{v}
			}
			return nil
		},
		"layers": func(v string) error {
			if r.many = v == "all"; !r.many {
				return errors.New("expected all, or to be left out")
			}
			return nil
		},
	})
	switch {
	case err != nil:
	case r.entry.name == "":
		err = errors.New("option name is missing: expected that of a layer plug-in")
	case m.Source != "" || len(m.Lowers) > 0:
		err = errors.New("a layer plug-in has no source and is made of nothing: what it serves is said by data and path")
	}
	return r, err
}

// DefaultDir is where plug-ins are unless others are named: libexec/sluice/plugins beside the directory of the daemon.
func DefaultDir() string {
	self, err := os.Executable()
	if err != nil {
		return ""
	}
	return filepath.Join(filepath.Dir(filepath.Dir(self)), "libexec", "sluice", "plugins")
}

// known are the plug-ins that there are. They are looked for once.
func (e *Extension) known(ctx context.Context, out *extensions.Outside, r request) (Set, error) {
	lists := out.Plugins
	if r.programs != nil {
		lists = r.programs
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	key := fmt.Sprintf("%t %q", lists == nil, lists)
	if set, ok := e.found[key]; ok {
		return set, nil
	}
	set, err := Discover(ctx, Config{Lists: lists, Dir: DefaultDir(), Compiled: e.Compiled, Starter: starter{out}})
	if err == nil {
		if e.found == nil {
			e.found = make(map[string]Set)
		}
		e.found[key] = set
	}
	return set, err
}

// starter starts a program once, to be heard. Nothing is granted to it yet.
type starter struct{ out *extensions.Outside }

// Start implements Starter.
func (s starter) Start(ctx context.Context, path string) (*os.File, func(), error) {
	first := make(chan *os.File, 1)
	c := config(s.out, path, plugin.Needs{})
	c.OnStart = func(control *os.File) {
		select {
		case first <- control:
		default:
			_ = control.Close() // it has ended, and was started again
		}
	}
	p, err := program.Start(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	return <-first, func() { _ = p.Stop(context.WithoutCancel(ctx)) }, nil
}

// config is how a plug-in is run: kept from everything but the files that its user may use, and the network if it asks for that before it
// has heard of any guest.
func config(out *extensions.Outside, path string, needs plugin.Needs) program.Config {
	c := program.Config{Name: "layer plug-in " + filepath.Base(path), Args: []string{path}, Log: out.Log}
	c.Confine.Seccomp, c.Confine.Network = true, needs.Network
	if len(needs.Caps) > 0 || len(needs.Syscalls) > 0 {
		out.Log.Warn("layer plug-in says that it needs what no plug-in is given: no capabilities, and no system calls of the deny list",
			"plugin", path, "caps", needs.Caps, "syscalls", needs.Syscalls)
	}
	return c
}

var _ extensions.Checker = (*Extension)(nil)

// CheckMount implements extensions.Checker. What plug-ins there are it does not say: they would have to be started.
func (*Extension) CheckMount(_ *extensions.Checking, m extensions.Mount) error {
	_, err := parse(m)
	return err
}

// OpenOutside implements extensions.Hosted.
func (e *Extension) OpenOutside(ctx context.Context, out *extensions.Outside, m extensions.Mount) (*extensions.Given, error) {
	r, err := parse(m)
	if err != nil {
		return nil, err
	}
	set, err := e.known(ctx, out, r)
	if err != nil {
		return nil, err
	}
	found, err := set.Find(r.entry.name)
	if err != nil {
		return nil, err
	}
	if found.Compiled != nil {
		return &extensions.Given{}, nil
	}
	p, err := program.Start(ctx, config(out, found.Path, found.Needs))
	if err != nil {
		return nil, err
	}
	out.OnClose(func() error { return p.Stop(context.Background()) })
	return &extensions.Given{Files: []*os.File{p.Line()}}, nil
}

// dialTime is how long a plug-in may take to say what layers it has, at the start.
const dialTime = time.Minute

// OpenInside implements extensions.Hosted.
func (e *Extension) OpenInside(in *extensions.Inside, m extensions.Mount, g *extensions.Given) (fsbackend.Backend, extensions.Options, error) {
	// No call takes longer than what is put into a directory.
	options := extensions.Options{ReadOnly: true, Timeout: pluginlayer.DefaultOnDemandTimeout + time.Minute}
	r, err := parse(m)
	if err != nil {
		g.Close()
		return nil, options, err
	}
	line, err := e.source(in, g, r.entry.name)
	if err != nil {
		g.Close()
		return nil, options, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), dialTime)
	defer cancel()
	conn, err := pluginlayer.Dial(ctx, pluginlayer.Config{
		Name: r.entry.name, Source: line, ProcFD: in.ProcFD, NoFileHandles: in.NoFileHandles, MaxFDs: in.MaxFDs, MaxFiles: in.MaxFDs, MaxInodes: in.MaxInodes, Log: in.Log,
	})
	if err != nil {
		return nil, options, errors.Join(err, line.Close())
	}
	l := &layers{end: func() error { return errors.Join(conn.Close(), line.Close()) }}
	if err := l.open(ctx, conn, r); err != nil {
		return nil, options, err
	}
	return l, options, nil
}

// source is what a plug-in's sockets come from.
type source interface {
	pluginlayer.Source
	Close() error
}

// source takes over what the half outside has given, or makes sockets to a plug-in that is compiled in.
func (e *Extension) source(in *extensions.Inside, g *extensions.Given, name string) (source, error) {
	if len(g.Files) == 1 {
		return program.NewLine(g.Files[0]), nil
	}
	for _, p := range e.Compiled {
		if len(g.Files) == 0 && p.Name() == name {
			return plugin.NewLocal(p, in.Log), nil
		}
	}
	return nil, fmt.Errorf("%d descriptors for a layer plug-in: expected one", len(g.Files))
}

// layers are those of one entry. As a backend they are the first of them.
type layers struct {
	fsbackend.Forward
	all  []fsbackend.Backend
	left atomic.Int32 // that are not closed
	end  func() error
}

// layer is one of them.
type layer struct {
	fsbackend.Forward
	of  *layers
	acl bool
}

// ACL says that the layer has access control lists.
func (b *layer) ACL() bool { return b.acl }

// open opens all layers that the plug-in has for r.
func (l *layers) open(ctx context.Context, conn *pluginlayer.Conn, r request) (err error) {
	l.left.Store(1) // what open itself holds
	defer func() {
		if err != nil {
			for _, b := range l.all {
				err = errors.Join(err, b.Close())
			}
		}
		err = errors.Join(err, l.done())
	}()
	set, err := conn.Layers(ctx, r.entry.data, r.entry.path)
	if err != nil {
		return err
	}
	if n := set.Len(); n > 1 && !r.many {
		return fmt.Errorf("the plug-in has %d layers: expected one, or an overlay of them: lowerdir=//%s/%s/%s", n, r.entry.name, r.entry.data, r.entry.path)
	}
	for i := range set.Len() {
		b, err := set.Open(ctx, i)
		if err != nil {
			return err
		}
		l.left.Add(1)
		l.all = append(l.all, &layer{fsbackend.Forward{Inner: fsbackend.Resolve(b)}, l, b.ACL()})
	}
	l.Inner = fsbackend.Resolve(l.all[0])
	return nil
}

// done counts one that is closed; with the last the plug-in is let go.
func (l *layers) done() error {
	if l.left.Add(-1) > 0 {
		return nil
	}
	return l.end()
}

// Close implements fsbackend.Backend.
func (b *layer) Close() error { return errors.Join(b.Inner.Close(), b.of.done()) }

// Layers implements extensions.Layered.
func (l *layers) Layers() []fsbackend.Backend { return l.all }
