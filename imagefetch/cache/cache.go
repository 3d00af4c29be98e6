// Package cache keeps chunks of content by their SHA-256, on disk or in memory, within a budget.
//
// A directory may be used by several processes at once. What is in it:
//
//	chunks/ab/abcd…   a chunk by its digest, complete and verified when it got this name
//	meta/NAME         what else is worth keeping, after its own digest
//	tmp/RANDOM.BYTES  being written by whoever holds its flock; BYTES are set aside for it
//	usage             how many bytes all of it takes, to be read and written under its flock
//	fetching          nothing; its bytes are locked by those who fetch a chunk, so that others wait for it
//
// The budget is never outgrown: room is set aside before a file is made and given back after one is gone, so that a process that is
// killed in between leaves the number in usage too high, which counting anew puts right.
package cache

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/ratelog"
)

// Key is the SHA-256 of a chunk.
type Key = [sha256.Size]byte

// ErrContent is of content that is not what its digest says.
var ErrContent = errors.New("the content is not what its digest says")

// Config says where chunks are kept.
type Config struct {
	// Dir is the directory, which is made if there is none but not its parents. "" keeps everything in memory.
	Dir string
	// Budget is how many bytes the directory may take on its disk; 0 is 8 GiB.
	Budget int64
	// MemoryBudget is how many bytes are kept in memory: of everything without a directory (0: 256 MiB), or of what cannot be
	// written to it (0: 64 MiB).
	MemoryBudget int64
	// Log is for a directory that fails; nil is for nobody.
	Log *slog.Logger
}

// Validate says what about c cannot be.
func (c *Config) Validate() error {
	if c.Budget < 0 || c.MemoryBudget < 0 {
		return errors.New("the cache's budget is negative: expected bytes, or 0 for the default")
	}
	return nil
}

// Cache is one that is open. It may be used from many goroutines.
type Cache struct {
	log *ratelog.Logger
	dir *directory // nil without one
	mem *memory
}

// Open opens a cache, to be closed. A directory that cannot be used is logged, and done without.
func Open(cfg Config) (*Cache, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	budget := cfg.MemoryBudget
	if budget == 0 {
		budget = 256 << 20
		if cfg.Dir != "" {
			budget = 64 << 20
		}
	}
	c := &Cache{log: ratelog.New(cfg.Log, time.Minute, 5), mem: newMemory(budget)}
	if cfg.Dir == "" {
		return c, nil
	}
	if cfg.Budget == 0 {
		cfg.Budget = 8 << 30
	}
	d, err := openDirectory(cfg.Dir, cfg.Budget, c.log)
	if err != nil {
		c.log.Warn("the cache's directory cannot be used: what is fetched is kept in memory only", "err", err)
		return c, nil
	}
	c.dir = d
	return c, nil
}

// Close gives up what is in memory. Descriptors that were handed out stay good.
func (c *Cache) Close() error {
	c.mem.close()
	if c.dir != nil {
		return c.dir.close()
	}
	return nil
}

// Get returns a chunk for reading, verified by this process if no other time then now, or nil.
func (c *Cache) Get(k Key, size int64) *os.File {
	if f := c.mem.get(k); f != nil {
		return f
	}
	if c.dir == nil {
		return nil
	}
	return c.dir.get(k, size)
}

// Has says whether Get would find a chunk, by its name and size only.
func (c *Cache) Has(k Key, size int64) bool {
	return c.mem.has(k) || c.dir != nil && c.dir.has(k, size)
}

// Meta returns what PutMeta was given under a name, or nil.
func (c *Cache) Meta(name string) []byte {
	if c.dir == nil {
		return nil
	}
	return c.dir.meta(name)
}

// PutMeta keeps data under a name, of letters, digits and "-_.", if there is a directory with room for it.
func (c *Cache) PutMeta(name string, data []byte) {
	if c.dir == nil {
		return
	}
	if err := c.dir.putMeta(name, data); err != nil {
		c.log.Warn("cannot write to the cache", "err", err)
	}
}

