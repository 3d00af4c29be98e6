// Package controltest has a daemon for tests of the control API's server and clients: shares, grafts and events in memory,
// and nobody who serves them.
package controltest

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

// Keep is how many events of a share are remembered for those who come later.
const Keep = 1024

// Daemon is a control.Daemon in memory. Its methods may be called from many goroutines.
type Daemon struct {
	mu     sync.Mutex
	info   api.Info
	stats  api.Stats
	shares map[string]*share
	fail   map[string][]error
	hang   map[string]chan struct{}
	calls  []string
}

type share struct {
	api.Share
	token   string
	grafts  map[string]*api.Graft
	leaving []api.Graft
	events  []api.Event   // the last Keep
	last    uint64        // ID of the latest
	news    chan struct{} // closed and replaced with each event
	gone    chan struct{} // closed when the share is removed
}

// New returns a daemon without shares.
func New() *Daemon {
	return &Daemon{
		info: api.Info{
			ID: "test", Version: "0.0.0-test", State: "READY", PID: 1, Started: time.Unix(1_700_000_000, 0).UTC(), Sandbox: "none",
			Backends: []string{"passthrough", "mem"},
		},
		shares: make(map[string]*share),
		fail:   make(map[string][]error),
		hang:   make(map[string]chan struct{}),
	}
}

// Fail makes the next call of method ("AddGraft") fail with err, before it does anything. Several fail one after the other; a
// nil lets one call through.
func (d *Daemon) Fail(method string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail[method] = append(d.fail[method], err)
}

// Hang makes calls of method wait, until their context ends or release is called.
func (d *Daemon) Hang(method string) (release func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ch := make(chan struct{})
	d.hang[method] = ch
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.hang, method)
		close(ch)
	})
}

// Calls returns the calls so far but those that only look: "AddGraft tag /path", with what is different from the default
// behind it.
func (d *Daemon) Calls() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.calls)
}

// Connect is a guest that mounts the share tag.
func (d *Daemon) Connect(tag string) {
	d.must(tag, func(s *share) { s.State, s.Guests = api.StateServing, s.Guests+1 })
}

// Disconnect is the guest's end.
func (d *Daemon) Disconnect(tag string) {
	d.must(tag, func(s *share) { s.State = api.StateWaiting })
}

// Open makes n the number of files that the guest has open in the graft at path. A graft that is Leaving goes with its last.
func (d *Daemon) Open(tag, path string, n int64) {
	d.must(tag, func(s *share) {
		if g := s.grafts[path]; g != nil {
			g.OpenFiles = n
			return
		}
		i := slices.IndexFunc(s.leaving, func(g api.Graft) bool { return g.Path == path })
		if i < 0 {
			panic(fmt.Sprintf("no graft %s in share %s", path, tag))
		}
		if s.leaving[i].OpenFiles = n; n == 0 {
			s.leaving = slices.Delete(s.leaving, i, i+1)
		}
	})
}

// Emit sends e, whose ID and, if zero, Time it sets, to whoever listens to tag's events, and returns the ID.
func (d *Daemon) Emit(tag string, e api.Event) (id uint64) {
	d.must(tag, func(s *share) {
		s.last++
		e.ID = s.last
		if e.Time.IsZero() {
			e.Time = time.Now().UTC()
		}
		if s.events = append(s.events, e); len(s.events) > Keep {
			s.events = s.events[1:]
		}
		close(s.news)
		s.news = make(chan struct{})
		id = e.ID
	})
	return id
}

// SetStats is what Stats answers from now on.
func (d *Daemon) SetStats(stats api.Stats) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stats = stats
}

// SetInfo changes what Info answers; State and Shares are still those of the shares.
func (d *Daemon) SetInfo(info api.Info) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.info = info
}

// must is f on a share that the test has to have added.
func (d *Daemon) must(tag string, f func(*share)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.shares[tag]
	if s == nil {
		panic("no share " + tag)
	}
	f(s)
}

