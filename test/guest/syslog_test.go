package guest_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest"
)

// underSyslog runs a program where $1 is the socket of syslog(3), in a mount namespace of its own.
const underSyslog = `
	mount -t tmpfs none /dev
	mknod -m 666 /dev/null c 1 3
	ln -s "$1" /dev/log
	shift
	exec "$@"`

// TestSyslog has the daemon find a syslog daemon that was started anew, confined as it is. Only without a sandbox can it.
func TestSyslog(t *testing.T) {
	t.Parallel()
	m := newScratch(t)
	log := filepath.Join(m.scratch, "log")
	listen := func() *net.UnixConn {
		conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: log, Net: "unixgram"})
		m.check(err)
		t.Cleanup(func() { _ = conn.Close() })
		deadline, _ := m.ctx.Deadline()
		m.check(conn.SetReadDeadline(deadline))
		return conn
	}
	first := listen()
	socket := filepath.Join(m.scratch, "fs.sock")
	args, err := testguest.TraceArgs("root+none", 0, []string{"--sandbox", "none", "--syslog", "--shared-dir", m.share, "--socket-path", socket})
	m.check(err)
	cmd := exec.Command("unshare", slices.Concat([]string{"-m", "sh", "-euc", underSyslog, "sh", log, program}, args)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	m.check(cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
	expect := func(conn *net.UnixConn, text string) {
		t.Helper()
		for {
			line := make([]byte, 1024)
			n, err := conn.Read(line)
			if err != nil {
				t.Fatalf("no line about %q in the log: %v", text, err)
			}
			if regexp.MustCompile(`^<1[0-5]>.* sluiced\[\d+\]: .*` + text).Match(line[:n]) {
				return
			}
		}
	}
	expect(first, "Waiting for vhost-user socket connection")
	m.check(first.Close())
	m.check(os.Remove(log))
	second := listen()
	frontEnd, err := net.Dial("unix", socket)
	m.check(err)
	expect(second, "Client connected")
	m.check(frontEnd.Close())
	expect(second, "Client disconnected")
	if err := <-ended; err != nil {
		t.Errorf("the daemon ended with %v\n%s", err, &stderr)
	}
}
