package extensions

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/fsbackend"
)

// Hosted is an extension in two halves. The one outside the sandbox has the host: it opens directories, starts programs, reaches
// the network through them; and it decides what the other half, which serves the guest behind the filter, is given: descriptors,
// and data to go with them. A guest that took the serving process over would have those and nothing else.
//
// It serves mounts that name it as their backend. With one, shares are served by two processes whatever the sandbox, as with
// --config. TryHandleMount is not asked.
type Hosted interface {
	Extension
	// OpenOutside opens what m needs of the host. An error says what of m was wrong and what was expected. It may take as long as
	// ctx lasts. What stays behind is to be given to out.OnClose as soon as it is there, also where an error follows.
	OpenOutside(ctx context.Context, out *Outside, m Mount) (*Given, error)
	// OpenInside makes the backend. It takes g's files over, of which none is left open on an error.
	OpenInside(in *Inside, m Mount, g *Given) (fsbackend.Backend, Options, error)
}

// Checker is a Hosted extension that can say what is wrong with a mount before it is served: for --check-config.
type Checker interface {
	Hosted
	// CheckMount returns what OpenOutside would find wrong with m without a look at the host: nothing is opened, started or asked for.
	CheckMount(c *Checking, m Mount) error
}

// Checking is what CheckMount is given by the daemon.
type Checking struct {
	// Has says whether m.Backend of Mount may be name, as Outside.Has does.
	Has func(name string) bool
	// Mount checks a part, as Outside.Open opens it.
	Mount func(m Mount) error
}

// ImageCounter is a Hosted extension that serves images, or the like, which are loaded as they are read, and counts that.
type ImageCounter interface {
	Hosted
	// ImageStats returns what is counted of each image that is open, within ctx, with Tag and Path of the Mount that it is, or is a part of.
	// One graft may have several: they are added up.
	ImageStats(ctx context.Context) ([]api.ImageStats, error)
}

// Mount is what a Hosted extension is asked to serve: a graft, or a part of one.
type Mount struct {
	// Share is the tag of the share, Path where in it the graft is.
	Share string `json:"share,omitempty"`
	Path  string `json:"path,omitempty"`
	// Backend names the extension, or is "passthrough", or "mem".
	Backend string `json:"backend"`
	// Source is a path of the host, absolute, or "".
	Source string `json:"source,omitempty"`
	// Options are as mount(8) has them, each "name" or "name=value".
	Options []string `json:"options,omitempty"`
	// Lowers are the trees it is made of, the uppermost first.
	Lowers []Mount `json:"lowers,omitempty"`
	// ReadOnly says that nothing will ever be changed by way of it. The core sees to that above it.
	ReadOnly bool `json:"read_only,omitempty"`
}

// Given is what the half outside gives the one inside.
type Given struct {
	// Data is the extension's own.
	Data json.RawMessage `json:"data,omitempty"`
	// Files become the other half's, in this order. At most 200 for a graft, those of its parts included.
	Files []*os.File `json:"-"`
	// Parts are backends that this one is put together from (Outside.Open, Inside.Open).
	Parts []Part `json:"parts,omitempty"`
}

// Part is one opened outside, for Inside.Open.
type Part struct {
	Mount Mount  `json:"mount"`
	Given *Given `json:"given"`
}

// Close closes the files of g and of its parts. A nil g has none.
func (g *Given) Close() {
	if g == nil {
		return
	}
	for _, f := range g.Files {
		_ = f.Close()
	}
	g.Files = nil
	for _, p := range g.Parts {
		p.Given.Close()
	}
}

// Outside is what OpenOutside is given by the daemon. It is good for as long as the graft lasts.
type Outside struct {
	// Log is the daemon's. What a guest or a program can cause is to be logged at a bounded rate.
	Log *slog.Logger
	// StateDir is a directory, which need not exist yet, for what outlives the daemon. Each extension has one of its own name in it.
	// "" says that there is none: the option is --state-dir.
	StateDir string
	// Plugins are executables that serve layers; nil leaves it to the default directory.
	Plugins []string
	// Has says whether m.Backend of Open may be name.
	Has func(name string) bool
	// Open opens m by its Backend: another hosted extension, "passthrough" with a directory as its Source (Given.Files[0] is it,
	// O_PATH, a private copy of what is mounted there where privileges allow), or "mem".
	Open func(ctx context.Context, m Mount) (Part, error)
	// OnClose has f called when the graft is gone for good, or OpenOutside has failed; the last one given first.
	OnClose func(f func() error)
	// Action has f answer what operators ask of the graft by this name (POST …/grafts/PATH/NAME): arg is JSON, what f returns too.
	// Errors should be of package extensions (ActionError) where the operator can do something about them. One action runs at a time.
	Action func(name string, f func(ctx context.Context, arg json.RawMessage) (any, error))
	// Tell has the half inside do what it has given to Inside.OnTell, and returns its answer. Not before OpenOutside has returned. The files
	// are copied.
	Tell func(ctx context.Context, method string, arg any, files ...*os.File) (json.RawMessage, error)
}

// Inside is what OpenInside is given.
type Inside struct {
	// Log is the daemon's. What a guest can cause is to be logged at a bounded rate.
	Log *slog.Logger
	// Open makes the backend of a part, whose files it takes over. Closing it is up to who gets it.
	Open func(p Part) (fsbackend.Backend, Options, error)
	// OnTell has f answer Outside.Tell. It takes the files over.
	OnTell func(f func(method string, arg json.RawMessage, files []*os.File) (any, error))
	// ProcFD is a descriptor of /proc/self/fd, which stays the daemon's, for passthrough.Config.
	ProcFD int
	// NoFileHandles says that the filter, or the lack of a capability, keeps passthrough from file handles.
	NoFileHandles bool
	// MaxFDs and MaxInodes are the graft's, as in passthrough.Config.
	MaxFDs, MaxInodes int
}

// Layered is a backend that is several layers, for who merges them: one entry of lowerdir= may be many. Those it returns, the uppermost
// first, are the caller's to close, and then it is not.
type Layered interface {
	Layers() []fsbackend.Backend
}

// ActionError is an error of an Action that the operator can do something about.
type ActionError struct {
	// Message says what is wrong and what was expected, Hint what to do.
	Message, Hint string
}

func (e *ActionError) Error() string { return e.Message }
