package imagefetch

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/sluicefs/sluice/imagefetch/cache"
	"github.com/sluicefs/sluice/imagefetch/registry"
)

// pullChunkSize is how large the chunks are that a layer is cut into that has none of its own.
const pullChunkSize = 4 << 20

// plainTOC is the table of contents of a layer that has been fetched whole.
type plainTOC struct {
	// End is the size of all chunks: their offsets are as if they lay behind one another.
	End     int64      `json:"end"`
	Entries []tocEntry `json:"entries"`
}

// loadPlain makes a table of contents for a layer that has none, by fetching all of it, if that has not been done before.
func (l *layer) loadPlain(ctx context.Context) error {
	if l.img.ref.Image == nil && !l.img.cfg.SkipVerify {
		return errors.New("nobody says what its digest is")
	}
	l.mu.Lock()
	l.plain, l.kind = true, "plain"
	l.mu.Unlock()
	toc := l.img.cache.Meta(l.metaName("plain"))
	if toc == nil {
		var err error
		if toc, err = l.pull(ctx); err != nil {
			return err
		}
		l.img.cache.PutMeta(l.metaName("plain"), toc)
	}
	var head struct {
		End int64 `json:"end"`
	}
	if err := json.Unmarshal(toc, &head); err != nil {
		return fmt.Errorf("read its table of contents: %w", err)
	}
	c, err := readTOC(bytes.NewReader(toc), head.End)
	if err != nil {
		return err
	}
	l.setContents(c)
	for s := range c.streams {
		l.mark(uint32(s))
	}
	return nil
}

// pull fetches the blob, puts the contents of its files into the cache, verifies it, and returns its table of contents.
func (l *layer) pull(ctx context.Context) ([]byte, error) {
	in := l.blob.Stream(ctx)
	defer in.Close()
	sum := sha256.New()
	l.setPulled(0)
	count := &countReader{r: io.TeeReader(in, sum), f: l.setPulled}
	buffered := bufio.NewReaderSize(count, 64<<10)
	start, _ := buffered.Peek(4)
	out, err := unpackAll(packingOf(start), buffered)
	if err != nil {
		return nil, err
	}
	p := puller{cache: l.img.cache.Cache, limit: l.img.cache.Capacity()}
	if err := p.tar(ctx, out); err != nil {
		return nil, err
	}
	if _, err := io.Copy(io.Discard, buffered); err != nil {
		return nil, err
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); l.img.ref.Image != nil && got != l.digest {
		l.img.counts.corrupt.Add(p.chunks)
		return nil, fmt.Errorf("it is not what its digest says: %w", registry.ErrContent)
	}
	l.img.counts.verified.Add(p.chunks)
	return json.Marshal(p.toc)
}

func (l *layer) setPulled(n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pulled = n
}

type countReader struct {
	r io.Reader
	n int64
	f func(n int64)
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.f(c.n)
	return n, err
}

// pullChunk fetches all of the layer again, for a chunk that the cache has not kept. That goes on when ctx ends, so that what has come
// serves the next one who asks.
func (l *layer) pullChunk(ctx context.Context, index uint32) (*os.File, error) {
	l.pullMu.Lock()
	a := l.repulling
	if a == nil {
		a = &attempt{done: make(chan struct{})}
		if !l.img.begin(func() { l.repull(a) }) {
			l.pullMu.Unlock()
			return nil, errClosed
		}
		l.repulling = a
	}
	l.pullMu.Unlock()
	select {
	case <-a.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if a.err != nil {
		return nil, a.err
	}
	for s := range l.streams {
		l.mark(uint32(s))
	}
	if f := l.fromCache(index); f != nil {
		return f, nil
	}
	return nil, errors.New("the layer has been fetched again, and the cache has not kept the chunk: its budget is too small for the image")
}

func (l *layer) repull(a *attempt) {
	_, a.err = l.pull(l.img.ctx)
	l.pullMu.Lock()
	l.repulling = nil
	l.pullMu.Unlock()
	close(a.done)
}

// puller takes a tar apart.
type puller struct {
	cache *cache.Cache
	limit int64
	toc   plainTOC
	// chunks are how many have been put into the cache.
	chunks int64
}

func (p *puller) tar(ctx context.Context, r io.Reader) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the tar: %w", err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		e, ok := tarEntry(h)
		if !ok {
			continue
		}
		if e.Type != "reg" || h.Size == 0 {
			p.toc.Entries = append(p.toc.Entries, e)
			continue
		}
		if err := p.file(t, e, h.Size); err != nil {
			return fmt.Errorf("%.100q: %w", h.Name, err)
		}
	}
}

// file puts a file's content into the cache.
func (p *puller) file(r io.Reader, e tocEntry, size int64) error {
	e.Size = size
	for at := int64(0); at < size; {
		n := min(size-at, pullChunkSize)
		if p.toc.End += n; p.toc.End > p.limit {
			return fmt.Errorf("the layer unpacks to more than the %d bytes that the cache may keep", p.limit)
		}
		w, err := p.cache.NewWriter(n)
		if err != nil {
			return err
		}
		if _, err := io.CopyN(w, r, n); err != nil {
			w.Abort()
			return err
		}
		p.chunks++
		sum := w.Sum()
		if p.cache.Has(sum, n) {
			w.Abort()
		} else {
			f, err := w.Commit(sum)
			if err != nil {
				return err
			}
			f.Close()
		}
		if at > 0 {
			e = tocEntry{Type: "chunk", Name: e.Name}
		}
		e.Offset, e.ChunkOffset, e.ChunkSize, e.ChunkDigest = p.toc.End-n, at, n, "sha256:"+hex.EncodeToString(sum[:])
		p.toc.Entries = append(p.toc.Entries, e)
		at += n
	}
	return nil
}

// tarEntry is what a header says, if it is of a file.
func tarEntry(h *tar.Header) (e tocEntry, ok bool) {
	types := map[byte]string{
		tar.TypeReg: "reg", tar.TypeDir: "dir", tar.TypeSymlink: "symlink", tar.TypeLink: "hardlink",
		tar.TypeChar: "char", tar.TypeBlock: "block", tar.TypeFifo: "fifo", tar.TypeGNUSparse: "reg",
	}
	e = tocEntry{
		Name: h.Name, Type: types[h.Typeflag], LinkName: h.Linkname, Mode: h.Mode, UID: int64(h.Uid), GID: int64(h.Gid),
		DevMajor: h.Devmajor, DevMinor: h.Devminor,
	}
	if !h.ModTime.IsZero() {
		e.ModTime = h.ModTime.UTC().Format(time.RFC3339Nano)
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			if e.Xattrs == nil {
				e.Xattrs = map[string][]byte{}
			}
			e.Xattrs[name] = []byte(v)
		}
	}
	return e, e.Type != ""
}
