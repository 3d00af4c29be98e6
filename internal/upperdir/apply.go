package upperdir

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// ApplyOptions say how changes are made in a directory.
type ApplyOptions struct {
	// Below is what lay below the upper, if that is at hand: what the target has at a path that is to be changed has to be what Below
	// has there. Without it, only what cannot be is refused.
	Below Tree
	// DryRun changes nothing and finds out whether it could be done.
	DryRun bool
	// Devices allows device nodes, which a guest may have made, in the target.
	Devices bool
}

// Conflict is a path of the target that is not what was expected there.
type Conflict struct {
	Path string
	Why  string
}

// maxConflicts is how many a ConflictError lists, and maxConflictPath how many bytes of a path it shows.
const (
	maxConflicts    = 20
	maxConflictPath = 300
)

// ConflictError says that changes do not fit the target, which is as it was.
type ConflictError struct {
	Target string
	// Conflicts are the first ones; More are not listed.
	Conflicts []Conflict
	More      int
}

// Error lists the paths.
func (e *ConflictError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s does not fit the changes in %d places, and nothing was changed", e.Target, len(e.Conflicts)+e.More)
	for _, c := range e.Conflicts {
		path := c.Path
		if len(path) > maxConflictPath {
			path = path[:maxConflictPath] + "…"
		}
		fmt.Fprintf(&b, "; %q: %s", path, c.Why)
	}
	if e.More > 0 {
		fmt.Fprintf(&b, "; and %d more", e.More)
	}
	return b.String()
}

// Apply makes the changes of u in the directory target, an absolute path, which should be what was below u. emit, if not nil, is told
// of each, also in a dry run.
//
// Everything is looked at before anything is changed, and a *ConflictError returned if it does not fit. Files are replaced, and
// directories removed and moved, in one step each. If Apply ends early, the target has a directory .sluice-apply, and the same call
// does the rest.
func (u *Upper) Apply(ctx context.Context, target string, o ApplyOptions, emit func(*Change) error) error {
	if !filepath.IsAbs(target) {
		return fmt.Errorf("apply to %q: it is no absolute path", target)
	}
	if emit == nil {
		emit = func(*Change) error { return nil }
	}
	if err := u.apply(ctx, target, o, emit); err != nil {
		return fmt.Errorf("apply %s to %s: %w", u.path, target, err)
	}
	return nil
}

func (u *Upper) apply(ctx context.Context, target string, o ApplyOptions, emit func(*Change) error) error {
	h := u.s.h
	fd, err := unix.Open(target, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%w: expected the directory that the overlay is on, or a copy of it", err)
	}
	top, err := h.take(fd)
	if err != nil {
		return err
	}
	defer top.close()
	busy, err := top.open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(busy)
	if unix.Flock(busy, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return errors.New("changes are being applied to it already; wait for them")
	}
	if top.id() == u.dir.id() || top.id() == u.work.id() {
		return errors.New("it is the upper directory itself; name the directory below")
	}
	from, err := h.at(u.dir.fd, ".")
	if err != nil {
		return err
	}
	defer from.close()
	a := &applier{
		h: h, ctx: ctx, o: o, emit: emit, target: top, origins: origins{below: o.Below},
		journal: journal{Upper: u.path, Dev: from.st.Dev, Ino: from.st.Ino},
	}
	defer func() { a.stage.close() }()
	again, err := a.resume()
	if err != nil {
		return err
	}
	if !again {
		if err := a.plan(from, target); err != nil {
			return err
		}
	}
	if o.DryRun {
		return nil
	}
	return a.run(from)
}

// journal is what an Apply that was cut short has to know to go on. It is in the staging directory.
type journal struct {
	Upper string `json:"upper"`
	Dev   uint64 `json:"dev"`
	Ino   uint64 `json:"ino"`
	Moves []move `json:"moves"`
	// Stays are paths of directories that are where they have been, although a mark says from where they come.
	Stays [][]byte `json:"stays,omitempty"`
	// Moved says that every source was moved to the staging directory; those that are no longer there are in their place.
	Moved bool `json:"moved"`
}

