package guest_test

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest"
)

// TestPOSIX runs the cases of guestprog as root and as a user, with the options that change how the daemon or the guest's kernel work.
func TestPOSIX(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		options string
		kinds   []testguest.Kind
	}{
		{"--xattr", kinds},
		{"--xattr --writeback", kinds[:1]},
		{"--xattr --cache never --allow-mmap --no-readdirplus", kinds[:1]},
		{"--xattr --cache metadata --allow-mmap", kinds[:1]},
		{"--xattr --cache always --writeback --allow-direct-io", kinds[:1]},
		{"--xattr --posix-lock --flock", kinds[:1]},
		{"--xattr --max-fds 64 --max-inodes 100000 --rlimit-nofile 1024 --log-level debug", kinds[:1]},
	} {
		for _, kind := range test.kinds {
			t.Run(string(kind)+" "+test.options, func(t *testing.T) {
				t.Parallel()
				m := newMachine(t, strings.Fields(test.options)...)
				m.makeFixtures()
				m.boot(testguest.Config{Kind: kind})
				m.runCases(t, "root", around.posix(testguest.Command{}))
				m.runCases(t, "user", around.posix(around.user()))
				if left := m.sh("ls -A /mnt"); left != "fixtures" {
					t.Errorf("the cases have left %q", left)
				}
			})
		}
	}
}

// makeFixtures makes what the cases of guestprog expect to find.
func (m *machine) makeFixtures() {
	m.t.Helper()
	for _, f := range []struct {
		name string
		mode uint32
		gid  int
	}{
		{"", 0o1777, 0},
		{"fixtures", 0o755, 0},
		{"fixtures/root-0755", 0o755, 0},
		{"fixtures/root-0755/root-0644", 0o644, 0},
		{"fixtures/root-0755/root-0600", 0o600, 0},
		{"fixtures/sticky", 0o1777, 0},
		{"fixtures/sticky/of-root", 0o644, 0},
		{"fixtures/team-0770", 0o770, 2000},
		{"fixtures/team-0770/team-0640", 0o640, 2000},
		{"fixtures/team-setgid", 0o2777, 2000},
	} {
		path := m.path(f.name)
		if permissions := f.name[strings.LastIndexByte(f.name, '-')+1:]; strings.HasPrefix(permissions, "06") || strings.HasSuffix(f.name, "of-root") {
			m.check(os.WriteFile(path, []byte(permissions), 0o600))
		} else {
			m.check(os.MkdirAll(path, 0o755))
		}
		m.chown(path, 0, f.gid)
		m.check(unix.Chmod(path, f.mode))
	}
}

// runCases runs guestprog and makes a subtest of each line that it prints.
func (m *machine) runCases(t *testing.T, name string, command testguest.Command) {
	t.Run(name, func(t *testing.T) {
		r, err := m.run(command)
		if err != nil {
			t.Fatalf("%v\n%s%s", err, r.Stdout, r.Stderr)
		}
		cases, failed := 0, 0
		for line := range strings.Lines(r.Stdout) {
			cases++
			line = strings.TrimSpace(line)
			if name, ok := strings.CutPrefix(line, "ok "); ok {
				t.Run(name, func(*testing.T) {})
				continue
			}
			failed++
			name, why, _ := strings.Cut(strings.TrimPrefix(line, "FAIL "), ": ")
			t.Run(name, func(t *testing.T) { t.Error(why) })
		}
		if cases == 0 || (failed > 0) != (r.Status != 0) {
			t.Errorf("%d cases, %d failed, status %d:\n%s", cases, failed, r.Status, r.Stderr)
		}
	})
}

// TestReadonly tries to change a share that the guest has mounted for writing.
func TestReadonly(t *testing.T) {
	eachKindInFull(t, func(t *testing.T, kind testguest.Kind) {
		m := newMachine(t, "--readonly", "--xattr")
		m.check(os.WriteFile(m.path("file"), []byte("content"), 0o666))
		m.check(os.Mkdir(m.path("sub"), 0o777))
		m.check(unix.Setxattr(m.path("file"), "user.present", []byte("1"), 0))
		before := digest(t, m.share)
		m.boot(testguest.Config{Kind: kind})
		m.runCases(t, "root", testguest.Command{Args: []string{"guestprog", "readonly", "/mnt"}})
		if after := digest(t, m.share); after != before {
			t.Errorf("the share has changed: %s, was %s", after, before)
		}
	})
}

// TestPosixtest runs go-fuse's POSIX tests in the guest.
func TestPosixtest(t *testing.T) {
	eachKind(t, func(t *testing.T, kind testguest.Kind) {
		m := newMachine(t, "--xattr")
		m.boot(testguest.Config{Kind: kind})
		m.posixtest()
	})
}

var posixtestResult = regexp.MustCompile(`(?m)^ +--- (PASS|FAIL|SKIP): TestAll/(\S+)`)

// posixtest runs go-fuse's POSIX tests on the share. Those that are known to fail are run all the same.
func (m *machine) posixtest(known ...string) {
	m.t.Helper()
	m.posixtestAt("/mnt", known...)
}

