package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/bundle"
)

func TestSources(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{
		os.Mkdir(at("d"), 0o755), os.WriteFile(at("d/f"), nil, 0o644), unix.Mkfifo(at("d/fifo"), 0o644),
		os.Symlink("d", at("to-d")), os.Symlink("d/f", at("to-f")), os.Symlink("none", at("to-none")), os.Symlink("loop", at("loop")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	fds := openFDs(t)
	for _, tt := range []struct {
		name, path, source string
		kind               bundle.Kind
		found              string // "" is CodeInvalid
	}{
		{"directory", "/x", "d", bundle.Dir, "d"},
		{"link to a directory", "/", "to-d", bundle.Dir, "d"},
		{"file", "/x", "d/f", bundle.File, "d/f"},
		{"link to a file", "/x", "to-f", bundle.File, "d/f"},
		{"FIFO", "/x", "d/fifo", bundle.File, "d/fifo"},
		{"file through a link", "/x", "to-d/f", bundle.File, "d/f"},
		{"file as the root", "/", "d/f", 0, ""},
		{"nothing", "/x", "none", 0, ""},
		{"link to nothing", "/x", "to-none", 0, ""},
		{"link to itself", "/x", "loop", 0, ""},
		{"below a file", "/x", "d/f/g", 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, err := (&keeper{}).openOne("tag", api.GraftSpec{Path: tt.path, Source: at(tt.source)})
			if tt.found == "" {
				wantCode(t, err, api.CodeInvalid, "source")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer g.close()
			if g.Mount.Kind != tt.kind || g.Mount.Source != at(tt.found) || !g.Dir || len(g.files()) != 1 {
				t.Errorf("%+v", g)
			}
		})
	}
	if n := openFDs(t); n > fds {
		t.Errorf("%d descriptors, and %d before", n, fds)
	}
}

// TestSourceChanges has what was found be something else by the time that it is opened.
func TestSourceChanges(t *testing.T) {
	dir := t.TempDir()
	for _, err := range []error{
		os.Mkdir(filepath.Join(dir, "d"), 0o755), os.WriteFile(filepath.Join(dir, "f"), nil, 0o644),
		os.Symlink("/etc", filepath.Join(dir, "link")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		kind   bundle.Kind
		source string
	}{
		{bundle.Dir, "gone"}, {bundle.Dir, "f"}, {bundle.Dir, "link"}, {bundle.File, "gone"}, {bundle.File, "d"}, {bundle.File, "link"}, {bundle.File, "f/g"},
	} {
		for _, follow := range []bool{false, true} {
			g := &openGraft{graftOrder: graftOrder{
				Mount: bundle.Mount{Kind: tt.kind, Source: filepath.Join(dir, tt.source)}, Spec: api.GraftSpec{FollowMounts: follow},
			}}
			err := g.open()
			wantCode(t, err, api.CodeInvalid, "source: open "+dir)
			if g.dir != nil || g.Dir {
				t.Errorf("%+v was opened", tt)
			}
		}
	}
}

// TestOpenTree looks for a way out of what was opened: a copy has none, what follows the host's mounts does.
func TestOpenTree(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	var above, up unix.Stat_t
	if err := unix.Stat(dir, &above); err != nil {
		t.Fatal(err)
	}
	probe, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	mayCopy := err == nil
	if mayCopy {
		_ = unix.Close(probe)
	} else if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOSYS) {
		t.Fatal(err)
	}
	for _, follow := range []bool{false, true} {
		fd, err := openTree(filepath.Join(dir, "d"), follow)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Fstatat(fd, "..", &up, 0); err != nil {
			t.Fatal(err)
		}
		if out := up.Ino == above.Ino; out != (follow || !mayCopy) {
			t.Errorf("follow %t, as root %t: .. leads out %t", follow, mayCopy, out)
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("flags %#x, %v: expected FD_CLOEXEC", flags, err)
		}
		if err := unix.Close(fd); err != nil {
			t.Fatal(err)
		}
	}
}
