package listen

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// TestMain fails the package on a goroutine, or a file descriptor, that is left over.
func TestMain(m *testing.M) {
	// The poller's own descriptors stay: have them opened before counting.
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	_ = r.Close()
	_ = w.Close()
	before := openFDs()
	code := m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		println(err.Error())
		code = 1
	}
	if after := openFDs(); after != before && code == 0 {
		println("file descriptors before and after:", before, after)
		code = 1
	}
	os.Exit(code)
}

func openFDs() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	return len(entries)
}

func open(t *testing.T, path string) *Listener {
	t.Helper()
	l, err := Path(path, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func dial(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// wantError checks that err says want.
func wantError(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
}

func TestPathAcceptsInTurn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l := open(t, path)
	for _, text := range []string{"first", "second"} {
		fe := dial(t, path)
		conn, err := l.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fe.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		_ = fe.Close()
		if got, err := io.ReadAll(conn); err != nil || string(got) != text {
			t.Errorf("read %q, %v, want %q", got, err, text)
		}
		_ = conn.Close()
	}
	if l.Connected() {
		t.Error("a listening socket says it is connected")
	}
	pid, err := os.ReadFile(path + ".pid")
	if err != nil || string(pid) != strconv.Itoa(os.Getpid())+"\n" {
		t.Errorf("the pid file holds %q (%v)", pid, err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if exists(path) || exists(path+".pid") {
		t.Error("files are left after Close")
	}
	if _, err := l.Accept(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

// TestPathWhateverTheUmask: it decides nothing, and is the same after as before.
func TestPathWhateverTheUmask(t *testing.T) {
	for _, mask := range []int{0, 0o027, 0o777} {
		path := filepath.Join(t.TempDir(), "s")
		old := unix.Umask(mask)
		l, err := Path(path, "")
		got := unix.Umask(old)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if got != mask {
			t.Errorf("umask is %#o, want %#o", got, mask)
		}
		if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o600 {
			t.Errorf("umask %#o: the socket is %v, %v", mask, info.Mode(), err)
		}
	}
}

func TestRefuse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l := open(t, path)
	waiting := dial(t, path)
	for range 2 {
		if err := l.Refuse(); err != nil {
			t.Error(err)
		}
	}
	if _, err := waiting.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("who waited reads %v, want the end", err)
	}
	_, err := net.Dial("unix", path)
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("who comes gets %v, want a refusal", err)
	}
	if !exists(path) || !exists(path+".pid") {
		t.Error("Refuse removed a file")
	}
}

func TestAcceptEndsWithContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l := open(t, path)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := l.Accept(ctx)
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Accept: %v, want %v", err, context.Canceled)
	}
	// Nothing of it sticks to the next.
	dial(t, path)
	conn, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}

func TestPathRefuses(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"file", "fifopid.pid", "pidlink-target"} {
		if err := os.WriteFile(at(name), []byte("precious"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(at("fifopid.pid")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(at("fifopid.pid"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(at("pidlink-target"), at("pidlink.pid")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(at("file"), at("link")); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, want string }{
		{at("file"), "exists and is not a socket"},
		{at("link"), "exists and is not a socket"},
		{dir, "exists and is not a socket"},
		{at("fifopid"), "exists and is not a regular file"},
		{at("pidlink"), "create the pid file"},
		{at("nowhere/s"), "create the pid file"},
	} {
		l, err := Path(tt.path, "")
		wantError(t, err, tt.want)
		if l != nil {
			_ = l.Close()
		}
	}
	_, err := Path(at("s"), "no-such-group")
	wantError(t, err, "no-such-group")
	for _, name := range []string{"file", "pidlink-target"} {
		if text, err := os.ReadFile(at(name)); err != nil || string(text) != "precious" {
			t.Errorf("%s is now %q, %v", name, text, err)
		}
	}
	if exists(at("s.pid")) || exists(at("file.pid")) {
		t.Error("a failed start left its pid file")
	}
	_ = os.Remove(dir + ".pid")
}

func TestPathGroup(t *testing.T) {
	gid := os.Getgid()
	if os.Geteuid() == 0 {
		gid = 1 // any group that a new file would not get by itself
	}
	g, err := user.LookupGroupId(strconv.Itoa(gid))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := Path(path, g.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o777 != 0o660 || int(st.Gid) != gid {
		t.Errorf("the socket has mode %#o and group %d, want 0660 and %d", st.Mode&0o777, st.Gid, gid)
	}
}

func TestPathLikeAnAbstractAddress(t *testing.T) {
	t.Chdir(t.TempDir())
	l := open(t, "@s")
	if !exists("@s") {
		t.Error("no socket in the file system")
	}
	_ = l.Close()
}

func TestPidFileOfAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l := open(t, path)
	_, err := Path(path, "")
	wantError(t, err, "another daemon (pid "+strconv.Itoa(os.Getpid())+") holds "+path+".pid")
	if !exists(path) || !exists(path+".pid") {
		t.Fatal("the second instance removed a file of the first")
	}
	// Somebody moved both away and put others there.
	for _, p := range []string{path, path + ".pid"} {
		if err := os.Rename(p, p+".old"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if !exists(path) || !exists(path+".pid") {
		t.Error("Close removed files that are not its own")
	}
}

// TestPidFileReplaced has the previous holder remove the file between open and lock: the lock on a file that is gone
// would exclude nobody.
func TestPidFileReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.pid")
	first, err := lockPidFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if flags, err := unix.FcntlInt(uintptr(first.fd.Int()), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("the pid file's descriptor has flags %#x (%v): not close-on-exec", flags, err)
	}
	reopen := func() int {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	gone, replaced := reopen(), reopen()
	if err := first.remove(); err != nil {
		t.Fatal(err)
	}
	if p, err := lockOpened(gone, path); p != nil || err != nil {
		t.Fatalf("locking a removed file: %v, %v; want neither file nor error", p, err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := lockOpened(replaced, path); p != nil || err != nil {
		t.Fatalf("locking a replaced file: %v, %v; want neither file nor error", p, err)
	}
	again, err := lockPidFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.remove(); err != nil {
		t.Error(err)
	}
}

// inherit returns the number of a descriptor as a launcher would pass it.
func inherit(t *testing.T, domain, kind int, prepare func(fd int) error) int {
	t.Helper()
	fd, err := unix.Socket(domain, kind, 0)
	if err != nil {
		t.Fatal(err)
	}
	if prepare != nil {
		if err := prepare(fd); err != nil {
			t.Fatal(err)
		}
	}
	return fd
}

func TestFDListening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd := inherit(t, unix.AF_UNIX, unix.SOCK_STREAM, func(fd int) error {
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			return err
		}
		return unix.Listen(fd, 1)
	})
	l, err := FD(fd)
	if err != nil {
		t.Fatal(err)
	}
	if l.Connected() {
		t.Error("a listening socket says it is connected")
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("the inherited descriptor is still open (%v)", err)
	}
	wantCloexec(t, l.ln)
	dial(t, path)
	conn, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wantCloexec(t, conn)
	_ = conn.Close()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if !exists(path) {
		t.Error("Close removed a socket that the launcher bound")
	}
}

func TestFDConnected(t *testing.T) {
	pair := func() (fd int, peer *os.File) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fds[0], os.NewFile(uintptr(fds[1]), "peer")
	}
	fd, peer := pair()
	defer peer.Close()
	l, err := FD(fd)
	if err != nil {
		t.Fatal(err)
	}
	if !l.Connected() {
		t.Error("a connected socket does not say so")
	}
	if err := l.Refuse(); err != nil {
		t.Error(err)
	}
	conn, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wantCloexec(t, conn)
	if _, err := l.Accept(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a second Accept: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Errorf("Close reached the connection that was handed out: %v", err)
	}
	_ = conn.Close()

	// One that nobody accepts is closed with the listener.
	fd, peer = pair()
	defer peer.Close()
	if l, err = FD(fd); err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	if n, err := peer.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("the peer reads %d, %v, want the end", n, err)
	}
}

func wantCloexec(t *testing.T, c syscall.Conn) {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = rc.Control(func(fd uintptr) {
		if flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("flags %#x (%v) of the descriptor: not close-on-exec", flags, err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestFDRefuses(t *testing.T) {
	file, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		fd   int
		want string
	}{
		{file, "is not a socket"},
		{inherit(t, unix.AF_UNIX, unix.SOCK_DGRAM, nil), "expected a Unix stream socket"},
		{inherit(t, unix.AF_UNIX, unix.SOCK_SEQPACKET, nil), "expected a Unix stream socket"},
		{inherit(t, unix.AF_INET, unix.SOCK_STREAM, nil), "expected a Unix stream socket"},
		{inherit(t, unix.AF_UNIX, unix.SOCK_STREAM, nil), "neither listens nor is connected"},
	} {
		_, err := FD(tt.fd)
		wantError(t, err, tt.want)
		if err := unix.Close(tt.fd); err != nil {
			t.Errorf("fd %d was taken although it is refused: %v", tt.fd, err)
		}
	}
	_, err = FD(file)
	wantError(t, err, "is not open")
}

func TestFromSystemd(t *testing.T) {
	self := strconv.Itoa(os.Getpid())
	for _, tt := range []struct {
		name     string
		pid, fds string
		ok       bool
		err      string
	}{
		{"nothing", "", "", false, ""},
		{"one socket", self, "1", true, ""},
		{"another process's", "1", "1", false, ""},
		{"no socket", self, "0", false, ""},
		{"two sockets", self, "2", false, "LISTEN_FDS=2"},
		{"nonsense", self, "x", false, "LISTEN_FDS=x"},
	} {
		env := map[string]string{"LISTEN_PID": tt.pid, "LISTEN_FDS": tt.fds}
		fd, ok, err := FromSystemd(func(name string) string { return env[name] })
		if ok != tt.ok || ok && fd != 3 {
			t.Errorf("%s: fd %d, %v", tt.name, fd, ok)
		}
		if tt.err != "" {
			wantError(t, err, tt.err)
		} else if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestNotifyReady(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	notify := func(to string) error {
		n, err := DialNotify(func(name string) string {
			if name != "NOTIFY_SOCKET" {
				t.Errorf("asked for %s", name)
			}
			return to
		})
		if err != nil {
			return err
		}
		return errors.Join(n.Ready(), n.Close())
	}
	if err := notify(path); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	if n, err := manager.Read(buf); err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("the service manager reads %q, %v", buf[:n], err)
	}
	if err := notify(""); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
	wantError(t, notify("relative"), "NOTIFY_SOCKET")
	wantError(t, notify(path+".gone"), "notify the service manager")
}

// TestPathLeavesServed does not take a socket from somebody who has no pid file.
func TestPathLeavesServed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	other, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	_, err = Path(path, "")
	wantError(t, err, "somebody else listens on "+path)
	if !errors.Is(err, ErrHeld) {
		t.Errorf("%v is not ErrHeld", err)
	}
	if !exists(path) || exists(path+".pid") {
		t.Error("the socket is gone, or the pid file has stayed")
	}
}
