// Package sandbox locks the daemon into what it serves, so that whoever takes it over has the guest's files and little else.
//
// # Order
//
// With [Namespace] the program runs twice. The first process, the launcher, opens what only it can open (the listening
// socket), calls [Start] and waits in [Child.Wait]; it keeps few privileges, or none. The second finds out with [Inherited] that
// it is the child. With [Chroot] and [None] there is one process, and [New], unless the launcher has something to do while the
// other one serves. From there on it is the same:
//
//  1. Everything that needs the host's tree, and privileges, is opened.
//  2. [Box.Enter]: from here on only the sources and what was asked for besides are in reach. Privileges are still there.
//  3. Backends are opened.
//  4. [Box.Confine]: capabilities go, on every thread, and nothing brings them back.
//  5. The seccomp filter, which is not of this room.
//
// All of it is one process image, so descriptors and memory of step 1 are good for ever.
//
// # Threads
//
// Root directory, working directory and mounts are shared by the threads of a Go program (CLONE_FS); capabilities and
// no_new_privs are each thread's own. Confine changes those on all of them through libcap's psx, and then reads back from
// /proc what each thread has.
package sandbox

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// Mode is how much of the host is put out of reach.
type Mode uint8

const (
	// Namespace has the daemon in process, mount, IPC and network namespaces of its own, whose tree holds nothing but the
	// sources. An ordinary user gets a user namespace besides.
	Namespace Mode = iota
	// Chroot changes the root directory to the one source, or to an empty directory without a name. It takes root.
	Chroot
	// None leaves the host in reach.
	None
)

func (m Mode) String() string {
	switch m {
	case Namespace:
		return "namespace"
	case Chroot:
		return "chroot"
	case None:
		return "none"
	}
	return fmt.Sprintf("Mode(%d)", uint8(m))
}

// A Box is the sandbox of this process. Its methods are for one goroutine, except Orphaned.
type Box struct {
	mode     Mode
	identity identity
	lifeline *os.File      // where there is a launcher: it holds the other end
	orphaned chan struct{} // likewise: closed when that end is closed

	porter *porter
	root   *sys.FD // Namespace: the file system at /
	procfd *sys.FD // /proc/self/fd
}

var errChrootTakesRoot = errors.New("sandbox chroot takes root: run as root, or with --sandbox namespace, which an ordinary user may")

// New returns the box of a process that is not started again: mode is Chroot or None.
func New(mode Mode) (*Box, error) {
	switch {
	case mode == Namespace:
		return nil, errors.New("sandbox namespace in a process that was not started for it: expected sandbox.Start")
	case mode == Chroot && os.Geteuid() != 0:
		return nil, errChrootTakesRoot
	}
	return &Box{mode: mode}, nil
}

// Orphaned returns a channel that is closed when the launcher has gone, however it ended: the daemon should end in good
// order. Close closes it as well. It is nil, and thus never ready, where there is no launcher.
func (b *Box) Orphaned() <-chan struct{} {
	return b.orphaned
}

// ProcSelfFD returns a descriptor of /proc/self/fd (O_PATH) that stays good when /proc is out of reach. It is the box's
// own, and is there from Enter to Close; -1 before.
func (b *Box) ProcSelfFD() int {
	if b.procfd == nil {
		return -1
	}
	return b.procfd.Int()
}

// Close gives up what the box holds. The sandbox stays as it is.
func (b *Box) Close() error {
	err := errors.Join(b.root.Close(), b.procfd.Close())
	if b.porter != nil {
		err = errors.Join(err, b.porter.end())
		b.porter = nil
	}
	if b.lifeline != nil {
		err = errors.Join(err, b.lifeline.Close())
		<-b.orphaned
		b.lifeline = nil
	}
	return err
}

// View is what stays within reach.
type View struct {
	Sources []Source
	Files   []string // of the host, files or directories: absolute, read-only, at the same path. They must exist.
	Network bool     // the files that name resolution and TLS need as well, those that exist
}

// Source is what is served.
type Source struct {
	Path     string // on the host; "" is a place holder and gets the path ""
	ReadOnly bool   // Namespace: mounted read-only
	File     bool   // a file is expected, and not a directory
}

// networkFiles are the files that View.Network means.
var networkFiles = []string{
	"/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl", "/etc/pki", "/usr/share/ca-certificates",
}

// open returns an O_PATH descriptor of the source.
func (s Source) open() (*sys.FD, error) {
	fd, err := unix.Open(s.Path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: s.Path, Err: err}
	}
	f := sys.NewFD(fd)
	dir, err := isDir(fd)
	switch {
	case err != nil:
		err = fmt.Errorf("inspect %s: %w", s.Path, err)
	case dir && s.File:
		err = fmt.Errorf("%s is a directory: expected a file", s.Path)
	case !dir && !s.File:
		err = fmt.Errorf("%s is not a directory: expected one to serve", s.Path)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func isDir(fd int) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	return st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}
