package guest_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/testguest"
)

// forRoot skips tests of what only the host's root can do.
func forRoot(t *testing.T) {
	t.Helper()
	if around.uid != 0 {
		t.Skip("files of several owners, devices and mounts of the host are the host's root's")
	}
}

// walkScript prints all that is to be seen of a tree, in both worlds: sizes and links of directories are a file system's own.
const walkScript = `cd %s
find . | LC_ALL=C sort >/tmp/walk.$$
while read -r f; do
	if [ -d "$f" ] && [ ! -L "$f" ]; then stat -c '%%n %%f %%u %%g' "$f"; else stat -c '%%n %%f %%u %%g %%h %%s %%t:%%T %%Y' "$f"; fi
	if [ -L "$f" ]; then readlink "$f"; fi
done </tmp/walk.$$
find . -type f | LC_ALL=C sort | while read -r f; do sha256sum "$f"; done
rm /tmp/walk.$$`

// hostSh runs a script with the guest's own shell on the host.
func hostSh(t *testing.T, script string) string {
	t.Helper()
	cmd := exec.Command(kit.Busybox(), "sh", "-euc", script)
	cmd.Env = []string{"PATH=/nowhere", "TZ=UTC"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("the host's %s: %v\n%s", script, err, out)
	}
	return strings.TrimSuffix(string(out), "\n")
}

// makeLayers makes three layers with all that layers can have, the uppermost first.
func makeLayers(t *testing.T, dir string) (layers []string) {
	t.Helper()
	for i, script := range []string{
		// The uppermost hides, replaces and adds.
		`mkdir -p etc opaque dir; echo top >etc/motd; mknod gone c 0 0; mknod dir/hidden c 0 0; echo now a file >was-dir; mkdir was-file
		echo in it >was-file/x; echo only this >opaque/this; chown 1000:1000 etc/motd`,
		`mkdir -p etc dir/sub opaque; echo middle >etc/motd; echo middle >etc/middle; chmod 4755 etc/middle; echo seen >dir/seen; echo no >dir/hidden
		ln -s middle etc/link; echo gone >gone; echo not seen >opaque/other; mkfifo dir/fifo; ln dir/seen dir/sub/same`,
		`mkdir -p etc dir/sub opaque/deep was-dir many; echo bottom >etc/motd; echo bottom >etc/bottom; echo gone >gone; echo x >was-dir/x
		echo a file >was-file; echo deep >opaque/deep/x; mknod dir/null c 1 3; head -c 3000000 /dev/zero >dir/big; echo end >>dir/big
		i=0; while [ $i -lt 200 ]; do echo $i >many/$i; i=$((i+1)); done; chmod 700 many; chown 1:2 many/7; touch -d '2001-02-03 04:05:06' many/8`,
	} {
		layer := filepath.Join(dir, fmt.Sprintf("layer%d", i))
		if err := os.Mkdir(layer, 0o755); err != nil {
			t.Fatal(err)
		}
		hostSh(t, "cd "+layer+"\n"+script)
		layers = append(layers, layer)
	}
	if err := unix.Setxattr(filepath.Join(layers[0], "opaque"), "user.overlay.opaque", []byte("y"), 0); err != nil {
		t.Fatal(err)
	}
	return layers
}

// mountOverlay mounts the kernel's own on the host.
func (m *machine) mountOverlay(at, options string) {
	m.t.Helper()
	m.check(os.MkdirAll(at, 0o755))
	m.check(unix.Mount("overlay", at, "overlay", 0, options))
	m.t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			m.t.Error(err)
		}
	})
}

// changeScript changes what the layers have in all ways that tools do.
const changeScript = `cd %s
echo more >>etc/bottom; chmod 600 etc/middle; rm etc/link; mv dir/seen dir/moved; ln dir/big dir/big2; echo x >dir/new
rm -r was-file; echo back >was-file; rm was-dir; mkdir was-dir; echo fresh >was-dir/y; rm -r opaque; mkdir opaque; echo new >opaque/new
mkdir -p a/b/c; echo deep >a/b/c/f; mv a/b a/d; rm many/1 many/2; chown 5:6 many/3; touch -d '2020-01-01 00:00:00' many/4; truncate -s 1000 dir/big2
ln -s x sym; mkfifo pipe; touch -d '2020-01-01 00:00:00' etc/bottom dir/new was-file was-dir/y opaque/new a/d/c/f dir/big2 pipe
touch -h -d '2020-01-01 00:00:00' sym; cp -a etc etc2; rm -r etc2/motd`

