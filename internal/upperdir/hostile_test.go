package upperdir

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestHostile has an upper full of what a guest could hope to be followed.
func TestHostile(t *testing.T) {
	s := openStore(t)
	dir := t.TempDir()
	u := s.given(t, dir)
	secret := dir + "/secret"
	must(t, os.Mkdir(secret, 0o755))
	must(t, os.WriteFile(secret+"/f", []byte("secret"), 0o644))
	must(t, os.Symlink(secret, u.Path()+"/link"))
	must(t, os.Symlink(secret+"/f", u.Path()+"/file"))
	must(t, os.Mkdir(u.Path()+"/sub", 0o755))
	must(t, os.WriteFile(u.Path()+"/sub/f", []byte("guest"), 0o644))
	must(t, os.WriteFile(u.Path()+"/bad\xffname", nil, 0o644))
	must(t, os.WriteFile(u.Path()+"/"+whPrefix+".", nil, 0o644))
	must(t, os.WriteFile(u.Path()+"/"+whPrefix, nil, 0o644))
	must(t, unix.Mkfifo(u.Path()+"/fifo", 0o644))
	lower := dir + "/lower"
	must(t, os.Mkdir(lower, 0o755))

	var paths []string
	must(t, u.Diff(t.Context(), s.lowersOf(t, lower), func(c *Change) error {
		paths = append(paths, c.Path)
		return nil
	}))
	if !slices.Equal(paths, []string{"bad\xffname", "fifo", "file", "link", "sub", "sub/f"}) {
		t.Errorf("the listing is %q", paths)
	}
	var archive bytes.Buffer
	_, err := u.Export(t.Context(), &archive, nil, 0)
	must(t, err)
	for a := tar.NewReader(&archive); ; {
		h, err := a.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		data, _ := io.ReadAll(a)
		if bytes.Contains(data, []byte("secret")) || strings.HasPrefix(h.Name, "link/") {
			t.Errorf("the layer has %s with %q", h.Name, data)
		}
	}

	// A target with links where the upper has directories, or at its names.
	target := dir + "/target"
	must(t, os.Mkdir(target, 0o755))
	must(t, os.Symlink(secret, target+"/sub"))
	err = u.Apply(t.Context(), target, ApplyOptions{}, nil)
	var conflict *ConflictError
	if !errors.As(err, &conflict) || conflict.Conflicts[0].Path != "sub" {
		t.Errorf("Apply over a symbolic link: %v", err)
	}
	must(t, os.Remove(target+"/sub"))
	must(t, os.Symlink(secret+"/f", target+"/file"))
	must(t, u.Apply(t.Context(), target, ApplyOptions{}, nil))
	if data, err := os.ReadFile(secret + "/f"); err != nil || string(data) != "secret" {
		t.Errorf("outside there is %q, %v", data, err)
	}
	if list, _ := os.ReadDir(secret); len(list) != 1 {
		t.Errorf("outside there are %v", list)
	}
}

// TestMarksRefused has marks that name no place there could be.
func TestMarksRefused(t *testing.T) {
	for _, to := range []string{"/../secret", "..", "a/b", "/a//b", "/", "", "/a/", ".", "a\x00b"} {
		s := openStore(t)
		dir := t.TempDir()
		u := s.given(t, dir)
		must(t, os.Mkdir(dir+"/lower", 0o755))
		must(t, os.Mkdir(u.Path()+"/d", 0o755))
		must(t, unix.Setxattr(u.Path()+"/d", "user.overlay.redirect", []byte(to), 0))
		tree := s.lowersOf(t, dir+"/lower")
		err := u.Diff(t.Context(), tree, func(*Change) error { return nil })
		wantErr(t, err, "overlay.redirect")
		_, err = u.Export(t.Context(), io.Discard, tree, 0)
		wantErr(t, err, "overlay.redirect")
		wantErr(t, u.Apply(t.Context(), dir+"/lower", ApplyOptions{}, nil), "overlay.redirect")
	}
}

