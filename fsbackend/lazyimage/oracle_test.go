package lazyimage

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// snapshot is a tree: what each path is, as one line.
type snapshot map[string]string

// describe is the line of a file. links are the other names of it.
func describe(mode, uid, gid uint32, sec, nsec int64, size uint64, rdev uint64, target string, content []byte, xattrs map[string]string) string {
	s := fmt.Sprintf("%#o %d:%d %d.%09d", mode, uid, gid, sec, nsec)
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		s += fmt.Sprintf(" %d bytes %x", size, sha256.Sum256(content))
	case unix.S_IFLNK:
		s += fmt.Sprintf(" %d %q", size, target)
	case unix.S_IFCHR, unix.S_IFBLK:
		s += fmt.Sprintf(" %d:%d", unix.Major(rdev), unix.Minor(rdev))
	}
	for _, name := range slices.Sorted(maps.Keys(xattrs)) {
		s += fmt.Sprintf(" %s=%q", name, xattrs[name])
	}
	return s
}

// links adds to each line of a file with more names than one which names those are, and how many it says they are.
func (s snapshot) links(inodes map[string]uint64, counts map[string]uint64) {
	names := make(map[uint64][]string)
	for _, p := range slices.Sorted(maps.Keys(inodes)) {
		names[inodes[p]] = append(names[inodes[p]], p)
	}
	for p, ino := range inodes {
		s[p] += fmt.Sprintf(" links %d %q", counts[p], names[ino])
	}
}

// snapshotOf is the tree as a guest sees it.
func snapshotOf(t *testing.T, i *image) snapshot {
	t.Helper()
	s := make(snapshot)
	inodes, counts := make(map[string]uint64), make(map[string]uint64)
	var visit func(p string)
	visit = func(p string) {
		e := i.walk(t, p)
		target, content := "", []byte(nil)
		switch e.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content = i.cat(t, p)
		case unix.S_IFLNK:
			target, _ = i.Readlink(e.NodeId)
		case unix.S_IFDIR:
			for _, name := range i.names(t, p) {
				visit(join(p, name))
			}
		}
		s[p] = describe(e.Mode, e.Uid, e.Gid, int64(e.Mtime), int64(e.Mtimensec), e.Size, uint64(e.Rdev), target, content, i.xattrs(t, &e))
		if e.Mode&unix.S_IFMT != unix.S_IFDIR {
			inodes[p], counts[p] = e.Ino, uint64(e.Nlink)
		}
	}
	visit("")
	s.links(inodes, counts)
	return s
}

func (i *image) xattrs(t *testing.T, e *fuseproto.EntryOut) map[string]string {
	t.Helper()
	list, _, errno := i.Listxattr(e.NodeId, 4096)
	if errno != 0 {
		t.Fatal(errno)
	}
	all := make(map[string]string)
	for name := range strings.SplitSeq(string(list), "\x00") {
		if name != "" {
			v, _, errno := i.Getxattr(e.NodeId, name, 4096)
			if errno != 0 {
				t.Fatal(errno)
			}
			all[name] = string(v)
		}
	}
	return all
}

