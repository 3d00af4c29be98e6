package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/ratelog"
)

// limits are what a client gets of the server, however it behaves.
type limits struct {
	header time.Duration // for the header of a request
	read   time.Duration // for header and body
	idle   time.Duration // between requests
	write  time.Duration // for the answer's being made and read
	end    time.Duration // for what was begun when the server ends
	health time.Duration // for the daemon to say that it is well
	event  time.Duration // for what a client of a stream is written at once
	// look, change and work are for what an operation does in the daemon.
	look, change, work time.Duration

	maxHeader int // bytes
	host      int // connections of a listener for operators
	guests    int // connections of a listener for guests
	eachGuest int // connections of one of them
}

var defaultLimits = limits{
	header: 5 * time.Second,
	read:   15 * time.Second,
	idle:   time.Minute,
	write:  40 * time.Second,
	end:    5 * time.Second,
	health: 2 * time.Second,
	event:  10 * time.Second,
	look:   10 * time.Second,
	change: 30 * time.Second, // after which Kata's client of nydusd gives up, too
	work:   time.Hour,

	maxHeader: 16 << 10,
	host:      256,
	guests:    64,
	eachGuest: 8,
}

// What the log gets of what others can cause, by listener.
const (
	logEvery = 10 * time.Second
	logBurst = 10
)

// Config describes a Server.
type Config struct {
	// Daemon is what is controlled.
	Daemon Daemon
	// Log may be nil.
	Log *slog.Logger

	// Unix is the operator's socket; with an empty Path there is none.
	Unix UnixListener
	// Vsock and Hybrid are for guests. Several of Vsock may have one port, for different guests.
	Vsock  []VsockListener
	Hybrid []HybridListener
	// Listeners are others, that somebody else has opened. The Server closes them.
	Listeners []Listener

	// NydusShare is the tag of the share that nydusd's API acts on if a request does not say; "" is the only one there is.
	NydusShare string
}

// Validate says what is wrong, before anything is opened.
func (c *Config) Validate() error {
	if c.Daemon == nil {
		return errors.New("control: there is no Daemon")
	}
	if c.NydusShare != "" {
		if err := api.CheckTag(c.NydusShare); err != nil {
			return fmt.Errorf("share of nydusd's API: %w", err)
		}
	}
	type guest struct{ port, cid uint32 }
	guests := make(map[guest]bool)
	for _, l := range c.Vsock {
		if err := l.validate(); err != nil {
			return fmt.Errorf("vsock port %d: %w", l.Port, err)
		}
		for _, id := range l.Allow.CIDs {
			if guests[guest{l.Port, id}] {
				return fmt.Errorf("vsock port %d: guest %d is there twice: expected one list of what it may do", l.Port, id)
			}
			guests[guest{l.Port, id}] = true
		}
	}
	for _, l := range c.Hybrid {
		if err := l.validate(); err != nil {
			return fmt.Errorf("vsock of %s, port %d: %w", l.Path, l.Port, err)
		}
	}
	for i, l := range c.Listeners {
		if l.Listener == nil {
			return fmt.Errorf("control: listener %d is nil", i)
		}
		for j := range l.Allow {
			if err := l.Allow[j].validate(); err != nil {
				return fmt.Errorf("listener %v: %w", l.Addr(), err)
			}
		}
	}
	return nil
}

// Server answers the control API's requests.
type Server struct {
	cfg       Config
	limits    limits
	log       *slog.Logger
	http      *http.Server
	fresh     fresh
	listeners []*listener
	own       *ownMetrics
	health    health

	// ending is done when streams have to end, base when everything has.
	ending    context.Context
	endSoon   context.CancelFunc
	base      context.Context
	endBase   context.CancelFunc
	closeOnce sync.Once
	closeErr  error
}

// A peer is what is known of the other end of connections.
type peer struct {
	allow *Allow          // nil for the operator
	log   *ratelog.Logger // of its own, so that one cannot use up what another would have to say
}

// New opens the listeners. Clients can connect from then on, and are answered once Serve runs.
func New(cfg Config) (*Server, error) { return newServer(cfg, defaultLimits) }

func newServer(cfg Config, lim limits) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, limits: lim, log: cfg.Log, own: newOwnMetrics(), fresh: fresh{conns: make(map[net.Conn]struct{})}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.ending, s.endSoon = context.WithCancel(context.Background())
	s.base, s.endBase = context.WithCancel(context.Background())
	s.http = &http.Server{
		Handler:                      http.HandlerFunc(s.handle),
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            lim.header,
		ReadTimeout:                  lim.read,
		WriteTimeout:                 lim.write,
		IdleTimeout:                  lim.idle,
		MaxHeaderBytes:               lim.maxHeader,
		ErrorLog:                     slog.NewLogLogger(limitedHandler{ratelog.New(s.log, logEvery, logBurst)}, slog.LevelWarn),
		ConnState:                    s.fresh.note,
		BaseContext:                  func(net.Listener) context.Context { return s.base },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, c.(*conn).peer)
		},
	}
	if err := s.open(); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// Serve answers until ctx is done, Close is called or a listener fails, and returns when what was begun has been answered, or
