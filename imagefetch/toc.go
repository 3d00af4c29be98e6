package imagefetch

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
)

// maxTOC is the largest table of contents, in bytes of JSON. maxPackedTOC is the same as it comes.
const (
	maxTOC       = 512 << 20
	maxPackedTOC = 64 << 20
)

// maxInner is how far into a compressed stream a chunk may begin: all before it has to be unpacked to get at it.
const maxInner = store.MaxChunk

// tocEntry is an entry of a table of contents: that of eStargz with what zstd:chunked has in addition.
type tocEntry struct {
	Name        string            `json:"name,omitempty"`
	Type        string            `json:"type"`
	Size        int64             `json:"size,omitempty"`
	ModTime     string            `json:"modtime,omitempty"`
	LinkName    string            `json:"linkName,omitempty"`
	Mode        int64             `json:"mode,omitempty"`
	UID         int64             `json:"uid,omitempty"`
	GID         int64             `json:"gid,omitempty"`
	Offset      int64             `json:"offset,omitempty"`
	EndOffset   int64             `json:"endOffset,omitempty"`
	InnerOffset int64             `json:"innerOffset,omitempty"`
	DevMajor    int64             `json:"devMajor,omitempty"`
	DevMinor    int64             `json:"devMinor,omitempty"`
	Xattrs      map[string][]byte `json:"xattrs,omitempty"`
	Digest      string            `json:"digest,omitempty"`
	ChunkOffset int64             `json:"chunkOffset,omitempty"`
	ChunkSize   int64             `json:"chunkSize,omitempty"`
	ChunkDigest string            `json:"chunkDigest,omitempty"`
	ChunkType   string            `json:"chunkType,omitempty"`
}

// contents is a layer as its table of contents has it.
type contents struct {
	entries []store.Entry
	chunks  []store.Chunk
	// at says for each chunk where it is.
	at []place
	// streams are the compressed runs of the blob that chunks are in, in order.
	streams []compressed
	// order are the chunks by stream, and in it by where they begin.
	order []uint32
	// landmark is where what should be prefetched ends, 0 for nothing, -1 for no word on that.
	landmark int64
	// total is the size of all chunks.
	total int64
}

// place is where a chunk is: in a stream, after so many bytes of what that unpacks to.
type place struct {
	stream uint32
	inner  int64
}

// compressed is a run of a blob's bytes that is unpacked as one.
type compressed struct {
	off, end int64
	lo, hi   uint32 // contents.order[lo:hi] are its chunks
}

// readTOC reads a table of contents, of a blob whose data ends at end.
func readTOC(r io.Reader, end int64) (*contents, error) {
	d := json.NewDecoder(r)
	b := builder{end: end, byPath: map[string]int{}, c: &contents{landmark: -1}}
	if err := expect(d, json.Delim('{')); err != nil {
		return nil, err
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, tocError(err)
		}
		if key != "entries" {
			var skip json.RawMessage
			if err := d.Decode(&skip); err != nil {
				return nil, tocError(err)
			}
			continue
		}
		if err := expect(d, json.Delim('[')); err != nil {
			return nil, err
		}
		for d.More() {
			var e tocEntry
			if err := d.Decode(&e); err != nil {
				return nil, tocError(err)
			}
			if err := b.add(&e); err != nil {
				return nil, fmt.Errorf("read the table of contents: entry %.100q: %w", e.Name, err)
			}
		}
		if err := expect(d, json.Delim(']')); err != nil {
			return nil, err
		}
	}
	if err := expect(d, json.Delim('}')); err != nil {
		return nil, err
	}
	c, err := b.finish()
	if err != nil {
		return nil, fmt.Errorf("read the table of contents: %w", err)
	}
	return c, nil
}

func tocError(err error) error { return fmt.Errorf("read the table of contents: %w", err) }

func expect(d *json.Decoder, want json.Token) error {
	got, err := d.Token()
	if err != nil {
		return tocError(err)
	}
	if got != want {
		return fmt.Errorf("read the table of contents: it has %v where %v should be", got, want)
	}
	return nil
}

// builder makes contents of entries.
type builder struct {
	c      *contents
	end    int64
	byPath map[string]int // of entries, where a later one takes the place of one before
	offs   []int64        // where streams begin, also those of landmarks
	data   []chunkData    // by chunk
	file   int            // the entry that chunks are of, -1 for one that is none
	next   int64          // where its next chunk should begin
	whole  string         // its digest
	stop   int64          // where its last chunk ends in the blob, 0 if it does not say so
}

type chunkData struct{ off, end, inner int64 }

