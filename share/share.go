package share

import (
	"errors"
	"fmt"
	"log/slog"
	"path"
	"reflect"
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
	// ReadOnly answers every change with EROFS, whatever the backend does.
	ReadOnly bool
	// UIDMap and GIDMap translate between the guest's ids and the backend's; the zero value is identity.
	UIDMap, GIDMap IDMap
	// Extension is the name of who serves it, "" for what comes with the daemon.
	Extension string
	// See fsbackend.Part. Slow also holds where the backend itself says so (fsbackend.Slow).
	Isolated, Slow bool
	Timeout        time.Duration
	Enter, Leave   func()
}

// Config describes a Share.
type Config struct {
	Grafts []Graft // in any order; one of them is the root
	Log    *slog.Logger
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
	if at["/"] == nil {
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
	parts  []*part // by index: the grafts, then the directories made up
	shown  []*fsbackend.Part
	alone  bool // there is nothing but the root
	top    *position
	madeUp madeUp
	log    *slog.Logger
	bugs   *ratelog.Logger // of what a backend does

	submounts, noOpen, writeback atomic.Bool // FUSE_SUBMOUNTS, FUSE_NO_OPEN_SUPPORT, FUSE_WRITEBACK_CACHE agreed on

	replay atomic.Pointer[replay] // nil without EnableReplay

	// mu orders changes of what positions are at, and of epoch. No call is made while it is held.
	mu    sync.Mutex
	epoch atomic.Uint64 // changes when what was looked up before no longer holds
}

// New returns a Share of the grafts in cfg. From then on they are the Share's; after an error they are still the caller's.
func New(cfg Config) (*Share, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Share{log: cfg.Log, alone: len(cfg.Grafts) == 1}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.bugs = ratelog.New(s.log, 10*time.Second, 5)
	s.parts = append(s.parts, nil) // the root's place
	for i := range cfg.Grafts {
		g := &cfg.Grafts[i]
		index := len(s.parts)
		if g.Path == "/" {
			index = 0
			s.parts[0] = newPart(index, g)
			continue
		}
		s.parts = append(s.parts, newPart(index, g))
	}
	for _, p := range s.parts {
		s.shown = append(s.shown, &p.info)
	}
	s.parts = append(s.parts, newPart(len(s.parts), &Graft{Backend: &s.madeUp, ReadOnly: true}))
	if err := s.place(); err != nil {
		return nil, err
	}
	return s, nil
}

// PartOf implements fsbackend.Divided. Directories that the share makes up belong to the root's part.
func (s *Share) PartOf(node uint64) *fsbackend.Part {
	if i := node >> indexShift; i < uint64(len(s.shown)) {
		return s.shown[i]
	}
	return s.shown[0]
}

// Parts returns what the share is put together from, the root's part first; the slice is not to be changed.
func (s *Share) Parts() []*fsbackend.Part {
	return s.shown
}

// Slow implements fsbackend.Slow for who does not ask PartOf: it is the root's answer.
func (s *Share) Slow() bool {
	return s.shown[0].Slow
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

// at returns the part that node belongs to.
func (s *Share) at(node uint64) (*part, Errno) {
	i := node >> indexShift
	if i >= uint64(len(s.parts)) {
		return nil, unix.ESTALE
	}
	p := s.parts[i]
	if p.dead.Load() {
		return nil, unix.EIO
	}
	if p.file != nil && node&numberMask == fuseproto.FUSE_ROOT_ID {
		return nil, unix.ESTALE // its directory is not the guest's to see
	}
	return p, fsbackend.OK
}

// opened returns the part that node and its handle fh both belong to.
func (s *Share) opened(node, fh uint64) (*part, Errno) {
	p, errno := s.at(node)
	if errno == fsbackend.OK && fh>>indexShift != node>>indexShift {
		return nil, unix.EBADF
	}
	return p, errno
}

// changed is at for a node that is to change.
func (s *Share) changed(node uint64) (*part, Errno) {
	p, errno := s.at(node)
	if errno == fsbackend.OK && p.readOnly {
		return nil, unix.EROFS
	}
	return p, errno
}

// directory is at for what only directories take part in.
func (s *Share) directory(node uint64) (*part, Errno) {
	p, errno := s.at(node)
	if errno == fsbackend.OK && p.file != nil {
		return nil, unix.ENOTDIR
	}
	return p, errno
}
