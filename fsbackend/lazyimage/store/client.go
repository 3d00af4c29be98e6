package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/ratelog"
)

const (
	// DefaultTimeout is ClientConfig.Timeout's.
	DefaultTimeout = 45 * time.Second

	maxAsked = 64   // requests of a client that wait for their answers
	maxNotes = 4096 // notes of a client that have not been sent
	maxTries = 2    // how often a request is sent
	minLife  = time.Second
	minPause = minLife / 10
	maxPause = 5 * time.Second
)

// ClientConfig says where a Client's fetcher is.
type ClientConfig struct {
	// Line is where sessions come from. It is needed.
	Line Line
	// Timeout is how long Chunk and Status wait for an answer, sessions that are yet to come included. It is above the fetcher's own
	// limits, and below that of the guest's requests. 0 is DefaultTimeout.
	Timeout time.Duration
	// Log is told, at a bounded rate, what is wrong with the fetcher; nil is nowhere.
	Log *slog.Logger
}

// Client is an image that a fetcher has open, in the process that serves it. It takes nothing for granted of what the fetcher
// says but that contents are what they should be: that it has verified.
type Client struct {
	cfg   ClientConfig
	log   *ratelog.Logger
	ctx   context.Context // ends with the Client
	end   context.CancelFunc
	tasks sync.WaitGroup
	slots chan struct{} // has an element for each request
	notes chan note

	mu      sync.Mutex
	conn    *conn // nil between two sessions
	dead    bool  // there will never be one again
	changed sync.Cond
	last    uint64 // id
	waiting map[uint64]*request
}

type note struct {
	layer int
	path  string
}

// request is one that waits for its answer.
type request struct {
	header header
	tries  int         // how often it has been sent; under Client.mu
	done   chan answer // takes one
}

type answer struct {
	body []byte
	file *os.File
	err  error
}

// NewClient makes a client of the fetcher at the other end of cfg.Line.
func NewClient(cfg ClientConfig) *Client { return newClient(cfg, minPause) }

func newClient(cfg ClientConfig, minPause time.Duration) *Client {
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	c := &Client{
		cfg: cfg, log: ratelog.New(cfg.Log, 10*time.Second, 5),
		slots: make(chan struct{}, maxAsked), notes: make(chan note, maxNotes),
		waiting: make(map[uint64]*request),
	}
	c.changed.L = &c.mu
	c.ctx, c.end = context.WithCancel(context.Background())
	c.tasks.Go(func() { c.sessions(minPause) })
	c.tasks.Go(c.sendNotes)
	return c
}

// Close implements Store. Calls under way end.
func (c *Client) Close() error {
	c.end()
	c.mu.Lock()
	if c.conn != nil {
		c.conn.close()
	}
	c.changed.Broadcast()
	c.mu.Unlock()
	c.tasks.Wait()
	return nil
}

// sessions takes one session after the other.
func (c *Client) sessions(minPause time.Duration) {
	pause := time.Duration(0)
	for {
		f, err := c.cfg.Line.Next(c.ctx)
		if err != nil {
			if c.ctx.Err() == nil {
				c.log.Error("the image's fetcher is gone for good", "error", err)
			}
			c.over()
			return
		}
		began := time.Now()
		if err := c.session(f); err != nil && c.ctx.Err() == nil {
			c.log.Warn("session with the image's fetcher broken off", "error", err)
		}
		// One that ends as soon as it has begun must not keep us, and the one who starts it, busy.
		if pause = min(2*pause+minPause, maxPause); time.Since(began) > minLife {
			pause = 0
		}
		select {
		case <-c.ctx.Done():
		case <-time.After(pause):
		}
	}
}

// over ends all that waits, and all that is yet to come.
func (c *Client) over() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = true
	c.changed.Broadcast()
	for id, r := range c.waiting {
		r.done <- answer{err: ErrUnavailable}
		delete(c.waiting, id)
	}
}

