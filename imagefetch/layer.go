package imagefetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/imagefetch/cache"
	"github.com/sluicefs/sluice/imagefetch/registry"
)

// layer is one of an image's.
type layer struct {
	img         *Image
	digest      string // of the blob; for one without a manifest, of its address
	annotations map[string]string
	blob        registry.Blob

	*contents
	packing packing
	// plain says that it cannot be fetched in pieces: chunks are places of the unpacked tar.
	plain bool
	kind  string // for people

	pullMu    sync.Mutex
	repulling *attempt // to fetch a plain layer again, or nil

	mu      sync.Mutex
	have    []bool // streams of which all chunks were in the cache once
	missing int
	fetched int64 // bytes of those
	pulled  int64 // bytes of the blob that came in the pull that is running
	err     string
}

func (l *layer) meta() store.Layer {
	return store.Layer{Digest: l.digest, Size: l.blob.Size(), Entries: l.entries, Chunks: l.chunks}
}

// setContents is once, when the table of contents is there.
func (l *layer) setContents(c *contents) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.contents = c
	l.have = make([]bool, len(c.streams))
	l.missing = len(c.streams)
}

// setErr remembers what went wrong last.
func (l *layer) setErr(err error) {
	l.mu.Lock()
	l.err = err.Error()
	l.mu.Unlock()
	l.img.log.Warn("cannot fetch from a layer", "layer", l.digest, "err", err)
}

// status is for Image.Status.
func (l *layer) status() store.Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := store.Status{Size: l.blob.Size(), Fetched: l.fetched, Err: l.err}
	s.Requests, s.Bytes = l.blob.Counters()
	switch {
	case l.missing == 0:
		// What is in no chunk is never needed.
		s.Fetched = s.Size
	case l.plain:
		s.Fetched = min(l.pulled, s.Size)
	}
	return s
}

// mark notes that all of a stream is in the cache, if it is.
func (l *layer) mark(s uint32) {
	l.mu.Lock()
	known := l.have[s]
	l.mu.Unlock()
	if known || !l.cached(s) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.have[s] {
		l.have[s] = true
		l.missing--
		l.fetched += l.streams[s].end - l.streams[s].off
	}
}

func (l *layer) has(s uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.have[s]
}

// whole says whether all of it has been in the cache.
func (l *layer) whole() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.missing == 0
}

// cached says whether all chunks of a stream are in the cache.
func (l *layer) cached(s uint32) bool {
	for _, i := range l.order[l.streams[s].lo:l.streams[s].hi] {
		if c := &l.chunks[i]; !l.img.cache.Has(c.Digest, int64(c.Size)) {
			return false
		}
	}
	return true
}

// errNoTOC is of a layer that cannot be fetched in pieces.
var errNoTOC = errors.New("it cannot be fetched in pieces")

// load gets the table of contents and verifies it.
func (l *layer) load(ctx context.Context) error {
	err := l.loadTOC(ctx)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil || !errors.Is(err, errNoTOC) && !errors.Is(err, registry.ErrContent) {
		return fmt.Errorf("open layer %s: %w", l.digest, err)
	}
	if l.img.ref.Image == nil && l.img.cfg.TOCDigest == "" && !l.img.cfg.SkipVerify {
		return fmt.Errorf("open layer %s: %w (toc_digest says what it is)", l.digest, err)
	}
	if l.img.cfg.Fallback != "pull" {
		return fmt.Errorf("open layer %s: %w (convert the image to eStargz or zstd:chunked, or have the layer fetched whole with fallback=pull)", l.digest, err)
	}
	if err := l.loadPlain(ctx); err != nil {
		return fmt.Errorf("fetch layer %s whole: %w", l.digest, err)
	}
	return nil
}

// tocAt is where a packed table of contents is, and what it should be.
type tocAt struct {
	registry.Range
	packing packing
	// end is where the blob's data ends.
	end int64
	// packed is the digest of it as it is, unpacked that of the JSON in it; one of them at least is known, unless skip.
	packed, unpacked string
	skip             bool
	// external says that it is not in the blob but in another image.
	external bool
	kind     string
}

