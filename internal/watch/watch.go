// Package watch tells what the host changes in a directory tree, or of one file: in the host's order, and a content only when it is complete.
//
// It reads inotify itself. fsnotify, which would do elsewhere, tells its users neither of IN_CLOSE_WRITE, without which nobody knows
// when a content is complete, nor which two halves make a rename, and it finds what it watches by paths, through symbolic links
// that whoever can write into the tree may put there.
//
// # What a reader can rely on
//
// For each name, the last event that speaks of it is later than the last change of it: Create and the To of a Rename say that it is
// there, Delete and the Path of a Rename that it is not. A reader that does with its picture of the tree what the events say, in their
// order, has the tree when the tree rests. Five rules make that hold when events are lost, gathered or overtaken by the host:
//   - Rescan says to look at a directory and everything below it again. A directory that is not there by then is told of by a later event.
//   - A Rename from a Path that the reader does not know brings To into being; a directory then has to be looked at, as with Rescan.
//   - What a Rename without Dir moves is a file, even if the reader has seen a directory at Path meanwhile.
//   - A Create of what the reader knows says that another file is there now.
//   - A Delete may name what the reader does not know: after a Rescan it is told of all that is gone, which the reader may have found.
//
// # What is not told
//
// inotify knows nothing of writes through a shared mapping, and does not say who made a change: what a guest does through the
// daemon comes back as an event, and who replays events has to ignore what the guest knows already. A directory above the tree's parent
// that is renamed goes unnoticed; the tree is watched on. Symbolic links are told of and not followed.
package watch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicefs/sluice/internal/ratelog"
)

// Kind is what has happened.
type Kind uint8

// Kinds of events.
const (
	_      Kind = iota
	Create      // Path has come into being, or is another file than before; its content is complete
	Modify      // the content of Path has changed, and is complete
	Attrib      // mode, owner, times or extended attributes have
	Delete      // Path is gone, and what was below it
	Rename      // Path is To now; what was at To before is gone
	Rescan      // anything in the directory Path, or below, may have changed
	Limit       // what changes at Path will not be told; others may share its fate, see Stats.Limited
)

// String is the name in the control API.
func (k Kind) String() string {
	names := [...]string{Create: "create", Modify: "modify", Attrib: "attrib", Delete: "delete", Rename: "rename", Rescan: "rescan", Limit: "limit"}
	if int(k) < len(names) && names[k] != "" {
		return names[k]
	}
	return fmt.Sprintf("kind %d", k)
}

// Event is a change. Path and To begin with "/", which is Config.Dir.
type Event struct {
	Kind Kind
	Path string
	To   string // of Rename
	Dir  bool   // it is a directory
}

// Limits bound what a tree may cost. What is beyond them is not told; the file is what it is all the same.
type Limits struct {
	MaxFiles   int   // files and directories in the tree; 0 is 131,072, at about 200 bytes each
	MaxBytes   int64 // sum of the regular files' sizes; 0 is any
	MaxWatches int   // directories; 0 is 32,768, at about 1 KiB of the kernel's memory each
}

// Config says what to watch.
type Config struct {
	Dir  string // a directory
	File string // if set, this name in Dir and nothing else
	Limits
	// Settle is how long after its last write a file counts as complete although it was not closed; 0 is 20 ms.
	Settle time.Duration
	Log    *slog.Logger // nil is none
}

// Validate says what is wrong.
func (c *Config) Validate() error {
	switch {
	case c.Dir == "":
		return errors.New("no directory to watch is given")
	case c.File == "." || c.File == ".." || strings.ContainsAny(c.File, "/\x00"):
		return fmt.Errorf("file to watch is %q: expected a name in %s, without a slash", c.File, c.Dir)
	case c.MaxFiles < 0 || c.MaxBytes < 0 || c.MaxWatches < 0:
		return errors.New("a limit of file events is negative: expected 0 for the default, or more")
	case c.Settle < 0:
		return fmt.Errorf("settle time is %v: expected 0 for the default, or more", c.Settle)
	}
	return nil
}

const (
	defaultMaxFiles   = 1 << 17
	defaultMaxWatches = 1 << 15
	defaultSettle     = 20 * time.Millisecond
)

