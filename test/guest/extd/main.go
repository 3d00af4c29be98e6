// Command extd is sluiced with extensions that tests ask for: well-behaved, failing, careless and hostile ones. A mount is
// claimed by its type in the spec.
package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"testing/fstest"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/daemon"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/iofs"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/seccomp"
)

func main() {
	os.Exit(daemon.Main(
		&recorder{},
		&who{name: "first", claims: []string{"/a"}},
		&who{name: "second", claims: []string{"/a", "/b"}},
		&refuser{},
		&careless{},
		&faulty{},
		&keeper{},
		&probe{},
	))
}

// tree is a backend over files in memory.
func tree(files fs.FS) (fsbackend.Backend, error) {
	return iofs.New(iofs.Config{FS: files})
}

// text is a file system of one file.
func text(name, content string) fs.FS {
	return fstest.MapFS{name: &fstest.MapFile{Data: []byte(content), Mode: 0o444}}
}

// recorder says what it is offered, and declines.
type recorder struct{ on bool }

func (*recorder) Name() string { return "recorder" }

func (r *recorder) SetFlags(flags *pflag.FlagSet) {
	flags.BoolVar(&r.on, "recorder-on", false, "say which mounts are offered")
}

func (r *recorder) TryHandleMount(_ *specs.Spec, mount *specs.Mount, path string, readonly bool) (fsbackend.Backend, extensions.Options, error) {
	if r.on {
		where := "root"
		if mount != nil {
			where = mount.Destination
		}
		fmt.Fprintf(os.Stderr, "recorder: offered %s readonly=%v source=%v\n", where, readonly, path != "")
	}
	return nil, extensions.Options{}, nil
}

func (*recorder) SeccompRules() seccomp.Rules { return nil }

// who claims mounts by destination, with a file that names it.
type who struct {
	name   string
	claims []string
}

func (w *who) Name() string { return w.name }

func (w *who) TryHandleMount(_ *specs.Spec, mount *specs.Mount, _ string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	if mount == nil || mount.Type != "who" || !slices.Contains(w.claims, mount.Destination) {
		return nil, extensions.Options{}, nil
	}
	b, err := tree(text(".who", w.name+"\n"))
	return b, extensions.Options{}, err
}

func (*who) SeccompRules() seccomp.Rules { return nil }

// refuser claims its mounts and fails.
type refuser struct{}

func (*refuser) Name() string { return "refuser" }

func (*refuser) TryHandleMount(_ *specs.Spec, mount *specs.Mount, _ string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	if mount == nil || mount.Type != "refuser" {
		return nil, extensions.Options{}, nil
	}
	return nil, extensions.Options{}, errors.New("the storage is not there")
}

func (*refuser) SeccompRules() seccomp.Rules { return nil }

// careless serves a writable tree whatever readonly says.
type careless struct{}

func (*careless) Name() string { return "careless" }

func (*careless) TryHandleMount(_ *specs.Spec, mount *specs.Mount, _ string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	if mount == nil || mount.Type != "careless" {
		return nil, extensions.Options{}, nil
	}
	b, err := mem.New(mem.Config{})
	return b, extensions.Options{}, err
}

func (*careless) SeccompRules() seccomp.Rules { return nil }

// opener is a file system whose files do something when they are opened.
type opener map[string]func() (string, error)

func (o opener) Open(name string) (fs.File, error) {
	act, ok := o[name]
	if !ok {
		return o.listing().Open(name)
	}
	content, err := act()
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return text(name, content).Open(name)
}

// listing is the same tree without effects.
func (o opener) listing() fstest.MapFS {
	files := fstest.MapFS{}
	for name := range o {
		files[name] = &fstest.MapFile{Mode: 0o444, Data: make([]byte, 64)}
	}
	return files
}

func (o opener) Stat(name string) (fs.FileInfo, error)      { return o.listing().Stat(name) }
func (o opener) ReadDir(name string) ([]fs.DirEntry, error) { return o.listing().ReadDir(name) }

