package pluginlayer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicefs/sluice/internal/ratelog"
	"github.com/sluicefs/sluice/plugin"
)

// Source starts a plug-in, or waits for it to be started again.
type Source interface {
	// Next returns this end of a new SOCK_SEQPACKET socket to the plug-in once it has been started; the one before has been closed
	// then, which is to say that this run of the plug-in is of no more use. An error is for good.
	Next(ctx context.Context) (*os.File, error)
}

// Defaults of Config.
const (
	DefaultTimeout         = 30 * time.Second
	DefaultOnDemandTimeout = 5 * time.Minute
	DefaultMaxInodes       = 1 << 20
	DefaultMaxFiles        = 4096
	DefaultMaxListed       = 1 << 18
)

// Config says which plug-in to use and how far to trust it.
type Config struct {
	// Name is what the plug-in is called in //NAME/DATA/PATH: another one is not accepted.
	Name   string
	Source Source
	// Timeout is how long the plug-in may take for an answer until the guest gets EIO; 0 is DefaultTimeout. OnDemandTimeout is how
	// long it may take to put a file into its directory; 0 is DefaultOnDemandTimeout.
	Timeout, OnDemandTimeout time.Duration
	// UID is the user that the plug-in runs as. A directory that it hands over must belong to that user, for it is read with the
	// rights of this process. 0, root's own, is not checked.
	UID uint32

	// MaxInodes is how many files the guest may know at a time, and MaxFiles how many it may have open, of one layer; one more is
	// ENFILE. MaxListed is how many names the listings of a layer's open directories may have together; one more is ENOMEM. 0 is
	// the default of each.
	MaxInodes, MaxFiles, MaxListed int
	// MaxFDs, NoFileHandles and ProcFD are passthrough's, for layers that are directories.
	MaxFDs        int
	NoFileHandles bool
	ProcFD        int
	// Log is told, at a bounded rate, when the plug-in ends and begins, and what it does wrong. nil drops that.
	Log *slog.Logger
}

// Validate says what is wrong with the configuration.
func (c *Config) Validate() error {
	switch {
	case !plugin.ValidPluginName(c.Name):
		return fmt.Errorf("layer plug-in %q: expected a name of 1 to 64 letters, digits, '.', '_' and '-'", c.Name)
	case c.Source == nil:
		return fmt.Errorf("layer plug-in %s without a Source", c.Name)
	case c.Timeout < 0 || c.OnDemandTimeout < 0 || c.MaxInodes < 0 || c.MaxFiles < 0 || c.MaxListed < 0:
		return fmt.Errorf("layer plug-in %s with a negative limit: give a positive one, or 0 for the default", c.Name)
	}
	return nil
}

// Conn is a plug-in in use. When it ends, its layers answer EIO, but for files that the guest has open already; when it has been
// started again, its layers are loaded again.
type Conn struct {
	cfg    Config
	log    *ratelog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
	starts atomic.Uint64

	mu      sync.Mutex // held while layers are loaded or ended: by no call of a guest's
	current *link      // nil: there is none
	layers  map[layerKey]*layer
	last    uint32
}

// Dial greets the plug-in that cfg.Source gives first, as long as ctx lasts.
func Dial(ctx context.Context, cfg Config) (*Conn, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.Timeout = cmp.Or(cfg.Timeout, DefaultTimeout)
	cfg.OnDemandTimeout = cmp.Or(cfg.OnDemandTimeout, DefaultOnDemandTimeout)
	cfg.MaxInodes = cmp.Or(cfg.MaxInodes, DefaultMaxInodes)
	cfg.MaxFiles = cmp.Or(cfg.MaxFiles, DefaultMaxFiles)
	cfg.MaxListed = cmp.Or(cfg.MaxListed, DefaultMaxListed)
	c := &Conn{cfg: cfg, log: ratelog.New(cfg.Log, time.Second, 5), done: make(chan struct{}), layers: make(map[layerKey]*layer)}
	first, err := c.next(ctx)
	if err != nil {
		return nil, fmt.Errorf("layer plug-in %s: %w", cfg.Name, err)
	}
	c.current = first
	c.ctx, c.cancel = context.WithCancel(context.Background())
	go c.run(first)
	return c, nil
}

// errSource is an error of a Source, which is for good.
var errSource = errors.New("it is not started any more")

// next waits for a run of the plug-in and greets it.
func (c *Conn) next(ctx context.Context) (*link, error) {
	f, err := c.cfg.Source.Next(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errSource, err)
	}
	conn, err := plugin.NewConn(f)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	hello, err := conn.Greet(ctx, &plugin.Hello{Proto: plugin.Proto, Name: "sluice", MaxRequests: plugin.MaxRequests})
	if err == nil && hello.Name != c.cfg.Name {
		err = fmt.Errorf("the program calls itself %s, expected %s", hello.Name, c.cfg.Name)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	c.starts.Add(1)
	return newLink(conn, hello), nil
}

// Starts returns how many runs of the plug-in have been greeted.
func (c *Conn) Starts() uint64 { return c.starts.Load() }

// How long to wait after a run of the plug-in that was of no use, or ended soon; it grows from the first to the second. A run that has
// lasted as long as the second was of use.
const (
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
)

// run keeps the plug-in in use until Close, or until its Source has no more.
func (c *Conn) run(l *link) {
	defer close(c.done)
	pause := firstPause
	for {
		if c.attend(l) >= maxPause {
			pause = firstPause
		} else {
			select {
			case <-time.After(pause):
			case <-c.ctx.Done():
			}
			pause = min(2*pause, maxPause)
		}
		if c.ctx.Err() != nil {
			return
		}
		var err error
		if l, err = c.next(c.ctx); err == nil {
			c.adopt(l)
			c.log.Warn("layer plug-in is in use again", "plugin", c.cfg.Name)
		} else if c.ctx.Err() == nil {
			c.log.Error("layer plug-in cannot be used", "plugin", c.cfg.Name, "error", err)
			if errors.Is(err, errSource) {
				return
			}
		}
	}
}

// attend returns how long l has lasted when it has ended, or Close ends it. A nil one has not been.
func (c *Conn) attend(l *link) time.Duration {
	if l == nil {
		return 0
	}
	began := time.Now()
	select {
	case <-l.dead:
		c.log.Warn("layer plug-in has ended: its layers answer EIO until it is started again", "plugin", c.cfg.Name, "error", l.err)
	case <-c.ctx.Done():
	}
	c.drop(l)
	return time.Since(began)
}

// drop ends l, and its being in use.
func (c *Conn) drop(l *link) {
	c.mu.Lock()
	c.current = nil
	c.mu.Unlock()
	l.close()
}

// adopt takes l into use: all layers are loaded again.
func (c *Conn) adopt(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, layer := range c.layers {
		if err := layer.load(l, wait{c.ctx.Done(), c.cfg.Timeout}); err != nil {
			c.log.Error("layer cannot be used since its plug-in was started again", "layer", layer.text, "error", err)
		}
	}
	c.current = l
}

// Close asks the plug-in to end, and hangs up. Backends of its layers answer EIO from here on.
func (c *Conn) Close() error {
	c.mu.Lock()
	l := c.current
	c.mu.Unlock()
	if l != nil {
		l.call(plugin.Request{Op: plugin.OpRelease}, wait{limit: min(c.cfg.Timeout, maxPause)})
	}
	c.cancel()
	<-c.done
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, layer := range c.layers {
		_ = layer.dir.Close()
	}
	return nil
}