const footerSize = estargz.FooterSize

// The footer of zstd:chunked is a frame that decoders skip. It begins with where the table of contents is and its size, and ends with a
// mark: that of 40 bytes with one, and that of 64, which podman has made since 2024, with another.
// (estargz/zstdchunked; containers/storage, pkg/chunked/internal/minimal)
const (
	zstdMark       = "GnUlInUx"
	longZstdMark   = "GNUlInUx"
	longZstdFooter = 64
)

// The footer of a layer whose table of contents is in another image is an empty gzip stream with this as its extra field. It is shorter
// than the others. (estargz/externaltoc)
const (
	externalMark   = "SG\x11\x00STARGZEXTERNALTOC"
	externalMarkAt = footerSize - 46 + 12
)

// loadTOC does it for a layer that has one.
func (l *layer) loadTOC(ctx context.Context) error {
	at := tocAt{unpacked: l.annotations[estargz.TOCJSONDigestAnnotation]}
	if at.unpacked == "" {
		at.unpacked = l.img.cfg.TOCDigest
	}
	if err := l.annotated(&at); err != nil {
		return err
	}
	if at.packed == "" && at.unpacked == "" {
		if !l.img.cfg.SkipVerify {
			return fmt.Errorf("%w: it has no table of contents, or nobody says what the digest of that is", errNoTOC)
		}
		at.skip = true
	}
	if at.kind == "" {
		if at.skip || l.cachedFooter() == nil || at.decodeFooter(l.cachedFooter(), l.blob.Size()) != nil {
			footer, err := l.fetchFooter(ctx)
			if err != nil {
				return err
			}
			if err := at.decodeFooter(footer, l.blob.Size()); err != nil {
				return err
			}
			l.img.cache.PutMeta(l.metaName("footer"), footer)
		}
	}
	if !at.skip {
		if b := l.img.cache.Meta(l.metaName("toc")); b != nil {
			if c, err := at.read(b); err == nil {
				l.use(&at, c)
				return nil
			}
		}
	}
	var b []byte
	var err error
	if at.external {
		b, err = l.img.externalTOC(ctx, l.digest)
	} else {
		b, err = fetchRange(ctx, l.blob, at.Range)
	}
	if err != nil {
		return err
	}
	c, err := at.read(b)
	if err != nil {
		return err
	}
	l.use(&at, c)
	l.img.cache.PutMeta(l.metaName("toc"), b)
	return nil
}

func (l *layer) use(at *tocAt, c *contents) {
	l.packing, l.kind = at.packing, at.kind
	l.setContents(c)
}

func (l *layer) metaName(what string) string {
	return what + "-" + strings.TrimPrefix(l.digest, "sha256:")
}

func (l *layer) cachedFooter() []byte {
	if b := l.img.cache.Meta(l.metaName("footer")); len(b) == footerSize || len(b) == longZstdFooter {
		return b
	}
	return nil
}

func (l *layer) fetchFooter(ctx context.Context) ([]byte, error) {
	footer, err := fetchRange(ctx, l.blob, registry.Range{Off: l.blob.Size() - footerSize, Len: footerSize})
	if err != nil || !bytes.HasSuffix(footer, []byte(longZstdMark)) {
		return footer, err
	}
	return fetchRange(ctx, l.blob, registry.Range{Off: l.blob.Size() - longZstdFooter, Len: longZstdFooter})
}