// faulty panics, hangs and fails, each by a file of its own.
type faulty struct{ timeout time.Duration }

func (*faulty) Name() string { return "faulty" }

func (f *faulty) SetFlags(flags *pflag.FlagSet) {
	flags.DurationVar(&f.timeout, "faulty-timeout", 2*time.Second, "how long a call may hang")
}

func (f *faulty) TryHandleMount(_ *specs.Spec, mount *specs.Mount, _ string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	if mount == nil || mount.Type != "faulty" {
		return nil, extensions.Options{}, nil
	}
	b, err := tree(opener{
		"boom":  func() (string, error) { panic("boom") },
		"hang":  func() (string, error) { select {} },
		"storm": func() (string, error) { return "", io.ErrUnexpectedEOF },
		"fine":  func() (string, error) { return "fine\n", nil },
	})
	return b, extensions.Options{Timeout: f.timeout}, err
}

func (*faulty) SeccompRules() seccomp.Rules { return nil }

// keeper opens a file while it may, and serves it when it may no longer.
type keeper struct {
	path string
	file *os.File
}

func (*keeper) Name() string { return "keeper" }

func (k *keeper) SetFlags(flags *pflag.FlagSet) {
	flags.StringVar(&k.path, "keeper-file", "", "`FILE` to open before the sandbox")
}

func (k *keeper) Prepare(extensions.PrepareContext) (err error) {
	if k.path != "" {
		k.file, err = os.Open(k.path)
	}
	return err
}

func (k *keeper) TryHandleMount(_ *specs.Spec, mount *specs.Mount, _ string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	if mount == nil || mount.Type != "keeper" {
		return nil, extensions.Options{}, nil
	}
	b, err := tree(opener{
		"kept": func() (string, error) {
			content := make([]byte, 64)
			n, err := k.file.ReadAt(content, 0)
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return string(content[:n]), err
		},
		"reopened": func() (string, error) {
			content, err := os.ReadFile(k.path)
			return string(content), err
		},
	})
	return b, extensions.Options{}, err
}

func (*keeper) SeccompRules() seccomp.Rules { return seccomp.Rules{"pread64": seccomp.MatchAll{}} }

// probe makes system calls, of which it declares some.
type probe struct{ declare []string }

func (*probe) Name() string { return "probe" }

func (p *probe) SetFlags(flags *pflag.FlagSet) {
	flags.StringSliceVar(&p.declare, "probe-declare", nil, "declare the system calls `LIST`: inet, mmap, deny-read")
}

func (p *probe) TryHandleMount(_ *specs.Spec, mount *specs.Mount, _ string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	if mount == nil || mount.Type != "probe" {
		return nil, extensions.Options{}, nil
	}
	b, err := tree(opener{
		"socket-inet":    func() (string, error) { return socket(unix.AF_INET) },
		"socket-netlink": func() (string, error) { return socket(unix.AF_NETLINK) },
		"in-background": func() (string, error) {
			result := make(chan error)
			go func() { _, err := socket(unix.AF_INET); result <- err }()
			return "made\n", <-result
		},
		"mmap-exec": func() (string, error) {
			_, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
			return "mapped\n", err
		},
	})
	return b, extensions.Options{}, err
}

func socket(family int) (string, error) {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	return "made\n", unix.Close(fd)
}

func (p *probe) SeccompRules() seccomp.Rules {
	rules := seccomp.Rules{}
	for _, what := range p.declare {
		switch what {
		case "inet":
			rules["socket"] = seccomp.PerArg{seccomp.Int32(unix.AF_INET)}
		case "mmap":
			rules["mmap"] = seccomp.MatchAll{}
		case "deny-read":
			rules["preadv2"] = seccomp.Deny{Rule: seccomp.MatchAll{}}
		}
	}
	return rules
}