// enter begins a call of method, which call describes if it does more than look. With a nil error d.mu is held.
func (d *Daemon) enter(ctx context.Context, method, call string) error {
	d.mu.Lock()
	if hang := d.hang[method]; hang != nil {
		d.mu.Unlock()
		select {
		case <-hang:
		case <-ctx.Done():
			return ctx.Err()
		}
		d.mu.Lock()
	}
	if err := ctx.Err(); err != nil {
		d.mu.Unlock()
		return err
	}
	if call != "" {
		d.calls = append(d.calls, method+" "+call)
	}
	if queue := d.fail[method]; len(queue) > 0 {
		d.fail[method] = queue[1:]
		if queue[0] != nil {
			d.mu.Unlock()
			return queue[0]
		}
	}
	return nil
}

// share finds a share. The caller holds d.mu.
func (d *Daemon) share(tag string) (*share, error) {
	if s := d.shares[tag]; s != nil {
		return s, nil
	}
	return nil, api.Errorf(api.CodeNotFound, "no share %q", tag)
}

// Info implements control.Daemon.
func (d *Daemon) Info(ctx context.Context) (api.Info, error) {
	if err := d.enter(ctx, "Info", ""); err != nil {
		return api.Info{}, err
	}
	defer d.mu.Unlock()
	info := d.info
	info.Shares = len(d.shares)
	for _, s := range d.shares {
		if s.State == api.StateServing {
			info.State = "RUNNING"
		}
	}
	return info, nil
}

// Shares implements control.Daemon.
func (d *Daemon) Shares(ctx context.Context) ([]api.Share, error) {
	if err := d.enter(ctx, "Shares", ""); err != nil {
		return nil, err
	}
	defer d.mu.Unlock()
	var all []api.Share
	for _, s := range d.shares {
		all = append(all, s.describe())
	}
	slices.SortFunc(all, func(a, b api.Share) int { return cmp.Compare(a.Tag, b.Tag) })
	return all, nil
}

// describe returns the share with the grafts it has now.
func (s *share) describe() api.Share {
	out := s.Share
	out.Grafts = nil
	for _, g := range s.list() {
		if !g.Leaving {
			out.Grafts = append(out.Grafts, g.GraftSpec)
		}
	}
	return out
}

// list returns the grafts in the order of control.Daemon.Grafts.
func (s *share) list() []api.Graft {
	var all []api.Graft
	for _, g := range s.grafts {
		all = append(all, *g)
	}
	slices.SortFunc(all, func(a, b api.Graft) int { return cmp.Compare(a.Path, b.Path) })
	return append(all, s.leaving...)
}

// AddShare implements control.Daemon.
func (d *Daemon) AddShare(ctx context.Context, spec api.ShareSpec) (api.Share, error) {
	if err := d.enter(ctx, "AddShare", spec.Tag); err != nil {
		return api.Share{}, err
	}
	defer d.mu.Unlock()
	if err := api.CheckTag(spec.Tag); err != nil {
		return api.Share{}, err
	}
	if d.shares[spec.Tag] != nil {
		return api.Share{}, api.Errorf(api.CodeExists, "there is a share %q already", spec.Tag)
	}
	if spec.Socket == "" {
		spec.Socket = "/run/sluice/" + spec.Tag + ".sock"
	}
	s := &share{
		Share:  api.Share{ShareSpec: spec, State: api.StateWaiting},
		token:  "token of " + spec.Tag,
		grafts: make(map[string]*api.Graft),
		news:   make(chan struct{}),
		gone:   make(chan struct{}),
	}
	for _, g := range spec.Grafts {
		if _, err := s.add(g, false); err != nil {
			return api.Share{}, err
		}
	}
	if s.grafts["/"] == nil {
		if _, err := s.add(api.GraftSpec{Path: "/", Backend: "mem", ReadOnly: true}, false); err != nil {
			return api.Share{}, err
		}
	}
	d.shares[spec.Tag] = s
	return s.describe(), nil
}