// move is a directory that a rename has taken from one path to another.
type move struct {
	From []byte `json:"from"` // JSON has no other strings than UTF-8
	To   []byte `json:"to"`
}

const (
	journalFile = "journal.json"
	movePrefix  = "move-"
)

// maxJournal bounds what is read of a journal, in bytes.
const maxJournal = 256 << 20

type applier struct {
	h       *host
	ctx     context.Context
	o       ApplyOptions
	emit    func(*Change) error
	target  *node
	journal journal

	// do is false while it is only looked.
	do        bool
	conflicts *ConflictError
	stage     *node
	copier    *copier
	origins   origins
	placed    map[string]string // upper's path → name in stage
	sourceOf  map[string]string // upper's path → where it was in the target
	sources   map[string]bool
	depth     int
	temps     int
}

// plan looks at everything without changing anything.
func (a *applier) plan(from *node, target string) error {
	a.conflicts = &ConflictError{Target: target}
	emit := a.emit
	if !a.o.DryRun {
		a.emit = func(*Change) error { return nil }
	}
	defer func() { a.emit = emit }()
	var below File
	if a.o.Below != nil {
		var err error
		if below, err = a.o.Below.Root(a.ctx); err != nil {
			return fmt.Errorf("look at the layers below: %w", err)
		}
		defer below.Close()
	}
	if staged, err := from.has(applyPrefix); err != nil {
		return err
	} else if staged {
		a.conflict(applyPrefix, "the guest has made a file of that name, which is needed here; remove it, in the guest")
	}
	if err := a.inside(from, a.target, below, "", ""); err != nil {
		return err
	}
	if len(a.conflicts.Conflicts) > 0 {
		return a.conflicts
	}
	return nil
}

func (a *applier) conflict(path, why string) {
	if len(a.conflicts.Conflicts) == maxConflicts {
		a.conflicts.More++
		return
	}
	a.conflicts.Conflicts = append(a.conflicts.Conflicts, Conflict{path, why})
}

// resume opens the staging directory of an Apply that was cut short, if there is one.
func (a *applier) resume() (bool, error) {
	stage, err := a.target.child(applyPrefix)
	if gone(err) {
		return false, nil
	}
	if err != nil {
		return false, explain("open", applyPrefix, err)
	}
	a.stage = stage
	text, err := readSmall(a.ctx, stage, journalFile, maxJournal)
	if gone(err) {
		return false, nil // it was cut short before it changed anything
	}
	var j journal
	if err == nil {
		err = json.Unmarshal(text, &j)
	}
	if err == nil && (j.Dev != a.journal.Dev || j.Ino != a.journal.Ino) {
		err = fmt.Errorf("the changes of %s were applied in part; apply those again first, so that they are whole, or remove %s from it", j.Upper, applyPrefix)
	}
	if err == nil && a.o.DryRun {
		err = errors.New("these changes were applied in part; apply them again for the rest, without a dry run")
	}
	if err != nil {
		return false, err
	}
	a.journal = j
	return true, nil
}

// readSmall reads a regular file of at most limit bytes.
func readSmall(ctx context.Context, dir *node, name string, limit int64) ([]byte, error) {
	n, err := dir.child(name)
	if err != nil {
		return nil, err
	}
	defer n.close()
	r, err := n.reader(ctx)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, limit))
}

