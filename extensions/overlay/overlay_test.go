package overlay

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/extensions/extensionstest"
	"github.com/sluicefs/sluice/extensions/permshift"
	"github.com/sluicefs/sluice/extensions/plugins"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

// place is a directory with a tree that is to be a lower layer, and a daemon's state.
type place struct {
	*extensionstest.Host
	t   *testing.T
	dir string
	log bytes.Buffer
}

func newPlace(t *testing.T) *place {
	p := &place{t: t, dir: t.TempDir()}
	p.Host = &extensionstest.Host{
		Extensions: []extensions.Hosted{Extension{}, permshift.Extension{}, &plugins.Extension{}},
		Log:        slog.New(slog.NewTextHandler(&p.log, nil)), StateDir: p.path("state"),
	}
	for _, dir := range []string{"lower/d", "other", "upper", "work"} {
		p.must(os.MkdirAll(p.path(dir), 0o755))
	}
	p.write("lower/f", "below")
	p.write("lower/d/g", "below, too")
	return p
}

func (p *place) path(name string) string { return filepath.Join(p.dir, name) }

func (p *place) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *place) write(name, text string) {
	p.t.Helper()
	p.must(os.WriteFile(p.path(name), []byte(text), 0o644))
}

// mount is an overlay of the lower layer.
func (p *place) mount(options ...string) extensions.Mount {
	return extensions.Mount{
		Share: "box", Path: "/", Backend: Name, Options: options,
		Lowers: []extensions.Mount{{Backend: extensions.Passthrough, Source: p.path("lower"), ReadOnly: true}},
	}
}

// guest does what a guest's root does, whose requests have to succeed.
type guest struct {
	*fsbackendtest.Client
	t *testing.T
}

func (p *place) guest(g *extensionstest.Graft) guest { return guest{g.Client(), p.t} }

func (g guest) ok(what string, errno fsbackend.Errno) {
	g.t.Helper()
	if errno != 0 {
		g.t.Fatalf("%s: %v", what, errno)
	}
}

func (g guest) create(name, text string) {
	g.t.Helper()
	out, errno := g.Create(fsbackendtest.Root, name, unix.O_WRONLY, 0o644)
	g.ok("CREATE "+name, errno)
	_, errno = g.Write(out.NodeId, out.Fh, 0, []byte(text), 0)
	g.ok("WRITE "+name, errno)
	g.Release(out.NodeId, out.Fh)
}

func (g guest) names() string {
	g.t.Helper()
	names := g.List(g.t, fsbackendtest.Root, 4096)
	slices.Sort(names)
	return strings.Join(names, " ")
}

