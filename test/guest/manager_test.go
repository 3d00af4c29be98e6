package guest_test

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestServiceManager starts the daemon as systemd does, with a listening socket and a place to say that it is ready, in the
// surroundings of this run and, as root, in the other sandboxes: neither is in reach from inside.
func TestServiceManager(t *testing.T) {
	t.Parallel()
	options := [][]string{around.options}
	if around.uid == 0 {
		options = [][]string{nil, {"--sandbox", "chroot"}, {"--sandbox", "none"}}
	}
	for _, options := range options {
		m := newScratch(t)
		listener, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(m.scratch, "fs.sock")})
		m.check(err)
		defer listener.Close()
		socket, err := listener.File()
		m.check(err)
		defer socket.Close()
		notify := filepath.Join(m.scratch, "notify")
		manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: notify})
		m.check(err)
		defer manager.Close()
		m.check(os.Chmod(notify, 0o666))

		// LISTEN_PID is the daemon's, which only what becomes the daemon can know.
		cmd := exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`, program, "--shared-dir", m.share}, options...)...)
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify)
		cmd.ExtraFiles = []*os.File{socket}
		var log bytes.Buffer
		cmd.Stderr = &log
		if around.uid != 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: around.uid, Gid: around.uid}}
		}
		m.check(cmd.Start())
		said := make([]byte, 64)
		m.check(manager.SetReadDeadline(time.Now().Add(30 * time.Second)))
		n, err := manager.Read(said)
		if err != nil || string(said[:n]) != "READY=1" {
			t.Errorf("%q: the service manager reads %q, %v", options, said[:n], err)
		}
		m.check(cmd.Process.Signal(syscall.SIGTERM))
		if err := cmd.Wait(); err != nil {
			t.Errorf("%q: the daemon ended with %v\n%s", options, err, log.String())
		}
	}
}