// run makes the changes.
func (a *applier) run(from *node) (err error) {
	if a.stage == nil {
		if a.stage, err = a.h.subdir(a.target, applyPrefix); err != nil {
			return explain("make", applyPrefix, err)
		}
	}
	if err := a.h.private(a.stage); err != nil {
		return explain("use", applyPrefix, err)
	}
	if err := a.tidy(); err != nil {
		return explain("tidy up", applyPrefix, err)
	}
	links, err := a.h.subdir(a.stage, "links")
	if err != nil {
		return explain("make", applyPrefix, err)
	}
	defer links.close()
	a.copier = &copier{h: a.h, ctx: a.ctx, links: links.fd, linked: make(map[fileID]string), rename: guestXattr}
	if err := a.moveAway(); err != nil {
		return err
	}
	a.do = true
	if err := a.inside(from, a.target, nil, "", ""); err != nil {
		return err
	}
	if err := a.attributes(from, a.target); err != nil {
		return explain("change attributes of", "", err)
	}
	// The journal goes last but one: what it describes is whole by then.
	if err := syncfs(a.target); err != nil {
		return explain("write", "", err)
	}
	if err := a.h.empty(a.ctx, a.stage); err != nil {
		return explain("remove", applyPrefix, err)
	}
	if err := unix.Unlinkat(a.target.fd, applyPrefix, unix.AT_REMOVEDIR); err != nil {
		return explain("remove", applyPrefix, err)
	}
	times := [2]unix.Timespec{from.st.Atim, from.st.Mtim}
	if errno := sys.UtimensFD(a.h.proc.Int(), a.target.fd, &times); errno != 0 {
		return explain("change times of", "", errno)
	}
	return nil
}

// private checks that the directory d is this user's alone.
func (h *host) private(d *node) error {
	if d.st.Uid != uint32(os.Geteuid()) || d.st.Mode&0o077 != 0 {
		return errors.New("it is not the daemon's own; remove it")
	}
	return nil
}

// tidy removes from the staging directory what an Apply that was cut short was at, and the next one begins anew.
func (a *applier) tidy() error {
	entries, err := a.stage.list(a.ctx)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.name == journalFile || strings.HasPrefix(e.name, movePrefix) {
			continue
		}
		if err := a.h.remove(a.ctx, a.stage, e, a.stage, 0); err != nil {
			return err
		}
	}
	return nil
}

// moveAway moves directories that have been renamed to the staging directory, the deepest first, from where they are put in their
// places. So no order of them is wrong, whichever has the name that another had.
func (a *applier) moveAway() error {
	if !a.journal.Moved {
		slices.SortStableFunc(a.journal.Moves, func(x, y move) int {
			return cmp.Compare(strings.Count(string(y.From), "/"), strings.Count(string(x.From), "/"))
		})
		if err := a.writeJournal(); err != nil {
			return err
		}
	}
	a.placed, a.sourceOf, a.sources = make(map[string]string), make(map[string]string), make(map[string]bool)
	for _, path := range a.journal.Stays {
		a.sourceOf[string(path)] = "" // nowhere else
	}
	for i, m := range a.journal.Moves {
		name := movePrefix + strconv.Itoa(i)
		a.placed[string(m.To)], a.sourceOf[string(m.To)], a.sources[string(m.From)] = name, "/"+string(m.From), true
		if a.journal.Moved {
			continue
		}
		if there, err := a.stage.has(name); err != nil {
			return explain("look for", name, err)
		} else if there {
			continue
		}
		if err := a.stageAway(string(m.From), name); err != nil {
			return explain("move", string(m.From), err)
		}
	}
	if a.journal.Moved {
		return nil
	}
	a.journal.Moved = true
	return a.writeJournal()
}

// stageAway moves the directory path of the target to the staging directory.
func (a *applier) stageAway(path, name string) error {
	dir, last := path[:strings.LastIndexByte(path, '/')+1], path[strings.LastIndexByte(path, '/')+1:]
	d, err := a.find(strings.TrimSuffix(dir, "/"))
	if err != nil {
		return err
	}
	defer d.close()
	return unix.Renameat(d.fd, last, a.stage.fd, name)
}

// find opens a path of the target, name by name.
func (a *applier) find(path string) (*node, error) {
	n, err := a.h.at(a.target.fd, ".")
	if err != nil || path == "" {
		return n, err
	}
	for name := range strings.SplitSeq(path, "/") {
		next, err := n.child(name)
		n.close()
		if err != nil {
			return nil, err
		}
		n = next
	}
	return n, nil
}

