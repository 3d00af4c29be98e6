package guest_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/permshift"
	"github.com/sluicefs/sluice/internal/testguest"
)

// TestLayersOverTrees has one guest on four shares: a tree with its permissions in attributes, twice; such a tree to write to; and one
// in which case makes no difference.
func TestLayersOverTrees(t *testing.T) {
	t.Parallel()
	m := &steered{machine: newScratch(t)}
	image, before := m.image()
	upper, folded := m.source("upper", nil), m.source("folded", map[string]string{"Readme.TXT": "read me\n", "Two": "", "TWO": ""})
	var config strings.Builder
	for _, s := range []struct{ tag, graft string }{
		{"one", fmt.Sprintf("backend = \"permshift\"\nsource = %q\nread-only = true", image)},
		{"two", fmt.Sprintf("backend = \"permshift\"\nread-only = true\n[[share.graft.lower]]\nsource = %q", image)},
		{"upper", fmt.Sprintf("backend = \"permshift\"\nsource = %q\noptions = [\"format=containers-override\"]", upper)},
		{"folded", fmt.Sprintf("backend = \"casefold\"\nsource = %q", folded)},
	} {
		fmt.Fprintf(&config, "[[share]]\ntag = %q\n[[share.graft]]\npath = \"/\"\n%s\n", s.tag, s.graft)
	}
	m.startShares(config.String())
	g := m.on("one", "two", "upper", "folded")
	t.Run("permissions", func(t *testing.T) { g.in(t).permissions(image, before) })
	t.Run("writable", func(t *testing.T) { g.in(t).writable(upper) })
	t.Run("case", func(t *testing.T) { g.in(t).caseFolding(folded) })
}

// in is m with another test.
func (m *machine) in(t *testing.T) *machine {
	n := *m
	n.t = t
	return &n
}

const listing = "ls -lnA --full-time | grep -v ^total"

// image makes a tree with many modes and owners, and converts it. It returns the directory, and what a listing had shown before.
func (s *steered) image() (dir, before string) {
	s.t.Helper()
	dir = filepath.Join(s.scratch, "image")
	s.check(os.Mkdir(dir, 0o755))
	n := 0
	for _, i := range "0124" {
		for _, j := range "1357" {
			for _, k := range "26" {
				for _, l := range "37" {
					path := filepath.Join(dir, "f"+string([]rune{i, j, k, l}))
					s.check(os.WriteFile(path, bytes.Repeat([]byte{byte(n)}, 4096), 0o600))
					s.chown(path, n, 1000+n)
					s.check(unix.Chmod(path, uint32(i-'0')<<9|uint32(j-'0')<<6|uint32(k-'0')<<3|uint32(l-'0')))
					n++
				}
			}
		}
	}
	if n != 64 {
		s.t.Fatalf("%d files, expected 64", n)
	}
	list := func() string {
		cmd := exec.Command(kit.Busybox(), "sh", "-c", listing)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "TZ=UTC")
		out, err := cmd.Output()
		s.check(err)
		return strings.TrimSuffix(string(out), "\n")
	}
	before = list()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	s.check(err)
	defer unix.Close(fd)
	done, err := permshift.Convert(s.t.Context(), fd, permshift.OriginalPermissions, 0)
	s.check(err)
	if done.Files != 65 {
		s.t.Errorf("converted %+v, expected 65 files", done)
	}
	s.give(dir)
	lines := strings.Split(list(), "\n")
	if i := slices.IndexFunc(lines, func(line string) bool { return !strings.HasPrefix(line, "-rwxr-xr-x ") }); i >= 0 {
		s.t.Errorf("the host shows %q, expected mode 0755", lines[i])
	}
	return dir, before
}

// permissions compares what the guest sees with what there was (B6), by both shares, which have the same files (B7).
func (m *machine) permissions(image, before string) {
	for _, tag := range []string{"one", "two"} {
		if got := m.sh("cd /mnt/%s; %s", tag, listing); got != before {
			m.t.Errorf("%s shows\n%s\nbefore it was converted\n%s", tag, got, before)
		}
	}
	inodes := "cd /mnt/%s; stat -c '%%i %%n' *"
	m.says(m.sh(inodes, "one"), inodes, "two")
	m.denies(readOnly, "touch /mnt/one/new")
	for _, row := range []struct {
		name string
		uid  uint32
		read bool
	}{{"f0123", 70000, false}, {"f0127", 70000, true}, {"f0123", 0, true}} {
		r, err := m.run(testguest.Command{Args: []string{"cat", "/mnt/one/" + row.name}, UID: row.uid, GID: row.uid})
		if err != nil || (r.Status == 0) != row.read {
			m.t.Errorf("read %s as user %d: status %d, %v, %s, expected that it is allowed: %v", row.name, row.uid, r.Status, err, r.Stderr, row.read)
		}
	}
	// What the first share has read comes out of the host's page cache for the second.
	m.dropFromCache(filepath.Join(image, "f0123"))
	sum := "cat /mnt/%s/f0123 | sha256sum"
	want := m.sh(sum, "one")
	read := m.readFromDisk()
	m.says(want, sum, "two")
	if more := m.readFromDisk() - read; more > 0 {
		m.t.Errorf("the second share read %d bytes from the disk that the first had read", more)
	}
}

