package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/listen"
	"github.com/sluicefs/sluice/internal/ratelog"
)

// UnixListener is a Unix socket on which everything may be done.
type UnixListener struct {
	// Path is where; it is locked by PATH.pid, and a socket that a dead daemon left behind is replaced.
	Path string
	// Group names a group that may connect beside the daemon's user; "" is none.
	Group string
}

// VsockListener is a port of AF_VSOCK, on which guests may do what is allowed.
type VsockListener struct {
	Port uint32
	// Allow has the CIDs of the guests in it; those that are nowhere are refused.
	Allow Allow
}

func (l *VsockListener) validate() error {
	if l.Port == 0 || l.Port == math.MaxUint32 {
		return errors.New("expected a port from 1 to 4294967294")
	}
	if len(l.Allow.CIDs) == 0 {
		return fmt.Errorf("no guest is allowed: expected the CIDs of some, or %d for all", uint32(AnyCID))
	}
	return l.Allow.validate()
}

// HybridListener is a port of the vsock device of Cloud Hypervisor or Firecracker: they forward a guest's connection to port P
// of the host to the Unix socket PATH_P.
type HybridListener struct {
	// Path is that of the VMM's own socket.
	Path string
	Port uint32
	// Group names a group that may connect, if the VMM is not of the daemon's user.
	Group string
	Allow Allow
}

func (l *HybridListener) validate() error {
	switch {
	case l.Path == "":
		return errors.New("expected the path of the VMM's vsock socket")
	case l.Port == 0 || l.Port == math.MaxUint32:
		return errors.New("expected a port from 1 to 4294967294")
	case len(l.Allow.CIDs) > 0:
		return errors.New("CIDs are for vsock: there is one guest behind a VMM's socket")
	}
	return l.Allow.validate()
}

// Listener is any listener.
type Listener struct {
	net.Listener
	// Allow is nil if everything may be done. Otherwise the first holds that has the CID of the other end, where the connections
	// have a *vsock.Addr, and the first that has no CIDs where they do not. Who has none is refused.
	Allow []Allow
}

// open opens the listeners of the configuration.
func (s *Server) open() error {
	if u := s.cfg.Unix; u.Path != "" {
		l, err := listenUnix(u.Path, u.Group, s.log)
		if err != nil {
			return fmt.Errorf("open the control socket: %w", err)
		}
		s.add("unix", l, nil)
	}
	var ports []uint32
	for _, v := range s.cfg.Vsock {
		if !slices.Contains(ports, v.Port) {
			ports = append(ports, v.Port)
		}
	}
	for _, port := range ports {
		var allow []Allow
		for _, v := range s.cfg.Vsock {
			if v.Port == port {
				allow = append(allow, v.Allow)
			}
		}
		l, err := vsock.Listen(port, nil)
		if err != nil {
			return fmt.Errorf("listen on vsock port %d: %w", port, err)
		}
		s.add("vsock:"+strconv.FormatUint(uint64(port), 10), l, allow)
	}
	for _, h := range s.cfg.Hybrid {
		path := h.Path + "_" + strconv.FormatUint(uint64(h.Port), 10)
		l, err := listenUnix(path, h.Group, nil)
		if err != nil {
			return fmt.Errorf("open the vsock socket of a VMM: %w", err)
		}
		s.add("hybrid:"+path, l, []Allow{h.Allow})
	}
	for _, l := range s.cfg.Listeners {
		s.add(l.Addr().Network()+":"+l.Addr().String(), l.Listener, l.Allow)
	}
	return nil
}

// add has l served.
func (s *Server) add(name string, l net.Listener, allow []Allow) {
	out := &listener{
		Listener: l, name: name, own: s.own,
		log: ratelog.New(s.log.With("listener", name), logEvery, logBurst),
		max: s.limits.host, maxEach: s.limits.host,
		open: make(map[uint32]int), closed: sync.OnceValue(l.Close),
	}
	if allow == nil {
		out.operator = &peer{log: out.log}
	} else {
		out.max, out.maxEach = s.limits.guests, s.limits.eachGuest
	}
	for i := range allow {
		out.guests = append(out.guests, &peer{
			allow: &allow[i],
			log:   ratelog.New(s.log.With("listener", name, "cids", allow[i].CIDs), logEvery, logBurst),
		})
	}
	s.listeners = append(s.listeners, out)
}