func (a *applier) writeJournal() error {
	text, err := json.Marshal(a.journal)
	if err != nil {
		return err
	}
	temp := "journal.new"
	fd, err := unix.Openat(a.stage.fd, temp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return explain("write", journalFile, err)
	}
	f := os.NewFile(uintptr(fd), journalFile)
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = unix.Renameat(a.stage.fd, temp, a.stage.fd, journalFile)
	}
	if err == nil {
		err = fsyncDir(a.stage)
	}
	return explain("write", journalFile, err)
}

// inside makes the changes of the upper's directory n in the target's t, which is nil in a dry run if it is not there yet. below is
// what was merged with n, or nil. path is n's; origin is where t was before anything was moved, "/" in front, or "" if nowhere.
func (a *applier) inside(n, t *node, below File, path, origin string) error {
	if a.depth++; a.depth > maxDepth {
		return tooDeep(path)
	}
	defer func() { a.depth-- }()
	l, err := n.read(a.ctx)
	if err != nil {
		return explain("read directory", path, err)
	}
	items := l.items
	if l.opaque && t != nil {
		entries, err := t.list(a.ctx)
		if err != nil {
			return explain("read directory", path, err)
		}
		names := make([]string, 0, len(entries))
		for _, e := range entries {
			if path != "" || e.name != applyPrefix {
				names = append(names, e.name)
			}
		}
		items = withHidden(items, names)
	}
	for _, it := range items {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		if err := a.item(n, t, it, below, path, origin); err != nil {
			return err
		}
	}
	return nil
}

func (a *applier) item(n, t *node, it item, parent File, dir, origin string) (err error) {
	path := join(dir, it.name)
	var old *node
	if t != nil {
		old, err = t.child(it.name)
		if err != nil && !gone(err) {
			return explain("look at", path, err)
		}
		if err == nil {
			defer old.close()
		}
	}
	var below File
	if parent != nil {
		below, err = parent.Lookup(a.ctx, it.name)
		switch {
		case err == nil:
			defer below.Close()
		case errors.Is(err, fs.ErrNotExist):
			below = nil
		default:
			return explain("look below at", path, err)
		}
	}
	if !a.do && a.o.Below != nil {
		if err := a.expect(path, old, below); err != nil {
			return explain("compare", path, err)
		}
	}
	if !it.present {
		return a.delete(t, old, it.name, path)
	}
	f, err := n.child(it.name)
	if gone(err) {
		return nil
	}
	if err != nil {
		return explain("read", path, err)
	}
	defer f.close()
	if f.isDir() {
		return a.directory(f, t, old, parent, below, it, path, origin)
	}
	return a.file(f, t, old, it.name, path)
}

// expect notes a conflict if the target's file old is not what was below.
func (a *applier) expect(path string, old *node, below File) error {
	if old == nil && below == nil {
		return nil
	}
	if below == nil {
		a.conflict(path, "it is a "+typeName(old.st.Mode)+", and there was nothing when the overlay began")
		return nil
	}
	was, err := below.Info(a.ctx)
	switch {
	case err != nil:
		return err
	case old == nil:
		a.conflict(path, "it is gone, and was a "+typeName(was.Mode)+" when the overlay began")
	case typeName(old.st.Mode) != typeName(was.Mode):
		a.conflict(path, "it is a "+typeName(old.st.Mode)+", and was a "+typeName(was.Mode)+" when the overlay began")
	case old.kind() == unix.S_IFREG && (old.st.Size != was.Size || old.st.Mtim.Nano() != was.Mtime):
		a.conflict(path, "the file has been changed since the overlay began")
	}
	return nil
}

func (a *applier) delete(t, old *node, name, path string) error {
	if old == nil {
		if a.do && a.sources[path] {
			return a.emit(newChange(path, Deleted, unix.S_IFDIR))
		}
		return nil
	}
	if a.do {
		if err := a.discard(t, old, name); err != nil {
			return explain("delete", path, err)
		}
	}
	return a.emit(change(path, Deleted, &old.st, nil))
}

