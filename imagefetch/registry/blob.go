package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
)

// Blob is content of a known size that can be read in ranges.
type Blob interface {
	// Size is in bytes.
	Size() int64
	// Fetch hands the content of each of ranges, which are in order and apart from each other, to f: i is its index, and r ends after
	// its last byte. f need not read all of it. It is called again for a range that it was not given whole, and then begins anew;
	// it may return an error that wraps ErrContent, and be given the range by another host. Any other error of f is final.
	Fetch(ctx context.Context, ranges []Range, f func(i int, r io.Reader) error) error
	// Stream is all of it. What breaks off is resumed.
	Stream(ctx context.Context) io.ReadCloser
	// Counters say how many requests were sent for it and how many bytes came.
	Counters() (requests, bytes int64)
}

// MaxRanges is how many ranges Blob.Fetch may be asked for at once.
const MaxRanges = 32

// remote is a blob on the network.
type remote struct {
	c     *Client
	hosts []*host
	repo  string
	// where is its first address at a host.
	where func(h *host) *url.URL
	size  int64

	requests, bytes atomic.Int64
	single          atomic.Bool // one range a request

	mu sync.Mutex
	// moved is where hosts have redirected to. It is asked first, until it refuses.
	moved map[*host]*url.URL
}

// Blob is a blob of the repository of an image. digest and size are those of the manifest.
func (c *Client) Blob(image Reference, digest string, size int64) Blob {
	origin, repo := repoOf(image.Image)
	return c.newRemote(c.hostsOf(origin), repo, size, func(h *host) *url.URL { return h.url(repo, "blobs", digest) })
}

func (c *Client) newRemote(hosts []*host, repo string, size int64, where func(h *host) *url.URL) *remote {
	b := &remote{c: c, hosts: hosts, repo: repo, where: where, size: size, moved: map[*host]*url.URL{}}
	b.single.Store(c.cfg.SingleRange)
	return b
}

// URLBlob is what is at an address, once its size has been found out.
func (c *Client) URLBlob(ctx context.Context, u *url.URL) (Blob, error) {
	h := &host{name: u.Host, access: c.cfg.Hosts[u.Host].Access}
	h.access.PlainHTTP = u.Scheme == "http"
	c.mu.Lock()
	// The session that it has is by host.
	k := hostKey{"", u.Scheme + "://" + u.Host}
	if known := c.hosts[k]; known != nil {
		h = known
	}
	c.hosts[k] = h
	c.mu.Unlock()
	b := c.newRemote([]*host{h}, "", -1, func(*host) *url.URL { return u })
	if err := c.try(ctx, b.hosts, b.findSize); err != nil {
		return nil, fmt.Errorf("find the size of %s: %w", redact(u), err)
	}
	return b, nil
}

// findSize asks with HEAD, and where that says nothing for the first byte.
func (b *remote) findSize(ctx context.Context, h *host, _ *watchdog) error {
	resp, err := b.ask(ctx, h, http.MethodHead, nil)
	if err != nil {
		return err
	}
	discard(resp)
	if resp.StatusCode == http.StatusOK && resp.ContentLength > 0 {
		b.size = resp.ContentLength
		return nil
	}
	if resp, err = b.ask(ctx, h, http.MethodGet, http.Header{"Range": {"bytes=0-0"}}); err != nil {
		return err
	}
	defer discard(resp)
	switch resp.StatusCode {
	case http.StatusOK:
		if resp.ContentLength > 0 {
			b.size = resp.ContentLength
			return nil
		}
	case http.StatusPartialContent:
		if r, size, err := parseContentRange(resp.Header.Get("Content-Range")); err == nil && r.Off == 0 && size > 0 {
			b.size = size
			return nil
		}
	default:
		return statusFailure(h.name, resp)
	}
	return &failure{kind: elsewhere, err: fmt.Errorf("%s does not say how large it is", h.name)}
}

func (b *remote) Size() int64 { return b.size }

func (b *remote) Counters() (requests, bytes int64) { return b.requests.Load(), b.bytes.Load() }

func (b *remote) count(n int) { b.bytes.Add(int64(n)) }

// ask sends a request to h, or where it has redirected before.
func (b *remote) ask(ctx context.Context, h *host, method string, header http.Header) (*http.Response, error) {
	b.requests.Add(1)
	b.mu.Lock()
	moved := b.moved[h]
	b.mu.Unlock()
	if moved != nil {
		resp, err := b.c.askAt(ctx, h, b.repo, moved, method, header)
		if err == nil && (resp.StatusCode < 300 || resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests ||
			resp.StatusCode == http.StatusRequestedRangeNotSatisfiable) {
			return resp, nil
		}
		// It was good for a time only, perhaps: the host knows another one.
		if err == nil {
			discard(resp)
		}
		b.mu.Lock()
		delete(b.moved, h)
		b.mu.Unlock()
		if ctx.Err() != nil {
			return nil, netFailure(ctx, moved.Host, ctx.Err())
		}
		b.requests.Add(1)
	}
	at := b.where(h)
	resp, err := b.c.ask(ctx, h, b.repo, method, at, header)
	if err != nil {
		return nil, err
	}
	resp, to, err := b.c.follow(ctx, h, b.repo, at, resp, method, header)
	if err != nil {
		return nil, err
	}
	if to != at && resp.StatusCode < 300 {
		b.mu.Lock()
		b.moved[h] = to
		b.mu.Unlock()
	}
	return resp, nil
}

