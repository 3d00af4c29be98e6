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
	// keptEvents and keptBytes are how many events of a share, and bytes in their paths, can be asked for again, and half as many
	// more at times. The server can have more than that replayed, so that nobody is sent what it has forgotten.
	keptEvents = 1 << 13
	keptBytes  = 2 << 20
	// pendingEvents is how many may wait to be published before a watch has to gather its own, and how many are published at a time.
	pendingEvents = 1 << 8
)

// eventLog is the events of one share: what its watches have seen, in one order, for any number of followers. It costs nothing
// much until something is watched.
type eventLog struct {
	announce func([]api.Event) error // tells the server, before anybody else hears of them
	log      *slog.Logger

	ctx    context.Context // until close
	cancel context.CancelFunc

	mu      sync.Mutex
	token   string         // "" until something is watched
	pending chan api.Event // nil until then
	ended   chan struct{}  // nil until then; closed when nothing is published any more
	watched []string       // where in the share rescans look
	events  []api.Event    // the last ones, in order
	bytes   int            // in their paths
	last    uint64         // ID of the last one that there was
	changed chan struct{}  // closed when there are more
}

func newEventLog(announce func([]api.Event) error, log *slog.Logger) *eventLog {
	l := &eventLog{announce: announce, log: log, changed: make(chan struct{})}
	// The clock, so that an ID that another daemon has given is never taken for one of these.
	l.last = uint64(time.Now().UnixMicro())
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// enable begins to publish, and has followers know token, by a second hello if need be. Not after close.
func (l *eventLog) enable(token string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.token != "" {
		return
	}
	l.token, l.pending, l.ended = token, make(chan api.Event, pendingEvents), make(chan struct{})
	go l.publish(l.pending, l.ended)
	l.wakeLocked()
}

func (l *eventLog) wakeLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// add has e published, once enabled. It waits while too many do.
func (l *eventLog) add(ctx context.Context, e api.Event) {
	l.mu.Lock()
	pending := l.pending
	l.mu.Unlock()
	select {
	case pending <- e:
	case <-ctx.Done():
	case <-l.ctx.Done():
	}
}

// publish numbers events, announces them and lets followers have them, as many at a time as there are.
func (l *eventLog) publish(pending <-chan api.Event, ended chan<- struct{}) {
	defer close(ended)
	for {
		select {
		case <-l.ctx.Done():
			return
		case e := <-pending:
			l.publishBatch(gather(e, pending))
		}
	}
}

// gather returns first and what else there is.
func gather(first api.Event, pending <-chan api.Event) []api.Event {
	batch := []api.Event{first}
	for len(batch) < pendingEvents {
		select {
		case e := <-pending:
			batch = append(batch, e)
		default:
			return batch
		}
	}
	return batch
}

// publishBatch is publish's, who alone changes l.last.
func (l *eventLog) publishBatch(batch []api.Event) {
	for i := range batch {
		batch[i].ID = l.last + 1 + uint64(i)
	}
	if err := l.announce(batch); err != nil && l.ctx.Err() == nil {
		l.log.Warn("events are not announced: they cannot be replayed", "error", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last += uint64(len(batch))
	for _, e := range batch {
		l.bytes += len(e.Path) + len(e.To)
	}
	l.events = append(l.events, batch...)
	if len(l.events) > keptEvents*3/2 || l.bytes > keptBytes*3/2 {
		n := 0
		for ; len(l.events)-n > keptEvents || l.bytes > keptBytes; n++ {
			l.bytes -= len(l.events[n].Path) + len(l.events[n].To)
		}
		l.events = slices.Clone(l.events[n:]) // followers may still read the old ones, which then go
	}
	l.wakeLocked()
}

// after returns the token, the events after the one with ID since, and what is closed when there is more. Where some of them are not
// kept any more, or never were, because since is another daemon's, rescans of all that is watched stand for them.
func (l *eventLog) after(since uint64) (token string, events []api.Event, more <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := l.last - uint64(len(l.events)) // ID of the one before the first kept
	if since >= first && since <= l.last {
		return l.token, l.events[since-first:], l.changed
	}
	for _, dir := range l.watched {
		events = append(events, api.Event{ID: since, Time: time.Now(), Kind: api.EventRescan, Path: dir, Dir: true})
	}
	if events == nil {
		events = []api.Event{{Time: time.Now(), Kind: api.EventRescan, Path: "/", Dir: true}}
	}
	events[len(events)-1].ID = l.last // who has not seen this one has to see all of them
	return l.token, events, l.changed
}

// follow is control.Daemon's Events. There is a second hello if the token comes late.
func (l *eventLog) follow(ctx context.Context, since uint64, send func(api.Event) error) error {
	if since == 0 {
		l.mu.Lock()
		since = l.last
		l.mu.Unlock()
	}
	greeted, told := false, ""
	for {
		token, events, more := l.after(since)
		if !greeted || told != token {
			greeted, told = true, token
			if err := send(api.Event{ID: since, Kind: api.EventHello, Time: time.Now(), Token: token}); err != nil {
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
		case <-l.ctx.Done():
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// close ends it, and what follows it. Events that are not published are lost. It may be called again.
func (l *eventLog) close() {
	l.cancel()
	l.mu.Lock()
	ended := l.ended
	l.mu.Unlock()
	if ended != nil {
		<-ended
	}
}

// setWatched says whether what is at path is told of.
func (l *eventLog) setWatched(path string, watched bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.watched = slices.DeleteFunc(l.watched, func(p string) bool { return p == path })
	if watched {
		l.watched = append(l.watched, path)
	}
}

// watching is the watch of one graft. nil is none.
type watching struct {
	events  *eventLog
	path    string // of the graft
	watcher *watch.Watcher
	log     *slog.Logger
	emit    func(context.Context, watch.Event)
	stop    context.CancelFunc // nil before start
	done    chan struct{}
}

// watchGraft begins to watch the host's directory or file of a graft: what happens from now on, l is told after start.
func watchGraft(o *graftOrder, l *eventLog, log *slog.Logger) (*watching, error) {
	spec, dir, file := o.Spec, o.Mount.Source, ""
	if o.Mount.Kind == bundle.File {
		dir, file = filepath.Dir(dir), filepath.Base(dir)
	}
	log = log.With("graft", spec.Path)
	watcher, err := watch.New(watch.Config{
		Dir: dir, File: file, Log: log, Limits: watch.Limits{MaxFiles: spec.WatchMaxFiles, MaxBytes: int64(spec.WatchMaxBytes)},
	})
	if err != nil {
		return nil, err
	}
	place := func(p string) string {
		switch {
		case p == "":
			return ""
		case file != "":
			return spec.Path
		}
		return path.Join(spec.Path, p)
	}
	there := true // the single file
	emit := func(ctx context.Context, e watch.Event) {
		if file != "" && e.Kind == watch.Create && there {
			// Another one by that name: who watches the one that was there has to hear that it is gone.
			l.add(ctx, api.Event{Time: time.Now(), Kind: api.EventDelete, Path: spec.Path})
		}
		if e.Kind == watch.Create || e.Kind == watch.Delete {
			there = e.Kind == watch.Create
		}
		l.add(ctx, api.Event{Time: time.Now(), Kind: eventKinds[e.Kind], Path: place(e.Path), To: place(e.To), Dir: e.Dir})
	}
	return &watching{events: l, path: spec.Path, watcher: watcher, log: log, emit: emit}, nil
}

// start has the log be told.
func (w *watching) start() {
	if w == nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.stop, w.done = cancel, make(chan struct{})
	w.events.setWatched(w.path, true)
	go func() {
		defer close(w.done)
		if err := w.watcher.Run(ctx, func(e watch.Event) { w.emit(ctx, e) }); err != nil && ctx.Err() == nil {
			w.log.Error("the host's changes are no longer seen", "error", err)
		}
	}()
}

// close ends the watch.
func (w *watching) close() error {
	if w == nil {
		return nil
	}
	if w.stop != nil {
		w.stop()
		<-w.done
		w.events.setWatched(w.path, false)
	}
	return w.watcher.Close()
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
