package guest_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/internal/testguest"
)

// small mounts a tmpfs of so many bytes.
func (m *machine) small(name string, bytes int) string {
	m.t.Helper()
	dir := filepath.Join(m.scratch, name)
	m.check(os.Mkdir(dir, 0o755))
	m.check(unix.Mount("small", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=755", bytes)))
	m.t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			m.t.Error(err)
		}
	})
	return dir
}

// TestOverlayFullDisk fills the disk that takes what the guest writes: the guest is told so, what it has stays as it is, and it goes on
// when there is room. A checkpoint that does not fit leaves nothing.
func TestOverlayFullDisk(t *testing.T) {
	forRoot(t)
	t.Parallel()
	s := &steered{machine: newScratch(t)}
	base := s.source("base", map[string]string{"lower": strings.Repeat("below\n", 1000), "big": strings.Repeat("x", 6<<20)})
	state := s.small("state", 4<<20)
	s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
		"--state-dir", state, "--share", fmt.Sprintf("tag=box,socket=%s/box.sock,dir=%s,overlay=discard", s.scratch, base),
	}})
	g := s.on("box")
	g.sh("cd /mnt/box; head -c 3000000 /dev/urandom >kept; sha256sum kept >/tmp/sum")
	g.denies(noSpace, "cd /mnt/box; cat /dev/zero >more")
	g.denies(noSpace, "cd /mnt/box; echo x >>big") // to copy it up takes more than there is
	g.denies(noSpace, "cd /mnt/box; mkdir -p d; i=0; while [ $i -lt 100 ]; do dd if=/dev/zero of=d/$i bs=100000 count=1 2>/tmp/dd || { cat /tmp/dd >&2; exit 1; }; i=$((i+1)); done")
	_, err := s.c.ActGraft(s.ctx, "box", "/", api.ActCheckpoint, []byte(`{"name":"full"}`))
	if err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("a checkpoint on a full disk: %v", err)
	}
	if got := act[[]api.Checkpoint](s, "box", api.ActCheckpoints, struct{}{}); len(got) > 0 {
		t.Errorf("there are checkpoints: %+v", got)
	}
	g.says("", "cd /mnt/box; sha256sum -s -c /tmp/sum; cmp big /mnt/box/big; rm -r more d; echo again >after")
	g.says("again", "cat /mnt/box/after")
	g.says("6291456", "stat -c %%s /mnt/box/big")
	g.guest.Close()
	s.check(s.c.RemoveShare(s.ctx, "box", true))
	s.await("the disk is empty again", func() bool {
		var st unix.Statfs_t
		return unix.Statfs(state, &st) == nil && (st.Blocks-st.Bfree)*uint64(st.Bsize) < 256<<10
	})
}

// TestImageFullCache has no room for what an image's guest reads: it reads the right bytes all the same.
func TestImageFullCache(t *testing.T) {
	forRoot(t)
	t.Parallel()
	s := &steered{machine: newScratch(t)}
	data := make([]byte, 6<<20)
	for i := range data {
		data[i] = byte(i*i>>7 ^ i>>13)
	}
	image := imagetest.New(t, []imagetest.File{{Name: "a", Data: data}, {Name: "b", Data: data[1<<20:]}, {Name: "etc/"}, {Name: "etc/motd", Data: []byte("hello\n")}})
	state := s.small("state", 2<<20)
	s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
		"--lazyimage-fetcher", fetch, "--state-dir", state,
		"--share", fmt.Sprintf("tag=i,socket=%s/i.sock,image=%s", s.scratch, image.Ref),
	}})
	s.check(os.WriteFile(filepath.Join(s.scratch, "a"), data, 0o644))
	want := hostSh(t, "sha256sum <"+filepath.Join(s.scratch, "a"))
	g := s.on("i")
	g.says(want, "sha256sum </mnt/i/a")
	g.says(want, "echo 3 >/proc/sys/vm/drop_caches; sha256sum </mnt/i/a")
	g.says("true", "tail -c 5242880 /mnt/i/a | cmp - /mnt/i/b && echo true; cat /mnt/i/etc/motd >/dev/null")
}

