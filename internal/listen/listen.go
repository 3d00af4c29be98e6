// Package listen waits for the front-end: on a socket it creates, with a pid file as its lock, or on one it inherits.
package listen

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Listener hands out the connections of front-ends, one at a time. Its methods may be called at the same time.
type Listener struct {
	ln *net.UnixListener // nil if an established connection was inherited
	// conn is that connection until Accept has handed it out.
	mu   sync.Mutex
	conn *net.UnixConn

	// What Path created, and Close removes.
	socket *ownFile
	pid    *pidFile
}

// Path creates a Unix socket at path and listens on it. PATH.pid is locked first, so that of two daemons on one path the
// second fails; a socket that a dead one left behind is replaced, anything else there is left alone. Only the daemon's
// user may connect, and with group != "" the members of that group. The umask, which is the whole process's, has no say in
// it and is left alone: sockets may be created while other goroutines create files.
func Path(path, group string) (*Listener, error) {
	gid := -1
	if group != "" {
		g, err := user.LookupGroup(group)
		if err != nil {
			return nil, fmt.Errorf("find the group of the socket: %w", err)
		}
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			return nil, fmt.Errorf("find the group of the socket: gid of %s: %w", group, err)
		}
	}

	pid, err := lockPidFile(path + ".pid")
	if err != nil {
		return nil, err
	}
	l := &Listener{pid: pid}
	if err := l.bind(path, gid); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// bind makes l listen on path, whose lock it holds.
func (l *Listener) bind(path string, gid int) error {
	switch info, err := os.Lstat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return fmt.Errorf("look at the socket path: %w", err)
	case info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("%s exists and is not a socket: remove it, or choose another path", path)
	case served(path):
		return fmt.Errorf("somebody else listens on %s: %w", path, ErrHeld)
	default:
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove the stale socket: %w", err)
		}
	}

	name := path
	if strings.HasPrefix(name, "@") {
		name = "./" + name // net would take it for an abstract address
	}
	// The mode of a socket that is not bound is what bind(2) gives the file, less the umask: nobody else ever can connect.
	config := net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) error {
		var err error
		if ctlErr := conn.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); ctlErr != nil {
			return ctlErr
		}
		return err
	}}
	ln, err := config.Listen(context.Background(), "unix", name)
	if err != nil {
		return fmt.Errorf("create the socket: %w", err)
	}
	l.ln = ln.(*net.UnixListener)
	l.ln.SetUnlinkOnClose(false) // it may be another's by then
	if l.socket, err = identify(path); err != nil {
		return fmt.Errorf("look at the new socket: %w", err)
	}
	mode := os.FileMode(0o600)
	if gid >= 0 {
		mode = 0o660
		if err := os.Lchown(path, -1, gid); err != nil {
			return fmt.Errorf("give the socket to its group: %w", err)
		}
	}
	if err := os.Chmod(path, mode); err != nil {
		return fmt.Errorf("open the socket to those who may connect: %w", err)
	}
	return nil
}

// served says whether somebody listens on the socket at path, who takes no pid file for a lock.
func served(path string) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return !errors.Is(unix.Connect(fd, &unix.SockaddrUnix{Name: path}), unix.ECONNREFUSED)
}

// FD takes over the inherited descriptor fd, a Unix stream socket that is listening, as launchers of virtiofsd pass it, or
// already connected to a front-end. fd is closed; the socket stays with whoever shares it.
func FD(fd int) (*Listener, error) {
	listening, err := inspect(fd)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "inherited socket")
	defer f.Close()
	if listening {
		// The net package's copy of the descriptor is close-on-exec.
		ln, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("listen on fd %d: %w", fd, err)
		}
		return &Listener{ln: ln.(*net.UnixListener)}, nil
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("use the connection on fd %d: %w", fd, err)
	}
	return &Listener{conn: conn.(*net.UnixConn)}, nil
}

// File returns a descriptor of the listening or connected socket for another process, to which FD gives it. Close it.
func (l *Listener) File() (*os.File, error) {
	f, err := func() (*os.File, error) {
		if l.ln != nil {
			return l.ln.File()
		}
		return l.conn.File()
	}()
	if err != nil {
		return nil, fmt.Errorf("hand over the socket: %w", err)
	}
	return f, nil
}

// inspect checks that fd is a Unix stream socket and tells a listening from a connected one. Nothing but SO_ACCEPTCONN
// does: some launchers mean the one by --fd and some the other.
func inspect(fd int) (listening bool, err error) {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	switch {
	case errors.Is(err, unix.EBADF):
		return false, fmt.Errorf("fd %d is not open: the launcher has to pass a socket by that number", fd)
	case errors.Is(err, unix.ENOTSOCK):
		return false, fmt.Errorf("fd %d is not a socket; expected a Unix stream socket", fd)
	case err != nil:
		return false, fmt.Errorf("inspect fd %d: %w", fd, err)
	}
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return false, fmt.Errorf("inspect fd %d: %w", fd, err)
	}
	if domain != unix.AF_UNIX || kind != unix.SOCK_STREAM {
		return false, fmt.Errorf("fd %d is a socket of family %d and type %d; expected a Unix stream socket (%d and %d)",
			fd, domain, kind, unix.AF_UNIX, unix.SOCK_STREAM)
	}
	accepts, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return false, fmt.Errorf("inspect fd %d: %w", fd, err)
	}
	if accepts != 0 {
		return true, nil
	}
	if _, err := unix.Getpeername(fd); err != nil {
		return false, fmt.Errorf("fd %d is a socket that neither listens nor is connected", fd)
	}
	return false, nil
}

// Connected says whether a connection was inherited, so that there is no second Accept.
func (l *Listener) Connected() bool { return l.ln == nil }

// Accept waits for a front-end until ctx is done. The connection is the caller's.
func (l *Listener) Accept(ctx context.Context) (*net.UnixConn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if l.ln == nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.conn == nil {
			return nil, net.ErrClosed
		}
		conn := l.conn
		l.conn = nil
		return conn, nil
	}
	if err := l.ln.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("accept a front-end: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = l.ln.SetDeadline(time.Unix(0, 1)) })
	defer stop()
	conn, err := l.ln.AcceptUnix()
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("accept a front-end: %w", err)
	}
	return conn, nil
}

// Refuse closes the listening socket: whoever waits to be accepted, and whoever comes, is refused instead of waiting for
// ever, unless another process shares the socket. The files stay until Close.
func (l *Listener) Refuse() error {
	if l.ln == nil {
		return nil
	}
	if err := l.ln.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Close closes what was not handed out and removes the socket and the pid file, if they are still the ones it created.
// Closing again does nothing.
func (l *Listener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	errs := []error{l.Refuse()}
	if l.conn != nil {
		errs = append(errs, l.conn.Close())
		l.conn = nil
	}
	// The pid file last: until it is gone nobody else creates the socket.
	if l.socket != nil {
		errs = append(errs, l.socket.remove())
		l.socket = nil
	}
	if l.pid != nil {
		errs = append(errs, l.pid.remove())
		l.pid = nil
	}
	return errors.Join(errs...)
}
