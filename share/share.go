package share

import (
	"errors"
	"fmt"
	"log/slog"
	"path"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/ratelog"
)

// Errno is what a guest sees.
type Errno = fsbackend.Errno

// Graft is one backend at one place of the tree.
type Graft struct {
	// Path is "/" for the root, else absolute and clean: "/data/x". It need not exist in the backend around it.
	Path string
	// Backend serves what is at Path, and nothing else. The Share closes it.
	Backend fsbackend.Backend
	// File, if set, is the name in the backend's root directory of the one file (or other non-directory) that is at Path. What
	// else the backend has is out of reach.
	File string
	// Policy is what the Share holds the backend and the guest to. It can be changed later.
	Policy
	// UIDMap and GIDMap translate between the guest's ids and the backend's; the zero value is identity.
	UIDMap, GIDMap IDMap
	// Extension is the name of who serves it, "" for what comes with the daemon.
	Extension string
	// See fsbackend.Part. Slow also holds where the backend itself says so (fsbackend.Slow).
	Isolated, Slow bool
	Timeout        time.Duration
	Enter, Leave   func()
	// OnClose, unless nil, is called when the Share has closed the backend. It must not wait for the Share.
	OnClose func()
}

// Close closes the backend of a graft that no Share has.
func (g *Graft) Close() error { return closeBackend(g.Backend, g.OnClose) }

func closeBackend(b fsbackend.Backend, closed func()) error {
	if closed != nil {
		defer closed()
	}
	return b.Close()
}

// Config describes a Share.
type Config struct {
	Grafts []Graft // in any order; one of them is the root, unless Dynamic
	// Dynamic says that grafts may come and go: see Share.Add. The root stays. Without a graft at "/" it is an empty directory
	// that cannot be changed.
	Dynamic bool
	// OnRemoved, unless nil, is called when a graft that was removed or replaced has gone for good, after its backend's Close,
	// whose error it is given. It may use the Share, but not wait for its Close.
	OnRemoved func(part *fsbackend.Part, err error)
	Log       *slog.Logger
}

// Validate says which graft is wrong.
func (c Config) Validate() error {
	at := make(map[string]*Graft)
	for i := range c.Grafts {
		g := &c.Grafts[i]
		if err := g.validate(); err != nil {
			return fmt.Errorf("graft %q: %w", g.Path, err)
		}
		if at[g.Path] != nil {
			return fmt.Errorf("graft %q: there are two at this path: expected one", g.Path)
		}
		at[g.Path] = g
	}
	if at["/"] == nil && !c.Dynamic {
		return errors.New("no graft at /: expected one as the root")
	}
	if len(c.Grafts) > maxGrafts {
		return fmt.Errorf("%d grafts: expected at most %d", len(c.Grafts), maxGrafts)
	}
	for _, g := range c.Grafts {
		for up := g.Path; up != "/"; {
			up = path.Dir(up)
			if above := at[up]; above != nil && above.File != "" {
				return fmt.Errorf("graft %q: it is below %q, which is a file", g.Path, up)
			}
		}
	}
	return nil
}

func (g *Graft) validate() error {
	switch {
	case !path.IsAbs(g.Path) || path.Clean(g.Path) != g.Path:
		return errors.New("expected an absolute path without \"//\", \".\", \"..\" and a slash at the end")
	case strings.IndexByte(g.Path, 0) >= 0:
		return errors.New("there is a NUL in the path")
	case isNil(g.Backend):
		return errors.New("there is no backend")
	case g.File != "" && g.Path == "/":
		return errors.New("the root is a file: expected a directory")
	case strings.ContainsAny(g.File, "/\x00") || g.File == "." || g.File == ".." || len(g.File) > unix.NAME_MAX:
		return fmt.Errorf("file %q: expected one component of at most %d bytes", g.File, unix.NAME_MAX)
	}
	for _, name := range components(g.Path) {
		if len(name) > unix.NAME_MAX {
			return fmt.Errorf("component %q: expected at most %d bytes", name, unix.NAME_MAX)
		}
	}
	if err := g.Policy.validate(); err != nil {
		return err
	}
	if err := g.UIDMap.Validate(); err != nil {
		return fmt.Errorf("user ids: %w", err)
	}
	if err := g.GIDMap.Validate(); err != nil {
		return fmt.Errorf("group ids: %w", err)
	}
	return nil
}

// isNil finds the nil pointer in an interface too, which an extension gives by mistake when it means to give nothing.
func isNil(b fsbackend.Backend) bool {
	if b == nil {
		return true
	}
	v := reflect.ValueOf(b)
	switch v.Kind() {
	case reflect.Pointer, reflect.Map, reflect.Func, reflect.Chan, reflect.Slice:
		return v.IsNil()
	}
	return false
}

