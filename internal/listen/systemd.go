package listen

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
)

// firstSystemdFD is SD_LISTEN_FDS_START of sd_listen_fds(3).
const firstSystemdFD = 3

// FromSystemd returns the descriptor that systemd passed to this process, and whether it passed any (sd_listen_fds(3)).
func FromSystemd(getenv func(string) string) (fd int, ok bool, err error) {
	// Both are inherited by children that the sockets are not meant for.
	if getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return 0, false, nil
	}
	switch n := getenv("LISTEN_FDS"); n {
	case "", "0":
		return 0, false, nil
	case "1":
		return firstSystemdFD, true, nil
	default:
		return 0, false, fmt.Errorf("systemd passed LISTEN_FDS=%s sockets; expected 1", n)
	}
}

// Notifier is a connection to the service manager, to be made before its socket is out of reach.
type Notifier struct{ conn *net.UnixConn }

// DialNotify connects to the service manager's socket (sd_notify(3)), if there is one. The Notifier of none is nil, and its
// methods do nothing.
func DialNotify(getenv func(string) string) (*Notifier, error) {
	path := getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil, nil
	}
	if path[0] != '/' && path[0] != '@' {
		return nil, errors.New("notify the service manager: NOTIFY_SOCKET is neither a path nor an abstract address")
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		return nil, fmt.Errorf("notify the service manager: %w", err)
	}
	return &Notifier{conn}, nil
}

// Ready tells that the socket can be connected to.
func (n *Notifier) Ready() error {
	if n == nil {
		return nil
	}
	if _, err := n.conn.Write([]byte("READY=1")); err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	return nil
}

// Close closes the connection.
func (n *Notifier) Close() error {
	if n == nil {
		return nil
	}
	return n.conn.Close()
}