// annotated finds out where the table of contents is from what the manifest says of a zstd:chunked layer.
func (l *layer) annotated(at *tocAt) error {
	for _, prefix := range []string{"io.github.containers.zstd-chunked.", "io.containers.zstd-chunked."} {
		sum, position := l.annotations[prefix+"manifest-checksum"], l.annotations[prefix+"manifest-position"]
		if sum == "" || position == "" {
			continue
		}
		// Offset, size, size unpacked, and the format: 1 is the only one there is.
		var n [4]int64
		fields := strings.Split(position, ":")
		for i := range min(len(fields), len(n)) {
			v, err := strconv.ParseInt(fields[i], 10, 63)
			if err != nil {
				v = -1
			}
			n[i] = v
		}
		if len(fields) != len(n) || min(n[0], n[1], n[2]) < 0 || n[3] != 1 {
			return fmt.Errorf("%w: the manifest says that its table of contents is at %.80q, expected OFFSET:SIZE:UNPACKED:1", errNoTOC, position)
		}
		at.Range, at.packing, at.packed, at.kind = registry.Range{Off: n[0], Len: n[1]}, packedZstd, sum, "zstd:chunked"
		at.end = at.Off
		return at.check(l.blob.Size())
	}
	return nil
}

// check says whether the table of contents can be where it is said to be.
func (at *tocAt) check(size int64) error {
	if at.Off < 0 || at.Len <= 0 || at.Len > size || at.Off > size-at.Len {
		return fmt.Errorf("%w: its table of contents is said to be at %d+%d of %d bytes", errNoTOC, at.Off, at.Len, size)
	}
	if at.Len > maxPackedTOC {
		return fmt.Errorf("%w: its table of contents has %d bytes, expected at most %d", errNoTOC, at.Len, maxPackedTOC)
	}
	return nil
}

// decodeFooter finds out where it is from how the blob ends.
func (at *tocAt) decodeFooter(footer []byte, size int64) error {
	var (
		end, off, n int64
		err         error
	)
	if bytes.Equal(footer[externalMarkAt:externalMarkAt+len(externalMark)], []byte(externalMark)) {
		at.packing, at.kind, at.external, at.end = packedGzip, "eStargz with its table of contents elsewhere", true, size
		return nil
	}
	tail := footer[footerSize-zstdchunked.FooterSize:]
	if len(footer) == longZstdFooter {
		tail = footer
	}
	if bytes.HasSuffix(tail, []byte(zstdMark)) || bytes.HasSuffix(tail, []byte(longZstdMark)) {
		at.packing, at.kind = packedZstd, "zstd:chunked"
		off, n = int64(binary.LittleEndian.Uint64(tail)), int64(binary.LittleEndian.Uint64(tail[8:]))
		end = off
	} else {
		at.packing, at.kind = packedGzip, "eStargz"
		d := estargz.GzipDecompressor{}
		if end, off, _, err = d.ParseFooter(footer); err != nil {
			legacy := estargz.LegacyGzipDecompressor{}
			end, off, _, err = legacy.ParseFooter(footer[footerSize-legacy.FooterSize():])
			n = size - legacy.FooterSize() - off
		} else {
			n = size - footerSize - off
		}
	}
	if err != nil {
		return fmt.Errorf("%w: it has no table of contents at its end", errNoTOC)
	}
	at.Range, at.end = registry.Range{Off: off, Len: n}, end
	return at.check(size)
}

// read reads the table of contents, b as it comes.
func (at *tocAt) read(b []byte) (*contents, error) {
	if at.packed != "" && registry.DigestOf(b) != at.packed {
		return nil, fmt.Errorf("its table of contents is not what the manifest says: %w", registry.ErrContent)
	}
	var r io.Reader
	if at.packing == packedGzip {
		d := estargz.GzipDecompressor{}
		in, err := d.DecompressTOC(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("its table of contents cannot be unpacked: %w", registry.ErrContent)
		}
		defer in.Close()
		r = in
	} else {
		in, release, err := unpack(at.packing, bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("its table of contents cannot be unpacked: %w", registry.ErrContent)
		}
		defer release()
		r = in
	}
	sum := sha256.New()
	limited := &io.LimitedReader{R: r, N: maxTOC}
	tee := io.TeeReader(limited, sum)
	c, err := readTOC(tee, at.end)
	if limited.N <= 0 {
		return nil, fmt.Errorf("its table of contents is larger than %d bytes: %w", maxTOC, registry.ErrContent)
	}
	// The digest is of all of it, and says first whether there is any use in what is wrong with it.
	if _, copyErr := io.Copy(io.Discard, tee); copyErr != nil {
		return nil, fmt.Errorf("its table of contents cannot be unpacked: %w", registry.ErrContent)
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); at.unpacked != "" && got != at.unpacked {
		return nil, fmt.Errorf("its table of contents is not what the manifest says: %w", registry.ErrContent)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoTOC, err)
	}
	return c, nil
}