// TestOverlayAsTheKernels serves three layers and an upper as one tree, does the same there as in the kernel's overlayfs of the same
// layers on the host, and compares the two. The kernel then takes over the upper that the guest has written.
func TestOverlayAsTheKernels(t *testing.T) {
	forRoot(t)
	t.Parallel()
	s := &steered{machine: newScratch(t)}
	layers := makeLayers(t, s.scratch)
	before := hostSh(t, fmt.Sprintf(walkScript, s.scratch+"/layer2"))
	var dirs []string
	for _, name := range []string{"up", "work", "kup", "kwork"} {
		dir := filepath.Join(s.scratch, name)
		s.check(os.Mkdir(dir, 0o755))
		dirs = append(dirs, dir)
	}
	lowers := strings.Join(layers, ":")
	kernel := filepath.Join(s.scratch, "kernel")
	s.mountOverlay(kernel, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,userxattr", lowers, dirs[2], dirs[3]))
	s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
		"--share", fmt.Sprintf("tag=x,socket=%s/x.sock,lowerdir=%s,upperdir=%s,workdir=%s,xattr", s.scratch, lowers, dirs[0], dirs[1]),
	}})
	g := s.on("x")
	compare := func(when, host string) {
		t.Helper()
		want, got := hostSh(t, fmt.Sprintf(walkScript, host)), g.sh(walkScript, "/mnt/x")
		if want != got {
			t.Errorf("%s the guest's tree is not the kernel's:\n%s", when, difference(want, got))
		}
	}
	compare("at first", kernel)
	hostSh(t, fmt.Sprintf(changeScript, kernel))
	g.sh(changeScript, "/mnt/x")
	compare("after changes", kernel)
	if after := hostSh(t, fmt.Sprintf(walkScript, s.scratch+"/layer2")); after != before {
		t.Errorf("the lowest layer was changed:\n%s", difference(before, after))
	}
	g.guest.Close()
	s.daemon.Close()
	again := filepath.Join(s.scratch, "again")
	s.mountOverlay(again, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,userxattr", lowers, dirs[0], dirs[1]))
	if want, got := hostSh(t, fmt.Sprintf(walkScript, kernel)), hostSh(t, fmt.Sprintf(walkScript, again)); want != got {
		t.Errorf("what the guest has written is, to the kernel, something else:\n%s", difference(want, got))
	}
}

// difference are the lines that two texts do not share.
func difference(want, got string) string {
	a, b := strings.Split(want, "\n"), strings.Split(got, "\n")
	var out []string
	for _, line := range a {
		if !slices.Contains(b, line) {
			out = append(out, "- "+line)
		}
	}
	for _, line := range b {
		if !slices.Contains(a, line) {
			out = append(out, "+ "+line)
		}
	}
	return strings.Join(out, "\n")
}

// act has an overlay do something.
func act[T any](s *steered, tag, action string, arg any) (answer T) {
	s.t.Helper()
	text, err := json.Marshal(arg)
	s.check(err)
	got, err := s.c.ActGraft(s.ctx, tag, "/", action, text)
	s.check(err)
	s.check(json.Unmarshal(got, &answer))
	return answer
}

// TestOverlayDiscard keeps what a guest has written, looks at it, undoes it, makes it real, and lets it go.
func TestOverlayDiscard(t *testing.T) {
	forRoot(t)
	t.Parallel()
	s := &steered{machine: newScratch(t)}
	base := s.source("base", map[string]string{"etc/motd": "welcome\n", "usr/bin/tool": "#!/bin/sh\n", "old/file": "x\n"})
	state := filepath.Join(s.scratch, "state")
	before := hostSh(t, fmt.Sprintf(walkScript, base))
	s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
		"--state-dir", state, "--share", fmt.Sprintf("tag=box,socket=%s/box.sock,dir=%s,overlay=discard", s.scratch, base),
	}})
	g := s.on("box")
	g.sh("cd /mnt/box; echo changed >etc/motd; rm -r old; mkdir work; echo one >work/one")
	got := act[[]api.OverlayChange](s, "box", api.ActDiff, api.OverlayDiff{Tar: filepath.Join(s.scratch, "work.tar")})
	var changes []string
	for _, c := range got {
		changes = append(changes, c.Kind+" "+c.Path)
	}
	if want := []string{"modified /etc/motd", "deleted /old", "added /work", "added /work/one"}; !slices.Equal(changes, want) {
		t.Errorf("changed are %q, want %q", changes, want)
	}
	if list := hostSh(t, "tar tf "+filepath.Join(s.scratch, "work.tar")); !strings.Contains(list, ".wh.old") || !strings.Contains(list, "work/one") {
		t.Errorf("the layer of the changes has %q", list)
	}
	kept := act[api.Checkpoint](s, "box", api.ActCheckpoint, api.OverlayName{Name: "first"})
	if kept.Name != "first" || kept.Files == 0 {
		t.Errorf("the checkpoint is %+v", kept)
	}
	g.sh("rm -r /mnt/box/usr /mnt/box/work; echo worse >/mnt/box/etc/motd")
	if _, err := s.c.ActGraft(s.ctx, "box", "/", api.ActRestore, json.RawMessage(`{"name":"first"}`)); err == nil || !strings.Contains(err.Error(), "guest") {
		t.Errorf("restore below a guest: %v, want that it is refused", err)
	}
	if after := hostSh(t, fmt.Sprintf(walkScript, base)); after != before {
		t.Errorf("the lower layer was changed:\n%s", difference(before, after))
	}
	g.guest.Close()
	s.await("the share waits again", func() bool { return s.shareNow("box").State == api.StateWaiting })
	act[struct{}](s, "box", api.ActRestore, api.OverlayName{Name: "first"})
	g = s.on("box")
	g.says("changed\none", "cat /mnt/box/etc/motd /mnt/box/work/one")
	g.says("#!/bin/sh", "cat /mnt/box/usr/bin/tool")
	act[[]api.OverlayChange](s, "box", api.ActApply, api.OverlayApply{Target: base})
	if got := hostSh(t, "cd "+base+"; cat etc/motd work/one; test ! -e old"); got != "changed\none" {
		t.Errorf("made real, it is %q", got)
	}
	g.guest.Close()
	s.check(s.c.RemoveShare(s.ctx, "box", true))
	s.await("what was written is gone", func() bool {
		left, err := os.ReadDir(filepath.Join(state, "overlay", "uppers"))
		return err == nil && len(left) == 0
	})
}