// cannot be in time. It may be called once.
func (s *Server) Serve(ctx context.Context) error {
	failed := make(chan error, len(s.listeners))
	for _, l := range s.listeners {
		go func() { failed <- s.http.Serve(l) }()
	}
	var err error
	running := len(s.listeners)
	select {
	case <-ctx.Done():
	case err = <-failed:
		running--
	}

	s.endSoon()
	s.fresh.end()
	patience, cancel := context.WithTimeout(context.Background(), s.limits.end)
	defer cancel()
	if s.http.Shutdown(patience) != nil {
		s.log.Warn("the control API ended before some requests did")
	}
	closeErr := s.Close()
	for range running {
		<-failed
	}
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("serve the control API: %w", err)
	}
	return errors.Join(err, closeErr)
}

// Close ends everything at once and removes the sockets. Closing again does nothing.
func (s *Server) Close() error {
	s.closeOnce.Do(func() {
		s.endSoon()
		s.endBase()
		errs := []error{s.http.Close()}
		for _, l := range s.listeners {
			errs = append(errs, l.Close())
		}
		s.closeErr = errors.Join(slices.DeleteFunc(errs, func(err error) bool { return errors.Is(err, net.ErrClosed) })...)
	})
	return s.closeErr
}

// of returns how long a kind of operation may take, 0 for ever.
func (l *limits) of(k kind) time.Duration {
	switch k {
	case look:
		return l.look
	case change:
		return l.change
	case work:
		return l.work
	}
	return 0
}

type peerKey struct{}

// handle answers one request.
func (s *Server) handle(w http.ResponseWriter, r *http.Request) {
	rec := &recorder{ResponseWriter: w}
	c := &call{Request: r, server: s, w: rec, peer: r.Context().Value(peerKey{}).(*peer)}
	rt, tag, methods := find(r.Method, r.URL.EscapedPath())
	c.tag = tag
	defer func() {
		s.own.countRequest(rt, rec.status)
		p := recover()
		if p == nil {
			return
		}
		if p == http.ErrAbortHandler || rec.status != 0 {
			panic(http.ErrAbortHandler) // half an answer must not look like a whole one
		}
		c.peer.log.Error("a request to the control API panicked", "operation", r.Method+" "+r.URL.Path, "panic", p, "stack", string(debug.Stack()))
		c.replyError(api.Errorf(api.CodeInternal, "the daemon panicked: see its log"))
	}()
	if err := c.readBody(); err != nil {
		c.replyError(err)
		return
	}
	switch {
	case rt == nil && len(methods) == 0:
		c.replyError(&api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("no path %q", r.URL.Path), Hint: "see GET /v1/openapi.yaml for those there are"})
		return
	case rt == nil:
		w.Header()["Allow"] = []string{join(methods)}
		_ = c.reply(http.StatusMethodNotAllowed, api.Errorf(api.CodeInvalid, "no %s of %s: expected %s", r.Method, r.URL.Path, join(methods)))
		return
	case !c.allow().operation(rt.operation):
		c.replyError(&api.Error{Code: api.CodeForbidden, Message: rt.operation + " is not allowed here", Hint: "the host's operator can allow it by this name"})
		return
	}
	if limit := s.limits.of(rt.kind); limit > 0 {
		ctx, cancel := context.WithTimeout(r.Context(), limit)
		defer cancel()
		c.Request = r.WithContext(ctx)
	}
	if rt.kind == work {
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.limits.work + s.limits.write))
	}
	if err := rt.handle(c); err != nil {
		c.replyError(err)
	}
}

// A recorder notes the status of an answer.
type recorder struct {
	http.ResponseWriter
	status int // 0 until there is one
}

// WriteHeader implements http.ResponseWriter.
func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(p)
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// A limitedHandler is a slog.Handler of a ratelog.Logger, for net/http, which logs what clients do.
type limitedHandler struct{ log *ratelog.Logger }

func (limitedHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h limitedHandler) Handle(_ context.Context, r slog.Record) error {
	h.log.Warn(r.Message)
	return nil
}

func (h limitedHandler) WithAttrs([]slog.Attr) slog.Handler { return h }

func (h limitedHandler) WithGroup(string) slog.Handler { return h }