// change describes what becomes of the target's file old, which may be nil.
func change(path string, kind Kind, now, old *unix.Stat_t) *Change {
	c := newChange(path, kind, now.Mode)
	if c.Type == "file" {
		c.Size = now.Size
	}
	if old != nil && typeName(old.Mode) != c.Type {
		c.Was = typeName(old.Mode)
	}
	return c
}

// discard removes the target's file old, called name in t. A directory goes in one step.
func (a *applier) discard(t, old *node, name string) error {
	if !old.isDir() {
		return unix.Unlinkat(t.fd, name, 0)
	}
	return unix.Renameat(t.fd, name, a.stage.fd, randomName("gone-"))
}

// file puts the upper's file f in the place of old.
func (a *applier) file(f, t, old *node, name, path string) error {
	if err := f.checkWhole(); err != nil {
		return explain("copy", path, err)
	}
	if k := f.kind(); !a.do && !a.o.Devices && (k == unix.S_IFCHR || k == unix.S_IFBLK) {
		a.conflict(path, "the guest has made a device node; allow devices (--devices) to have it there")
	}
	kind := Added
	var was *unix.Stat_t
	if old != nil {
		kind, was = Modified, &old.st
	}
	if a.do {
		if err := a.put(f, t, old, name); err != nil {
			return explain("copy", path, err)
		}
	}
	return a.emit(change(path, kind, &f.st, was))
}

func (a *applier) put(f, t, old *node, name string) error {
	temp := "file-" + strconv.Itoa(a.temps)
	a.temps++
	if err := a.copier.file(f, a.stage.fd, temp); err != nil {
		return err
	}
	if old != nil && old.isDir() {
		if err := unix.Renameat2(a.stage.fd, temp, t.fd, name, unix.RENAME_EXCHANGE); err != nil {
			return err
		}
		return unix.Renameat(a.stage.fd, temp, a.stage.fd, randomName("gone-"))
	}
	return unix.Renameat(a.stage.fd, temp, t.fd, name)
}

// directory makes the upper's directory f, and what is in it, in t.
func (a *applier) directory(f, t, old *node, parent, below File, it item, path, origin string) error {
	opaque, to, err := f.dirMarks()
	if err != nil {
		return explain("read", path, err)
	}
	home := origin + "/" + it.name
	if to != "" {
		moved, source, err := a.origin(f, parent, to, path, origin)
		if err != nil {
			return explain("look below at", path, err)
		}
		if source != nil {
			defer source.Close()
		}
		if moved != home && moved != "" {
			return a.moved(f, t, old, source, it.name, path, moved)
		}
		if !a.do {
			a.journal.Stays = append(a.journal.Stays, []byte(path))
		}
		if source != nil {
			below = source
		}
	}
	var d *node
	switch {
	case old == nil || !old.isDir() || it.hides:
		if old != nil && !opaque && !it.hides && !a.do {
			a.conflict(path, "it is a "+typeName(old.st.Mode)+", and the changes are to what was a directory")
		}
		if a.do {
			if d, err = a.replace(t, old, it.name); err != nil {
				return explain("make", path, err)
			}
			defer d.close()
		}
		kind := Added
		var was *unix.Stat_t
		if old != nil {
			kind, was = Modified, &old.st
		}
		if err := a.emit(change(path, kind, &f.st, was)); err != nil {
			return err
		}
		below = nil
	default:
		d = old
		if f.st.Mode != old.st.Mode || f.st.Uid != old.st.Uid || f.st.Gid != old.st.Gid {
			if err := a.emit(change(path, Metadata, &f.st, nil)); err != nil {
				return err
			}
		}
	}
	return a.finish(f, d, below, path, home)
}