func (b *builder) add(e *tocEntry) error {
	if e.Type == "chunk" {
		return b.addChunk(e)
	}
	if err := b.endFile(); err != nil {
		return err
	}
	b.file = -1
	name, err := cleanPath(e.Name)
	if err != nil {
		return err
	}
	switch name {
	case estargz.PrefetchLandmark, estargz.NoPrefetchLandmark:
		b.c.landmark = 0
		if name == estargz.PrefetchLandmark {
			b.c.landmark = e.Offset
		}
		b.offs = append(b.offs, e.Offset)
		return nil
	case estargz.TOCTarName:
		return nil
	}
	s, err := toEntry(name, e)
	if err != nil {
		return err
	}
	i, again := b.byPath[name]
	if again {
		b.c.entries[i] = s
	} else {
		i = len(b.c.entries)
		b.c.entries = append(b.c.entries, s)
		b.byPath[name] = i
	}
	if e.Type != "reg" || e.Size == 0 {
		return nil
	}
	b.file, b.next, b.whole, b.stop = i, 0, e.Digest, e.EndOffset
	if e.ChunkOffset != 0 {
		return errors.New("its first chunk does not begin at offset 0")
	}
	return b.addChunk(e)
}

// endFile checks that all of the file before was there.
func (b *builder) endFile() error {
	if len(b.c.entries) == 0 || b.file < 0 {
		return nil
	}
	if f := &b.c.entries[b.file]; b.next != int64(f.Size) && f.Mode&unix.S_IFMT == unix.S_IFREG {
		return fmt.Errorf("the chunks of %.100q end at %d of %d bytes", f.Path, b.next, f.Size)
	}
	return nil
}

func (b *builder) addChunk(e *tocEntry) error {
	if b.file < 0 || len(b.c.entries) == 0 {
		return errors.New("it is a chunk of no file")
	}
	f := &b.c.entries[b.file]
	size := e.ChunkSize
	if size == 0 {
		size = int64(f.Size) - e.ChunkOffset
	}
	if e.ChunkOffset != b.next || size <= 0 || size > store.MaxChunk || size > int64(f.Size)-b.next {
		return fmt.Errorf("a chunk of %d bytes is at %d of %d, and the one before ends at %d", size, e.ChunkOffset, f.Size, b.next)
	}
	at := b.next
	b.next += size
	if e.ChunkType == "zeros" {
		if e.Offset > 0 {
			b.offs = append(b.offs, e.Offset) // it is packed all the same
		}
		return nil
	}
	digest := e.ChunkDigest
	if digest == "" && at == 0 && size == int64(f.Size) {
		digest = b.whole
	}
	sum, err := parseDigest(digest)
	if err != nil {
		return fmt.Errorf("the chunk at %d has no digest that can be verified", at)
	}
	end := e.EndOffset
	if e.Type != "chunk" {
		end = 0
	}
	if end == 0 && b.next == int64(f.Size) {
		end = b.stop // a file's endOffset is that of its last chunk
	}
	if e.Offset < 0 || e.Offset >= b.end || end < 0 || end > b.end || e.InnerOffset < 0 || e.InnerOffset > maxInner || end != 0 && end <= e.Offset {
		return fmt.Errorf("the chunk at %d is not in the blob's data, which ends at %d", at, b.end)
	}
	if len(b.c.chunks) == math.MaxUint32 {
		return errors.New("there are too many chunks")
	}
	f.Chunks = append(f.Chunks, store.Span{Off: uint64(at), Len: uint64(size), Chunk: uint32(len(b.c.chunks))})
	b.c.chunks = append(b.c.chunks, store.Chunk{Digest: sum, Size: uint32(size)})
	b.data = append(b.data, chunkData{e.Offset, end, e.InnerOffset})
	b.offs = append(b.offs, e.Offset)
	b.c.total += size
	return nil
}

func (b *builder) finish() (*contents, error) {
	if err := b.endFile(); err != nil {
		return nil, err
	}
	if err := b.resolveLinks(); err != nil {
		return nil, err
	}
	c := b.c
	slices.Sort(b.offs)
	b.offs = slices.Compact(b.offs)
	c.order = make([]uint32, len(c.chunks))
	for i := range c.order {
		c.order[i] = uint32(i)
	}
	slices.SortStableFunc(c.order, func(x, y uint32) int {
		return cmp.Or(cmp.Compare(b.data[x].off, b.data[y].off), cmp.Compare(b.data[x].inner, b.data[y].inner))
	})
	c.at = make([]place, len(c.chunks))
	for n, i := range c.order {
		d := b.data[i]
		if last := len(c.streams) - 1; last >= 0 && c.streams[last].off == d.off {
			before := c.order[n-1]
			if d.inner < c.at[before].inner+int64(c.chunks[before].Size) {
				return nil, fmt.Errorf("chunks at %d of the blob overlap", d.off)
			}
			c.streams[last].hi = uint32(n + 1)
		} else {
			end := d.end
			if end == 0 {
				end = b.end
				if next, _ := slices.BinarySearch(b.offs, d.off+1); next < len(b.offs) {
					end = b.offs[next]
				}
			}
			if last >= 0 && c.streams[last].end > d.off {
				return nil, fmt.Errorf("chunks at %d and %d of the blob overlap", c.streams[last].off, d.off)
			}
			c.streams = append(c.streams, compressed{off: d.off, end: end, lo: uint32(n), hi: uint32(n + 1)})
		}
		c.at[i] = place{uint32(len(c.streams) - 1), d.inner}
	}
	if c.landmark > b.end {
		return nil, fmt.Errorf("the prefetch landmark is at %d, after the blob's data", c.landmark)
	}
	return c, nil
}

