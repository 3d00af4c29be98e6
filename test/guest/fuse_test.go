package guest_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/internal/testguest/sshd"
)

// programs is a daemon that serves what unmodified FUSE programs have, without a mount on the host.
type programs struct {
	*steered
	tree string // on the host
}

// in is a file of the test's own on the host.
func (p *programs) in(name string) string { return filepath.Join(p.scratch, name) }

// must runs a command on the host.
func (p *programs) must(name string, args ...string) {
	p.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		p.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// servePrograms serves a tree by squashfuse (sq), an overlay on it (ov), an encrypted directory (cr) and one of an SSH server's (ss).
func servePrograms(t *testing.T) *programs {
	t.Helper()
	p := &programs{steered: &steered{machine: newScratch(t)}}
	p.tree = p.source("tree", map[string]string{"a/b/c": "deep\n", "file": strings.Repeat("0123456789", 100_000), "empty": ""})
	p.must("mksquashfs", p.tree, p.in("tree.sqfs"), "-quiet", "-no-progress")
	p.check(os.WriteFile(p.in("pass"), []byte("secret\n"), 0o600))
	for _, dir := range []string{"cipher", "upper", "work", "remote", "plain", "cipher2"} {
		p.check(os.Mkdir(p.in(dir), 0o755))
	}
	for _, dir := range []string{"cipher", "cipher2"} {
		p.must("gocryptfs", "-q", "-init", "-passfile", p.in("pass"), "-scryptn", "10", p.in(dir))
	}
	server, err := sshd.Start(p.scratch)
	p.check(err)
	t.Cleanup(server.Close)
	p.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
		"--share", fmt.Sprintf("tag=sq,socket=%s/sq.sock,fuse=squashfuse -f %s {mnt}", p.scratch, p.in("tree.sqfs")),
		"--share", fmt.Sprintf("tag=cr,socket=%s/cr.sock,xattr,fuse=gocryptfs -fg -q -allow_other -passfile %s %s {mnt}", p.scratch, p.in("pass"), p.in("cipher")),
		"--share", fmt.Sprintf(`tag=ov,socket=%[1]s/ov.sock,xattr,fuse=fuse-overlayfs -f -o lowerdir=%[2]s\,upperdir=%[1]s/upper\,workdir=%[1]s/work {mnt}`, p.scratch, p.tree),
		"--share", fmt.Sprintf("tag=pv,socket=%s/pv.sock,fuse=squashfuse_ll -f -o allow_other %s {mnt},option=mount=private", p.scratch, p.in("tree.sqfs")),
		"--share", fmt.Sprintf("tag=pt,socket=%s/pt.sock,dir=%s", p.scratch, p.in("plain")),
		"--share", fmt.Sprintf("tag=ss,socket=%s/ss.sock,fuse=sshfs -f %s {mnt},option=network", p.scratch, strings.Join(server.Options(p.in("remote")), " ")),
	}})
	return p
}

// TestFUSEPrograms serves an archive, an encrypted directory, an overlay and a directory of an SSH server's, and kills programs at work.
func TestFUSEPrograms(t *testing.T) {
	forRoot(t)
	t.Parallel()
	p := servePrograms(t)
	g := p.on("sq", "cr", "ov", "ss", "pt", "pv")
	want := hostSh(t, fmt.Sprintf(walkScript, p.tree))
	if got := g.sh(walkScript, "/mnt/sq"); got != want {
		t.Errorf("squashfuse serves another tree:\n%s", difference(want, got))
	}
	// As a graft, too, though the guest may do more at once in a directory than the program.
	_, err := p.c.AddGraft(p.ctx, "cr", api.GraftSpec{
		Path: "/archive", Backend: "fuse", Options: []string{fmt.Sprintf("command=squashfuse -f %s {mnt}", p.in("tree.sqfs"))},
	}, false)
	p.check(err)
	if got := g.sh(walkScript, "/mnt/cr/archive"); got != want {
		t.Errorf("squashfuse serves another tree as a graft:\n%s", difference(want, got))
	}
	p.check(p.c.RemoveGraft(p.ctx, "cr", "/archive"))
	// gocryptfs beside a directory of the host, which has agreed with the guest on more than it can do: O_TRUNC among it.
	_, err = p.c.AddGraft(p.ctx, "pt", api.GraftSpec{
		Path: "/secret", Backend: "fuse", Options: []string{fmt.Sprintf("command=gocryptfs -fg -q -allow_other -passfile %s %s {mnt}", p.in("pass"), p.in("cipher2"))},
	}, false)
	p.check(err)
	g.sh("cd /mnt/pt/secret; cp -r /mnt/sq tree; diff -r tree /mnt/sq; cp tree/file tree/a/b/c; cmp tree/file tree/a/b/c; echo short >tree/file")
	g.says("short", "cat /mnt/pt/secret/tree/file; >/mnt/pt/secret/tree/file; cat /mnt/pt/secret/tree/file; touch /mnt/pt/beside")
	p.check(p.c.RemoveGraft(p.ctx, "pt", "/secret"))
	for _, tag := range []string{"cr", "ov", "ss"} {
		g.sh("cd /mnt/%s; mkdir -p new/sub; (cd /mnt/sq; tar c .) | tar x -C new/sub; diff -r new/sub /mnt/sq", tag)
		g.sh("cd /mnt/%s/new; mv sub moved; rm moved/empty; echo more >>moved/a/b/c; ln -s a moved/link", tag)
		g.says("deep\nmore", "cat /mnt/%s/new/moved/a/b/c", tag)
		g.sh("cmp /mnt/%s/new/moved/file /mnt/sq/file", tag)
	}
	if names := hostSh(t, "find "+p.in("cipher")); strings.Contains(names, "moved") {
		t.Errorf("gocryptfs keeps names in clear: %s", names)
	}
	if want, got := hostSh(t, fmt.Sprintf(walkScript, p.in("remote"))), g.sh(walkScript, "/mnt/ss"); got != want {
		t.Errorf("sshfs serves another tree:\n%s", difference(want, got))
	}

	// A program that is killed is started again, and where it has mounted mounts again: what is asked meanwhile fails soon or waits for it.
	for program, file := range map[string]string{"squashfuse": "/mnt/sq/a/b/c", "squashfuse_ll": "/mnt/pv/a/b/c", "sshfs": "/mnt/ss/new/moved/a/b/c"} {
		data := g.sh("cat %s", file)
		killed := p.process(program)
		reading := g.pausing(func(say, hear string) string {
			return fmt.Sprintf("echo >%s; i=0; while [ $i -lt 300 ]; do cat %s >/dev/null 2>&1 || true; i=$((i+1)); done", say, file)
		})
		reading.paused()
		p.check(unix.Kill(killed, unix.SIGKILL))
		reading.end()
		g.await(program+" serves again", func() bool { out, err := g.trySh("cat " + file); return err == nil && out == data })
		if p.process(program) == killed {
			t.Errorf("%s has not been started again", program)
		}
	}
	g.says("deep\nmore", "cat /mnt/cr/new/moved/a/b/c")
}

// TestFUSEPosixtest runs go-fuse's POSIX tests on what FUSE programs serve.
func TestFUSEPosixtest(t *testing.T) {
	forRoot(t)
	t.Parallel()
	g := servePrograms(t).on("cr", "ov")
	g.posixtestAt("/mnt/cr")
	// It keeps a file that is open and deleted under another name, and counts that one. Mounted on the host FstatDeleted fails as well;
	// NlinkZero does not as the host's kernel, with writeback caching, does not ask.
	g.posixtestAt("/mnt/ov", "FstatDeleted", "NlinkZero")
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