// Share is a tree of several backends. It implements every interface of fsbackend.
type Share struct {
	parts   table
	root    *part // parts' first
	nobody  *part // directories made up; parts' last
	top     *position
	dynamic bool
	alone   bool // there is nothing but the root, for ever
	log     *slog.Logger
	bugs    *ratelog.Logger // of what a backend does

	onGone    func(*fsbackend.Part)
	onRemoved func(*fsbackend.Part, error)

	submounts, noOpen, writeback atomic.Bool // FUSE_SUBMOUNTS, FUSE_NO_OPEN_SUPPORT, FUSE_WRITEBACK_CACHE agreed on

	replay atomic.Pointer[replay] // nil without EnableReplay

	// mu orders changes of the tree, of what positions are at, and of epoch. No call of a backend is made while it is held.
	mu       sync.Mutex
	live     bool                // New has returned: what readers may have is copied, not changed
	list     []*part             // all of them but nobody, the root first; those that leave too
	closing  []*burial           // of those that have gone
	ghosts   map[uint16]ghost    // by index
	last     uint16              // index given last
	madeUps  uint64              // number given last to a directory made up
	holds    []hold              // see drop
	sessions uint64              // counts beginnings and ends
	features *fsbackend.Features // of the session, if there is one
	wanted   uint64              // what WantFlags has said

	epoch atomic.Uint64 // changes when what was looked up before no longer holds
}

// New returns a Share of the grafts in cfg. From then on they are the Share's; after an error they are still the caller's.
func New(cfg Config) (*Share, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Share{
		log: cfg.Log, dynamic: cfg.Dynamic, alone: len(cfg.Grafts) == 1 && !cfg.Dynamic,
		onRemoved: cfg.OnRemoved, onGone: func(*fsbackend.Part) {}, ghosts: make(map[uint16]ghost),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.bugs = ratelog.New(s.log, 10*time.Second, 5)
	at := slices.IndexFunc(cfg.Grafts, func(g Graft) bool { return g.Path == "/" })
	if at >= 0 {
		s.root = s.newPart(&cfg.Grafts[at])
	} else {
		s.root = s.newMadeUp()
	}
	s.put(0, s.root)
	s.nobody = s.newMadeUp()
	s.nobody.picky = true
	s.nobody.shown = &s.root.info
	s.nobody.setIndex(madeUpIndex)
	s.parts.set(madeUpIndex, s.nobody)
	s.madeUps = fuseproto.FUSE_ROOT_ID
	s.top = &position{}
	s.top.graft.Store(s.root)
	s.top.home.Store(s.root)
	s.top.typ.Store(unix.DT_DIR)
	if at < 0 {
		s.root.setDir(fuseproto.FUSE_ROOT_ID, s.top)
	}
	for i := range cfg.Grafts {
		if i == at {
			continue
		}
		p := s.newPart(&cfg.Grafts[i])
		s.put(s.freeIndex(), p)
		if err := s.place(p, false); err != nil {
			return nil, fmt.Errorf("graft %q: %w", p.info.Path, err)
		}
	}
	s.sort(s.top)
	s.live = true
	return s, nil
}

// put gives p its index.
func (s *Share) put(index uint16, p *part) {
	p.setIndex(index)
	s.parts.set(index, p)
	s.list = append(s.list, p)
}

// PartOf implements fsbackend.Divided. Directories that the share makes up belong to the root's part.
func (s *Share) PartOf(node uint64) *fsbackend.Part {
	if p := s.parts.get(node >> indexShift); p != nil {
		return p.shown
	}
	return &s.root.info
}

// OnGone implements fsbackend.Changing.
func (s *Share) OnGone(f func(*fsbackend.Part)) { s.onGone = f }

// Parts returns what the share is put together from, the root's part first.
func (s *Share) Parts() []*fsbackend.Part {
	var shown []*fsbackend.Part
	for _, p := range s.snapshot() {
		shown = append(shown, &p.info)
	}
	return shown
}

// snapshot returns all parts but that of directories made up.
func (s *Share) snapshot() []*part {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.list)
}

// Slow implements fsbackend.Slow for who does not ask PartOf: it is the root's answer.
func (s *Share) Slow() bool {
	return s.root.info.Slow
}

// lacks is the answer where a backend lacks an interface. From ENOSYS a guest learns never to ask again, for all of its
// file system: right if the backend is all there is.
func (s *Share) lacks(otherwise Errno) Errno {
	return s.known(unix.ENOSYS, otherwise)
}

