package guest_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/test/guest/selfcheck"
)

// steered is a machine whose daemon the test steers by the control API while guests run.
type steered struct {
	*machine
	c *client.Client
}

// newSteered starts a daemon that has an empty directory as the root of its share.
func newSteered(t *testing.T, options ...string) *steered {
	t.Helper()
	s := &steered{machine: newScratch(t)}
	s.startSteered(testguest.DaemonConfig{Program: program, Share: s.share, Args: options})
	return s
}

// startSteered starts the daemon with a control socket.
func (s *steered) startSteered(cfg testguest.DaemonConfig) {
	s.t.Helper()
	cfg.Args = append([]string{"--control-socket", filepath.Join(s.scratch, "ctl")}, cfg.Args...)
	s.check(s.start(cfg))
	s.connect()
}

// connect makes the client of the daemon's control socket.
func (s *steered) connect() {
	s.t.Helper()
	c, err := client.New(client.Config{Socket: filepath.Join(s.scratch, "ctl")})
	s.check(err)
	s.t.Cleanup(func() { _ = c.Close() })
	s.c = c
}

// source makes a directory of the host, beside the share, with these files in it, and returns its path. All of it is the guest's root's.
func (s *steered) source(name string, files map[string]string) string {
	s.t.Helper()
	dir := filepath.Join(s.scratch, name)
	s.check(os.Mkdir(dir, 0o755))
	for file, content := range files {
		path := filepath.Join(dir, file)
		s.check(os.MkdirAll(filepath.Dir(path), 0o755))
		s.check(os.WriteFile(path, []byte(content), 0o644))
	}
	s.give(dir)
	return dir
}

// give gives a directory of the host and all that is in it to the guest's root.
func (s *steered) give(dir string) {
	s.t.Helper()
	if around.uid == 0 {
		return
	}
	s.check(filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			s.own(path)
		}
		return err
	}))
}

// graft adds a graft to the first share.
func (s *steered) graft(spec api.GraftSpec) api.Graft {
	s.t.Helper()
	g, err := s.c.AddGraft(s.ctx, testguest.Tag, spec, false)
	s.check(err)
	return g
}

// ungraft removes it.
func (s *steered) ungraft(path string) {
	s.t.Helper()
	s.check(s.c.RemoveGraft(s.ctx, testguest.Tag, path))
}

// alter changes it.
func (s *steered) alter(path string, change api.GraftChange) {
	s.t.Helper()
	_, err := s.c.ChangeGraft(s.ctx, testguest.Tag, path, change)
	s.check(err)
}

// leaving are the grafts that were removed and go on for what is open.
func (s *steered) leaving() (paths []string) {
	s.t.Helper()
	grafts, err := s.c.Grafts(s.ctx, testguest.Tag)
	s.check(err)
	for _, g := range grafts {
		if g.Leaving {
			paths = append(paths, g.Path)
		}
	}
	return paths
}

// await waits until what is true, which somebody else makes.
func (m *machine) await(what string, is func() bool) {
	m.t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatalf("not within a minute: %s", what)
		}
	}
}

// says has the guest run a script, whose output must be want.
func (m *machine) says(want, script string, args ...any) {
	m.t.Helper()
	if got := m.sh(script, args...); got != want {
		m.t.Errorf("the guest's %s says %q, want %q", fmt.Sprintf(script, args...), got, want)
	}
}

// denies has the guest run a script that must fail with an error in which why is.
func (m *machine) denies(why, script string, args ...any) {
	m.t.Helper()
	script = fmt.Sprintf(script, args...)
	if out, err := m.trySh(script); err == nil || !strings.Contains(err.Error(), why) {
		m.t.Errorf("the guest's %s: %q, %v, want %q", script, out, err, why)
	}
}

const (
	noEntry  = "No such file or directory"
	readOnly = "Read-only file system"
	noSpace  = "No space left on device"
)

// pausing is a script of the guest that waits for the test at times.
type pausing struct {
	m         *machine
	say, hear string
	ended     chan struct{}
	out       string
	err       error
}

// pausing runs a script, given the names of two FIFOs. It pauses by writing to the first, and goes on when it has read from the
// second.
func (m *machine) pausing(script func(say, hear string) string) *pausing {
	m.t.Helper()
	dir := m.sh("mktemp -d")
	p := &pausing{m: m, say: dir + "/say", hear: dir + "/hear", ended: make(chan struct{})}
	m.sh("mkfifo %s %s", p.say, p.hear)
	go func() {
		defer close(p.ended)
		p.out, p.err = m.trySh(script(p.say, p.hear))
	}()
	return p
}