// TestOverlayUnderWrites asks all that there is to ask of an overlay while a guest writes as fast as it can: each checkpoint is of one
// moment.
func TestOverlayUnderWrites(t *testing.T) {
	t.Parallel()
	s := &steered{machine: newScratch(t)}
	base := s.source("base", map[string]string{"a": "0\n", "b": "0\n", "tree/x": "x\n", "tree/sub/y": "y\n"})
	state := filepath.Join(s.scratch, "state")
	cfg := testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
		"--state-dir", state, "--share", fmt.Sprintf("tag=box,socket=%s/box.sock,dir=%s,overlay=discard", s.scratch, base),
	}}
	if around.uid != 0 && around.ranges {
		// Files of other ids would be out of the keeper's reach.
		if err := s.start(cfg); err == nil || !strings.Contains(err.Error(), "leave these out") {
			t.Errorf("an ordinary user's overlay with --uid-map: %v", err)
		}
		return
	}
	s.startSteered(cfg)
	g := s.on("box")
	// b is never ahead of a, nor more than one behind.
	g.sh(`cd /mnt/box; (i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); for f in a b; do echo $i >$f.new; mv $f.new $f; done
		mv tree t2; mv t2 tree; mkdir -p many/$((i%%7))/deep; rm -rf many/$(((i+3)%%7)); ln -f a link; done; echo $i >/tmp/stopped) >/tmp/out 2>&1 &`)
	s.await("the guest writes", func() bool { return g.sh("cat /mnt/box/b") != "0" })
	for i := range 12 {
		name := "n" + strconv.Itoa(i)
		act[api.Checkpoint](s, "box", api.ActCheckpoint, api.OverlayName{Name: name})
		read := func(file string) int {
			text, err := os.ReadFile(filepath.Join(state, "overlay/checkpoints", name, "upper", file))
			s.check(err)
			n, err := strconv.Atoi(strings.TrimSpace(string(text)))
			s.check(err)
			return n
		}
		if a, b := read("a"), read("b"); a-b < 0 || a-b > 1 {
			t.Errorf("checkpoint %d has a=%d and b=%d: that was never so", i, a, b)
		}
		act[[]api.OverlayChange](s, "box", api.ActDiff, api.OverlayDiff{Tar: filepath.Join(s.scratch, name+".tar")})
		act[[]api.OverlayChange](s, "box", api.ActApply, api.OverlayApply{Target: base, DryRun: true})
		act[[]api.OverlayChange](s, "box", api.ActApply, api.OverlayApply{Target: base, DryRun: true, Checkpoint: name})
		act[struct{}](s, "box", api.ActForget, api.OverlayName{Name: name})
	}
	// Nobody waits for this one; the guest goes on.
	ctx, cancel := context.WithTimeout(s.ctx, 20*time.Millisecond)
	defer cancel()
	_, _ = s.c.ActGraft(ctx, "box", "/", api.ActDiff, []byte("{}"))
	before := g.sh("cat /mnt/box/a")
	s.await("the guest goes on", func() bool { return g.sh("cat /mnt/box/a") != before })
	g.sh("touch /tmp/stop; while [ ! -e /tmp/stopped ]; do sleep 0.1; done")
	g.says("", "cat /tmp/out")
	g.guest.Close()
}

// TestKilledHard kills the daemon's processes while a guest writes: nothing of them is left, and the next daemon takes away what was
// to be discarded.
func TestKilledHard(t *testing.T) {
	forRoot(t)
	t.Parallel()
	for _, which := range []string{"keeper", "server"} {
		t.Run(which, func(t *testing.T) {
			s := &steered{machine: newScratch(t)}
			base := s.source("base", map[string]string{"a": "0\n"})
			state := filepath.Join(s.scratch, "state")
			cfg := testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
				"--state-dir", state, "--share", fmt.Sprintf("tag=box,socket=%s/box.sock,dir=%s,overlay=discard", s.scratch, base),
			}}
			s.startSteered(cfg)
			g := s.on("box")
			g.sh("cd /mnt/box; (while true; do head -c 1000000 /dev/zero >f; done) >/dev/null 2>&1 &")
			uppers := filepath.Join(state, "overlay/uppers")
			s.await("the guest writes", func() bool {
				found, err := filepath.Glob(uppers + "/*/upper/f")
				return err == nil && len(found) == 1
			})
			info, err := s.c.Info(s.ctx)
			s.check(err)
			keeper, server := info.PID, childOf(t, info.PID)
			victim, other := keeper, server
			if which == "server" {
				victim, other = server, keeper
			}
			s.check(unix.Kill(victim, unix.SIGKILL))
			s.await("the other process ends, too", func() bool { return gone(other) })
			g.guest.Close()
			s.startSteered(cfg)
			s.await("what was to be discarded is gone", func() bool {
				left, err := os.ReadDir(uppers)
				trash, err2 := os.ReadDir(filepath.Join(state, "overlay/trash"))
				return err == nil && err2 == nil && len(left) == 1 && len(trash) == 0
			})
			s.on("box").says("a\n0", "ls /mnt/box; cat /mnt/box/a")
		})
	}
}

// childOf returns the only child of a process.
func childOf(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatalf("children of %d: %q", pid, text)
	}
	return child
}

// gone says that a process has ended, be it that nobody has asked how.
func gone(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return true
	}
	_, after, _ := strings.Cut(string(text), ") ")
	return strings.HasPrefix(after, "Z")
}

// TestRootsOverlay serves layers with the marks of root's overlays, as docker's are, to a daemon that may see them; what it writes is for
// a plain mount of the kernel's.
func TestRootsOverlay(t *testing.T) {
	forRoot(t)
	t.Parallel()
	s := &steered{machine: newScratch(t)}
	lower := s.source("lower", map[string]string{"d/hidden": "no\n", "e/gone": "no\n"})
	upper := s.source("upper", map[string]string{"d/shown": "yes\n"})
	s.check(unix.Setxattr(filepath.Join(upper, "d"), "trusted.overlay.opaque", []byte("y"), 0))
	work := s.source("work", nil)
	s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
		"--modcaps", "+sys_admin", "--share", fmt.Sprintf("tag=x,socket=%s/x.sock,lowerdir=%s,upperdir=%s,workdir=%s", s.scratch, lower, upper, work),
	}})
	g := s.on("x")
	g.says("shown", "ls /mnt/x/d; rm -r /mnt/x/e; mkdir /mnt/x/e; echo new >/mnt/x/e/new")
	g.guest.Close()
	s.daemon.Close()
	kernel := filepath.Join(s.scratch, "kernel")
	s.mountOverlay(kernel, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work))
	if got := hostSh(t, "cd "+kernel+"; ls d e"); got != "d:\nshown\n\ne:\nnew" {
		t.Errorf("to the kernel, the guest has left:\n%s", got)
	}
}
