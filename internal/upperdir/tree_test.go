package upperdir

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	unix.Umask(0o022)
	goleak.VerifyTestMain(m)
}

// needRoot ends a test that mounts, or gives files to others, where that is not to be had.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("it mounts overlays and makes devices: run it as root")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func openStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "base"), slog.New(slog.DiscardHandler))
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

func dirFile(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { must(t, f.Close()) })
	return f
}

func (s *Store) lowersOf(t *testing.T, paths ...string) Tree {
	t.Helper()
	var dirs []*os.File
	for _, p := range paths {
		dirs = append(dirs, dirFile(t, p))
	}
	l, err := s.Lowers(dirs)
	must(t, err)
	return l
}

// given returns an upper of directories in dir.
func (s *Store) given(t *testing.T, dir string) *Upper {
	t.Helper()
	for _, name := range []string{"upper", "work"} {
		must(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
	}
	u, err := s.Given(filepath.Join(dir, "upper"), filepath.Join(dir, "work"))
	must(t, err)
	t.Cleanup(func() { must(t, u.Close()) })
	return u
}

// snapshot describes every file below root in a line. With marks, extended attributes that are an overlay's are taken for others.
func snapshot(t *testing.T, root string, marks, times bool) map[string]string {
	t.Helper()
	tree := make(map[string]string)
	links := make(map[uint64]string)
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		var b strings.Builder
		fmt.Fprintf(&b, "%#o %d:%d", st.Mode, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " size %d sum %x", st.Size, sha256.Sum256(data))
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", target)
		case unix.S_IFCHR, unix.S_IFBLK:
			fmt.Fprintf(&b, " rdev %#x", st.Rdev)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if times {
				fmt.Fprintf(&b, " mtime %d", st.Mtim.Nano())
			}
			if st.Nlink > 1 {
				// Other names may be outside.
				if links[st.Ino] == "" {
					links[st.Ino] = rel
				} else {
					fmt.Fprintf(&b, " link of %s", links[st.Ino])
				}
			}
		}
		buf := make([]byte, 4096)
		n, err := unix.Llistxattr(path, buf)
		if err != nil {
			return err
		}
		names := strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 })
		slices.Sort(names)
		for _, name := range names {
			if _, ok := guestXattr(name); !ok && !marks {
				continue
			}
			value := make([]byte, 4096)
			n, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %s=%q", name, value[:n])
		}
		tree[rel] = b.String()
		return nil
	}))
	return tree
}

func sameTrees(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	for _, path := range slices.Sorted(maps.Keys(want)) {
		if got[path] != want[path] {
			t.Errorf("%s: %s is %q, expected %q", what, path, got[path], want[path])
		}
	}
	for _, path := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[path]; !ok {
			t.Errorf("%s: %s is there (%s), expected nothing", what, path, got[path])
		}
	}
}

// populate makes a random tree in dir, the same for the same seed.
func populate(t *testing.T, dir string, seed uint64) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 2))
	dirs := []string{dir}
	var files []string
	for i := range 40 {
		parent := dirs[r.IntN(len(dirs))]
		path := filepath.Join(parent, fmt.Sprintf("n%d", i%15))
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		switch r.IntN(8) {
		case 0, 1, 2:
			must(t, os.Mkdir(path, 0o755))
			dirs = append(dirs, path)
		case 3:
			must(t, os.Symlink("target", path))
		case 4:
			if len(files) > 0 {
				must(t, os.Link(files[r.IntN(len(files))], path))
				break
			}
			fallthrough
		case 5:
			must(t, unix.Mkfifo(path, 0o640))
		default:
			must(t, os.WriteFile(path, []byte(strings.Repeat(fmt.Sprint(i), r.IntN(3000))), 0o644))
			must(t, unix.Setxattr(path, "user.n", []byte{byte(i)}, 0))
			files = append(files, path)
		}
	}
}