// RemoveShare implements control.Daemon.
func (d *Daemon) RemoveShare(ctx context.Context, tag string, force bool) error {
	call := tag
	if force {
		call += " force"
	}
	if err := d.enter(ctx, "RemoveShare", call); err != nil {
		return err
	}
	defer d.mu.Unlock()
	s, err := d.share(tag)
	if err != nil {
		return err
	}
	if s.State != api.StateWaiting && !force {
		return &api.Error{Code: api.CodeBusy, Message: fmt.Sprintf("a guest is connected to share %q", tag), Hint: "disconnect it, or force"}
	}
	delete(d.shares, tag)
	close(s.gone)
	return nil
}

// Grafts implements control.Daemon.
func (d *Daemon) Grafts(ctx context.Context, tag string) ([]api.Graft, error) {
	if err := d.enter(ctx, "Grafts", ""); err != nil {
		return nil, err
	}
	defer d.mu.Unlock()
	s, err := d.share(tag)
	if err != nil {
		return nil, err
	}
	return s.list(), nil
}

// add puts a graft into the share.
func (s *share) add(spec api.GraftSpec, replace bool) (api.Graft, error) {
	if err := api.CheckPath(spec.Path); err != nil {
		return api.Graft{}, err
	}
	if spec.Source == "" && spec.Backend != "mem" {
		return api.Graft{}, api.Errorf(api.CodeInvalid, "graft %s has no source", spec.Path)
	}
	if old := s.grafts[spec.Path]; old != nil {
		if !replace {
			return api.Graft{}, api.Errorf(api.CodeExists, "there is a graft at %s already", spec.Path)
		}
		s.leave(old)
	}
	g := &api.Graft{GraftSpec: spec}
	s.grafts[spec.Path] = g
	return *g, nil
}

// leave takes a graft away, but for what is open.
func (s *share) leave(g *api.Graft) {
	delete(s.grafts, g.Path)
	if g.OpenFiles > 0 {
		g.Leaving = true
		s.leaving = append(s.leaving, *g)
	}
}

// AddGraft implements control.Daemon.
func (d *Daemon) AddGraft(ctx context.Context, tag string, spec api.GraftSpec, replace bool) (api.Graft, error) {
	call := tag + " " + spec.Path
	if replace {
		call += " replace"
	}
	if err := d.enter(ctx, "AddGraft", call); err != nil {
		return api.Graft{}, err
	}
	defer d.mu.Unlock()
	s, err := d.share(tag)
	if err != nil {
		return api.Graft{}, err
	}
	return s.add(spec, replace)
}

// graft finds a graft of a share. The caller holds d.mu.
func (d *Daemon) graft(tag, path string) (*share, *api.Graft, error) {
	s, err := d.share(tag)
	if err != nil {
		return nil, nil, err
	}
	g := s.grafts[path]
	if g == nil {
		return nil, nil, api.Errorf(api.CodeNotFound, "no graft at %s in share %q", path, tag)
	}
	return s, g, nil
}

// ChangeGraft implements control.Daemon.
func (d *Daemon) ChangeGraft(ctx context.Context, tag, path string, change api.GraftChange) (api.Graft, error) {
	if err := d.enter(ctx, "ChangeGraft", tag+" "+path); err != nil {
		return api.Graft{}, err
	}
	defer d.mu.Unlock()
	_, g, err := d.graft(tag, path)
	if err != nil {
		return api.Graft{}, err
	}
	set(&g.ReadOnly, change.ReadOnly)
	set(&g.Cache, change.Cache)
	set(&g.NoSUID, change.NoSUID)
	set(&g.NoDev, change.NoDev)
	set(&g.NoExec, change.NoExec)
	set(&g.NoSymfollow, change.NoSymfollow)
	set(&g.MaxBytes, change.MaxBytes)
	set(&g.MaxInodes, change.MaxInodes)
	return *g, nil
}