func TestMetacopy(t *testing.T) {
	s := openStore(t)
	dir := t.TempDir()
	u := s.given(t, dir)
	must(t, os.Mkdir(dir+"/lower", 0o755))
	must(t, os.WriteFile(u.Path()+"/f", nil, 0o644))
	must(t, unix.Setxattr(u.Path()+"/f", "user.overlay.metacopy", nil, 0))
	tree := s.lowersOf(t, dir+"/lower")
	wantErr(t, u.Diff(t.Context(), tree, func(*Change) error { return nil }), "metacopy=off")
	_, err := u.Export(t.Context(), io.Discard, tree, 0)
	wantErr(t, err, "metacopy=off")
	wantErr(t, u.Apply(t.Context(), dir+"/lower", ApplyOptions{}, nil), "metacopy=off")
}

// TestDeep has directories nested as deep as nobody can name.
func TestDeep(t *testing.T) {
	s := openStore(t)
	u, err := s.Discard(Attr{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())})
	must(t, err)
	fd, err := unix.Open(u.Path(), unix.O_PATH|unix.O_CLOEXEC, 0)
	must(t, err)
	for range 3 * maxDepth {
		must(t, unix.Mkdirat(fd, strings.Repeat("d", 100), 0o700))
		next, err := unix.Openat(fd, strings.Repeat("d", 100), unix.O_PATH|unix.O_CLOEXEC, 0)
		must(t, err)
		must(t, unix.Close(fd))
		fd = next
	}
	must(t, unix.Close(fd))
	_, err = s.Checkpoint(t.Context(), u, "c")
	wantErr(t, err, "nested more than")
	_, err = u.Export(t.Context(), io.Discard, nil, 0)
	wantErr(t, err, "nested more than")
	wantErr(t, u.Apply(t.Context(), t.TempDir(), ApplyOptions{DryRun: true}, nil), "nested more than")
	// No process has as many descriptors as there are levels.
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: maxDepth, Max: limit.Max}))
	defer func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }()
	must(t, u.Close())
	if left := s.entries(t); left != "" {
		t.Errorf("after Close there are %s", left)
	}
}

// TestApplyInPieces ends Apply after each of its changes, and expects the next one to do the rest.
func TestApplyInPieces(t *testing.T) {
	s := openStore(t)
	for after := 0; ; after++ {
		dir := t.TempDir()
		lower, target := dir+"/lower", dir+"/target"
		u := s.given(t, dir)
		for _, d := range []string{lower + "/a/in", lower + "/b", lower + "/gone/deep", lower + "/opaque", target, u.Path() + "/a", u.Path() + "/b", u.Path() + "/c", u.Path() + "/opaque/new"} {
			must(t, os.MkdirAll(d, 0o755))
		}
		for _, f := range []string{"/a/in/one", "/a/two", "/b/three", "/gone/deep/four", "/opaque/five", "/six", "/seven"} {
			must(t, os.WriteFile(lower+f, []byte(f), 0o644))
		}
		// a and b have changed places, c was a/in, gone and seven are gone.
		for path, to := range map[string]string{"/a": "/b", "/b": "/a", "/c": "/a/in"} {
			must(t, unix.Setxattr(u.Path()+path, "user.overlay.redirect", []byte(to), 0))
		}
		must(t, unix.Setxattr(u.Path()+"/opaque", "user.fuseoverlayfs.opaque", []byte("y"), 0))
		for _, f := range []string{"/" + whPrefix + "gone", "/b/" + whPrefix + "in", "/six", "/" + whPrefix + "seven"} {
			must(t, os.WriteFile(u.Path()+f, []byte("new"), 0o644))
		}
		must(t, os.Link(u.Path()+"/six", u.Path()+"/opaque/new/six"))
		flatten(t, lower, target)

		stop := errors.New("stop")
		n := 0
		tree := s.lowersOf(t, lower)
		err := u.Apply(t.Context(), target, ApplyOptions{Below: tree}, func(*Change) error {
			if n++; n > after {
				return stop
			}
			return nil
		})
		if err != nil {
			if !errors.Is(err, stop) {
				t.Fatal(err)
			}
			wantErr(t, u.Apply(t.Context(), target, ApplyOptions{DryRun: true}, nil), "applied in part")
			other := s.given(t, t.TempDir())
			wantErr(t, other.Apply(t.Context(), target, ApplyOptions{}, nil), "were applied in part")
			must(t, u.Apply(t.Context(), target, ApplyOptions{Below: tree}, nil))
		}
		var got []string
		must(t, filepath.Walk(target, func(path string, st os.FileInfo, err error) error {
			if err == nil && st.Mode().IsRegular() {
				data, _ := os.ReadFile(path)
				got = append(got, fmt.Sprintf("%s=%s", path[len(target):], data))
			}
			return err
		}))
		if s := strings.Join(got, " "); s != "/a/three=/b/three /b/two=/a/two /c/one=/a/in/one /opaque/new/six=new /six=new" {
			t.Fatalf("ended after %d changes and done again, the target holds %s", after, s)
		}
		if _, err := os.Lstat(target + "/gone"); err == nil {
			t.Error("a directory that is gone is there")
		}
		if err == nil {
			if after < 8 {
				t.Errorf("there were %d changes", after)
			}
			// A layer of the same changes has the same outcome.
			var layer bytes.Buffer
			_, err := u.Export(t.Context(), &layer, tree, 0)
			must(t, err)
			unpack(t, &layer, lower)
			got, want := snapshot(t, lower, true, true), snapshot(t, target, true, true)
			delete(got, ".") // is in no layer
			delete(want, ".")
			sameTrees(t, "layer unpacked", got, want)
			return
		}
	}
}