// work does random things in the tree root, as a guest would.
func work(t *testing.T, root string, seed uint64) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 3))
	for i := range 60 {
		var all, dirs []string
		must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && path != root {
				all = append(all, path)
			}
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		}))
		if len(all) == 0 {
			return
		}
		some := all[r.IntN(len(all))]
		if r.IntN(40) == 0 {
			some = root
		}
		into := filepath.Join(dirs[r.IntN(len(dirs))], fmt.Sprintf("n%d", r.IntN(20)))
		// Most things may fail for good reasons: what is there afterwards is what counts.
		switch r.IntN(12) {
		case 0:
			// A pipe that nobody reads is not waited for.
			if f, err := os.OpenFile(into, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NONBLOCK, 0o600); err == nil {
				_, _ = fmt.Fprint(f, "new", i)
				_ = f.Close()
			}
		case 1:
			if f, err := os.OpenFile(some, os.O_WRONLY|os.O_APPEND|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0); err == nil {
				_, _ = f.WriteString("more")
				_ = f.Close()
			}
		case 2:
			_ = os.Remove(some)
		case 3:
			if some != root {
				_ = os.RemoveAll(some)
			}
		case 4:
			_ = os.Mkdir(into, 0o700)
		case 5, 6, 7:
			_ = os.Rename(some, into)
		case 8:
			_ = unix.Renameat2(unix.AT_FDCWD, some, unix.AT_FDCWD, all[r.IntN(len(all))], unix.RENAME_EXCHANGE)
		case 9:
			_ = os.Link(some, into)
		case 10:
			_ = unix.Fchmodat(unix.AT_FDCWD, some, r.Uint32()&0o777|0o700, 0)
			_ = os.Lchown(some, r.IntN(3), r.IntN(3))
		case 11:
			_ = unix.Setxattr(some, "user.x", []byte{byte(i)}, 0)
			_ = unix.Removexattr(some, "user.n")
		}
	}
}

// overlay is the kernel's, over a tree made from seed.
type overlay struct{ dir, lower, lower2, upper, merged string }

func mountOverlay(t *testing.T, seed uint64) *overlay {
	t.Helper()
	dir := t.TempDir()
	o := &overlay{dir, dir + "/lower", dir + "/lower2", dir + "/upper", dir + "/merged"}
	for _, d := range []string{o.lower, o.lower2, o.upper, dir + "/work", o.merged} {
		must(t, os.Mkdir(d, 0o755))
	}
	populate(t, o.lower2, seed)
	must(t, unix.Mount("overlay", o.merged, "overlay", 0, "lowerdir="+o.lower2+",upperdir="+o.lower+",workdir="+dir+"/work,redirect_dir=on,index=off"))
	work(t, o.merged, seed+1000)
	must(t, unix.Unmount(o.merged, 0))
	must(t, os.RemoveAll(dir+"/work"))
	must(t, os.Mkdir(dir+"/work", 0o755))
	o.mount(t, o.upper)
	return o
}

func (o *overlay) mount(t *testing.T, upper string) {
	t.Helper()
	work := filepath.Join(filepath.Dir(upper), "work")
	must(t, os.MkdirAll(work, 0o755))
	must(t, unix.Mount("overlay", o.merged, "overlay", 0, "lowerdir="+o.lower+":"+o.lower2+",upperdir="+upper+",workdir="+work+",redirect_dir=on,index=off"))
	t.Cleanup(func() { _ = unix.Unmount(o.merged, unix.MNT_DETACH) })
}

// flatten copies what is in from, as a guest sees it, to a new directory to.
func flatten(t *testing.T, from, to string) {
	t.Helper()
	h, err := newHost()
	must(t, err)
	defer h.proc.Close()
	must(t, os.MkdirAll(to, 0o755))
	links := to + ".links"
	must(t, os.Mkdir(links, 0o755))
	var nodes []*node
	for _, path := range []string{from, to, links} {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		n, err := h.take(fd)
		must(t, err)
		defer n.close()
		nodes = append(nodes, n)
	}
	c := &copier{h: h, ctx: t.Context(), links: nodes[2].fd, linked: make(map[fileID]string), rename: guestXattr}
	must(t, c.tree(nodes[0], nodes[1], "", 0))
	must(t, c.attributes(nodes[0], nodes[1]))
	must(t, os.RemoveAll(links))
}
