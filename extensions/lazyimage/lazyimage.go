// Package lazyimage is the extension that serves container images without pulling them: fsbackend/lazyimage inside the sandbox, and
// the program sluice-fetch, which has the network, outside it.
package lazyimage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/lazyimage"
	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/seccomp"
)

const (
	// Name is the extension's.
	Name = "lazyimage"

	// openLimit is how long the tables of contents of an image's layers are waited for.
	openLimit = 3 * time.Minute
	// timeout is how long a request to the registry may take, with all tries, where no option says so. answerSlack more is waited for
	// the fetcher's answer, and callSlack more for that to the guest.
	timeout     = 45 * time.Second
	answerSlack = 5 * time.Second
	callSlack   = 15 * time.Second
	// checkLimit is how long the action check waits for what is fetched at once.
	checkLimit = 10 * time.Second
)

// Extension serves images. Its zero value is ready.
type Extension struct {
	program    string
	unconfined bool
	fetcher    fetcher
}

// Name implements extensions.Extension.
func (*Extension) Name() string { return Name }

// SetFlags implements extensions.FlagSetter.
func (e *Extension) SetFlags(flags *pflag.FlagSet) {
	flags.StringVar(&e.program, "lazyimage-fetcher", "", "the `program` that fetches images; without, sluice-fetch beside this one, or in the PATH")
	flags.BoolVar(&e.unconfined, "lazyimage-unconfined", false, "run it in the host's namespaces, for where there are no others to be had")
}

// TryHandleMount implements extensions.Extension. Mounts are served as Hosted ones.
func (*Extension) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, extensions.Options, error) {
	return nil, extensions.Options{}, nil
}

// SeccompRules implements extensions.Extension: what the daemon has of its own serves to read chunks and to receive them.
func (*Extension) SeccompRules() seccomp.Rules {
	return seccomp.Rules{
		// store.Client: questions to the fetcher; and sockets that Go's poller waits for
		"sendmsg": seccomp.PerArg{2: seccomp.Int32(unix.MSG_NOSIGNAL | unix.MSG_DONTWAIT)},
		"fcntl": seccomp.Or{
			seccomp.PerArg{1: seccomp.Int32(unix.F_DUPFD_CLOEXEC)},
			seccomp.PerArg{1: seccomp.Int32(unix.F_GETFL)},
			seccomp.PerArg{1: seccomp.Int32(unix.F_SETFL)},
		},
	}
}

// insideOptions is what the half outside tells the one inside.
type insideOptions struct {
	Merge     bool             `json:"merge,omitempty"`
	Opaque    lazyimage.Opaque `json:"opaque,omitempty"`
	ReadAhead int              `json:"read_ahead,omitempty"`
	Timeout   time.Duration    `json:"timeout"` // of a request to the registry, with all tries
}

// readMount returns what m asks for.
func readMount(m extensions.Mount) (*options, error) {
	if m.Source != "" || len(m.Lowers) > 0 {
		return nil, fmt.Errorf("lazyimage of the directory %q: expected none, but one of the options image=, url= and file=", m.Source)
	}
	return parse(m.Options)
}

var (
	_ extensions.Checker      = (*Extension)(nil)
	_ extensions.ImageCounter = (*Extension)(nil)
)

// CheckMount implements extensions.Checker.
func (*Extension) CheckMount(_ *extensions.Checking, m extensions.Mount) error {
	_, err := readMount(m)
	return err
}

// OpenOutside implements extensions.Hosted.
func (e *Extension) OpenOutside(ctx context.Context, out *extensions.Outside, m extensions.Mount) (*extensions.Given, error) {
	o, err := readMount(m)
	if err != nil {
		return nil, err
	}
	if o.cacheDir == "" && !o.inMemory && out.StateDir != "" {
		o.cacheDir = filepath.Join(out.StateDir, Name)
	}
	data, err := json.Marshal(o.inside)
	if err != nil {
		return nil, err
	}
	line, err := e.fetcher.open(ctx, out, e, o, &m)
	if err != nil {
		return nil, err
	}
	out.Action("check", func(ctx context.Context, _ json.RawMessage) (any, error) { return out.Tell(ctx, "check", nil) })
	return &extensions.Given{Data: data, Files: []*os.File{line}}, nil
}

// ImageStats implements extensions.ImageCounter.
func (e *Extension) ImageStats(ctx context.Context) ([]api.ImageStats, error) {
	return e.fetcher.stats(ctx)
}

// OpenInside implements extensions.Hosted.
func (e *Extension) OpenInside(in *extensions.Inside, m extensions.Mount, g *extensions.Given) (_ fsbackend.Backend, _ extensions.Options, err error) {
	var o insideOptions
	if len(g.Files) != 1 || len(g.Parts) > 0 {
		g.Close()
		return nil, extensions.Options{}, fmt.Errorf("%d descriptors and %d parts for an image: expected one, and none", len(g.Files), len(g.Parts))
	}
	if err := json.Unmarshal(g.Data, &o); err != nil {
		g.Close()
		return nil, extensions.Options{}, err
	}
	line, err := store.NewSocketLine(g.Files[0])
	if err != nil {
		return nil, extensions.Options{}, err
	}
	image := &image{Client: store.NewClient(store.ClientConfig{Line: line, Timeout: o.Timeout + answerSlack, Log: in.Log}), line: line}
	ctx, cancel := context.WithTimeout(context.Background(), openLimit)
	defer cancel()
	fs, err := lazyimage.New(ctx, lazyimage.Config{
		Store: image, Merge: o.Merge, Opaque: o.Opaque, ReadAhead: o.ReadAhead, MaxFDs: in.MaxFDs, MaxInodes: in.MaxInodes, Log: in.Log,
	})
	if err != nil {
		return nil, extensions.Options{}, errors.Join(err, image.Close())
	}
	debug.FreeOSMemory() // putting a large image together takes several times the memory that it then needs
	in.OnTell(func(method string, _ json.RawMessage, files []*os.File) (any, error) {
		(&extensions.Given{Files: files}).Close()
		if method != "check" {
			return nil, fmt.Errorf("an image is asked to %q: expected check", method)
		}
		return fs.Check(checkLimit)
	})
	// What is here is read on the queue's own thread; the rest asks for another one by ErrMayBlock, of those that are the graft's own.
	return fs, extensions.Options{ReadOnly: true, Inline: true, Timeout: o.Timeout + callSlack}, nil
}

// image is a client with its line.
type image struct {
	*store.Client
	line *store.SocketLine
}

// Close implements store.Store.
func (i *image) Close() error {
	return errors.Join(i.Client.Close(), i.line.Close())
}