// posixtestAt is posixtest in a directory of the guest's.
func (m *machine) posixtestAt(dir string, known ...string) {
	m.t.Helper()
	r, err := m.run(testguest.Command{Args: []string{"posixtest", "-posixdir=" + dir, "-test.v"}, Dir: "/tmp"})
	if err != nil {
		m.t.Fatalf("%v\n%s%s", err, r.Stdout, r.Stderr)
	}
	counts := map[string]int{}
	for _, match := range posixtestResult.FindAllStringSubmatch(r.Stdout, -1) {
		if match[1] == "FAIL" && slices.Contains(known, match[2]) {
			match[1] = "KNOWN"
		}
		counts[match[1]]++
		if match[1] != "PASS" {
			m.t.Logf("%s %s", match[1], match[2])
		}
	}
	m.t.Log(counts)
	if counts["PASS"] < 20 || counts["FAIL"] > 0 || r.Status != min(counts["KNOWN"], 1) {
		m.t.Errorf("status %d:\n%s%s", r.Status, r.Stdout, r.Stderr)
	}
}

// TestHostView makes something of each type in the guest and looks at it on the host.
func TestHostView(t *testing.T) {
	eachKindInFull(t, func(t *testing.T, kind testguest.Kind) {
		m := newMachine(t)
		m.check(os.Chmod(m.share, 0o777))
		m.boot(testguest.Config{Kind: kind})
		as := around.user()
		as.Args = []string{"sh", "-euc", `cd /mnt; umask 027; echo content >file; mkdir dir; ln -s file link; ln file hard; mkfifo fifo; chmod 1750 dir`}
		if r, err := m.run(as); err != nil || r.Status != 0 {
			t.Fatalf("status %d, %v\n%s", r.Status, err, r.Stderr)
		}
		m.sh("touch -d @1000000000 /mnt/file")
		type seen struct {
			name         string
			mode         uint32
			uid, gid     int // the guest's
			nlink        uint64
			major, minor uint32
		}
		uid, gid := int(as.UID), int(as.GID)
		want := []seen{
			{"file", unix.S_IFREG | 0o640, uid, gid, 2, 0, 0},
			{"hard", unix.S_IFREG | 0o640, uid, gid, 2, 0, 0},
			{"dir", unix.S_IFDIR | 0o1750, uid, gid, 2, 0, 0},
			{"link", unix.S_IFLNK | 0o777, uid, gid, 1, 0, 0},
			{"fifo", unix.S_IFIFO | 0o640, uid, gid, 1, 0, 0},
		}
		if around.ranges {
			m.sh("cd /mnt; mkfifo given; chown 1234:5678 given")
			want = append(want, seen{"given", unix.S_IFIFO | 0o644, 1234, 5678, 1, 0, 0})
		}
		if around.uid == 0 {
			m.sh("cd /mnt; mknod char c 1 3; mknod block b 7 9")
			want = append(want, seen{"char", unix.S_IFCHR | 0o644, 0, 0, 1, 1, 3}, seen{"block", unix.S_IFBLK | 0o644, 0, 0, 1, 7, 9})
		}
		for _, test := range want {
			var st unix.Stat_t
			m.check(unix.Lstat(m.path(test.name), &st))
			got := fmt.Sprintf("%#o %d:%d %d %d:%d", st.Mode, st.Uid, st.Gid, st.Nlink, unix.Major(st.Rdev), unix.Minor(st.Rdev))
			want := fmt.Sprintf("%#o %d:%d %d %d:%d", test.mode, around.hostID(test.uid), around.hostID(test.gid), test.nlink, test.major, test.minor)
			if got != want {
				t.Errorf("%s is %s, want %s", test.name, got, want)
			}
			if test.name == "file" && st.Mtim.Sec != 1_000_000_000 {
				t.Errorf("file has mtime %d, want 1000000000", st.Mtim.Sec)
			}
		}
	})
}

// TestSubmount has a file system of the host's inside the share: to the guest it is a mount of its own.
func TestSubmount(t *testing.T) {
	eachKindInFull(t, func(t *testing.T, kind testguest.Kind) {
		m := newScratch(t)
		m.check(os.Mkdir(m.path("sub"), 0o755))
		m.check(os.Mkdir(m.path("dir"), 0o755))
		// Before the daemon starts: into a mount namespace of its own only what is below a shared mount comes later.
		m.check(unix.Mount("tmpfs", m.path("sub"), "tmpfs", 0, "size=1m"))
		t.Cleanup(func() { _ = unix.Unmount(m.path("sub"), unix.MNT_DETACH) })
		m.check(os.WriteFile(m.path("sub/file"), []byte("below"), 0o644))
		m.check(m.start(testguest.DaemonConfig{Program: program, Share: m.share}))
		m.boot(testguest.Config{Kind: kind})
		out := m.sh("cd /mnt; cat sub/file; echo; stat -c %%d . dir sub sub/file; stat -f -c %%b sub")
		lines := strings.Fields(out)
		if len(lines) != 6 || lines[0] != "below" {
			t.Fatalf("the guest has %q", out)
		}
		if root, dir, sub, file := lines[1], lines[2], lines[3], lines[4]; root != dir || sub == root || file != sub {
			t.Errorf("st_dev is %s of the share, %s of a directory, %s of the mount and %s of its file", root, dir, sub, file)
		}
		if lines[5] != "256" {
			t.Errorf("the mount has %s blocks of 4 KiB, want 256", lines[5])
		}
	})
}