// known is errno, but where a backend answers ENOSYS beside others, what lacks says.
func (s *Share) known(errno, otherwise Errno) Errno {
	if errno == unix.ENOSYS && !s.alone {
		return otherwise
	}
	return errno
}

// find returns the part that node belongs to, for a call of it: part.done ends that.
func (s *Share) find(c *fsbackend.Context, node uint64) (*part, Errno) {
	p := s.parts.get(node >> indexShift)
	if p == nil || !p.enterCall(c) {
		return nil, s.unknown(node)
	}
	errno := unix.ESTALE
	switch {
	case c.Part != nil && c.Part != p.shown:
	case p.dead.Load():
		errno = unix.EIO
	case !p.picky:
		return p, fsbackend.OK
	case p == s.nobody && p.dir(node&numberMask) == nil:
		errno = s.unknown(node)
	case p.file != nil && node&numberMask == fuseproto.FUSE_ROOT_ID: // its directory is not the guest's to see
	default:
		return p, fsbackend.OK
	}
	p.done(c)
	return nil, errno
}

// unknown is the answer to a node of no part, or to a directory that is not made up: the guest may still have it from what has
// gone. A directory that was made up may be another now: see life.absence.
func (s *Share) unknown(node uint64) Errno {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g, ok := s.ghosts[uint16(node>>indexShift)]; ok {
		return g.absence
	}
	return unix.ESTALE
}

// at is find for a request without a handle: of a graft that was removed, only what is open is there.
func (s *Share) at(c *fsbackend.Context, node uint64) (*part, Errno) {
	p, errno := s.find(c, node)
	if errno == fsbackend.OK && p.leaving.Load() && !p.handles.has(node&numberMask) {
		p.done(c)
		return nil, p.absence()
	}
	return p, errno
}

// exists is at or its like for a second node, which may be another part's than the request.
func (s *Share) exists(find func(*Share, *fsbackend.Context, uint64) (*part, Errno), node uint64) Errno {
	p, errno := find(s, &nobodysContext, node)
	if errno == fsbackend.OK {
		p.done(&nobodysContext)
	}
	return errno
}

// nobodysContext is for calls that belong to no request. It stays as it is.
var nobodysContext fsbackend.Context

// opened is find for a request whose handle fh must be of the same part. Most requests are such, so what find does for most
// parts is here, too: each function more is 5 ns, after a system call that has had others in the caches.
func (s *Share) opened(c *fsbackend.Context, node, fh uint64) (*part, Errno) {
	p := s.parts.get(node >> indexShift)
	if p != nil && !p.picky && !p.dead.Load() && (c.Part == p.shown || c.Part == nil) && fh>>indexShift == node>>indexShift &&
		(!p.leaves || p.calls.enter(c.Shard)) {
		return p, fsbackend.OK
	}
	return s.openedElse(c, node, fh)
}

// openedElse is opened for what is not as usual.
func (s *Share) openedElse(c *fsbackend.Context, node, fh uint64) (*part, Errno) {
	p, errno := s.find(c, node)
	if errno == fsbackend.OK && fh>>indexShift != node>>indexShift {
		p.done(c)
		return nil, unix.EBADF
	}
	return p, errno
}

// named is at for what has to do with names, and for what opens more: there is neither in a graft that was removed, open or not.
func (s *Share) named(c *fsbackend.Context, node uint64) (*part, Errno) {
	p, errno := s.find(c, node)
	if errno == fsbackend.OK && p.leaving.Load() {
		p.done(c)
		return nil, p.absence()
	}
	return p, errno
}

// directory is named for what only directories take part in.
func (s *Share) directory(c *fsbackend.Context, node uint64) (*part, Errno) {
	p, errno := s.named(c, node)
	if errno == fsbackend.OK && p.file != nil {
		p.done(c)
		return nil, unix.ENOTDIR
	}
	return p, errno
}

// atToChange, openedToChange and directoryToChange are for calls that may change something: part.doneChange ends them.
func (s *Share) atToChange(c *fsbackend.Context, node uint64) (*part, Errno) {
	p, errno := s.at(c, node)
	return p.toChange(c, errno)
}

func (s *Share) openedToChange(c *fsbackend.Context, node, fh uint64) (*part, Errno) {
	p, errno := s.opened(c, node, fh)
	return p.toChange(c, errno)
}

func (s *Share) directoryToChange(c *fsbackend.Context, node uint64) (*part, Errno) {
	p, errno := s.directory(c, node)
	return p.toChange(c, errno)
}