// dropFromCache has the host forget a file's pages.
func (m *machine) dropFromCache(path string) {
	m.t.Helper()
	f, err := os.Open(path)
	m.check(err)
	defer f.Close()
	m.check(f.Sync())
	m.check(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// readFromDisk is how much the process that serves has read so far that was not in the page cache, in bytes.
func (m *machine) readFromDisk() int64 {
	m.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", m.daemon.Server()))
	m.check(err)
	_, rest, found := strings.Cut(string(b), "\nread_bytes: ")
	value, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.ParseInt(value, 10, 64)
	if !found || err != nil {
		m.t.Fatalf("no read_bytes in %q", b)
	}
	return n
}

// writable has users of the guest make files of all kinds, which on the host are all the daemon's.
func (m *machine) writable(upper string) {
	m.sh("mkdir -m 1777 /mnt/upper/tmp")
	user := testguest.Command{UID: 1000, GID: 1001, Args: []string{"sh", "-euc", "umask 027; cd /mnt/upper/tmp; echo mine >file; mkdir dir; mkfifo pipe; chmod 2750 dir; echo x >dir/inner"}}
	r, err := m.run(user)
	m.check(err)
	if r.Status != 0 {
		m.t.Fatalf("as a user: status %d, %s", r.Status, r.Stderr)
	}
	m.sh("cd /mnt/upper/tmp; mknod null c 1 3; chmod 666 null; echo root >root; chown 7:8 root; chmod 4711 root; ln -s tmp/file ../link; chown -h 7:8 ../link")
	m.says("1777 0:0 directory .\n640 1000:1001 regular file file\n2750 1000:1001 directory dir\n640 1000:1001 regular file dir/inner\n640 1000:1001 fifo pipe\n"+
		"666 0:0 character special file null\n4711 7:8 regular file root", "cd /mnt/upper/tmp; stat -c '%%a %%u:%%g %%F %%n' . file dir dir/inner pipe null root")
	m.says("mine", "cat /mnt/upper/link")
	m.says("through\ngone", "cd /mnt/upper/tmp; echo lost >null; (echo through >pipe) & cat /mnt/upper/tmp/pipe; cat null; wait; echo gone")
	if r, err := m.run(testguest.Command{UID: 1000, GID: 1001, Args: []string{"sh", "-c", "echo x >>/mnt/upper/tmp/root"}}); err != nil || r.Status == 0 {
		m.t.Errorf("a user wrote to another's file: %v", err)
	}
	for name, value := range map[string]string{
		"": "0:0:1777:dir", "file": "1000:1001:0640:file", "dir": "1000:1001:2750:dir", "pipe": "1000:1001:0640:pipe", "null": "0:0:0666:char-1-3", "root": "7:8:4711:file",
	} {
		path := filepath.Join(upper, "tmp", name)
		buf := make([]byte, 100)
		n, err := unix.Lgetxattr(path, permshift.ContainersOverride.Xattr(), buf)
		m.check(err)
		var st unix.Stat_t
		m.check(unix.Lstat(path, &st))
		if string(buf[:n]) != value || st.Mode&0o7777 != 0o755 || int(st.Uid) != around.hostID(0) {
			m.t.Errorf("on the host %q has the value %q, mode %#o, owner %d, expected %q, 0755, %d", name, buf[:n], st.Mode, st.Uid, value, around.hostID(0))
		}
	}
}

// caseFolding uses names in another case than theirs.
func (m *machine) caseFolding(folded string) {
	m.says("read me", "cd /mnt/folded; cat README.txt")
	m.says("Readme.TXT\nTWO\nTwo", "cd /mnt/folded; ls -A | sort")
	m.says("read me\nmore", "cd /mnt/folded; echo more >>readme.txt; cat Readme.TXT")
	m.denies("File exists", "mkdir /mnt/folded/README.TXT")
	m.sh("cd /mnt/folded; mkdir -p Some/Dir; echo deep >some/DIR/File; mv SOME/dir/file moved; rmdir some/dir; rmdir SOME")
	m.says("deep", "cd /mnt/folded; cat MOVED")
	m.sh("rm /mnt/folded/README.txt")
	// What the host makes is found at once, too.
	m.check(os.WriteFile(filepath.Join(folded, "FromHost"), []byte("host\n"), 0o644))
	m.says("host", "cat /mnt/folded/fromhost")
	entries, err := os.ReadDir(folded)
	m.check(err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{"FromHost", "TWO", "Two", "moved"}; !slices.Equal(names, want) {
		m.t.Errorf("the host has %q, expected %q", names, want)
	}
}