// snapshotDir is a directory of the host. linked says that links count, which an overlay's do not.
func snapshotDir(t *testing.T, root string, linked bool) snapshot {
	t.Helper()
	s := make(snapshot)
	inodes, counts := make(map[string]uint64), make(map[string]uint64)
	err := filepath.WalkDir(root, func(full string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		p := strings.TrimPrefix(strings.TrimPrefix(full, root), "/")
		var st unix.Stat_t
		if err := unix.Lstat(full, &st); err == unix.ENOENT && !linked {
			return nil // overlayfs lists whiteouts in directories that only one layer has
		} else if err != nil {
			return err
		}
		target, content := "", []byte(nil)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err = os.ReadFile(full)
		case unix.S_IFLNK:
			target, err = os.Readlink(full)
		}
		xattrs := make(map[string]string)
		list := make([]byte, 4096)
		n, xerr := unix.Llistxattr(full, list)
		if err != nil || xerr != nil {
			return fmt.Errorf("%s: %v, %v", full, err, xerr)
		}
		for name := range strings.SplitSeq(string(list[:n]), "\x00") {
			if name != "" && !strings.HasPrefix(name, "trusted.") && !strings.HasPrefix(name, "security.selinux") {
				v := make([]byte, 4096)
				n, err := unix.Lgetxattr(full, name, v)
				if err != nil {
					return err
				}
				xattrs[name] = string(v[:n])
			}
		}
		s[p] = describe(st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, uint64(st.Size), st.Rdev, target, content, xattrs)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			inodes[p], counts[p] = st.Ino, uint64(st.Nlink)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if linked {
		s.links(inodes, counts)
	}
	return s
}

// unlinked is s without what it says of links.
func (s snapshot) unlinked() snapshot {
	u := make(snapshot)
	for p, line := range s {
		line, _, _ = strings.Cut(line, " links ")
		u[p] = line
	}
	return u
}

func (s snapshot) compare(t *testing.T, what string, want snapshot) {
	t.Helper()
	bad := 0
	for _, p := range slices.Sorted(maps.Keys(want)) {
		if s[p] != want[p] && bad < 5 {
			bad++
			t.Errorf("%s: %q is\n%s, expected\n%s", what, p, s[p], want[p])
		}
	}
	for p := range s {
		if _, ok := want[p]; !ok && bad < 5 {
			bad++
			t.Errorf("%s: %q is there: %s", what, p, s[p])
		}
	}
}

// unpack applies a layer's tar file to a directory, as container runtimes do: first what it hides, then what it brings.
func unpack(t *testing.T, root string, packed []byte) {
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	each := func(do func(h *tar.Header, full string, r io.Reader)) {
		r := tar.NewReader(bytes.NewReader(packed))
		for {
			h, err := r.Next()
			if err == io.EOF {
				return
			}
			must(err)
			do(h, filepath.Join(root, h.Name), r)
		}
	}
	each(func(_ *tar.Header, full string, _ io.Reader) {
		dir, base := filepath.Split(full)
		switch of, white := strings.CutPrefix(base, whiteoutPrefix); {
		case !white || !isDir(root, dir):
		case base == opaqueMarker:
			names, _ := os.ReadDir(dir)
			for _, e := range names {
				must(os.RemoveAll(filepath.Join(dir, e.Name())))
			}
		default:
			must(os.RemoveAll(filepath.Join(dir, of)))
		}
	})
	type times struct {
		full string
		when time.Time
	}
	var dirs []times
	each(func(h *tar.Header, full string, r io.Reader) {
		if strings.HasPrefix(filepath.Base(full), whiteoutPrefix) {
			return
		}
		old, err := os.Lstat(full)
		if err == nil && (!old.IsDir() || h.Typeflag != tar.TypeDir) {
			must(os.RemoveAll(full))
		}
		mode := uint32(h.Mode) & 0o7777
		switch h.Typeflag {
		case tar.TypeDir:
			if err := os.Mkdir(full, 0o700); err != nil && !os.IsExist(err) {
				t.Fatal(err)
			}
			// A directory has what the last layer says, and nothing else.
			list := make([]byte, 4096)
			n, err := unix.Llistxattr(full, list)
			must(err)
			for name := range strings.SplitSeq(string(list[:n]), "\x00") {
				if strings.HasPrefix(name, "user.") {
					must(unix.Lremovexattr(full, name))
				}
			}
			dirs = append(dirs, times{full, h.ModTime})
		case tar.TypeReg:
			b, err := io.ReadAll(r)
			must(err)
			must(os.WriteFile(full, b, 0o600))
		case tar.TypeSymlink:
			must(os.Symlink(h.Linkname, full))
		case tar.TypeLink:
			must(os.Link(filepath.Join(root, h.Linkname), full))
			return
		case tar.TypeFifo:
			must(unix.Mkfifo(full, 0o600))
		case tar.TypeChar:
			must(unix.Mknod(full, unix.S_IFCHR|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))))
		}
		must(os.Lchown(full, h.Uid, h.Gid))
		for record, v := range h.PAXRecords {
			if name, ok := strings.CutPrefix(record, "SCHILY.xattr."); ok {
				must(unix.Lsetxattr(full, name, []byte(v), 0))
			}
		}
		if h.Typeflag != tar.TypeSymlink {
			must(syscall.Chmod(full, mode))
		}
		touch(t, full, h.ModTime)
	})
	for _, d := range dirs {
		if _, err := os.Lstat(d.full); err == nil {
			touch(t, d.full, d.when)
		}
	}
}

// isDir says whether all of the way from root to dir is directories.
func isDir(root, dir string) bool {
	for dir = filepath.Clean(dir); dir != root; dir = filepath.Dir(dir) {
		if info, err := os.Lstat(dir); err != nil || !info.IsDir() {
			return false
		}
	}
	return true
}

func touch(t *testing.T, full string, when time.Time) {
	ts := unix.NsecToTimespec(when.UnixNano())
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, full, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		t.Fatalf("utimes %s: %v", full, err)
	}
}

