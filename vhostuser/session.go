// Package vhostuser is the vhost-user protocol as a back-end speaks it: one session's messages and ring states.
//
//	socket ──conn──▶ message ──handlers[request]: size, fds, feature──▶ session ──▶ Device, guestmem.Memory
//
// The session keeps what the front-end has said about each ring and tells the Device when a ring is to start or to
// stop; it never touches guest memory itself. The front-end is not trusted: nothing that it sends may panic, block for ever or leak.
package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/internal/sys"
)

// DefaultDrainTimeout is Config.DrainTimeout's when that is 0.
const DefaultDrainTimeout = 5 * time.Second

// Config is what a session needs.
type Config struct {
	Device Device           // required
	Memory *guestmem.Memory // required; its regions are the session's: they come and go with it
	Log    *slog.Logger     // nil: discard
	// DrainTimeout is how long REM_MEM_REG and SET_MEM_TABLE wait for the requests that use removed memory before they
	// report failure; 0: DefaultDrainTimeout. The memory then goes when those requests end.
	DrainTimeout time.Duration
}

// Validate says what is missing.
func (c *Config) Validate() error {
	switch {
	case c.Device == nil:
		return errors.New("vhostuser.Config has no Device")
	case c.Memory == nil:
		return errors.New("vhostuser.Config has no Memory")
	case c.DrainTimeout < 0:
		return fmt.Errorf("vhostuser.Config has a DrainTimeout of %v, expected 0 or more", c.DrainTimeout)
	}
	if n := c.Device.NumQueues(); n < 1 || n > 256 {
		return fmt.Errorf("device has %d queues, expected 1 to 256", n)
	}
	return nil
}

// Serve runs one session on conn, which it owns and closes, until the front-end disconnects at a message boundary (nil), breaks the
// protocol (*ProtocolError), the connection fails, or ctx ends (its error). When it returns every ring is stopped and disabled,
// the memory is cleared, and every descriptor received is closed: those of SetCall and SetErr by setting nil.
func Serve(ctx context.Context, conn *net.UnixConn, cfg Config) error {
	defer conn.Close()
	if err := cfg.Validate(); err != nil {
		return err
	}
	return newSession(ctx, conn, cfg).run(ctx)
}

// session is the state of one connection; only the goroutine of Serve touches it.
type session struct {
	conn         *conn
	device       Device
	memory       *guestmem.Memory
	log          *slog.Logger
	drainTimeout time.Duration
	done         <-chan struct{} // closed when the session is to end

	offered         uint64
	protocolOffered uint64
	protocol        uint64 // acknowledged protocol features
	rings           []ring
	regions         int     // in memory
	backendReq      *sys.FD // SET_BACKEND_REQ_FD: held, for it tells the front-end that we are there
	reply           []byte  // payload of the reply of a typed message
	warnings        int
}

func newSession(ctx context.Context, sock *net.UnixConn, cfg Config) *session {
	s := &session{
		conn:            newConn(sock),
		device:          cfg.Device,
		memory:          cfg.Memory,
		log:             cfg.Log,
		drainTimeout:    cfg.DrainTimeout,
		done:            ctx.Done(),
		offered:         cfg.Device.Features() | VHOST_USER_F_PROTOCOL_FEATURES,
		protocolOffered: protocolFeatures,
		rings:           make([]ring, cfg.Device.NumQueues()),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.drainTimeout == 0 {
		s.drainTimeout = DefaultDrainTimeout
	}
	if cfg.Device.ConfigSpace() != nil {
		s.protocolOffered |= VHOST_USER_PROTOCOL_F_CONFIG
	}
	return s
}

func (s *session) run(ctx context.Context) error {
	// A deadline that has passed ends the reads and writes that block, and all that follow.
	stop := context.AfterFunc(ctx, func() { _ = s.conn.sock.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	defer s.close()
	for {
		m, err := s.conn.recv()
		if err == nil {
			err = s.handle(&m)
			m.closeFDs()
		}
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return ctx.Err()
		case err == io.EOF:
			return nil
		default:
			return err
		}
	}
}

// close takes back all that the session gave to the device.
func (s *session) close() {
	s.resetRings()
	for i := range s.rings {
		s.device.SetCall(i, nil)
		s.device.SetErr(i, nil)
	}
	s.memory.Clear()
	if err := s.device.MemoryChanged(); err != nil {
		s.warn("device keeps memory after the session", "err", err)
	}
	_ = s.backendReq.Close()
}

// handle carries out and answers one message; an error ends the session.
func (s *session) handle(m *message) error {
	s.log.Debug("vhost-user message", "request", m.Request.String(), "size", m.Size, "fds", len(m.fds), "need_reply", m.Flags&FlagNeedReply != 0)
	h := &refused
	if m.Request < numRequests {
		h = &handlers[m.Request]
	}
	var err error
	typed := false
	switch {
	case h.do == nil:
		err = errors.New("it belongs to no feature that was offered")
	case h.feature&^s.protocol != 0:
		err = fmt.Errorf("it needs protocol features %#x, which were not negotiated", h.feature)
	case len(m.payload) != h.wantSize(m):
		// Not even an acknowledgement: the two sides do not mean the same message.
		return &ProtocolError{m.Request, fmt.Errorf("its payload has %d bytes, expected %d", len(m.payload), h.wantSize(m))}
	default:
		typed = h.typed
		s.reply = s.reply[:0]
		if err = h.checkFDs(m); err == nil {
			err = h.do(s, m)
		}
	}

	wanted := m.Flags&FlagNeedReply != 0 && s.protocol&VHOST_USER_PROTOCOL_F_REPLY_ACK != 0
	var device *deviceError
	switch {
	case typed && err == nil:
		return s.conn.reply(m.Request, s.reply)
	case typed, err != nil && !wanted && !errors.As(err, &device):
		// An acknowledgement would be taken for the typed reply, or none was asked for and the front-end would not know.
		return &ProtocolError{m.Request, err}
	case err != nil:
		s.warn("vhost-user request failed", "request", m.Request.String(), "err", err)
	}
	if !wanted {
		return nil
	}
	ack := uint64(0)
	if err != nil {
		ack = 1
	}
	return s.conn.reply(m.Request, Append(s.reply[:0], ack))
}

// maxWarnings is how many warnings one session may log: the front-end can cause as many as it likes.
const maxWarnings = 20

func (s *session) warn(msg string, args ...any) {
	s.warnings++
	switch {
	case s.warnings <= maxWarnings:
		s.log.Warn(msg, args...)
	case s.warnings == maxWarnings+1:
		s.log.Warn("more warnings of this vhost-user session are logged at debug level only")
		fallthrough
	default:
		s.log.Debug(msg, args...)
	}
}