func (b *remote) Fetch(ctx context.Context, ranges []Range, f func(i int, r io.Reader) error) error {
	if err := checkRanges(ranges, b.size); err != nil {
		return err
	}
	return b.c.try(ctx, b.hosts, (&fetch{b: b, ranges: ranges, f: f}).attempt)
}

func checkRanges(ranges []Range, size int64) error {
	end := int64(0)
	if len(ranges) > MaxRanges {
		return fmt.Errorf("fetch ranges: %d were asked for, at most %d can be", len(ranges), MaxRanges)
	}
	for _, r := range ranges {
		if r.Off < end || r.Len <= 0 || r.Len > size || r.Off > size-r.Len {
			return fmt.Errorf("fetch bytes %d+%d: out of order, or not in the %d that there are", r.Off, r.Len, size)
		}
		end = r.end()
	}
	return nil
}

// fetch is one call of Fetch.
type fetch struct {
	b      *remote
	ranges []Range
	done   int // of the ranges, which are handed out in order
	f      func(i int, r io.Reader) error
}

// attempt fetches what ranges are left.
func (f *fetch) attempt(ctx context.Context, h *host, w *watchdog) error {
	want := f.ranges[f.done:]
	if len(want) == 0 {
		return nil
	}
	if f.b.single.Load() {
		want = want[:1]
	}
	resp, err := f.b.ask(ctx, h, http.MethodGet, http.Header{"Range": {header(want)}})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK, http.StatusPartialContent:
	case http.StatusBadRequest, http.StatusRequestedRangeNotSatisfiable:
		if len(want) > 1 {
			f.b.single.Store(true)
			return &failure{kind: instead, err: fmt.Errorf("%s refuses several ranges", h.name)}
		}
		return statusFailure(h.name, resp)
	default:
		return statusFailure(h.name, resp)
	}
	before := f.done
	in := &body{r: resp.Body, w: w, count: f.b.count}
	w.rest()
	err = f.take(ctx, h, resp, in)
	if f.done == before || f.done < len(f.ranges) && err != nil {
		if err == nil {
			err = &failure{kind: temporary, err: fmt.Errorf("%s answers with other bytes than it was asked for", h.name)}
		}
		return err
	}
	if f.done == len(f.ranges) {
		return nil
	}
	if len(want) > 1 {
		// It gave some of them, so it can be asked for the others, one by one.
		f.b.single.Store(true)
	}
	return &failure{kind: instead, err: fmt.Errorf("%s answers with fewer ranges than it was asked for", h.name)}
}

// take hands out the ranges that an answer has, in order.
func (f *fetch) take(ctx context.Context, h *host, resp *http.Response, in *body) error {
	p, err := partsOf(resp, in, f.b.size)
	if err != nil {
		return err
	}
	skip := f.b.c.cfg.MaxSkip
	for f.done < len(f.ranges) {
		piece, r, err := p.next()
		if errors.Is(err, io.EOF) && in.err == nil {
			return nil
		}
		if err != nil {
			return f.readFailure(ctx, h, in, err)
		}
		at := piece.Off
		for f.done < len(f.ranges) {
			want := f.ranges[f.done]
			if want.Off < at || want.end() > piece.end() {
				break
			}
			if skip -= want.Off - at; skip < 0 {
				return &failure{kind: elsewhere, err: fmt.Errorf("%s ignores ranges", h.name)}
			}
			if _, err := io.CopyN(io.Discard, r, want.Off-at); err != nil {
				return f.readFailure(ctx, h, in, err)
			}
			exact := &exactReader{r: r, left: want.Len}
			if err := f.f(f.done, exact); err != nil {
				if in.err != nil || exact.short {
					// What f says of it is of no use: it has not had all of it.
					return f.readFailure(ctx, h, in, io.ErrUnexpectedEOF)
				}
				if errors.Is(err, ErrContent) {
					return &failure{kind: elsewhere, err: err}
				}
				return &failure{kind: final, err: err}
			}
			f.done++
			if f.done == len(f.ranges) {
				return nil
			}
			if _, err := io.Copy(io.Discard, exact); err != nil {
				return f.readFailure(ctx, h, in, err)
			}
			at = want.end()
		}
	}
	return nil
}