func TestConflicts(t *testing.T) {
	s := openStore(t)
	dir := t.TempDir()
	lower, target := dir+"/lower", dir+"/target"
	u := s.given(t, dir)
	must(t, os.Mkdir(lower, 0o755))
	for _, name := range []string{"changed", "gone", "kind", "deleted"} {
		must(t, os.WriteFile(lower+"/"+name, []byte(name), 0o644))
		must(t, os.WriteFile(u.Path()+"/"+name, []byte("new"), 0o644))
	}
	must(t, os.Rename(u.Path()+"/deleted", u.Path()+"/"+whPrefix+"deleted"))
	must(t, os.WriteFile(u.Path()+"/added", nil, 0o644))
	flatten(t, lower, target)
	must(t, os.WriteFile(target+"/changed", []byte("other"), 0o644))
	must(t, os.Remove(target+"/gone"))
	must(t, os.Remove(target+"/kind"))
	must(t, os.Mkdir(target+"/kind", 0o755))
	must(t, os.WriteFile(target+"/deleted", []byte("with work of others"), 0o644))
	must(t, os.WriteFile(target+"/added", nil, 0o644))
	before := snapshot(t, target, true, true)
	for _, dry := range []bool{true, false} {
		err := u.Apply(t.Context(), target, ApplyOptions{Below: s.lowersOf(t, lower), DryRun: dry}, nil)
		var conflict *ConflictError
		if !errors.As(err, &conflict) || len(conflict.Conflicts) != 5 {
			t.Fatalf("dry run %v: %v, expected five conflicts", dry, err)
		}
		for _, path := range []string{"added", "changed", "deleted", "gone", "kind"} {
			wantErr(t, err, fmt.Sprintf("; %q: ", path))
		}
		sameTrees(t, "target", snapshot(t, target, true, true), before)
	}
	wantErr(t, u.Apply(t.Context(), u.Path(), ApplyOptions{}, nil), "is the upper directory itself")
	wantErr(t, u.Apply(t.Context(), "target", ApplyOptions{}, nil), "absolute")
}

func TestDevices(t *testing.T) {
	needRoot(t)
	s := openStore(t)
	dir := t.TempDir()
	u := s.given(t, dir)
	must(t, os.Mkdir(dir+"/target", 0o755))
	must(t, unix.Mknod(u.Path()+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	wantErr(t, u.Apply(t.Context(), dir+"/target", ApplyOptions{}, nil), "device node")
	must(t, u.Apply(t.Context(), dir+"/target", ApplyOptions{Devices: true}, nil))
	sameTrees(t, "target", snapshot(t, dir+"/target", true, true), snapshot(t, u.Path(), true, true))
	_, err := s.Checkpoint(t.Context(), u, "c")
	must(t, err)
	sameTrees(t, "checkpoint", snapshot(t, s.path+"/checkpoints/c/upper", true, true), snapshot(t, u.Path(), true, true))
}

func TestExportLimit(t *testing.T) {
	s := openStore(t)
	u := s.given(t, t.TempDir())
	must(t, os.WriteFile(u.Path()+"/f", nil, 0o644))
	must(t, os.Truncate(u.Path()+"/f", 1<<40))
	_, err := u.Export(t.Context(), io.Discard, nil, 1<<30)
	wantErr(t, err, "raise the limit")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := u.Export(ctx, io.Discard, nil, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("Export, cancelled: %v", err)
	}
}