// copyOut makes a directory of the host of what the guest sees of a single layer, with which the kernel then makes an overlay.
func copyOut(t *testing.T, i *image, root string) {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	done := make(map[uint64]string)
	var visit func(p string)
	visit = func(p string) {
		e, full := i.walk(t, p), filepath.Join(root, p)
		switch typ := e.Mode & unix.S_IFMT; {
		case typ == unix.S_IFDIR:
			if p != "" {
				must(os.Mkdir(full, 0o700))
			}
			for _, name := range i.names(t, p) {
				visit(join(p, name))
			}
		case done[e.Ino] != "":
			must(os.Link(done[e.Ino], full))
			return
		case typ == unix.S_IFREG:
			must(os.WriteFile(full, i.cat(t, p), 0o600))
		case typ == unix.S_IFLNK:
			target, _ := i.Readlink(e.NodeId)
			must(os.Symlink(target, full))
		default:
			must(unix.Mknod(full, e.Mode, int(e.Rdev)))
		}
		done[e.Ino] = full
		must(os.Lchown(full, int(e.Uid), int(e.Gid)))
		for name, v := range i.xattrs(t, &e) {
			must(unix.Lsetxattr(full, name, []byte(v), 0))
		}
		if e.Mode&unix.S_IFMT != unix.S_IFLNK {
			must(syscall.Chmod(full, e.Mode&0o7777))
		}
		touch(t, full, time.Unix(int64(e.Mtime), int64(e.Mtimensec)))
	}
	visit("")
}

// randomLayers are tar files that follow each other, as a build makes them: directories are in every layer that touches something
// below them. Their times are at most nsec ns into a second.
func randomLayers(t *testing.T, rnd *rand.Rand, nsec int) [][]byte {
	t.Helper()
	names := []string{"a", "b", "c", "d", "e"}
	var packed [][]byte
	for n := range 3 {
		header := func(typ byte, mode int64) tar.Header {
			return tar.Header{Typeflag: typ, Mode: mode, Uid: rnd.IntN(3), Gid: rnd.IntN(3), ModTime: time.Unix(int64(rnd.IntN(1<<30)), int64(rnd.IntN(nsec)))}
		}
		dir := func(p string) file {
			h := header(tar.TypeDir, 0o700|int64(rnd.IntN(0o100)))
			if rnd.IntN(3) == 0 {
				h.PAXRecords = map[string]string{"SCHILY.xattr.user.d": fmt.Sprint(n)}
			}
			return file{name: p + "/", header: h}
		}
		files := []file{dir(".")}
		files[0].name = "./"
		kinds := map[string]byte{} // what the layer has at each path
		var regular []string
		var fill func(p string, depth int)
		fill = func(p string, depth int) {
			if n > 0 && p != "" && rnd.IntN(4) == 0 { // in a layer's root, overlayfs does not look for it
				files = append(files, file{name: p + opaqueMarker, header: header(tar.TypeReg, 0o644)})
			}
			for _, name := range names {
				at := p + name
				h := header(0, int64(rnd.IntN(0o10000)))
				switch k := rnd.IntN(12); {
				case k < 3 && depth < 3:
					kinds[at] = 'd'
					files = append(files, dir(at))
					fill(at+"/", depth+1)
				case k == 3 && n > 0:
					files = append(files, file{name: p + whiteoutPrefix + name, header: h})
				case k == 4:
					h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, "../"+name, 0o777
					files = append(files, file{name: at, header: h})
				case k == 5:
					h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, 1, 3
					files = append(files, file{name: at, header: h})
				case k == 6 && len(regular) > 0:
					h.Typeflag, h.Linkname = tar.TypeLink, regular[rnd.IntN(len(regular))]
					files = append(files, file{name: at, header: h})
				case k < 9:
					h.PAXRecords = map[string]string{"SCHILY.xattr.user.n": at}
					files = append(files, file{name: at, data: strings.Repeat(at, rnd.IntN(40)), header: h})
					regular = append(regular, at)
				}
			}
		}
		fill("", 0)
		packed = append(packed, pack(t, files...))
	}
	return packed
}

// T-D9: what is merged here is what unpacking the layers in order gives; and single layers, stacked by the kernel's overlayfs, give it
// too.
func TestMergeIsWhatUnpackingGives(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test makes devices and mounts overlays: run it as root")
	}
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			packed := randomLayers(t, rand.New(rand.NewPCG(seed, 9)), 1e9)
			build := func() *fake {
				s := new(fake)
				for _, p := range packed {
					s.add(t, p, 16)
				}
				return s
			}
			merged := snapshotOf(t, open(t, build(), Config{Merge: true}))

			host := t.TempDir()
			for _, p := range packed {
				unpack(t, host, p)
			}
			merged.compare(t, "merged", snapshotDir(t, host, true))

			lower := ""
			for n := range packed {
				dir := t.TempDir()
				copyOut(t, open(t, build(), Config{Layer: n, Opaque: OpaqueTrusted}), dir)
				lower = dir + ":" + lower
			}
			at := t.TempDir()
			if err := unix.Mount("overlay", at, "overlay", unix.MS_RDONLY, "lowerdir="+strings.TrimSuffix(lower, ":")); err != nil {
				t.Fatalf("mount the overlay of %s: %v", lower, err)
			}
			defer func() {
				if err := unix.Unmount(at, 0); err != nil {
					t.Error(err)
				}
			}()
			merged.unlinked().compare(t, "merged, beside the kernel's overlay", snapshotDir(t, at, false))
		})
	}
}