// Usage is how many bytes the directory takes, as far as is known without counting; without one, what is kept in memory.
func (c *Cache) Usage() int64 {
	if c.dir == nil {
		return c.mem.usage()
	}
	return c.dir.usage()
}

// Writer takes the content of one chunk.
type Writer struct {
	c    *Cache
	temp *temp    // on disk, or nil
	mem  *os.File // in memory, or nil
	size int64
	n    int64
	sum  interface {
		io.Writer
		Sum([]byte) []byte
	}
}

// NewWriter makes room for a chunk of so many bytes. It is to be ended by Commit or Abort.
func (c *Cache) NewWriter(size int64) (*Writer, error) {
	w := &Writer{c: c, size: size, sum: sha256.New()}
	if c.dir != nil {
		var err error
		if w.temp, err = c.dir.newTemp(size); err == nil {
			return w, nil
		}
		c.log.Warn("cannot write to the cache: what is fetched is kept in memory", "err", err)
	}
	var err error
	w.mem, err = newMemfd()
	return w, err
}

// Write appends to the chunk. It fails where there is more than its size.
func (w *Writer) Write(p []byte) (int, error) {
	if int64(len(p)) > w.size-w.n {
		return 0, fmt.Errorf("%w: it is longer than %d bytes", ErrContent, w.size)
	}
	if w.temp != nil {
		if _, err := w.temp.f.WriteAt(p, w.n); err != nil {
			if err := w.toMemory(err); err != nil {
				return 0, err
			}
		}
	}
	if w.mem != nil {
		if _, err := w.mem.WriteAt(p, w.n); err != nil {
			return 0, fmt.Errorf("write a chunk to memory: %w", err)
		}
	}
	w.n += int64(len(p))
	_, _ = w.sum.Write(p)
	return len(p), nil
}

// toMemory goes on without the disk, which has failed.
func (w *Writer) toMemory(cause error) error {
	w.c.log.Warn("cannot write to the cache: what is fetched is kept in memory", "err", cause)
	mem, err := newMemfd()
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.NewOffsetWriter(mem, 0), io.NewSectionReader(w.temp.f, 0, w.n)); err != nil {
		mem.Close()
		return fmt.Errorf("read back from the cache: %w", err)
	}
	w.temp.abort()
	w.temp, w.mem = nil, mem
	return nil
}

// Reset begins anew.
func (w *Writer) Reset() {
	w.n = 0
	w.sum = sha256.New()
}

// Sum is the digest of what has been written.
func (w *Writer) Sum() (k Key) {
	w.sum.Sum(k[:0])
	return k
}

// Commit ends the chunk: if it is what k says, it is kept, and returned for reading. ErrContent says that it is not.
func (w *Writer) Commit(k Key) (*os.File, error) {
	if w.n != w.size || w.Sum() != k {
		w.Abort()
		return nil, ErrContent
	}
	if w.temp != nil {
		f, err := w.temp.commit(k)
		if err == nil {
			w.temp = nil
			return f, nil
		}
		if err := w.toMemory(err); err != nil {
			w.Abort()
			return nil, err
		}
	}
	f := w.mem
	w.mem = nil
	return w.c.mem.put(k, w.size, f)
}

// Abort forgets the chunk. It does nothing after Commit.
func (w *Writer) Abort() {
	if w.temp != nil {
		w.temp.abort()
	}
	if w.mem != nil {
		w.mem.Close()
	}
	w.temp, w.mem = nil, nil
}

func newMemfd() (*os.File, error) {
	fd, err := unix.MemfdCreate("sluice-chunk", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	return os.NewFile(uintptr(fd), "chunk"), nil
}

// Capacity is how many bytes are kept before something has to go.
func (c *Cache) Capacity() int64 {
	if c.dir == nil || c.dir.count == nil {
		return c.mem.budget
	}
	return c.dir.budget
}