// uppers lists what is in the store.
func (p *place) uppers() []string {
	p.t.Helper()
	entries, err := os.ReadDir(p.path("state/overlay/uppers"))
	p.must(err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// act asks for an action, whose answer goes to v.
func (p *place) act(g *extensionstest.Graft, name string, arg, v any) {
	p.t.Helper()
	answer, err := g.Act(p.t.Context(), name, arg)
	if err != nil {
		p.t.Fatalf("%s: %v", name, err)
	}
	if v != nil {
		p.must(json.Unmarshal(answer, v))
	}
}

func changes(all []api.OverlayChange) string {
	var b strings.Builder
	for _, c := range all {
		fmt.Fprintf(&b, "%s %s; ", c.Kind, c.Path)
	}
	return strings.TrimSuffix(b.String(), "; ")
}

// TestUpperKinds has a guest write to an upper of each kind, twice.
func TestUpperKinds(t *testing.T) {
	for _, kind := range []struct {
		name    string
		options func(p *place) []string
		second  string // what is there when it is opened again
	}{
		{"discard", func(*place) []string { return []string{"upper=discard"} }, "d f"},
		{"keep", func(*place) []string { return []string{"upper=keep"} }, "d f new"},
		{"given", func(p *place) []string {
			return []string{"upperdir=" + p.path("upper"), "workdir=" + p.path("work")}
		}, "d f new"},
		{"state", func(p *place) []string { return []string{"upper=keep", "state=" + p.path("elsewhere")} }, "d f new"},
	} {
		t.Run(kind.name, func(t *testing.T) {
			p := newPlace(t)
			m := p.mount(kind.options(p)...)
			g, err := p.TryOpen(t.Context(), m)
			p.must(err)
			p.guest(g).create("new", "above")
			if got := p.guest(g).names(); got != "d f new" {
				t.Errorf("the guest sees %s", got)
			}
			p.must(g.Close())
			if kind.name == "discard" {
				if left := p.uppers(); len(left) > 0 {
					t.Errorf("of a discarded upper, %q is left", left)
				}
			}
			if got := p.guest(p.Open(t, m)).names(); got != kind.second {
				t.Errorf("opened again, the guest sees %s, expected %s", got, kind.second)
			}
			if _, err := os.Lstat(p.path("lower/new")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the lower layer has changed: %v", err)
			}
		})
	}
}

// TestReadOnly opens overlays into which nothing can be written: they need no place for it, and make none.
func TestReadOnly(t *testing.T) {
	p := newPlace(t)
	for _, m := range []extensions.Mount{p.mount(), p.mount("upper=none"), p.mount("upper=discard", "ro")} {
		g := p.Open(t, m)
		if _, errno := g.Client().Create(fsbackendtest.Root, "new", unix.O_WRONLY, 0o644); errno != unix.EROFS {
			t.Errorf("%v: CREATE: %v, expected EROFS", m.Options, errno)
		}
		if _, err := g.Act(t.Context(), api.ActDiff, api.OverlayDiff{}); err == nil {
			t.Errorf("%v: a diff of what has no upper", m.Options)
		}
	}
	if _, err := os.Lstat(p.path("state")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a place for what is written was made: %v", err)
	}
}

// TestReadOnlyShowsTheUpper opens overlays read-only in which something was written before: it shows. That of a graft, which may be
// lifted while it is used, is not the overlay's to see to.
func TestReadOnlyShowsTheUpper(t *testing.T) {
	p := newPlace(t)
	for _, options := range [][]string{{"upper=keep"}, {"upperdir=" + p.path("upper"), "workdir=" + p.path("work")}, {"upper=discard", "from=one"}} {
		if len(options) == 1 || options[1] != "from=one" {
			g, err := p.TryOpen(t.Context(), p.mount(options...))
			p.must(err)
			c := p.guest(g)
			c.create("new", "above")
			c.ok("UNLINK", c.Unlink(fsbackendtest.Root, "f"))
			if options[0] == "upper=keep" {
				p.act(g, api.ActCheckpoint, api.OverlayName{Name: "one"}, nil)
			}
			p.must(g.Close())
		}
		ro := p.mount(append(slices.Clone(options), "ro")...)
		policy := p.mount(options...)
		policy.ReadOnly = true
		for _, m := range []extensions.Mount{ro, policy} {
			g, err := p.TryOpen(t.Context(), m)
			p.must(err)
			if got := p.guest(g).names(); got != "d new" {
				t.Errorf("%v: the guest sees %s", m.Options, got)
			}
			var all []api.OverlayChange
			p.act(g, api.ActDiff, api.OverlayDiff{}, &all)
			if got := changes(all); got != "deleted /f; added /new" {
				t.Errorf("%v: diff: %s", m.Options, got)
			}
			want := fsbackend.Errno(0)
			if !m.ReadOnly {
				want = unix.EROFS
			}
			if errno := g.Client().Unlink(fsbackendtest.Root, "new"); errno != want {
				t.Errorf("%v: UNLINK: %v, expected %v", m.Options, errno, want)
			}
			p.must(g.Close())
		}
	}
}

// TestKeepNames has no two grafts get the same kept upper.
func TestKeepNames(t *testing.T) {
	p := newPlace(t)
	for _, at := range [][2]string{{"a", "/"}, {"a", "/b"}, {"a.b", "/"}, {"a-b", "/"}, {"a", "/b/c"}, {"a", "/b.c"}, {"a", "/" + strings.Repeat("é", 200)}} {
		m := p.mount("upper=keep")
		m.Share, m.Path = at[0], at[1]
		p.Open(t, m)
	}
	names := p.uppers()
	if len(names) != 7 {
		t.Errorf("uppers of 7 grafts: %q", names)
	}
	// As another daemon would.
	m := p.mount("upper=keep")
	m.Share = "a"
	if err := p.OpenFails(t, m); !strings.Contains(err.Error(), "in use by another overlay") {
		t.Errorf("the same upper again: %v", err)
	}
}

// TestFrom starts from a checkpoint: a kept upper only the first time.
func TestFrom(t *testing.T) {
	p := newPlace(t)
	first, err := p.TryOpen(t.Context(), p.mount("upper=discard"))
	p.must(err)
	p.guest(first).create("one", "1")
	p.act(first, api.ActCheckpoint, api.OverlayName{Name: "start"}, nil)
	p.must(first.Close())
	for i, want := range []string{"d f one", "d f one two"} {
		g, err := p.TryOpen(t.Context(), p.mount("upper=keep", "from=start"))
		p.must(err)
		if got := p.guest(g).names(); got != want {
			t.Errorf("start %d: the guest sees %s, expected %s", i, got, want)
		}
		if i == 0 {
			p.guest(g).create("two", "2")
		}
		p.must(g.Close())
	}
	if err := p.OpenFails(t, p.mount("upper=discard", "from=none")); !strings.Contains(err.Error(), "there is no checkpoint none") {
		t.Error(err)
	}
}

// TestActions has an operator look at, keep, undo and take over what a guest has done.
func TestActions(t *testing.T) {
	p := newPlace(t)
	g := p.Open(t, p.mount("upper=keep"))
	c := p.guest(g)
	c.create("new", "above")
	c.ok("UNLINK", c.Unlink(fsbackendtest.Root, "f"))
	var made api.Checkpoint
	p.act(g, api.ActCheckpoint, api.OverlayName{Name: "one"}, &made)
	if made.Name != "one" || made.Bytes != 5 || made.Time.IsZero() {
		t.Errorf("a checkpoint: %+v", made)
	}
	c.create("later", "")
	var all []api.OverlayChange
	p.act(g, api.ActDiff, api.OverlayDiff{}, &all)
	if got := changes(all); got != "deleted /f; added /later; added /new" {
		t.Errorf("diff: %s", got)
	}
	p.act(g, api.ActDiff, api.OverlayDiff{Checkpoint: "one", Tar: p.path("one.tar")}, &all)
	if got := changes(all); got != "deleted /f; added /new" {
		t.Errorf("diff of the checkpoint: %s", got)
	}
	f, err := os.Open(p.path("one.tar"))
	p.must(err)
	defer f.Close()
	var names []string
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		p.must(err)
		names = append(names, h.Name)
	}
	if !slices.Contains(names, ".wh.f") || !slices.Contains(names, "new") || slices.Contains(names, "later") {
		t.Errorf("the layer has %q", names)
	}

	if out, err := exec.Command("cp", "-a", p.path("lower"), p.path("target")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.act(g, api.ActApply, api.OverlayApply{Target: p.path("target"), DryRun: true}, &all)
	if _, err := os.Lstat(p.path("target/f")); err != nil || len(all) != 3 {
		t.Errorf("a dry run: %s, %v", changes(all), err)
	}
	p.act(g, api.ActRestore, api.OverlayName{Name: "one"}, nil)
	if got := p.guest(g).names(); got != "d new" {
		t.Errorf("restored, the guest sees %s", got)
	}
	if left := p.uppers(); len(left) != 1 || left[0] != "keep-share.box" {
		t.Errorf("after a restore there are %q", left)
	}
	var list []api.Checkpoint
	p.act(g, api.ActCheckpoints, struct{}{}, &list)
	if len(list) != 1 || list[0].Name != "one" {
		t.Errorf("checkpoints: %+v", list)
	}
	p.act(g, api.ActForget, api.OverlayName{Name: "one"}, nil)
	p.act(g, api.ActCheckpoints, struct{}{}, &list)
	if len(list) != 0 {
		t.Errorf("after it was forgotten: %+v", list)
	}

	p.write("target/new", "in the way")
	var action *extensions.ActionError
	_, err = g.Act(t.Context(), api.ActApply, api.OverlayApply{Target: p.path("target")})
	if !errors.As(err, &action) || !strings.Contains(action.Hint, "by hand") {
		t.Errorf("apply to what does not fit: %v", err)
	}
	p.must(os.Remove(p.path("target/new")))
	p.act(g, api.ActApply, api.OverlayApply{Target: p.path("target")}, nil)
	if text, err := os.ReadFile(p.path("target/new")); err != nil || string(text) != "above" {
		t.Errorf("applied: %q, %v", text, err)
	}
}

// TestPathsOfChanges has changes at names that begin with a dot, or have any bytes: nothing of them is lost.
func TestPathsOfChanges(t *testing.T) {
	p := newPlace(t)
	const odd = "\xff\n\""
	p.must(os.MkdirAll(p.path("lower/"+odd), 0o755))
	g := p.Open(t, p.mount("upper=discard"))
	c := p.guest(g)
	c.create(".config", "")
	c.create("...", "")
	c.ok("RENAME", c.Rename(fsbackendtest.Root, odd, fsbackendtest.Root, odd+"2", 0))
	c.ok("UNLINK", c.Unlink(fsbackendtest.Root, "f"))
	_, errno := c.Mkdir(fsbackendtest.Root, "f", 0o755)
	c.ok("MKDIR", errno)
	_, errno = c.Chmod(fsbackendtest.Root, 0o700)
	c.ok("CHMOD", errno)
	var all []api.OverlayChange
	p.act(g, api.ActDiff, api.OverlayDiff{}, &all)
	var got []string
	for _, change := range all {
		got = append(got, fmt.Sprintf("%s %q %q %s", change.Kind, change.FullPath(), change.FullFrom(), change.Was))
	}
	want := []string{
		`metadata "/" "" `, `added "/..." "" `, `added "/.config" "" `, `modified "/f" "" file`, `deleted "/\xff\n\"" "" `, `added "/\xff\n\"2" "/\xff\n\"" `,
	}
	if !slices.Equal(got, want) {
		t.Errorf("diff:\n%s\nexpected:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestApplyConflicts has changes that do not fit: every one of them is said, and devices are made if they are asked for.
func TestApplyConflicts(t *testing.T) {
	p := newPlace(t)
	g := p.Open(t, p.mount("upper=discard"))
	c := p.guest(g)
	for _, name := range []string{"a", "b", "c\xff"} {
		c.create(name, "")
		p.write("other/"+name, "")
	}
	_, errno := c.Mknod(fsbackendtest.Root, "z", unix.S_IFCHR|0o600, 0x103)
	if errno == unix.EPERM {
		t.Skip("not allowed to make devices")
	}
	c.ok("MKNOD", errno)
	_, err := g.Act(t.Context(), api.ActApply, api.OverlayApply{Target: p.path("other"), DryRun: true})
	for _, want := range []string{"in 4 places", `"a": `, `"b": `, `"c\xff": `, `"z": `, "allow devices"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("apply to what does not fit: %v, expected %s", err, want)
		}
	}
	p.act(g, api.ActApply, api.OverlayApply{Target: p.path("lower"), Devices: true}, nil)
	var st unix.Stat_t
	if err := unix.Lstat(p.path("lower/z"), &st); err != nil || st.Rdev != 0x103 {
		t.Errorf("the device is %#x, %v", st.Rdev, err)
	}
}

// TestApplyWhileInUse has a guest go on after what it did was applied to the lower directory: what it removes then is gone, too.
func TestApplyWhileInUse(t *testing.T) {
	for _, checkpoint := range []string{"", "one"} {
		p := newPlace(t)
		mount := p.mount("upper=keep")
		g, err := p.TryOpen(t.Context(), mount)
		p.must(err)
		c := p.guest(g)
		c.create("mine", "above")
		p.act(g, api.ActCheckpoint, api.OverlayName{Name: "one"}, nil)
		for _, name := range []string{"nothing", "neither", "none"} { // the names below are known then
			if _, e := c.Lookup(fsbackendtest.Root, name); e != unix.ENOENT {
				t.Fatalf("LOOKUP of %s: %v", name, e)
			}
		}
		p.act(g, api.ActApply, api.OverlayApply{Target: p.path("lower"), Checkpoint: checkpoint}, nil)
		if text, err := os.ReadFile(p.path("lower/mine")); err != nil || string(text) != "above" {
			t.Errorf("applied: %q, %v", text, err)
		}
		c.ok("UNLINK", c.Unlink(fsbackendtest.Root, "mine"))
		p.must(g.Close())
		if got := p.guest(p.Open(t, mount)).names(); got != "d f" {
			t.Errorf("applied from checkpoint %q, and removed: the guest sees %s", checkpoint, got)
		}
	}
}

// TestActionErrors asks for what cannot be.
func TestActionErrors(t *testing.T) {
	p := newPlace(t)
	g := p.Open(t, p.mount("upperdir="+p.path("upper"), "workdir="+p.path("work")))
	p.write("there.tar", "")
	p.act(g, api.ActCheckpoint, api.OverlayName{Name: "twice"}, nil)
	for _, c := range []struct {
		action string
		arg    any
		want   string
	}{
		{api.ActRestore, api.OverlayName{Name: "twice"}, "is one that was given"},
		{api.ActCheckpoint, api.OverlayName{Name: "twice"}, "twice"},
		{api.ActCheckpoint, api.OverlayName{Name: "../x"}, "is not usable"},
		{api.ActForget, api.OverlayName{Name: "none"}, "there is no checkpoint none"},
		{api.ActDiff, api.OverlayDiff{Checkpoint: "none"}, "there is no checkpoint none"},
		{api.ActDiff, api.OverlayDiff{Tar: p.path("there.tar")}, "exists: expected the name of a new file"},
		{api.ActDiff, map[string]int{"x": 1}, "expected a JSON object with no other members than checkpoint, tar"},
		{api.ActCheckpoints, map[string]int{"x": 1}, "expected an empty JSON object"},
		{api.ActApply, api.OverlayApply{Target: "relative"}, "no absolute path"},
		{api.ActApply, api.OverlayApply{Target: p.path("none")}, "expected the directory that the overlay is on"},
	} {
		_, err := g.Act(t.Context(), c.action, c.arg)
		text := fmt.Sprint(err)
		if action := (*extensions.ActionError)(nil); errors.As(err, &action) {
			text += ": " + action.Hint
		}
		if !strings.Contains(text, c.want) {
			t.Errorf("%s %+v: %s, expected %q", c.action, c.arg, text, c.want)
		}
	}
	// What was refused, or given up, holds no guest up.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := g.Act(ctx, api.ActDiff, api.OverlayDiff{}); !errors.Is(err, context.Canceled) {
		t.Errorf("an action nobody waits for: %v", err)
	}
	p.guest(g).create("new", "")
}

// TestBelowIsNoDirectory compares with a layer that only the half inside sees, as it does with an image's: names, targets and
// attributes of any bytes get across.
func TestBelowIsNoDirectory(t *testing.T) {
	p := newPlace(t)
	odd := "odd\xff\xfe"
	p.write("lower/"+odd, "some text")
	p.must(os.Symlink("to "+odd, p.path("lower/link")))
	p.must(unix.Lsetxattr(p.path("lower/"+odd), "user.bytes", []byte{0xff, 0, 0xfe}, 0))
	p.must(os.MkdirAll(p.path("lower/gone/"+odd), 0o755))
	m := p.mount("upper=discard")
	m.Lowers = []extensions.Mount{{Backend: "permshift", Source: p.path("lower"), Options: []string{"format=off"}, ReadOnly: true}}
	g := p.Open(t, m)
	c := p.guest(g)
	for _, name := range []string{odd, "link"} {
		e, errno := c.Lookup(fsbackendtest.Root, name)
		c.ok("LOOKUP", errno)
		// Copied up, and then as it was.
		_, errno = c.Link(e.NodeId, fsbackendtest.Root, "x")
		c.ok("LINK", errno)
		c.ok("UNLINK", c.Unlink(fsbackendtest.Root, "x"))
	}
	// Opaque, so that what lies below is listed.
	gone, errno := c.Lookup(fsbackendtest.Root, "gone")
	c.ok("LOOKUP gone", errno)
	c.ok("RMDIR", c.Rmdir(gone.NodeId, odd))
	c.ok("RMDIR", c.Rmdir(fsbackendtest.Root, "gone"))
	_, errno = c.Mkdir(fsbackendtest.Root, "gone", 0o755)
	c.ok("MKDIR", errno)

	var all []api.OverlayChange
	p.act(g, api.ActDiff, api.OverlayDiff{}, &all)
	if got := changes(all); got != "deleted /gone/odd\uFFFD" {
		t.Errorf("diff: %q", got)
	}
}

// TestSeveralBelow cannot compare with layers that are no directories.
func TestSeveralBelow(t *testing.T) {
	p := newPlace(t)
	m := p.mount("upper=discard")
	m.Lowers = append(m.Lowers, extensions.Mount{Backend: "permshift", Source: p.path("other"), Options: []string{"format=off"}})
	_, err := p.Open(t, m).Act(t.Context(), api.ActDiff, api.OverlayDiff{})
	if err == nil || !strings.Contains(err.Error(), "expected one, or directories") {
		t.Error(err)
	}
}

// TestNested makes an overlay of an overlay.
func TestNested(t *testing.T) {
	p := newPlace(t)
	p.write("other/o", "")
	m := p.mount("upper=discard")
	m.Lowers = []extensions.Mount{p.mount("lowerdir=" + p.path("other")), {Backend: extensions.Mem}}
	g := p.Open(t, m)
	p.guest(g).create("new", "")
	if got := p.guest(g).names(); got != "d f new o" {
		t.Errorf("the guest sees %s", got)
	}
}

// TestHostileTree has a half inside that was taken over say what a tree cannot have.
func TestHostileTree(t *testing.T) {
	for _, name := range []string{"..", ".", "", "a/b", "/etc", "a\x00"} {
		tr := &tree{tell: func(_ context.Context, _ string, arg any, _ ...*os.File) (json.RawMessage, error) {
			if arg.(treeQuestion).List {
				return json.Marshal(treeAnswer{Names: [][]byte{[]byte("fine"), []byte(name)}})
			}
			return json.Marshal(treeAnswer{Info: &treeInfo{}})
		}}
		root, err := tr.Root(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if names, err := root.Names(t.Context()); err == nil {
			t.Errorf("a directory with %q has %q", name, names)
		}
	}
}

// TestOpenErrors opens what cannot be: the message says which, and what to do.
func TestOpenErrors(t *testing.T) {
	p := newPlace(t)
	p.must(os.MkdirAll(p.path("lower/inner"), 0o755))
	p.must(os.Symlink(p.path("lower"), p.path("link")))
	sourced, bare, stateless := p.mount(), p.mount(), *p.Host
	sourced.Source, bare.Lowers, stateless.StateDir = p.path("lower"), nil, ""
	for _, c := range []struct {
		m    extensions.Mount
		want string
	}{
		{sourced, "expected it as a layer"},
		{bare, "lowerdir= is missing"},
		{p.mount("upper=some"), "expected one of discard, keep, none"},
		{p.mount("lowerdir=" + p.path("none")), "layer " + p.path("none")},
		{p.mount("lowerdir=lower"), `layer "lower" is relative`},
		{p.mount("lowerdir=//none//"), `layer plug-in "none" is not known`},
		{p.mount("lowerdir=//permshift/data/" + p.path("lower")), `option "data"`},
		{p.mount("lowerdir=//permshift//" + p.path("none")), "no such file"},
		{p.mount("upperdir="+p.path("lower"), "workdir="+p.path("work")), "are the same, or in each other"},
		{p.mount("upperdir="+p.path("link"), "workdir="+p.path("work")), "are the same, or in each other"},
		{p.mount("upperdir="+p.path("lower/inner"), "workdir="+p.path("work")), "are the same, or in each other"},
		{p.mount("upperdir="+p.path("upper"), "workdir="+p.path("lower/inner")), "are the same, or in each other"},
		{p.mount("upperdir="+p.dir, "workdir="+p.path("work")), "in each other"},
		{p.mount("upperdir="+p.path("none"), "workdir="+p.path("work")), "none"},
		{p.mount("upper=discard", "from=none"), "there is no checkpoint none"},
		{p.mount("upper=discard", "state=relative"), "no absolute path"},
		{p.mount("upper=discard", "state="+p.path("lower/f")), "lower/f"},
		{p.mount("plugins=/none:/x", "lowerdir=//p//"), "/none"},
	} {
		if err := p.OpenFails(t, c.m); !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, expected %q", c.m.Options, err, c.want)
		}
	}
	if err := stateless.OpenFails(t, p.mount("upper=discard")); !strings.Contains(err.Error(), "--state-dir") {
		t.Error(err)
	}
	if left := p.uppers(); len(left) > 0 {
		t.Errorf("after errors, there are %q", left)
	}
}

// TestExtensionOrPlugin takes //NAME for the extension of that name where there is one.
func TestExtensionOrPlugin(t *testing.T) {
	p := newPlace(t)
	root := permshiftMark(t, p)
	m := p.mount("lowerdir=//permshift//" + root)
	m.Lowers = nil
	if e, errno := p.Open(t, m).Client().Lookup(fsbackendtest.Root, "f"); errno != 0 || e.Uid != 7 {
		t.Errorf("LOOKUP: owner %d, %v", e.Uid, errno)
	}
	has := func(name string) bool { return name == "there" }
	if got := mountOf(m, Lower{Plugin: "there", Data: "d", Path: "p"}, has); got.Backend != "there" || got.Source != "/p" || !slices.Equal(got.Options, []string{"data=d"}) {
		t.Errorf("an extension: %+v", got)
	}
	got := mountOf(m, Lower{Plugin: "other", Data: "d", Path: "p"}, has)
	if want := []string{"name=other", "data=d", "path=p", "layers=all"}; got.Backend != PluginBackend || !slices.Equal(got.Options, want) {
		t.Errorf("a plug-in: %+v", got)
	}
}

// permshiftMark makes a tree in which f belongs to user 7 as permshift sees it.
func permshiftMark(t *testing.T, p *place) string {
	t.Helper()
	const name = "user.containers.override_stat"
	p.must(unix.Lsetxattr(p.path("lower"), name, []byte("0:0:0755:dir"), 0))
	p.must(unix.Lsetxattr(p.path("lower/f"), name, []byte("7:7:0644:file"), 0))
	return p.path("lower")
}

// TestRootsMarks has root's own marks: they are warned of, and written where somebody else may mount the upper directory.
func TestRootsMarks(t *testing.T) {
	p := newPlace(t)
	mark := func() error { return unix.Lsetxattr(p.path("other"), "trusted.overlay.opaque", []byte("y"), 0) }
	if os.Geteuid() != 0 || mark() != nil {
		t.Skip("trusted.* is root's")
	}
	p.must(unix.Lremovexattr(p.path("other"), "trusted.overlay.opaque"))
	p.must(os.Mkdir(p.path("other/d"), 0o755))
	p.Open(t, p.mount("lowerdir="+p.path("other")))
	if strings.Contains(p.log.String(), "sys_admin") {
		t.Errorf("without marks, the log has %s", p.log.String())
	}
	p.must(unix.Lsetxattr(p.path("other/d"), "trusted.overlay.opaque", []byte("y"), 0))
	p.Open(t, p.mount("lowerdir="+p.path("other")))
	if got := p.log.String(); !strings.Contains(got, "sys_admin") || !strings.Contains(got, p.path("other")) {
		t.Errorf("with marks, the log has %s", got)
	}
	for _, c := range []struct{ option, want string }{{"rw", "trusted.overlay."}, {"userxattr", "user.overlay."}} {
		g, err := p.TryOpen(t.Context(), p.mount("upperdir="+p.path("upper"), "workdir="+p.path("work"), c.option))
		p.must(err)
		guest := p.guest(g)
		d, errno := guest.Lookup(fsbackendtest.Root, "d")
		guest.ok("LOOKUP", errno)
		guest.ok("UNLINK", guest.Unlink(d.NodeId, "g"))
		guest.ok("RMDIR", guest.Rmdir(fsbackendtest.Root, "d"))
		_, errno = guest.Mkdir(fsbackendtest.Root, "d", 0o755)
		guest.ok("MKDIR", errno)
		buf := make([]byte, 1000)
		n, err := unix.Llistxattr(p.path("upper/d"), buf)
		p.must(err)
		if !strings.Contains(string(buf[:n]), c.want+"opaque") {
			t.Errorf("%s: the upper directory's d has %q", c.option, buf[:n])
		}
		p.must(g.Close())
		p.must(os.RemoveAll(p.path("upper/d")))
	}
}

// TestFreezeIsEnded has whoever asks for something go away before the overlay is frozen.
func TestFreezeIsEnded(t *testing.T) {
	var told []string
	o := &outside{Outside: &extensions.Outside{Tell: func(ctx context.Context, method string, _ any, _ ...*os.File) (json.RawMessage, error) {
		told = append(told, method)
		return nil, ctx.Err() // a question that is given up may have been heard
	}}}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := o.frozen(ctx, func() error { t.Error("somebody who has gone is served"); return nil })
	if !errors.Is(err, context.Canceled) || !slices.Equal(told, []string{tellFreeze, tellThaw}) {
		t.Errorf("told was %q, with %v; expected a freeze and its end", told, err)
	}
}

// TestManPageNumbers maps ids as the example of fuse-overlayfs(1) does (B11), with its own text; also of what the guest makes.
func TestManPageNumbers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("files of several owners are root's")
	}
	p := newPlace(t)
	p.must(os.Chown(p.path("lower/f"), 0, 1))
	p.must(os.Chown(p.path("lower/d"), 65536, 70000))
	for _, c := range []struct {
		options []string
		f, d    [2]uint32
	}{
		{[]string{"uidmapping=0:1000:1:1:110000:65536", "gidmapping=0:1000:1:1:110000:65536"}, [2]uint32{1000, 110000}, [2]uint32{175535, 65534}},
		{[]string{"uidmapping=0:1000:1,1:110000:65536"}, [2]uint32{1000, 1}, [2]uint32{175535, 70000}},
		{[]string{"uidmapping=0:1000:1", "squash_to_gid=7"}, [2]uint32{1000, 7}, [2]uint32{65534, 7}},
		{[]string{"squash_to_root"}, [2]uint32{}, [2]uint32{}},
		{[]string{"squash_to_uid=5", "squash_to_root"}, [2]uint32{5, 0}, [2]uint32{5, 0}},
	} {
		graft, err := p.TryOpen(t.Context(), p.mount(append(c.options, "upper=discard")...))
		p.must(err)
		g := p.guest(graft)
		for name, want := range map[string][2]uint32{"f": c.f, "d": c.d} {
			e, errno := g.Lookup(fsbackendtest.Root, name)
			g.ok("LOOKUP", errno)
			if got := [2]uint32{e.Uid, e.Gid}; got != want {
				t.Errorf("%v: %s belongs to %v, expected %v", c.options, name, got, want)
			}
		}
		p.must(graft.Close())
	}
	// Who is 110000 in the guest is 1 in the layer.
	m := p.mount("uidmapping=0:1000:1:1:110000:65536", "gidmapping=0:1000:1:1:110000:65536", "upperdir="+p.path("upper"), "workdir="+p.path("work"))
	p.must(os.Chmod(p.path("lower"), 0o777))
	p.must(os.Chmod(p.path("upper"), 0o777))
	made, errno := p.Open(t, m).Client().As(110000, 1000).Mkdir(fsbackendtest.Root, "made", 0o755)
	var st unix.Stat_t
	if err := unix.Lstat(p.path("upper/made"), &st); errno != 0 || err != nil || made.Uid != 110000 || made.Gid != 1000 || st.Uid != 1 || st.Gid != 0 {
		t.Errorf("a directory of 110000:1000 is shown as %d:%d and belongs to %d:%d, %v, %v, expected 1:0", made.Uid, made.Gid, st.Uid, st.Gid, errno, err)
	}
}
