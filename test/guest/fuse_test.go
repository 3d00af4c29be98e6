package guest_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest"
)

// TestFUSEPrograms serves what unmodified FUSE programs have, without a mount on the host: an archive, an encrypted directory and an
// overlay, of which one is killed at work.
func TestFUSEPrograms(t *testing.T) {
	forRoot(t)
	t.Parallel()
	s := &steered{machine: newScratch(t)}
	tree := s.source("tree", map[string]string{"a/b/c": "deep\n", "file": strings.Repeat("0123456789", 100_000), "empty": ""})
	must := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
	}
	in := func(name string) string { return filepath.Join(s.scratch, name) }
	must("mksquashfs", tree, in("tree.sqfs"), "-quiet", "-no-progress")
	s.check(os.WriteFile(in("pass"), []byte("secret\n"), 0o600))
	for _, dir := range []string{"cipher", "upper", "work"} {
		s.check(os.Mkdir(in(dir), 0o755))
	}
	must("gocryptfs", "-q", "-init", "-passfile", in("pass"), "-scryptn", "10", in("cipher"))
	s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
		"--share", fmt.Sprintf("tag=sq,socket=%s/sq.sock,fuse=squashfuse -f %s {mnt}", s.scratch, in("tree.sqfs")),
		"--share", fmt.Sprintf("tag=cr,socket=%s/cr.sock,fuse=gocryptfs -fg -q -passfile %s %s {mnt}", s.scratch, in("pass"), in("cipher")),
		"--share", fmt.Sprintf(`tag=ov,socket=%[1]s/ov.sock,fuse=fuse-overlayfs -f -o lowerdir=%[2]s\,upperdir=%[1]s/upper\,workdir=%[1]s/work {mnt}`, s.scratch, tree),
	}})
	g := s.on("sq", "cr", "ov")
	want := hostSh(t, fmt.Sprintf(walkScript, tree))
	if got := g.sh(walkScript, "/mnt/sq"); got != want {
		t.Errorf("squashfuse serves another tree:\n%s", difference(want, got))
	}
	for _, tag := range []string{"cr", "ov"} {
		g.sh("cd /mnt/%s; mkdir -p new/sub; (cd /mnt/sq; tar c .) | tar x -C new/sub; cd new; mv sub moved; rm moved/empty; echo more >>moved/a/b/c; ln -s a moved/link", tag)
		g.says("deep\nmore", "cat /mnt/%s/new/moved/a/b/c", tag)
		g.sh("cmp /mnt/%s/new/moved/file /mnt/sq/file", tag)
	}
	if names := hostSh(t, "find "+in("cipher")); strings.Contains(names, "moved") {
		t.Errorf("gocryptfs keeps names in clear: %s", names)
	}

	// A program that is killed is started again: what is asked meanwhile fails soon or waits for it.
	reading := g.pausing(func(say, hear string) string {
		return fmt.Sprintf("echo >%s; i=0; while [ $i -lt 300 ]; do cat /mnt/sq/a/b/c >/dev/null 2>&1 || true; i=$((i+1)); done", say)
	})
	reading.paused()
	s.check(unix.Kill(s.process("squashfuse"), unix.SIGKILL))
	reading.end()
	g.await("squashfuse serves again", func() bool { out, err := g.trySh("cat /mnt/sq/a/b/c"); return err == nil && out == "deep" })
	g.says("deep\nmore", "cat /mnt/cr/new/moved/a/b/c")
}

// process is the process id of a program that the daemon has started.
func (s *steered) process(name string) int {
	s.t.Helper()
	for _, pid := range s.daemon.PIDs() {
		if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil && strings.TrimSpace(string(comm)) == name {
			return pid
		}
	}
	s.t.Fatalf("the daemon has no process %s", name)
	return 0
}