// readFailure is of a body that broke off, or is not of the form that its header says.
func (f *fetch) readFailure(ctx context.Context, h *host, in *body, err error) error {
	var fail *failure
	if errors.As(err, &fail) {
		return err
	}
	if in.err != nil {
		err = in.err
	}
	return netFailure(ctx, h.name, fmt.Errorf("the answer breaks off: %w", err))
}

// exactReader reads exactly so much: less is an error.
type exactReader struct {
	r     io.Reader
	left  int64
	short bool
}

func (e *exactReader) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > e.left {
		p = p[:e.left]
	}
	n, err := e.r.Read(p)
	e.left -= int64(n)
	if e.left == 0 {
		return n, nil
	}
	if err != nil {
		e.short = true
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
	}
	return n, err
}

func (b *remote) Stream(ctx context.Context) io.ReadCloser {
	ctx, cancel := context.WithCancel(ctx)
	return &stream{b: b, ctx: ctx, cancel: cancel}
}

// stream reads a blob from the first byte to the last.
type stream struct {
	b      *remote
	ctx    context.Context
	cancel context.CancelFunc
	at     int64
	in     *body // of the connection that there is, or nil
	close  func()
	broken int // times that it broke off without a byte
}

func (s *stream) Read(p []byte) (int, error) {
	for {
		if s.at == s.b.size {
			return 0, io.EOF
		}
		if s.in == nil {
			if err := s.connect(); err != nil {
				return 0, err
			}
		}
		n, err := s.in.Read(p[:min(int64(len(p)), s.b.size-s.at)])
		s.at += int64(n)
		if err != nil {
			s.hangUp()
			if s.at < s.b.size {
				s.b.c.failures.count(s.ctx, &failure{kind: temporary, reason: reasonNetwork, err: err})
			}
			if n == 0 {
				s.broken++
			}
			if s.at < s.b.size && (s.ctx.Err() != nil || s.broken >= s.b.c.cfg.Tries) {
				return n, netFailure(s.ctx, "the registry", fmt.Errorf("the layer breaks off: %w", err))
			}
		}
		if n > 0 {
			s.broken = 0
			return n, nil
		}
	}
}

// connect asks for what is left.
func (s *stream) connect() error {
	return s.b.c.try(s.ctx, s.b.hosts, func(_ context.Context, h *host, _ *watchdog) error {
		// What came outlives the attempt, so it has a watchdog of its own.
		w, ctx := newWatchdog(s.ctx, s.b.c.stall())
		ok := false
		defer func() {
			if !ok {
				w.stop()
			}
		}()
		header := http.Header{}
		if s.at > 0 {
			header.Set("Range", fmt.Sprintf("bytes=%d-", s.at))
		}
		resp, err := s.b.ask(ctx, h, http.MethodGet, header)
		if err != nil {
			return err
		}
		in := &body{r: resp.Body, w: w, count: s.b.count}
		switch resp.StatusCode {
		case http.StatusOK, http.StatusPartialContent:
			var p *parts
			if p, err = partsOf(resp, in, s.b.size); err == nil {
				var piece Range
				if piece, _, err = p.next(); err == nil && (piece.Off > s.at || piece.end() != s.b.size) {
					err = &failure{kind: temporary, err: fmt.Errorf("%s answers with other bytes than it was asked for", h.name)}
				}
				if err == nil {
					_, err = io.CopyN(io.Discard, in, s.at-piece.Off)
				}
			}
		default:
			err = statusFailure(h.name, resp)
		}
		if err != nil {
			resp.Body.Close()
			return netFailure(ctx, h.name, err)
		}
		w.rest()
		ok = true
		s.in, s.close = in, func() { resp.Body.Close(); w.stop() }
		return nil
	})
}

func (s *stream) hangUp() {
	if s.in != nil {
		s.close()
		s.in = nil
	}
}

func (s *stream) Close() error {
	s.hangUp()
	s.cancel()
	return nil
}

// file is a blob in a local file.
type file struct {
	f    *os.File
	size int64
}

// OpenFile opens a blob that is a file. It is to be closed.
func OpenFile(path string) (Blob, io.Closer, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("open the layer: %w", err)
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("open the layer: %w", err)
	}
	return &file{f, fi.Size()}, f, nil
}

func (b *file) Size() int64                       { return b.size }
func (b *file) Counters() (requests, bytes int64) { return 0, 0 }

func (b *file) Fetch(ctx context.Context, ranges []Range, f func(i int, r io.Reader) error) error {
	if err := checkRanges(ranges, b.size); err != nil {
		return err
	}
	for i, r := range ranges {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := f(i, &exactReader{r: io.NewSectionReader(b.f, r.Off, r.Len), left: r.Len}); err != nil {
			return err
		}
	}
	return nil
}

func (b *file) Stream(context.Context) io.ReadCloser {
	return io.NopCloser(&exactReader{r: io.NewSectionReader(b.f, 0, b.size), left: b.size})
}