// Stats are what a Watcher has done so far, except Watches and Files, which are now.
type Stats struct {
	Watches   int    // directories that are watched
	Files     int    // files and directories that are told of
	Sent      uint64 // events given to emit
	Rescans   uint64 // of these, Rescan
	Limited   uint64 // changes not told because of a limit
	Overflows uint64 // times that the kernel's queue was too short
}

type counters struct {
	watches, files                    atomic.Int64
	sent, rescans, limited, overflows atomic.Uint64
}

// ErrRunning is what a second Run says.
var ErrRunning = errors.New("the watcher runs already")

// Watcher watches from New until Close, or the end of Run.
type Watcher struct {
	cfg   Config
	stats counters
	queue *queue
	tree  *tracker

	mu      sync.Mutex
	running bool
	closed  bool
	stop    chan struct{} // closed by Close
	done    chan struct{} // closed at the end of Run
}

// New begins to watch: what changes from now on, Run will tell. The directory must exist.
func New(cfg Config) (*Watcher, error) { return newWatcher(cfg, newInotify) }

func newWatcher(cfg Config, open func() (source, error)) (*Watcher, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.MaxFiles == 0 {
		cfg.MaxFiles = defaultMaxFiles
	}
	if cfg.MaxWatches == 0 {
		cfg.MaxWatches = defaultMaxWatches
	}
	if cfg.Settle == 0 {
		cfg.Settle = defaultSettle
	}
	w := &Watcher{cfg: cfg, stop: make(chan struct{}), done: make(chan struct{})}
	w.queue = newQueue()
	w.tree = newTracker(&w.cfg, &w.stats, w.queue, ratelog.New(cfg.Log, time.Minute, 4), open)
	if err := w.tree.open(context.Background()); err != nil {
		w.tree.close()
		return nil, fmt.Errorf("watch %s: %w", cfg.Dir, err)
	}
	return w, nil
}

// Run calls emit with each event, one at a time, until ctx ends or Close is called, and then releases everything. While emit takes
// its time events are gathered, and become Rescans when they are too many. Whatever happens to the tree, Run goes on: a tree that
// disappears is watched again when there is one under its name.
func (w *Watcher) Run(ctx context.Context, emit func(Event)) error {
	w.mu.Lock()
	if w.closed || w.running {
		defer w.mu.Unlock()
		if w.closed {
			return fmt.Errorf("watch %s: %w", w.cfg.Dir, context.Canceled)
		}
		return ErrRunning
	}
	w.running = true
	w.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	var reader sync.WaitGroup
	reader.Go(func() { w.tree.run(ctx) })
	defer func() {
		cancel()
		reader.Wait()
		w.mu.Lock()
		w.closed = true
		w.mu.Unlock()
		close(w.done)
	}()
	for {
		ev, wait, ok := w.queue.next(time.Now())
		if ok {
			emit(ev)
			w.stats.sent.Add(1)
			if ev.Kind == Rescan {
				w.stats.rescans.Add(1)
			}
		}
		var timer <-chan time.Time
		if wait > 0 {
			timer = time.After(wait)
		}
		if ok {
			select {
			case <-ctx.Done():
				return nil
			case <-w.stop:
				return nil
			default:
				continue
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-w.stop:
			return nil
		case <-w.queue.wake:
		case <-timer:
		}
	}
}

// Close ends Run, waits for it, and releases everything. It must not be called by emit.
func (w *Watcher) Close() error {
	w.mu.Lock()
	closed, running := w.closed, w.running
	if !closed {
		w.closed = true
		close(w.stop)
	}
	w.mu.Unlock()
	switch {
	case running:
		<-w.done
	case !closed:
		w.tree.close()
	}
	return nil
}

// Stats may be called at any time.
func (w *Watcher) Stats() Stats {
	return Stats{
		Watches:   int(w.stats.watches.Load()),
		Files:     int(w.stats.files.Load()),
		Sent:      w.stats.sent.Load(),
		Rescans:   w.stats.rescans.Load(),
		Limited:   w.stats.limited.Load(),
		Overflows: w.stats.overflows.Load(),
	}
}