// A listener hands out the connections of those that may connect, and no more than it has room for: who floods one listener
// keeps nobody from another, and one guest no other guest.
type listener struct {
	net.Listener
	name     string
	own      *ownMetrics
	log      *ratelog.Logger
	operator *peer   // nil if it is for guests
	guests   []*peer // in the order of Listener.Allow
	max      int     // connections
	maxEach  int     // connections of one CID
	closed   func() error

	mu   sync.Mutex
	all  int
	open map[uint32]int // by CID, 0 for none
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			// net/http waits and goes on when descriptors run out, but does not look into errors for that.
			if ne := net.Error(nil); errors.As(err, &ne) {
				err = ne
			}
			return nil, err
		}
		id, hasID := cid(c)
		p := l.peer(id, hasID)
		if p == nil {
			l.own.refused.WithLabelValues(l.name).Inc()
			l.log.Warn("refused a connection to the control API: the guest may not connect", "peer", c.RemoteAddr())
			_ = c.Close()
			continue
		}
		if !l.take(id) {
			l.own.refused.WithLabelValues(l.name).Inc()
			l.log.Warn("refused a connection to the control API: there are too many", "peer", c.RemoteAddr())
			refuse(c)
			continue
		}
		return &conn{Conn: c, peer: p, release: sync.OnceFunc(func() { l.give(id) })}, nil
	}
}

// Close implements net.Listener. Closing again does nothing, and returns what closing did.
func (l *listener) Close() error { return l.closed() }

// peer returns who connects, nil if that may not be.
func (l *listener) peer(id uint32, hasID bool) *peer {
	if l.operator != nil {
		return l.operator
	}
	for _, p := range l.guests {
		cids := p.allow.CIDs
		if hasID && (slices.Contains(cids, id) || slices.Contains(cids, AnyCID)) || !hasID && len(cids) == 0 {
			return p
		}
	}
	return nil
}

// take counts a connection in, if there is room.
func (l *listener) take(id uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == l.max || l.open[id] == l.maxEach {
		return false
	}
	l.all++
	l.open[id]++
	l.own.connections.WithLabelValues(l.name).Inc()
	return true
}

// give counts it out.
func (l *listener) give(id uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.open[id]--; l.open[id] == 0 {
		delete(l.open, id)
	}
	l.own.connections.WithLabelValues(l.name).Dec()
}

// refusal is an answer for who is not even asked what they want.
var refusal = func() []byte {
	const body = `{"code":"unavailable","message":"too many connections: close some, or wait"}` + "\n"
	return []byte("HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n" +
		"Content-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body)
}()

// refuse closes c, with an answer if there is room for it: nobody waits for who has no room.
func refuse(c net.Conn) {
	if sc, ok := c.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			_ = raw.Write(func(fd uintptr) bool {
				_, _ = unix.SendmsgN(int(fd), refusal, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
				return true
			})
		}
	}
	_ = c.Close()
}

// A conn is a connection that is counted.
type conn struct {
	net.Conn
	peer    *peer
	release func()
}

// Close implements net.Conn.
func (c *conn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// A unixListener is a listen.Listener as a net.Listener.
type unixListener struct {
	*listen.Listener
	addr *net.UnixAddr
	log  *slog.Logger // told who connects; may be nil
}

func listenUnix(path, group string, log *slog.Logger) (*unixListener, error) {
	l, err := listen.Path(path, group)
	if err != nil {
		return nil, err
	}
	return &unixListener{l, &net.UnixAddr{Net: "unix", Name: path}, log}, nil
}

// Accept implements net.Listener.
func (u *unixListener) Accept() (net.Conn, error) {
	c, err := u.Listener.Accept(context.Background())
	if err != nil {
		return nil, err
	}
	if u.log != nil && u.log.Enabled(context.Background(), slog.LevelDebug) {
		u.logPeer(c)
	}
	return c, nil
}

// logPeer says which process connects.
func (u *unixListener) logPeer(c *net.UnixConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			u.log.Debug("connection to the control API", "pid", cred.Pid, "uid", cred.Uid, "gid", cred.Gid)
		}
	})
}

// Addr implements net.Listener.
func (u *unixListener) Addr() net.Addr { return u.addr }

func join(names []string) string { return strings.Join(names, ", ") }