// paused waits until the script pauses.
func (p *pausing) paused() {
	p.m.t.Helper()
	heard := make(chan error, 1)
	go func() {
		_, err := p.m.trySh("read -r word <" + p.say)
		heard <- err
	}()
	select {
	case err := <-heard:
		p.m.check(err)
	case <-p.ended:
		p.m.t.Fatalf("the guest's script has ended: %s, %v", p.out, p.err)
	}
}

// resume lets it go on.
func (p *pausing) resume() {
	p.m.t.Helper()
	p.m.sh("echo >%s", p.hear)
}

// end waits for its end.
func (p *pausing) end() string {
	p.m.t.Helper()
	<-p.ended
	p.m.check(p.err)
	return p.out
}

// device returns a file's st_dev in the guest.
func (m *machine) device(path string) string {
	m.t.Helper()
	return m.sh("stat -c %%d %s", path)
}

// TestGraft grafts directories and single files while the guest runs (C3, C13).
func TestGraft(t *testing.T) {
	eachKind(t, func(t *testing.T, kind testguest.Kind) {
		m := newSteered(t)
		m.check(os.WriteFile(m.path("own"), []byte("the root's\n"), 0o644))
		m.boot(testguest.Config{Kind: kind})
		m.denies(noEntry, "cat /mnt/a/dir/file")
		m.graft(api.GraftSpec{Path: "/a/dir", Source: m.source("dir", map[string]string{"file": "in the graft\n", "sub/deep": "deeper\n"})})
		m.says("in the graft\ndeeper\nthe root's", "cat /mnt/a/dir/file /mnt/a/dir/sub/deep /mnt/own")
		m.says("file\nsub", "ls /mnt/a/dir")
		m.says("a\nown", "ls /mnt")

		// A mount of its own, in the middle of what find -xdev does not leave.
		if root, made, graft, file := m.device("/mnt"), m.device("/mnt/a"), m.device("/mnt/a/dir"), m.device("/mnt/a/dir/file"); graft == root || graft == made || file != graft {
			t.Errorf("st_dev is %s of the root, %s of the way, %s of the graft and %s of a file in it", root, made, graft, file)
		}
		m.says("1", "grep -c ' /mnt/a/dir .* - virtiofs ' /proc/self/mountinfo")
		m.says("1", "find /mnt/a/dir -xdev -name deep | wc -l")
		m.says("0", "find /mnt -xdev -name deep | wc -l")
		m.says("1", "find /mnt -name deep | wc -l")

		// The guest changes the graft, and the host sees it, but nobody changes the way to it.
		m.sh("echo from the guest >/mnt/a/dir/new; mv /mnt/a/dir/new /mnt/a/dir/sub/new")
		if got, err := os.ReadFile(filepath.Join(m.scratch, "dir/sub/new")); string(got) != "from the guest\n" {
			t.Errorf("the host reads %q, %v", got, err)
		}
		m.denies(readOnly, "echo x >/mnt/a/new")
		for _, change := range []string{"rmdir /mnt/a/dir", "mv /mnt/a/dir /mnt/other", "mv /mnt/a /mnt/other", "ln /mnt/own /mnt/a/dir/own", "rmdir /mnt/a"} {
			if _, err := m.trySh(change); err == nil {
				t.Errorf("the guest's %s is done", change)
			}
		}
		if _, err := m.c.AddGraft(m.ctx, testguest.Tag, api.GraftSpec{Path: "/a/dir", Source: m.share}, false); apiCode(err) != api.CodeExists {
			t.Errorf("a second graft at the same place: %v", err)
		}

		// Only the file of its directory, and none of what is beside it.
		one := m.source("one", map[string]string{"hosts": "first\n", "secret": "not shared\n"})
		m.graft(api.GraftSpec{Path: "/etc/hosts", Source: filepath.Join(one, "hosts")})
		m.says("first", "cat /mnt/etc/hosts")
		m.says("hosts", "ls /mnt/etc")
		for _, way := range []string{"etc/secret", "etc/../secret", "etc/hosts/../secret", "etc/hosts/secret", "secret"} {
			if out, err := m.trySh("cat /mnt/" + way); err == nil {
				t.Errorf("the guest reads %q by %s", out, way)
			}
		}
		m.sh("echo written by the guest >/mnt/etc/hosts")
		for _, change := range []string{"rm /mnt/etc/hosts", "mv /mnt/etc/hosts /mnt/etc/other", "mv /mnt/own /mnt/etc/hosts", "ln /mnt/etc/hosts /mnt/own2"} {
			if _, err := m.trySh(change); err == nil {
				t.Errorf("the guest's %s is done", change)
			}
		}

		// It is its name that is followed.
		held := m.pausing(func(say, hear string) string {
			return fmt.Sprintf("exec 3</mnt/etc/hosts; echo >%s; read -r word <%s; cat <&3", say, hear)
		})
		held.paused()
		for i := range 10 {
			next := strings.Repeat(fmt.Sprint("replaced ", i, " "), i+1)
			m.check(os.WriteFile(filepath.Join(one, "next"), []byte(next+"\n"), 0o644))
			m.give(one)
			m.check(os.Rename(filepath.Join(one, "next"), filepath.Join(one, "hosts")))
			m.says(next, "cat /mnt/etc/hosts")
		}
		held.resume()
		if got := held.end(); got != "written by the guest" {
			t.Errorf("what was open before the host replaced it reads %q", got)
		}
		m.denies(noEntry, "cat /mnt/etc/next")
	})
}