func set[T any](to, from *T) {
	if from != nil {
		*to = *from
	}
}

// RemoveGraft implements control.Daemon.
func (d *Daemon) RemoveGraft(ctx context.Context, tag, path string) error {
	if err := d.enter(ctx, "RemoveGraft", tag+" "+path); err != nil {
		return err
	}
	defer d.mu.Unlock()
	s, g, err := d.graft(tag, path)
	if err != nil {
		return err
	}
	if path == "/" {
		return api.Errorf(api.CodeInvalid, "the root of a share cannot be removed")
	}
	s.leave(g)
	return nil
}

// ActGraft implements control.Daemon. Only graft "/" has actions, those of an overlay, with answers that never change.
func (d *Daemon) ActGraft(ctx context.Context, tag, path, action string, arg json.RawMessage) (json.RawMessage, error) {
	if err := d.enter(ctx, "ActGraft", tag+" "+path+" "+action+" "+string(arg)); err != nil {
		return nil, err
	}
	defer d.mu.Unlock()
	if _, _, err := d.graft(tag, path); err != nil {
		return nil, err
	}
	made := api.Checkpoint{Name: "first", Time: time.Unix(1e9, 0).UTC(), Files: 3, Bytes: 4096}
	changes := []api.OverlayChange{
		{Path: "/etc/motd", Kind: api.ChangeModified, Type: "file", Size: 2048},
		{Path: "/old", Kind: api.ChangeDeleted, Type: "directory"},
		{Path: "/renamed", Kind: api.ChangeAdded, Type: "directory", From: "/was"},
		{Path: "/\uFFFD\nx", RawPath: []byte("/\xff\nx"), Kind: api.ChangeAdded, Type: "file", Was: "directory"},
	}
	answer, ok := map[string]any{
		api.ActCheckpoint: made, api.ActCheckpoints: []api.Checkpoint{made}, api.ActDiff: changes, api.ActApply: changes,
		api.ActRestore: struct{}{}, api.ActForget: struct{}{},
	}[action]
	if path != "/" || !ok {
		return nil, api.Errorf(api.CodeInvalid, "%q is nothing that the graft can do", action)
	}
	return json.Marshal(answer)
}

// Events implements control.Daemon. It also ends when the share is removed.
func (d *Daemon) Events(ctx context.Context, tag string, since uint64, send func(api.Event) error) error {
	if err := d.enter(ctx, "Events", ""); err != nil {
		return err
	}
	s, err := d.share(tag)
	if err != nil {
		d.mu.Unlock()
		return err
	}
	if since == 0 {
		since = s.last
	}
	hello := api.Event{Kind: api.EventHello, Time: time.Now().UTC(), Token: s.token}
	d.mu.Unlock()
	if err := send(hello); err != nil {
		return err
	}
	for {
		d.mu.Lock()
		batch := s.after(since)
		news := s.news
		d.mu.Unlock()
		for _, e := range batch {
			if err := send(e); err != nil {
				return err
			}
			since = e.ID
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-news:
		case <-s.gone:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// after returns the events behind since, or one EventRescan with the ID of the latest where some of them are forgotten.
func (s *share) after(since uint64) []api.Event {
	if since >= s.last {
		return nil
	}
	if first := s.events[0].ID; since+1 < first {
		return []api.Event{{ID: s.last, Time: time.Now().UTC(), Kind: api.EventRescan, Path: "/", Dir: true}}
	}
	return slices.Clone(s.events[len(s.events)-int(s.last-since):])
}

// Stats implements control.Daemon.
func (d *Daemon) Stats(ctx context.Context) (api.Stats, error) {
	if err := d.enter(ctx, "Stats", ""); err != nil {
		return api.Stats{}, err
	}
	defer d.mu.Unlock()
	return d.stats, nil
}