// fetchRange gets a part of a blob that is small.
func fetchRange(ctx context.Context, blob registry.Blob, r registry.Range) ([]byte, error) {
	if r.Off < 0 {
		return nil, fmt.Errorf("%w: it is too small to have a table of contents", errNoTOC)
	}
	b := make([]byte, r.Len)
	err := blob.Fetch(ctx, []registry.Range{r}, func(_ int, in io.Reader) error {
		_, err := io.ReadFull(in, b)
		return err
	})
	return b, err
}

func (l *layer) key(s uint32) flightKey {
	return flightKey{l.img.cache.Cache, l.digest, l.streams[s].off}
}

// lockKey is what processes that share the cache lock while they fetch a stream.
func (k flightKey) lockKey() cache.Key {
	return sha256.Sum256(binary.LittleEndian.AppendUint64([]byte(k.blob), uint64(k.off)))
}

// fromCache is a chunk that is there, or nil.
func (l *layer) fromCache(index uint32) *os.File {
	c := &l.chunks[index]
	f := l.img.cache.Get(c.Digest, int64(c.Size))
	if f != nil {
		l.mark(l.at[index].stream)
	}
	return f
}

// chunk gets one chunk, within ctx.
func (l *layer) chunk(ctx context.Context, index uint32) (*os.File, error) {
	s := l.at[index].stream
	if f := l.fromCache(index); f != nil {
		l.img.counts.hit(&l.chunks[index])
		return f, nil
	}
	l.img.counts.miss(&l.chunks[index])
	defer l.img.gate.ask()()
	k := l.key(s)
	if l.plain {
		k.off = -1 // all of it is fetched
	}
	flights := &l.img.fetcher.flights
	for {
		fl, mine := flights.claim(k, nil, nil)
		if mine {
			f, err := l.lead(ctx, k, s, index)
			shared := err
			if ctx.Err() != nil {
				shared = nil // the others have time left
			}
			flights.land(k, fl, shared)
			return f, err
		}
		select {
		case <-fl.await():
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if f := l.fromCache(index); f != nil {
			return f, nil
		}
		if fl.err != nil {
			return nil, fl.err
		}
	}
}

// lead fetches a chunk for all who want it.
func (l *layer) lead(ctx context.Context, k flightKey, s, index uint32) (*os.File, error) {
	// Another process may fetch it. One that takes too long is not waited for.
	lockCtx, cancel := context.WithTimeout(ctx, l.lockTime())
	unlock, err := l.img.cache.Lock(lockCtx, k.lockKey())
	cancel()
	if err == nil {
		defer unlock()
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if f := l.fromCache(index); f != nil {
		return f, nil
	}
	if l.plain {
		return l.pullChunk(ctx, index)
	}
	select {
	case l.img.asking <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-l.img.asking }()
	var got *os.File
	err = l.fetch(ctx, fetchJob{streams: []uint32{s}, take: func(i uint32, f *os.File) bool {
		if i != index || got != nil {
			return false
		}
		got = f
		return true
	}, want: func(i uint32) bool { return i == index && got == nil }})
	if err != nil {
		if got != nil {
			got.Close()
		}
		return nil, err
	}
	return got, nil
}

func (l *layer) lockTime() time.Duration { return time.Duration(l.img.cfg.Registry.Timeout) / 2 }

// fetchJob is some of a layer's streams to fetch.
type fetchJob struct {
	// streams are in order.
	streams []uint32
	// want says whether a chunk is needed although it is in the cache; nil says no.
	want func(i uint32) bool
	// take may take over the file of a chunk that was fetched.
	take func(i uint32, f *os.File) bool
	// pace is called before so many bytes are read.
	pace func(n int) error
	// landed is called when a stream is done.
	landed func(s uint32)
}

// fetch gets streams and keeps their chunks. What of it came before an error is kept.
func (l *layer) fetch(ctx context.Context, j fetchJob) error {
	var ranges []registry.Range
	var parts [][]uint32
	for _, s := range j.streams {
		st := l.streams[s]
		if n := len(ranges); n > 0 && ranges[n-1].Off+ranges[n-1].Len == st.off {
			ranges[n-1].Len += st.end - st.off
			parts[n-1] = append(parts[n-1], s)
			continue
		}
		ranges = append(ranges, registry.Range{Off: st.off, Len: st.end - st.off})
		parts = append(parts, []uint32{s})
	}
	return l.blob.Fetch(ctx, ranges, func(i int, r io.Reader) error {
		if j.pace != nil {
			r = &pacedReader{r, j.pace}
		}
		for _, s := range parts[i] {
			if err := l.take(s, &io.LimitedReader{R: r, N: l.streams[s].end - l.streams[s].off}, &j); err != nil {
				return err
			}
			l.mark(s)
			if j.landed != nil {
				j.landed(s)
			}
		}
		return nil
	})
}

type pacedReader struct {
	r    io.Reader
	pace func(n int) error
}

func (p *pacedReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b[:min(len(b), 16<<10)])
	if err := p.pace(n); err != nil {
		return n, err
	}
	return n, err
}

// take unpacks a stream and keeps its chunks.
func (l *layer) take(s uint32, r *io.LimitedReader, j *fetchJob) error {
	list := l.order[l.streams[s].lo:l.streams[s].hi]
	left := 0
	wanted := make([]bool, len(list))
	for n, i := range list {
		c := &l.chunks[i]
		if j.want != nil && j.want(i) || !l.img.cache.Has(c.Digest, int64(c.Size)) {
			wanted[n] = true
			left++
		}
	}
	if left > 0 {
		in, release, err := unpack(l.packing, r)
		if err != nil {
			return contentError(err)
		}
		at := int64(0)
		for n, i := range list {
			if !wanted[n] {
				continue
			}
			c := &l.chunks[i]
			if _, err := io.CopyN(io.Discard, in, l.at[i].inner-at); err != nil {
				release()
				return contentError(err)
			}
			f, err := l.keep(in, c)
			if err != nil {
				release()
				return err
			}
			if j.take == nil || !j.take(i, f) {
				f.Close()
			}
			at = l.at[i].inner + int64(c.Size)
			if left--; left == 0 {
				break
			}
		}
		release()
	}
	// The next stream begins behind it.
	_, err := io.Copy(io.Discard, r)
	return err
}

// keep reads a chunk, verifies it and puts it in the cache.
func (l *layer) keep(in io.Reader, c *store.Chunk) (*os.File, error) {
	w, err := l.img.cache.NewWriter(int64(c.Size))
	if err != nil {
		return nil, err
	}
	r := &errReader{r: in}
	if _, err := io.CopyN(w, r, int64(c.Size)); err != nil {
		w.Abort()
		if r.err != nil {
			return nil, contentError(r.err)
		}
		return nil, err
	}
	f, err := w.Commit(c.Digest)
	if err == nil {
		l.img.counts.verified.Add(1)
	}
	if errors.Is(err, cache.ErrContent) {
		l.img.counts.corrupt.Add(1)
		return nil, fmt.Errorf("chunk sha256:%s: %w", hex.EncodeToString(c.Digest[:]), registry.ErrContent)
	}
	return f, err
}

// errReader remembers the error that its reader had, as against one of who writes.
type errReader struct {
	r   io.Reader
	err error
}

func (e *errReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if err != nil {
		e.err = err
	}
	return n, err
}

// contentError is of content that cannot be unpacked. If it is because no more of it came, package registry knows better.
func contentError(err error) error {
	return fmt.Errorf("unpack a chunk: %w: %w", err, registry.ErrContent)
}