// apiCode is what an error of the control API says it is.
func apiCode(err error) string {
	if e := (*api.Error)(nil); errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// tmpfs mounts one on a new directory of the host, as the guest's root's.
func (s *steered) tmpfs(dir string) string {
	s.t.Helper()
	s.check(os.MkdirAll(dir, 0o755))
	s.check(unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m,mode=755"))
	s.t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s.own(dir)
	return dir
}

// TestGraftsApart has files of the same inode number on two file systems of the host, and mounts inside a graft (C13), with each
// cache policy: with never, they have given EBADF elsewhere (kata-containers #9435).
func TestGraftsApart(t *testing.T) {
	t.Parallel()
	m := newSteered(t)
	for _, name := range []string{"one", "two", "outer", "outer/inner"} {
		dir := m.tmpfs(filepath.Join(m.scratch, name))
		m.check(os.WriteFile(filepath.Join(dir, "file"), []byte(name+"\n"), 0o644))
		m.check(os.Mkdir(filepath.Join(dir, "sub"), 0o755))
		m.give(dir)
	}
	m.boot(testguest.Config{Kind: testguest.UML})
	for _, cache := range []string{"never", "metadata", "auto", "always"} {
		for _, name := range []string{"one", "two", "outer"} {
			m.graft(api.GraftSpec{Path: "/" + cache + "/" + name, Source: filepath.Join(m.scratch, name), Cache: cache})
		}
		m.says("one\ntwo\nouter\nouter/inner", "cd /mnt/%s; cat one/file two/file outer/file outer/inner/file", cache)
		devices := strings.Fields(m.sh("cd /mnt/%s; stat -c %%d . one two outer outer/inner", cache))
		slices.Sort(devices)
		if len(slices.Compact(devices)) != 5 {
			t.Errorf("cache %s: st_dev are %v, want five different ones", cache, devices)
		}
		inodes := strings.Fields(m.sh("cd /mnt/%s; stat -c %%i one/file two/file", cache))
		if len(inodes) != 2 || inodes[0] != inodes[1] {
			t.Errorf("cache %s: inode numbers are %v, want the host's, which are the same", cache, inodes)
		}
		m.sh(`cd /mnt/%s
			for i in $(seq 5); do
				for d in one two outer outer/inner; do
					( cd $d/sub; ls -la . .. >/dev/null; cat ../file >/dev/null; touch new; rm new; [ "$(pwd)" = /mnt/%[1]s/$d/sub ] )
				done
				find . -type f | wc -l >/tmp/found
				[ $(cat /tmp/found) = 4 ]
			done`, cache)
	}
	m.says("outer/inner", "umount /mnt/never/outer/inner; cat /mnt/never/outer/inner/file") // it is mounted again
}

// TestRemovedGraft removes a graft in which the guest reads a file, and has its working directory (C6).
func TestRemovedGraft(t *testing.T) {
	t.Parallel()
	m := newSteered(t)
	dir := m.source("dir", map[string]string{"big": strings.Repeat("0123456789abcde\n", 8<<16), "small": "small\n"})
	m.boot(testguest.Config{Kind: testguest.UML})
	mounts := m.sh("grep -c virtiofs /proc/self/mountinfo")
	m.graft(api.GraftSpec{Path: "/a/dir", Source: dir})
	m.graft(api.GraftSpec{Path: "/a/file", Source: filepath.Join(dir, "small")})
	want := m.sh("sha256sum </mnt/a/dir/big")
	m.sh("echo 3 >/proc/sys/vm/drop_caches")
	reader := m.pausing(func(say, hear string) string {
		return fmt.Sprintf("cd /mnt/a/dir; exec 3<big 4<../file; { dd bs=1M count=3 <&3 2>/dev/null; echo >%s; read -r word <%s; cat <&3; } | sha256sum; cat <&4; exec 3<&- 4<&-", say, hear)
	})
	reader.paused()
	m.ungraft("/a/dir")
	m.denies(noEntry, "cat /mnt/a/dir/small")
	m.denies(noEntry, "ls /mnt/a/dir")
	m.says("file", "ls /mnt/a")
	m.ungraft("/a/file")
	m.denies(noEntry, "cat /mnt/a/file")
	m.denies(noEntry, "ls /mnt/a")
	m.says("", "ls /mnt")
	m.says(mounts, "grep -c virtiofs /proc/self/mountinfo")
	if got := m.leaving(); len(got) != 2 {
		t.Errorf("%v go on for what is open, want both grafts", got)
	}
	reader.resume()
	if got := reader.end(); got != want+"\nsmall" {
		t.Errorf("what was open reads %q, want %q", got, want)
	}
	m.await("the grafts go with the last of what was open", func() bool { return len(m.leaving()) == 0 })
	// There is place for others.
	m.graft(api.GraftSpec{Path: "/a", Source: dir})
	m.says("small", "cat /mnt/a/small")
}

// processes are what the daemon's two processes hold.
func (s *steered) processes() (keeper, server testguest.Usage, goroutines int) {
	s.t.Helper()
	var err error
	keeper, err = testguest.UsageOf(s.daemon.PID())
	s.check(err)
	server = s.usage()
	stats, err := s.c.Stats(s.ctx)
	s.check(err)
	return keeper, server, stats.Goroutines
}

// count is how many requests of one opcode the first share has answered.
func (s *steered) count(op string) uint64 {
	s.t.Helper()
	stats, err := s.c.Stats(s.ctx)
	s.check(err)
	for _, share := range stats.Shares {
		for _, o := range share.Ops {
			if share.Tag == testguest.Tag && o.Op == op {
				return o.Count
			}
		}
	}
	return 0
}

// TestGraftCycles adds and removes a graft again and again, while the guest reads a file in it all the time (C6).
func TestGraftCycles(t *testing.T) {
	t.Parallel()
	m := newSteered(t)
	dir := m.source("dir", map[string]string{"file": string(selfcheck.Content(1))})
	m.boot(testguest.Config{Kind: testguest.UML})
	// The guest drops a mount when it looks for it.
	mounts := func() string {
		return m.sh("stat /mnt/graft 2>/dev/null || true; grep -c virtiofs /proc/self/mountinfo")
	}
	before := mounts()
	reader := m.pausing(func(say, hear string) string {
		return fmt.Sprintf("guestprog readwhile /mnt/graft/file %s.stop", say)
	})
	cycles := func(n int) {
		for range n {
			reads := m.count("READ")
			m.graft(api.GraftSpec{Path: "/graft", Source: dir})
			m.await("the guest reads", func() bool { return m.count("READ") > reads })
			m.ungraft("/graft")
		}
		m.await("the grafts go", func() bool { return len(m.leaving()) == 0 })
	}
	// By then Go's heap has its least size.
	cycles(100)
	keeper, server, goroutines := m.processes()
	n := size{200, 5000}.n()
	begin := time.Now()
	cycles(n)
	took := time.Since(begin)
	m.sh("touch %s.stop", reader.say)
	t.Logf("%d cycles in %v; the reader: %s", n, took, strings.ReplaceAll(reader.end(), "\n", ", "))
	for line := range strings.SplitSeq(reader.out, "\n") {
		if what := strings.SplitN(line, " ", 2); len(what) != 2 || what[1] != "read" && what[1] != "absent" {
			t.Errorf("the guest says %q", line)
		}
	}
	if now := mounts(); now != before {
		t.Errorf("the guest has %s mounts, had %s", now, before)
	}
	keeperAfter, serverAfter, goroutinesAfter := m.processes()
	t.Logf("the keeper:")
	sameUsage(t, keeper, keeperAfter)
	t.Logf("the server: goroutines before %d, after %d", goroutines, goroutinesAfter)
	sameUsage(t, server, serverAfter)
	if goroutinesAfter > goroutines+2 {
		t.Errorf("the server has %d goroutines, had %d", goroutinesAfter, goroutines)
	}
}

// TestReplacedGraft puts a graft in another one's place, while the guest has a file of it open, and reads all the time (C6).
func TestReplacedGraft(t *testing.T) {
	t.Parallel()
	m := newSteered(t)
	var dirs [2]string
	for i := range dirs {
		dirs[i] = m.source(fmt.Sprint("dir", i), map[string]string{"file": string(selfcheck.Content(uint64(i))), "name": fmt.Sprintln(i), "only" + strconv.Itoa(i): ""})
	}
	m.boot(testguest.Config{Kind: testguest.UML})
	m.graft(api.GraftSpec{Path: "/graft", Source: dirs[0]})
	replace := func(i int) {
		t.Helper()
		_, err := m.c.AddGraft(m.ctx, testguest.Tag, api.GraftSpec{Path: "/graft", Source: dirs[i]}, true)
		m.check(err)
	}
	held := m.pausing(func(say, hear string) string {
		return fmt.Sprintf("cd /mnt/graft; exec 3<name; echo >%s; read -r word <%s; cat <&3; cat name 2>&1 | sed 's/.*: //'", say, hear)
	})
	held.paused()
	device := m.device("/mnt/graft")
	replace(1)
	m.says("1\nfile\nname\nonly1", "cat /mnt/graft/name; ls /mnt/graft")
	if now := m.device("/mnt/graft"); now == device {
		t.Errorf("st_dev is still %s", now)
	}
	held.resume()
	if got := held.end(); got != "0\nStale file handle" {
		t.Errorf("a file that was open, and the working directory, read %q", got)
	}
	reader := m.pausing(func(say, hear string) string {
		return fmt.Sprintf("guestprog readwhile /mnt/graft/file %s.stop", say)
	})
	n := size{100, 1000}.n()
	for i := range n {
		replace(i % 2)
		// Of reads after it: the guest's kernel tries an open that finds a stale file once more, not twice.
		reads := m.count("READ")
		m.await("the guest reads", func() bool { return m.count("READ") > reads })
	}
	m.sh("touch %s.stop", reader.say)
	if got := reader.end(); strings.Contains(got, "\n") || !strings.HasSuffix(got, " read") {
		t.Errorf("while the graft was replaced %d times, reading it ended as %q, want always the content", n, got)
	}
}

// TestReadOnlyGraft makes a graft read-only while the guest has files in it open for writing (C3).
func TestReadOnlyGraft(t *testing.T) {
	eachKindInFull(t, func(t *testing.T, kind testguest.Kind) {
		m := newSteered(t, "--xattr")
		dir := m.source("dir", map[string]string{"file": "content"})
		m.check(os.Mkdir(filepath.Join(dir, "sub"), 0o755))
		m.check(unix.Setxattr(filepath.Join(dir, "file"), "user.present", []byte("1"), 0))
		m.give(dir)
		m.boot(testguest.Config{Kind: kind})
		m.graft(api.GraftSpec{Path: "/graft", Source: dir})
		yes, no := true, false

		frozen := m.pausing(func(say, hear string) string {
			return fmt.Sprintf("guestprog frozen /mnt/graft %s %s", say, hear)
		})
		frozen.paused()
		m.alter("/graft", api.GraftChange{ReadOnly: &yes})
		before := digest(t, dir)
		frozen.resume()
		frozen.paused()
		m.runCases(t, "read-only", testguest.Command{Args: []string{"guestprog", "readonly", "/mnt/graft"}})
		m.sh("mount -o remount,rw /mnt/graft")
		m.sh("mount -o remount,rw /mnt")
		m.runCases(t, "remounted", testguest.Command{Args: []string{"guestprog", "readonly", "/mnt/graft"}})
		m.sh("mkdir /tmp/again; mount -o bind /mnt/graft /tmp/again; mount -o remount,rw,bind /tmp/again")
		m.runCases(t, "bound", testguest.Command{Args: []string{"guestprog", "readonly", "/tmp/again"}})
		m.sh("umount /tmp/again")
		if after := digest(t, dir); after != before {
			t.Errorf("the graft has changed: %s, was %s", after, before)
		}
		m.sh("echo others go on >/mnt/file")

		m.alter("/graft", api.GraftChange{ReadOnly: &no})
		frozen.resume()
		if got := frozen.end(); got != "" {
			t.Errorf("the guest says:\n%s", got)
		}
		m.sh("echo new >/mnt/graft/new; rm /mnt/graft/file")
		if got, err := os.ReadFile(filepath.Join(dir, "new")); string(got) != "new\n" {
			t.Errorf("when it is no longer read-only, the host has %q, %v", got, err)
		}
	})
}

// TestGraftQuota fills a graft that may hold only so much.
func TestGraftQuota(t *testing.T) {
	t.Parallel()
	m := newSteered(t)
	dir := m.source("dir", map[string]string{"there": strings.Repeat("x", 512<<10)})
	m.boot(testguest.Config{Kind: testguest.UML})
	m.graft(api.GraftSpec{Path: "/graft", Source: dir, MaxBytes: 4 << 20, MaxInodes: 20})
	m.await("what is there is counted", func() bool {
		grafts, err := m.c.Grafts(m.ctx, testguest.Tag)
		m.check(err)
		return grafts[len(grafts)-1].UsedBytes == 512<<10
	})
	df := func(option string) []string { // size, used, free
		t.Helper()
		fields := strings.Fields(m.sh("cd /mnt/graft; df -P %s . | tail -n 1", option))
		if len(fields) != 6 {
			t.Fatalf("df says %q", fields)
		}
		return fields[1:4]
	}
	if got := df("-k"); !slices.Equal(got, []string{"4096", "512", "3584"}) {
		t.Errorf("df says %v KiB", got)
	}
	m.sh("dd if=/dev/zero of=/mnt/graft/a bs=64k count=48 2>/dev/null")
	if got := df("-k"); !slices.Equal(got, []string{"4096", "3584", "512"}) {
		t.Errorf("with 3 MiB more df says %v KiB", got)
	}
	m.denies(noSpace, "dd if=/dev/zero of=/mnt/graft/b bs=64k count=16")
	m.denies(noSpace, "dd if=/dev/zero of=/mnt/graft/c bs=64k count=16; sync")
	m.denies(noSpace, "fallocate -l 1M /mnt/graft/c")
	var st unix.Stat_t
	m.check(unix.Stat(filepath.Join(dir, "b"), &st))
	if st.Blocks*512 > 512<<10 {
		t.Errorf("the host has %d bytes of what should be no more than 512 KiB", st.Blocks*512)
	}
	m.sh("dd if=/dev/zero of=/mnt/elsewhere bs=1M count=5 2>/dev/null")
	m.sh("rm /mnt/graft/a /mnt/graft/b; rm -f /mnt/graft/c")
	if got := df("-k"); !slices.Equal(got, []string{"4096", "512", "3584"}) {
		t.Errorf("when that is removed df says %v KiB", got)
	}
	limit := uint64(1 << 20)
	m.alter("/graft", api.GraftChange{MaxBytes: &limit})
	m.denies(noSpace, "dd if=/dev/zero of=/mnt/graft/a bs=64k count=16")
	limit = 8 << 20
	m.alter("/graft", api.GraftChange{MaxBytes: &limit})
	m.sh("dd if=/dev/zero of=/mnt/graft/a bs=1M count=7 2>/dev/null")
	m.sh("rm /mnt/graft/a")

	m.sh("for i in $(seq 19); do echo >/mnt/graft/$i; done")
	for _, more := range []string{"echo x >/mnt/graft/more", "mkdir /mnt/graft/more", "ln -s x /mnt/graft/more", "mkfifo /mnt/graft/more"} {
		m.denies(noSpace, more)
	}
	m.sh("ln /mnt/graft/1 /mnt/graft/link; mv /mnt/graft/2 /mnt/graft/moved; rm /mnt/graft/3; mkdir /mnt/graft/more; rmdir /mnt/graft/more; echo x >/mnt/graft/3")
	m.denies(noSpace, "echo x >/mnt/graft/more")
}

// TestGraftPolicies looks at what nosuid, nodev, noexec and nosymfollow do in the guest, whose mounts have none of them, and at
// each being changed.
func TestGraftPolicies(t *testing.T) {
	t.Parallel()
	m := newSteered(t)
	dir := m.source("dir", map[string]string{"plain": "plain\n", "script": "#!/bin/sh\necho runs\n"})
	m.check(os.Chmod(filepath.Join(dir, "script"), 0o755))
	m.check(os.Symlink("plain", filepath.Join(dir, "link")))
	m.check(os.WriteFile(filepath.Join(dir, "setuid"), nil, 0o755))
	if around.uid == 0 {
		m.check(unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	}
	m.give(dir)
	m.check(os.Chmod(filepath.Join(dir, "setuid"), 0o755|os.ModeSetuid))
	m.boot(testguest.Config{Kind: testguest.UML})
	m.graft(api.GraftSpec{Path: "/graft", Source: dir, Cache: "never"})
	free := func() {
		m.t.Helper()
		m.says("4755 755\nruns\nplain", "cd /mnt/graft; echo $(stat -c %%a setuid script); ./script; cat link")
		if around.uid == 0 {
			m.says("", "cat /mnt/graft/null; echo x >/mnt/graft/null; mknod /mnt/graft/made c 1 3; rm /mnt/graft/made")
		}
	}
	free()
	yes, no := true, false

	m.alter("/graft", api.GraftChange{NoSUID: &yes})
	m.says("755", "stat -c %%a /mnt/graft/setuid")
	m.says("755", "cp /bin/busybox /mnt/graft/new; chmod 4755 /mnt/graft/new; stat -c %%a /mnt/graft/new; rm /mnt/graft/new")
	m.alter("/graft", api.GraftChange{NoSUID: &no, NoDev: &yes})
	if around.uid == 0 {
		m.sh("echo 2 >/proc/sys/vm/drop_caches") // the guest never asks again for the number of a device that it knows
		m.denies("No such device or address", "cat /mnt/graft/null")
		m.denies("Operation not permitted", "mknod /mnt/graft/made c 1 3")
		m.sh("mkfifo /mnt/graft/fifo; rm /mnt/graft/fifo")
	}
	m.alter("/graft", api.GraftChange{NoDev: &no, NoExec: &yes})
	m.denies("Permission denied", "/mnt/graft/script")
	m.says("644", "stat -c %%a /mnt/graft/script")
	m.says("644", "touch /mnt/graft/new; chmod 755 /mnt/graft/new; stat -c %%a /mnt/graft/new; rm /mnt/graft/new")
	m.alter("/graft", api.GraftChange{NoExec: &no, NoSymfollow: &yes})
	m.denies("Too many levels of symbolic links", "cat /mnt/graft/link")
	m.says("plain", "cat /mnt/graft/plain")
	m.alter("/graft", api.GraftChange{NoSymfollow: &no})
	free()
}

// TestGraftIDs grafts one directory three times, with the ids of its files as they are and translated in two ways.
func TestGraftIDs(t *testing.T) {
	t.Parallel()
	m := newSteered(t)
	dir := m.source("dir", map[string]string{"root": "", "user": ""})
	m.boot(testguest.Config{Kind: testguest.UML})
	ids := "cd /mnt/%s; stat -c %%n:%%u:%%g root user"
	m.graft(api.GraftSpec{Path: "/same", Source: dir, Cache: "never"})
	if !around.ranges { // the daemon has one id, and the guest whichever is asked for
		one := []api.IDRange{{Guest: 7, Host: uint32(around.firstID), Count: 1}}
		m.graft(api.GraftSpec{Path: "/seven", Source: dir, UIDMap: one, GIDMap: one})
		m.says("root:7:7\nuser:7:7", ids, "seven")
		return
	}
	m.chown(filepath.Join(dir, "user"), 1000, 2000)
	m.check(os.Chmod(dir, 0o777)) // root of a graft with other ids is no root of the host
	m.graft(api.GraftSpec{Path: "/swapped", Source: dir, UIDMap: []api.IDRange{{Guest: 0, Host: 1000, Count: 1}, {Guest: 1000, Host: 0, Count: 1}}, GIDMap: []api.IDRange{{Guest: 0, Host: 2000, Count: 1}}})
	m.graft(api.GraftSpec{Path: "/moved", Source: dir, UIDMap: []api.IDRange{{Guest: 100, Host: 0, Count: 2000}}, GIDMap: []api.IDRange{{Guest: 100, Host: 0, Count: 3000}}})
	m.says("root:0:0\nuser:1000:2000", ids, "same")
	m.says("root:1000:65534\nuser:0:0", ids, "swapped")
	m.says("root:100:100\nuser:1100:2100", ids, "moved")
	m.sh("touch /mnt/swapped/new; chown 1000 /mnt/swapped/user; chown 1100:1100 /mnt/moved/root")
	m.says("new:1000:2000", "cd /mnt/same; stat -c %%n:%%u:%%g new")
	m.says("root:1000:1000\nuser:0:2000", ids, "same")
	m.denies("Value too large", "chown 3 /mnt/swapped/new")
	m.denies("Value too large", "touch /mnt/moved/none")
}

// TestGraftedRoot runs a program in a root directory that was grafted (C7).
func TestGraftedRoot(t *testing.T) {
	eachKindInFull(t, func(t *testing.T, kind testguest.Kind) {
		m := newSteered(t)
		m.boot(testguest.Config{Kind: kind})
		rootfs := m.source("rootfs", map[string]string{"etc/name": "grafted\n", "tmp/there": "", "var/log/x": "", "proc/x": ""})
		busybox, err := os.ReadFile(kit.Busybox())
		m.check(err)
		m.check(os.Mkdir(filepath.Join(rootfs, "bin"), 0o755))
		m.check(os.WriteFile(filepath.Join(rootfs, "bin/busybox"), busybox, 0o755))
		for _, applet := range []string{"sh", "cat", "ls", "rm", "mkdir", "ps"} {
			m.check(os.Symlink("/bin/busybox", filepath.Join(rootfs, "bin", applet)))
		}
		m.give(rootfs)
		m.graft(api.GraftSpec{Path: "/c1/rootfs", Source: rootfs})
		m.says("grafted\nlog\nfrom inside", "chroot /mnt/c1/rootfs /bin/sh -euc 'cat /etc/name; ls /var; echo from inside >/tmp/new; cat /tmp/new; rm /tmp/there; mkdir -p /a/b/c'")
		for path, want := range map[string]bool{"tmp/new": true, "tmp/there": false, "a/b/c": true} {
			if _, err := os.Lstat(filepath.Join(rootfs, path)); (err == nil) != want {
				t.Errorf("%s: %v, want it there: %v", path, err, want)
			}
		}
		m.says("grafted", "chroot /mnt/c1/rootfs /bin/sh -euc 'cd ../../../..; cat etc/name'")
		m.ungraft("/c1/rootfs")
		m.denies(noEntry, "chroot /mnt/c1/rootfs /bin/sh -c true")
	})
}

// TestMemGraft has a graft in the daemon's memory (C16).
func TestMemGraft(t *testing.T) {
	t.Parallel()
	m := newSteered(t)
	m.boot(testguest.Config{Kind: testguest.UML})
	m.graft(api.GraftSpec{Path: "/shm", Backend: "mem", MaxBytes: 2 << 20})
	m.says("2048", "cd /mnt/shm; df -Pk . | tail -n 1 | awk '{print $2}'")
	m.sh("echo hello >/mnt/shm/file; dd if=/dev/zero of=/mnt/shm/big bs=64k count=16 2>/dev/null")
	m.denies(noSpace, "dd if=/dev/zero of=/mnt/shm/more bs=64k count=32")
	m.sh("rm /mnt/shm/more; dd if=/dev/zero of=/mnt/shm/big bs=64k count=24 2>/dev/null")
	m.says("hello", "cat /mnt/shm/file")
	m.ungraft("/shm")
	m.denies(noEntry, "cat /mnt/shm/file")
	m.graft(api.GraftSpec{Path: "/shm", Backend: "mem", MaxBytes: 4 << 20})
	m.says("", "ls -A /mnt/shm")
	m.says("4096", "cd /mnt/shm; df -Pk . | tail -n 1 | awk '{print $2}'")
	if entries, err := os.ReadDir(m.share); err != nil || len(entries) != 0 {
		t.Errorf("the host has %v, %v", entries, err)
	}
}

// TestLaterMounts has the host mount things below what is shared, before the daemon has started and after, before the guest has
// looked there and after (C17, kata-containers #13137).
func TestLaterMounts(t *testing.T) {
	t.Parallel()
	m := &steered{machine: newScratch(t)}
	follow := m.source("follow", nil)
	fixed := m.source("fixed", nil)
	volume := m.source("volume", map[string]string{"data": "mounted\n"})
	bind := func(at string) {
		t.Helper()
		m.check(unix.Mount(volume, at, "", unix.MS_BIND, ""))
		t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	}
	places := []string{"early", "late", "seen"}
	for _, dir := range []string{m.share, follow, fixed} {
		for _, name := range places {
			m.check(os.Mkdir(filepath.Join(dir, name), 0o755))
		}
		m.give(dir)
		bind(filepath.Join(dir, "early"))
	}
	m.startSteered(testguest.DaemonConfig{Program: program, Share: m.share})
	m.graft(api.GraftSpec{Path: "/follow", Source: follow, FollowMounts: true})
	m.graft(api.GraftSpec{Path: "/fixed", Source: fixed})
	m.boot(testguest.Config{Kind: testguest.UML})
	m.says("", "ls /mnt/seen /mnt/follow/seen /mnt/fixed/seen | grep data || true")
	for _, dir := range []string{m.share, follow, fixed} {
		bind(filepath.Join(dir, "late"))
		bind(filepath.Join(dir, "seen"))
	}
	for _, dir := range []string{"/mnt", "/mnt/follow"} {
		for _, name := range places {
			// What the guest knows of a place it keeps for a second.
			place := dir + "/" + name
			m.await(place+" shows what is mounted there", func() bool { return m.sh("cat %s/data 2>/dev/null || true", place) == "mounted" })
			if m.device(place) == m.device(dir) {
				t.Errorf("st_dev of %s is that of %s", place, dir)
			}
		}
	}
	if around.uid == 0 { // an ordinary user cannot copy what is mounted
		m.says("mounted", "cat /mnt/fixed/early/data; sleep 1.2; cat /mnt/fixed/late/data /mnt/fixed/seen/data 2>/dev/null || true")
	}
	// And away again.
	m.check(unix.Unmount(filepath.Join(follow, "late"), unix.MNT_DETACH)) // the daemon, too, looks at what is mounted
	m.await("what is unmounted is gone", func() bool { return m.sh("ls /mnt/follow/late") == "" })
}