// origin finds where the target has, or has had, the directory that f at path was made of by renaming, as its mark to says.
func (a *applier) origin(f *node, parent File, to, path, dir string) (from string, source File, err error) {
	if a.do {
		from, ok := a.sourceOf[path]
		if !ok {
			return "", nil, errors.New("the guest has renamed it meanwhile; end the guest, and do it again")
		}
		return from, nil, nil
	}
	from = to
	if !strings.HasPrefix(to, "/") {
		from = dir + "/" + to
	}
	if a.o.Below == nil {
		return from, nil, nil
	}
	source, found, known, err := a.origins.of(a.ctx, f, parent, path)
	if err != nil || source == nil {
		return from, nil, err
	}
	if !known {
		a.conflict(path, fmt.Sprintf("it comes from %q in a layer below, and where that is seen cannot be told", found))
	}
	return "/" + found, source, nil
}

// finish makes what is in f in d, and gives d the attributes of f.
func (a *applier) finish(f, d *node, below File, path, origin string) error {
	if err := a.inside(f, d, below, path, origin); err != nil {
		return err
	}
	if !a.do {
		return nil
	}
	return explain("change attributes of", path, a.attributes(f, d))
}

// attributes gives the directory d what f has, and nothing else.
func (a *applier) attributes(f, d *node) error {
	if err := a.dropXattrs(f, d); err != nil {
		return err
	}
	return a.copier.attributes(f, d)
}

// replace makes an empty directory name in t.
func (a *applier) replace(t, old *node, name string) (*node, error) {
	if old != nil {
		if err := a.discard(t, old, name); err != nil {
			return nil, err
		}
	}
	return a.copier.mkdir(t.fd, name)
}

// moved puts the directory that was at from, and is in the staging directory by now, in its place, and makes the changes of f there.
func (a *applier) moved(f, t, old *node, below File, name, path, from string) error {
	var d *node
	var err error
	if a.do {
		if d, err = a.place(t, old, name, path); err != nil {
			return explain("move", path, err)
		}
	} else {
		d, err = a.find(strings.TrimPrefix(from, "/"))
		if err == nil && !d.isDir() {
			d.close()
			err = unix.ENOTDIR
		}
		if err != nil {
			a.conflict(path, fmt.Sprintf("it was renamed from %q, which is no directory there: %v", from[1:], err))
			return nil
		}
		a.journal.Moves = append(a.journal.Moves, move{[]byte(from[1:]), []byte(path)})
	}
	defer d.close()
	kind := Added
	var was *unix.Stat_t
	if old != nil {
		kind, was = Modified, &old.st
	}
	c := change(path, kind, &f.st, was)
	c.From = from[1:]
	if err := a.emit(c); err != nil {
		return err
	}
	return a.finish(f, d, below, path, from)
}

func (a *applier) place(t, old *node, name, path string) (*node, error) {
	staged := a.placed[path]
	there, err := a.stage.has(staged)
	if err != nil {
		return nil, err
	}
	if there {
		if old != nil {
			if err := a.discard(t, old, name); err != nil {
				return nil, err
			}
		}
		if err := unix.Renameat(a.stage.fd, staged, t.fd, name); err != nil {
			return nil, err
		}
	}
	return t.child(name)
}

// dropXattrs removes from d the extended attributes that f does not have.
func (a *applier) dropXattrs(f, d *node) error {
	names, err := d.xattrs()
	if err != nil || len(names) == 0 {
		return err
	}
	keep := map[string]bool{"security.selinux": true}
	mine, err := f.xattrs()
	if err != nil {
		return err
	}
	for _, name := range mine {
		if guest, ok := guestXattr(name); ok {
			keep[guest] = true
		}
	}
	for _, name := range names {
		if keep[name] {
			continue
		}
		file, err := unix.BytePtrFromString(name)
		if err != nil {
			return err
		}
		if errno := a.h.xattr.Remove(d.fd, file); errno != 0 && errno != unix.ENODATA {
			return fmt.Errorf("attribute %s: %w", name, errno)
		}
	}
	return nil
}