// resolveLinks has hard links name the file that they are of, and not one another.
func (b *builder) resolveLinks() error {
	for i := range b.c.entries {
		e := &b.c.entries[i]
		if !e.Hardlink {
			continue
		}
		for n := 0; ; n++ {
			j, ok := b.byPath[e.Target]
			if !ok || n > 40 {
				return fmt.Errorf("%.100q is a hard link to %.100q, which is not there", e.Path, e.Target)
			}
			to := &b.c.entries[j]
			if to.Mode&unix.S_IFMT == unix.S_IFDIR {
				return fmt.Errorf("%.100q is a hard link to %.100q, which is a directory", e.Path, e.Target)
			}
			if !to.Hardlink {
				// All names of a file have the same attributes: its own.
				e.Mode = to.Mode
				break
			}
			e.Target = to.Target
		}
	}
	return nil
}

func toEntry(name string, e *tocEntry) (store.Entry, error) {
	s := store.Entry{Path: name, Mode: uint32(e.Mode & 0o7777)}
	if e.Type != "char" && e.Type != "block" {
		e.DevMajor, e.DevMinor = 0, 0
	}
	for _, n := range []struct {
		what string
		v    int64
		to   *uint32
	}{{"uid", e.UID, &s.UID}, {"gid", e.GID, &s.GID}, {"device", e.DevMajor, &s.RdevMajor}, {"device", e.DevMinor, &s.RdevMinor}} {
		if n.v < 0 || n.v > math.MaxUint32 {
			return s, fmt.Errorf("its %s is %d", n.what, n.v)
		}
		*n.to = uint32(n.v)
	}
	switch e.Type {
	case "dir":
		s.Mode |= unix.S_IFDIR
	case "reg":
		s.Mode |= unix.S_IFREG
		if e.Size < 0 || e.Size > 1<<62 {
			return s, fmt.Errorf("its size is %d", e.Size)
		}
		s.Size = uint64(e.Size)
	case "symlink":
		s.Mode |= unix.S_IFLNK
		s.Target = e.LinkName
	case "hardlink":
		target, err := cleanPath(e.LinkName)
		if err != nil {
			return s, err
		}
		s.Mode |= unix.S_IFREG // until resolveLinks has found the file
		s.Target, s.Hardlink = target, true
	case "char":
		s.Mode |= unix.S_IFCHR
	case "block":
		s.Mode |= unix.S_IFBLK
	case "fifo":
		s.Mode |= unix.S_IFIFO
	default:
		return s, fmt.Errorf("its type is %.20q", e.Type)
	}
	if s.RdevMajor >= 1<<12 || s.RdevMinor >= 1<<20 {
		return s, fmt.Errorf("its device number is %d:%d: expected 12 and 20 bits", e.DevMajor, e.DevMinor)
	}
	if name == "" && e.Type != "dir" {
		return s, errors.New("the root is no directory")
	}
	if e.Type == "symlink" && (s.Target == "" || len(s.Target) > 4095 || strings.IndexByte(s.Target, 0) >= 0) {
		return s, fmt.Errorf("its target has %d bytes, or a NUL: expected 1 to 4095", len(s.Target))
	}
	if e.ModTime != "" {
		t, err := time.Parse(time.RFC3339, e.ModTime)
		if err != nil {
			return s, fmt.Errorf("its time %.40q cannot be read", e.ModTime)
		}
		s.MtimeSec, s.MtimeNsec = t.Unix(), uint32(t.Nanosecond())
	}
	for k, v := range e.Xattrs {
		if k == "" || len(k) > 255 || strings.IndexByte(k, 0) >= 0 || len(v) > 64<<10 {
			return s, fmt.Errorf("its extended attribute %.40q is too long", k)
		}
		s.Xattrs = append(s.Xattrs, store.Xattr{Name: k, Value: v})
	}
	slices.SortFunc(s.Xattrs, func(a, b store.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return s, nil
}

// cleanPath is a path relative to the root, without what means nothing. One that leads out of it is an error.
func cleanPath(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", errors.New("its name has a NUL")
	}
	if slices.Contains(strings.Split(name, "/"), "..") {
		return "", errors.New(`its name has ".." in it`)
	}
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if len(name) > store.MaxPath {
		return "", fmt.Errorf("its name is longer than %d bytes", store.MaxPath)
	}
	for part := range strings.SplitSeq(name, "/") {
		if len(part) > 255 {
			return "", errors.New("its name is longer than 255 bytes")
		}
	}
	return name, nil
}

func parseDigest(s string) (d [store.DigestSize]byte, err error) {
	text, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(text) != 2*len(d) {
		return d, fmt.Errorf("%.80q is no sha256 digest", s)
	}
	_, err = hex.Decode(d[:], []byte(text))
	return d, err
}
