// Package lazyimage serves a container image whose contents are fetched when they are read: its layers merged into one tree, as an
// image's root file system, or one layer as it is, for an overlay. The tree never changes.
//
// Names and attributes come whole when the backend is opened, and stay in memory in arrays without pointers (tree.go), built by
// build.go. Contents are chunks, whose descriptors come from the fetcher (package store) and are kept in a bounded cache (chunks.go);
// a READ goes from their page cache straight into the guest's memory.
package lazyimage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/internal/ratelog"
)

// Opaque is what marks a directory of a single layer that hides those beneath it in an overlay.
type Opaque int

// Kinds of marks.
const (
	OpaqueAll     Opaque = iota // both
	OpaqueTrusted               // trusted.overlay.opaque, which Linux's overlayfs reads
	OpaqueUser                  // user.overlay.opaque, which it reads if mounted with userxattr
)

const (
	defaultMaxFDs    = 1024
	defaultMaxInodes = 4 << 20
	defaultMaxOpen   = 1 << 20
)

// Config says what to serve.
type Config struct {
	// Store is the image. It is needed, and Close closes it.
	Store store.Store
	// Merge has all layers served as one tree, with what they hide of each other gone. Otherwise it is the one layer of number Layer, with
	// whiteouts as devices 0:0, and opaque directories with an extended attribute that says so.
	Merge bool
	Layer int
	// Opaque is how a single layer says that a directory is opaque.
	Opaque Opaque
	// MaxFDs is how many descriptors of chunks are kept open; calls that run may hold some more for their time. 0 is 1024.
	MaxFDs int
	// MaxInodes is how large a tree may be; a larger one is an error of New. 0 is 4194304.
	MaxInodes int
	// MaxOpen is how many files and directories the guest may have open; one more is ENFILE. 0, and the most, is 1048576.
	MaxOpen int
	// ReadAhead is the most that is fetched ahead of who reads a file in order, in bytes. 0 is 16 MiB, and less than 0 nothing.
	ReadAhead int
	// Log is told, at a bounded rate, what could not be read; nil is nowhere.
	Log *slog.Logger
}

// Validate says what is wrong with the configuration.
func (c *Config) Validate() error {
	switch {
	case c.Store == nil:
		return errors.New("lazy image without a store: set Config.Store")
	case c.Opaque < OpaqueAll || c.Opaque > OpaqueUser:
		return fmt.Errorf("lazy image with Config.Opaque %d: expected OpaqueAll, OpaqueTrusted or OpaqueUser", c.Opaque)
	case c.Layer < 0 || c.Merge && c.Layer != 0:
		return fmt.Errorf("lazy image with Config.Layer %d: expected a layer's number, and none with Config.Merge", c.Layer)
	case c.MaxFDs < 0 || c.MaxInodes < 0 || c.MaxOpen < 0 || c.MaxOpen > defaultMaxOpen:
		return fmt.Errorf("lazy image with at most %d descriptors, %d inodes, %d open files: expected positive numbers, or 0 for the defaults, and at most %d open files", c.MaxFDs, c.MaxInodes, c.MaxOpen, defaultMaxOpen)
	}
	return nil
}

// FS is an image as a backend.
type FS struct {
	tree
	store     store.Store
	log       *ratelog.Logger
	chunks    cache
	readAhead int
	handles   table
	noted     []atomic.Uint32 // a bit for each node: its first OPEN has been noted
	state     stateDir

	ctx   context.Context // ends with Close
	end   context.CancelFunc
	tasks sync.WaitGroup
}

// New opens the image, whose layers it waits for as long as ctx lasts. On an error config.Store stays the caller's.
func New(ctx context.Context, config Config) (*FS, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	for p, standard := range map[*int]int{
		&config.MaxFDs: defaultMaxFDs, &config.MaxInodes: defaultMaxInodes, &config.MaxOpen: defaultMaxOpen, &config.ReadAhead: defaultReadAhead,
	} {
		if *p == 0 {
			*p = standard
		}
	}
	layers, err := config.Store.Layers(ctx)
	if err != nil {
		return nil, fmt.Errorf("open the image: %w", err)
	}
	b := newBuilder(config.MaxInodes)
	first, last := 0, len(layers)
	if !config.Merge {
		if config.Layer >= len(layers) {
			return nil, fmt.Errorf("open layer %d of the image: it has %d, counted from 0, the lowest first", config.Layer, len(layers))
		}
		first, last = config.Layer, config.Layer+1
	}
	for i := first; i < last; i++ {
		if err := b.add(i, &layers[i], config.Merge); err != nil {
			return nil, fmt.Errorf("put the image together: layer %d: %w", i, err)
		}
	}
	f := &FS{
		store: config.Store, log: ratelog.New(config.Log, 10*time.Second, 5),
		readAhead: max(config.ReadAhead, 0),
	}
	if err := b.finish(&f.tree, layers[first:last], first, config.Opaque); err != nil {
		return nil, fmt.Errorf("put the image together: %w", err)
	}
	f.noted = make([]atomic.Uint32, (len(f.nodes)+31)/32)
	f.chunks.init(config.MaxFDs, len(f.chunkSizes))
	f.handles.limit = config.MaxOpen
	f.state.init(layers[first:last], first)
	f.ctx, f.end = context.WithCancel(context.Background())
	return f, nil
}

// Forget implements fsbackend.Backend. Nodes are there whether the guest knows them or not.
func (f *FS) Forget(uint64, uint64) {}

// Reset implements fsbackend.Backend.
func (f *FS) Reset() { f.handles.clear() }

// Close implements fsbackend.Backend.
func (f *FS) Close() error {
	f.end()
	f.tasks.Wait()
	f.chunks.close()
	return f.store.Close()
}

// Stats implements fsbackend.Statser. All nodes are there, as if the guest knew them.
func (f *FS) Stats() fsbackend.Stats {
	return fsbackend.Stats{Inodes: uint64(len(f.nodes)), FDs: fsbackend.FDs{Open: uint64(f.chunks.open.Load())}}
}