// session is one session from its begin to its end. What was asked before is asked again.
func (c *Client) session(f *os.File) error {
	conn, err := newConn(f)
	if err != nil {
		return err
	}
	defer conn.close()
	c.mu.Lock()
	if c.ctx.Err() != nil {
		c.mu.Unlock()
		return c.ctx.Err()
	}
	c.conn = conn
	var again []header
	for _, r := range c.waiting {
		r.tries++
		again = append(again, r.header)
	}
	c.changed.Broadcast()
	c.mu.Unlock()
	slices.SortFunc(again, func(a, b header) int { return int(a.id) - int(b.id) })
	for _, h := range again {
		if err = conn.send(h.append(nil), -1); err != nil {
			break
		}
	}
	for err == nil {
		err = c.receive(conn)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = nil
	for id, r := range c.waiting {
		if r.tries >= maxTries {
			r.done <- answer{err: ErrUnavailable}
			delete(c.waiting, id)
		}
	}
	if err == io.EOF || errors.Is(err, unix.EPIPE) {
		return nil
	}
	return err
}

// receive takes one answer.
func (c *Client) receive(conn *conn) error {
	buf := make([]byte, maxMessage) // an answer keeps what is in it
	b, file, lost, err := conn.receive(buf, true)
	if err != nil {
		return err
	}
	var h header
	a := answer{file: file}
	if a.body, err = h.parse(b); err != nil {
		a.drop()
		return err
	}
	c.mu.Lock()
	r := c.waiting[h.id]
	delete(c.waiting, h.id)
	c.mu.Unlock()
	if r == nil { // nobody waits for it any more
		a.drop()
		return nil
	}
	switch err = c.check(&a, h, r.header, lost); {
	case a.err != nil || err != nil:
		a.drop()
	}
	if err != nil {
		a.err = ErrUnavailable
	}
	r.done <- a
	return err
}

// check sets a.err to what h says, and returns an error if that is not an answer to asked.
func (c *Client) check(a *answer, h, asked header, lost bool) error {
	if h.op != asked.op || h.layer != asked.layer || h.index != asked.index {
		return fmt.Errorf("an answer to operation %d, layer %d, index %d: expected one to %d, %d, %d", h.op, h.layer, h.index, asked.op, asked.layer, asked.index)
	}
	withFile := h.status == statusOK && (h.op == opLayers || h.op == opChunk)
	switch {
	case lost:
		c.log.Error("a chunk is lost: the limit of open files is reached", "hint", "raise the limit, or lower the graft's max-fds")
		a.err = ErrUnavailable
	case withFile != (a.file != nil):
		return fmt.Errorf("an answer to operation %d with status %d, with a descriptor: %v", h.op, h.status, a.file != nil)
	case h.status == statusOK && (h.op == opStatus) != (len(a.body) >= statusSize), len(a.body) > statusSize+maxText:
		return fmt.Errorf("an answer to operation %d with %d bytes", h.op, len(a.body))
	case h.status == statusUnavailable:
		a.err = ErrUnavailable
	case h.status == statusCorrupt:
		a.err = ErrCorrupt
	case h.status == statusFailed:
		a.err = errors.New(plain(string(a.body)))
	}
	return nil
}

func (a *answer) drop() {
	if a.file != nil {
		_ = a.file.Close()
		a.file = nil
	}
}

// ask asks and waits for the answer, at most for limit unless that is 0.
func (c *Client) ask(ctx context.Context, op uint8, layer int, index uint32, limit time.Duration) (answer, error) {
	if layer < 0 || layer >= MaxLayers {
		return answer{}, fmt.Errorf("layer %d: expected 0 to %d", layer, MaxLayers-1)
	}
	var late <-chan time.Time
	if limit > 0 {
		t := time.NewTimer(limit)
		defer t.Stop()
		late = t.C
	}
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return answer{}, ctx.Err()
	case <-late:
		return answer{}, ErrUnavailable
	case <-c.ctx.Done():
		return answer{}, ErrUnavailable
	}
	r := &request{header: header{op: op, layer: uint32(layer), index: index}, done: make(chan answer, 1)}
	if !c.begin(r) {
		return answer{}, ErrUnavailable
	}
	select {
	case a := <-r.done:
		return a, a.err
	case <-ctx.Done():
		return c.giveUp(r, ctx.Err())
	case <-late:
		return c.giveUp(r, ErrUnavailable)
	case <-c.ctx.Done():
		return c.giveUp(r, ErrUnavailable)
	}
}

