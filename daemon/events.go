package daemon

import (
	"context"
	"log/slog"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/bundle"
	"github.com/sluicefs/sluice/internal/watch"
)

const (
	// keptEvents is how many events of a share can be asked for again.
	keptEvents = 1 << 16
	// pendingEvents is how many may wait to be published before a watch has to gather its own.
	pendingEvents = 1 << 12
)

// eventLog is the events of one share: what its watches have seen, in one order, for any number of followers.
type eventLog struct {
	announce func([]api.Event) error // tells the server, before anybody else hears of them
	log      *slog.Logger

	pending chan api.Event
	ending  context.CancelFunc
	ended   chan struct{}

	mu      sync.Mutex
	token   string        // "" until something is watched
	events  []api.Event   // the last ones, in order
	last    uint64        // ID of the last one that there was
	changed chan struct{} // closed when there are more
}

func newEventLog(announce func([]api.Event) error, log *slog.Logger) *eventLog {
	ctx, cancel := context.WithCancel(context.Background())
	l := &eventLog{
		announce: announce, log: log, pending: make(chan api.Event, pendingEvents),
		ending: cancel, ended: make(chan struct{}), changed: make(chan struct{}),
	}
	go l.publish(ctx)
	return l
}

// enable has followers know token, by a second hello if need be.
func (l *eventLog) enable(token string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.token == "" {
		l.token = token
		l.wakeLocked()
	}
}

func (l *eventLog) wakeLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// add has e published. It waits while too many do.
func (l *eventLog) add(ctx context.Context, e api.Event) {
	select {
	case l.pending <- e:
	case <-ctx.Done():
	}
}

// publish numbers events, announces them and lets followers have them, as many at a time as there are.
func (l *eventLog) publish(ctx context.Context) {
	defer close(l.ended)
	for {
		var batch []api.Event
		select {
		case <-ctx.Done():
			return
		case e := <-l.pending:
			batch = append(batch, e)
		}
		for more := true; more && len(batch) < pendingEvents; {
			select {
			case e := <-l.pending:
				batch = append(batch, e)
			default:
				more = false
			}
		}
		for i := range batch {
			batch[i].ID = l.last + 1 + uint64(i) // nobody else changes it
		}
		if err := l.announce(batch); err != nil {
			l.log.Warn("events are not announced: they cannot be replayed", "error", err)
		}
		l.mu.Lock()
		l.last += uint64(len(batch))
		l.events = append(l.events, batch...)
		if n := len(l.events); n > 2*keptEvents {
			l.events = slices.Clone(l.events[n-keptEvents:])
		}
		l.wakeLocked()
		l.mu.Unlock()
	}
}

// after returns the token, the events after the one with ID since, and what is closed when there is more. Where some of them are not
// kept any more, or never were, because since is another daemon's, a rescan of everything stands for them all.
func (l *eventLog) after(since uint64) (token string, events []api.Event, more <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := l.last - uint64(len(l.events)) // ID of the one before the first kept
	if since < first || since > l.last {
		return l.token, []api.Event{{ID: l.last, Time: time.Now(), Kind: api.EventRescan, Path: "/", Dir: true}}, l.changed
	}
	return l.token, l.events[since-first:], l.changed
}

// follow is control.Daemon's Events. There is a second hello if the token comes late.
func (l *eventLog) follow(ctx context.Context, since uint64, send func(api.Event) error) error {
	l.mu.Lock()
	if since == 0 {
		since = l.last
	}
	l.mu.Unlock()
	greeted, told := false, ""
	for {
		token, events, more := l.after(since)
		if !greeted || told != token {
			greeted, told = true, token
			if err := send(api.Event{Kind: api.EventHello, Time: time.Now(), Token: token}); err != nil {
				return err
			}
		}
		for _, e := range events {
			if err := send(e); err != nil {
				return err
			}
			since = e.ID
		}
		if len(events) > 0 {
			continue
		}
		select {
		case <-more:
		case <-l.ended:
			return api.Errorf(api.CodeNotFound, "the share is gone")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// close ends it, and what follows it.
func (l *eventLog) close() {
	l.ending()
	<-l.ended
}

// watching is the watch of one graft.
type watching struct {
	watcher *watch.Watcher
	stop    context.CancelFunc
	done    chan struct{}
}

// watchGraft starts to watch the host's directory or file of a graft, of which l is told.
func watchGraft(o *graftOrder, l *eventLog, log *slog.Logger) (*watching, error) {
	spec, dir, file := o.Spec, o.Mount.Source, ""
	if o.Mount.Kind == bundle.File {
		dir, file = filepath.Dir(dir), filepath.Base(dir)
	}
	w, err := watch.New(watch.Config{
		Dir: dir, File: file, Log: log, Limits: watch.Limits{MaxFiles: spec.WatchMaxFiles, MaxBytes: int64(spec.WatchMaxBytes)},
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	g := &watching{watcher: w, stop: cancel, done: make(chan struct{})}
	place := func(p string) string {
		switch {
		case p == "":
			return ""
		case file != "":
			return spec.Path
		}
		return path.Join(spec.Path, p)
	}
	go func() {
		defer close(g.done)
		err := w.Run(ctx, func(e watch.Event) {
			l.add(ctx, api.Event{Time: time.Now(), Kind: eventKinds[e.Kind], Path: place(e.Path), To: place(e.To), Dir: e.Dir})
		})
		if err != nil && ctx.Err() == nil {
			log.Error("the host's changes are no longer seen", "graft", spec.Path, "source", spec.Source, "error", err)
		}
	}()
	return g, nil
}

// eventKinds are a watch's kinds in the API's words.
var eventKinds = map[watch.Kind]string{
	watch.Create: api.EventCreate,
	watch.Modify: api.EventModify,
	watch.Attrib: api.EventAttrib,
	watch.Delete: api.EventDelete,
	watch.Rename: api.EventRename,
	watch.Rescan: api.EventRescan,
	watch.Limit:  api.EventLimit,
}

// close ends the watch.
func (g *watching) close() error {
	g.stop()
	<-g.done
	return g.watcher.Close()
}