// begin sends r, now or as soon as there is a session.
func (c *Client) begin(r *request) bool {
	c.mu.Lock()
	if c.dead || c.ctx.Err() != nil {
		c.mu.Unlock()
		return false
	}
	c.last++
	r.header.id = c.last
	c.waiting[c.last] = r
	conn := c.conn
	if conn != nil {
		r.tries++
	}
	c.mu.Unlock()
	if conn != nil && conn.send(r.header.append(nil), -1) != nil {
		conn.close() // its reader tidies up
	}
	return true
}

// giveUp has nobody wait for r any more: with err, unless the answer has come just now.
func (c *Client) giveUp(r *request, err error) (answer, error) {
	c.mu.Lock()
	_, pending := c.waiting[r.header.id]
	delete(c.waiting, r.header.id)
	conn := c.conn
	c.mu.Unlock()
	if !pending {
		a := <-r.done
		return a, a.err
	}
	if conn != nil {
		h := header{op: opCancel, id: r.header.id}
		if conn.send(h.append(nil), -1) != nil {
			conn.close()
		}
	}
	return answer{}, err
}

// Layers implements Store.
func (c *Client) Layers(ctx context.Context) ([]Layer, error) {
	a, err := c.ask(ctx, opLayers, 0, 0, 0)
	if err != nil {
		return nil, fmt.Errorf("ask for the image's layers: %w", err)
	}
	defer a.file.Close()
	n, err := regular(a.file)
	if err != nil || n > MaxMeta {
		return nil, fmt.Errorf("take the image's description of %d bytes: expected a file of at most %d: %w", n, MaxMeta, err)
	}
	b := make([]byte, n)
	if _, err := a.file.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("read the image's description: %w", err)
	}
	return DecodeMeta(b)
}

// regular returns the size of f, which is an error unless it is a regular file: reading anything else might never end.
func regular(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() {
		return 0, fmt.Errorf("it is no regular file but %v", info.Mode())
	}
	return info.Size(), nil
}

// Chunk implements Store.
func (c *Client) Chunk(ctx context.Context, layer int, index uint32) (*os.File, error) {
	a, err := c.ask(ctx, opChunk, layer, index, c.cfg.Timeout)
	if err != nil {
		if err != ErrCorrupt && ctx.Err() == nil {
			err = ErrUnavailable
		}
		return nil, err
	}
	if _, err := regular(a.file); err != nil {
		a.drop()
		c.log.Error("the image's fetcher has sent a chunk that is none", "error", err)
		return nil, ErrUnavailable
	}
	return a.file, nil
}

// Status implements Store.
func (c *Client) Status(ctx context.Context, layer int) (Status, error) {
	a, err := c.ask(ctx, opStatus, layer, 0, c.cfg.Timeout)
	if err != nil {
		return Status{}, err
	}
	var n [statusSize / 8]int64
	for i := range n {
		n[i] = max(int64(le.Uint64(a.body[8*i:])), 0)
	}
	return Status{Size: n[0], Fetched: n[1], Requests: n[2], Bytes: n[3], Err: plain(string(a.body[statusSize:]))}, nil
}

// Prefetched implements Store.
func (c *Client) Prefetched(ctx context.Context) error {
	_, err := c.ask(ctx, opPrefetched, 0, 0, 0)
	return err
}

// Reach implements Store.
func (c *Client) Reach(ctx context.Context) error {
	_, err := c.ask(ctx, opReach, 0, 0, c.cfg.Timeout)
	return err
}

// Note implements Store. It does not wait: what there is no room for is not noted.
func (c *Client) Note(layer int, path string) {
	select {
	case c.notes <- note{layer, path}:
	default:
	}
}

// sendNotes passes the notes on, each once there is a session.
func (c *Client) sendNotes() {
	for {
		var n note
		select {
		case n = <-c.notes:
		case <-c.ctx.Done():
			return
		}
		h := header{op: opNote, layer: uint32(n.layer)}
		message := append(h.append(nil), n.path...)
		for {
			conn := c.wait()
			if conn == nil {
				return
			}
			if conn.send(message, -1) == nil {
				break
			}
			conn.close()
		}
	}
}

// wait returns a session that has not ended, nil if there will never be one again.
func (c *Client) wait() *conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.dead || c.ctx.Err() != nil:
			return nil
		case c.conn != nil && !c.conn.isClosed():
			return c.conn
		}
		c.changed.Wait()
	}
}
