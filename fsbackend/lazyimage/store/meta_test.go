package store

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const someDigest = digestName + "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// sample is an image with something of everything.
func sample() []Layer {
	return []Layer{
		{
			Digest: someDigest, Size: 1 << 40,
			Chunks: []Chunk{{Digest: [DigestSize]byte{1}, Size: 10}, {Digest: [DigestSize]byte{2}, Size: MaxChunk}},
			Entries: []Entry{
				{Path: "dir/link", Hardlink: true, Target: "dir/file"},
				{Mode: unix.S_IFDIR | 0o755, MtimeSec: -1},
				{
					Path: "dir/file", Mode: unix.S_IFREG | 0o4755, UID: 1, GID: 1<<32 - 2, MtimeSec: 1 << 33, MtimeNsec: 999_999_999, Size: 5 << 30,
					Xattrs: []Xattr{{"security.capability", []byte{0, 1}}, {"user.a", []byte{}}},
					Chunks: []Span{{Off: 5, Len: 10, Chunk: 0}, {Off: 15, Len: MaxChunk, Chunk: 1}, {Off: 4 << 30, Len: 10, Chunk: 0}},
				},
				{Path: "dir/\xff\n", Mode: unix.S_IFLNK | 0o777, Target: "../x"},
				{Path: "null", Mode: unix.S_IFCHR | 0o666, RdevMajor: 1, RdevMinor: 3},
				{Path: ".wh.gone", Mode: unix.S_IFREG},
			},
		},
		{Digest: someDigest},
	}
}

func TestMetaRoundTrip(t *testing.T) {
	b, err := EncodeMeta(sample())
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeMeta(b)
	if err != nil {
		t.Fatal(err)
	}
	want := sample()
	want[1].Entries, want[1].Chunks = []Entry{}, []Chunk{}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("decoded\n%+v, expected\n%+v", got, want)
	}
	clear(b) // nothing of it is kept
	if !reflect.DeepEqual(got, want) {
		t.Error("what was decoded changes with what it was decoded from")
	}
}

// What the type of an entry has no use for is nobody's concern.
func TestEncodeMetaLeavesOut(t *testing.T) {
	l := Layer{Digest: someDigest, Chunks: []Chunk{{Size: 1}}, Entries: []Entry{
		{Path: "d", Mode: unix.S_IFDIR, Size: 4096, RdevMajor: 1 << 30, Target: "x", Chunks: []Span{{Chunk: 7}}},
		{Path: "f", Mode: unix.S_IFREG, RdevMinor: 9, Target: "x"},
		{Path: "h", Mode: 0xffffffff, Size: 7, Hardlink: true, Target: "f", Xattrs: []Xattr{{Name: ""}}},
	}}
	b, err := EncodeMeta([]Layer{l})
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeMeta(b)
	if err != nil {
		t.Fatal(err)
	}
	want := []Entry{{Path: "d", Mode: unix.S_IFDIR}, {Path: "f", Mode: unix.S_IFREG}, {Path: "h", Hardlink: true, Target: "f"}}
	if !reflect.DeepEqual(got[0].Entries, want) {
		t.Errorf("decoded %+v, expected %+v", got[0].Entries, want)
	}
}

// Each of these breaks one promise of a doc comment: the encoder says so, and so does the decoder, given what a hostile one makes of it.
func TestMetaChecks(t *testing.T) {
	file := func(change func(*Entry)) func(*Layer) {
		return func(l *Layer) {
			change(&l.Entries[2])
			l.Entries[0].Target = l.Entries[2].Path
		}
	}
	for name, breakIt := range map[string]func(*Layer){
		"digest":            func(l *Layer) { l.Digest = "sha256:0123" },
		"digest's alphabet": func(l *Layer) { l.Digest = strings.ToUpper(someDigest) },
		"layer size":        func(l *Layer) { l.Size = -1 },
		"empty chunk":       func(l *Layer) { l.Chunks[0].Size = 0 },
		"large chunk":       func(l *Layer) { l.Chunks[1].Size = MaxChunk + 1 },
		"dot":               file(func(x *Entry) { x.Path = "a/./b" }),
		"dots":              file(func(x *Entry) { x.Path = ".." }),
		"absolute path":     file(func(x *Entry) { x.Path = "/a" }),
		"slash at the end":  file(func(x *Entry) { x.Path = "a/" }),
		"NUL":               file(func(x *Entry) { x.Path = "a\x00" }),
		"long name":         file(func(x *Entry) { x.Path = strings.Repeat("n", 256) }),
		"long path":         file(func(x *Entry) { x.Path = strings.Repeat("n/", MaxPath/2) + "nn" }),
		"root of a file":    file(func(x *Entry) { x.Path = "" }),
		"no type":           file(func(x *Entry) { x.Mode = 0o644 }),
		"two types":         file(func(x *Entry) { x.Mode = unix.S_IFREG | unix.S_IFIFO | 0o644 }),
		"mode":              file(func(x *Entry) { x.Mode |= 1 << 20 }),
		"nanoseconds":       file(func(x *Entry) { x.MtimeNsec = 1e9 }),
		"size":              file(func(x *Entry) { x.Size = maxSize + 1 }),
		"size below chunks": file(func(x *Entry) { x.Size = 4<<30 + 9 }),
		"chunk number":      file(func(x *Entry) { x.Chunks[0].Chunk = 2 }),
		"overlap":           file(func(x *Entry) { x.Chunks[0].Off = 6 }),
		"order":             file(func(x *Entry) { x.Chunks[2].Off = 0 }),
		"offset":            file(func(x *Entry) { x.Chunks[2].Off = 1<<64 - 5 }),
		"xattr name":        file(func(x *Entry) { x.Xattrs[0].Name = "" }),
		"xattr value":       file(func(x *Entry) { x.Xattrs[0].Value = make([]byte, maxXattr+1) }),
		"xattr order":       file(func(x *Entry) { x.Xattrs[0].Name = "user.a" }),
		"no target":         func(l *Layer) { l.Entries[3].Target = "" },
		"long target":       func(l *Layer) { l.Entries[3].Target = strings.Repeat("t", 4096) },
		"target with a NUL": func(l *Layer) { l.Entries[3].Target = "a\x00" },
		"device number":     func(l *Layer) { l.Entries[4].RdevMajor = 1 << 12 },
	} {
		t.Run(name, func(t *testing.T) {
			layers := sample()
			breakIt(&layers[0])
			if _, err := EncodeMeta(layers); err == nil {
				t.Error("it is encoded")
			}
			e := encoder{records: make([]byte, metaHeaderSize)}
			for i := range layers {
				links, err := layers[i].links()
				if err != nil {
					t.Fatal(err)
				}
				e.layer(&layers[i], links)
			}
			if got, err := DecodeMeta(e.finish(len(layers))); err == nil {
				t.Errorf("it is decoded to %+v", got)
			}
		})
	}
	for name, target := range map[string]string{"missing": "nothing", "itself": "dir/link", "another link": "second", "directory": ""} {
		layers := sample()
		layers[0].Entries[0].Target = target
		layers[0].Entries = append(layers[0].Entries, Entry{Path: "second", Hardlink: true, Target: "dir/file"})
		if _, err := EncodeMeta(layers); err == nil {
			t.Errorf("a hard link to %s is encoded", name)
		}
	}
}

// Every hard link's index is checked.
func TestDecodeMetaLinks(t *testing.T) {
	b, err := EncodeMeta(sample())
	if err != nil {
		t.Fatal(err)
	}
	at := metaHeaderSize + layerHeaderSize + 2*chunkSize + entrySize - 4 // of entry 0
	if le.Uint32(b[at:]) != 2 {
		t.Fatalf("index is %d, expected 2", le.Uint32(b[at:]))
	}
	for i, ok := range []bool{false, false, true, true, true, true, false} {
		le.PutUint32(b[at:], uint32(i))
		if _, err := DecodeMeta(b); (err == nil) != ok {
			t.Errorf("link to entry %d: %v", i, err)
		}
	}
	le.PutUint32(b[at:], 2)
	le.PutUint32(b[at+entrySize:], 2)
	if _, err := DecodeMeta(b); err == nil {
		t.Error("an entry that is no link leads somewhere")
	}
}

// Whatever is cut off or changed, it is decoded in little time, and what comes out is whole.
func TestDecodeMetaHostile(t *testing.T) {
	good, err := EncodeMeta(sample())
	if err != nil {
		t.Fatal(err)
	}
	for n := range good {
		if _, err := DecodeMeta(good[:n]); err == nil {
			t.Errorf("%d of %d bytes are decoded", n, len(good))
		}
	}
	for at := 0; at+4 <= len(good); at++ {
		b := bytes.Clone(good)
		le.PutUint32(b[at:], 0xffffffff)
		if layers, err := DecodeMeta(b); err == nil {
			again(t, layers)
		}
	}
}

// again encodes what was decoded, which fails if it was not as the doc comments say.
func again(t *testing.T, layers []Layer) {
	t.Helper()
	if _, err := EncodeMeta(layers); err != nil {
		t.Errorf("decoded layers are not encoded: %v", err)
	}
}

func FuzzDecodeMeta(f *testing.F) {
	b, err := EncodeMeta(sample())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		layers, err := DecodeMeta(b)
		if err != nil {
			return
		}
		for i := range layers {
			// Encoding finds hard links by path, of which a hostile image has several with one.
			paths := make(map[string]bool)
			for _, x := range layers[i].Entries {
				if paths[x.Path] {
					return
				}
				paths[x.Path] = true
			}
		}
		back, err := EncodeMeta(layers)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(back, b) {
			t.Fatal("what was decoded is encoded differently")
		}
	})
}

// many is a layer of n entries as images have them.
func many(n int) []Layer {
	rnd := rand.New(rand.NewPCG(1, 2))
	l := Layer{Digest: someDigest, Size: 1 << 30}
	for i := range n {
		size := uint64(rnd.IntN(1 << 20))
		x := Entry{Path: fmt.Sprintf("usr/lib/package%03d/part%02d/file-%d.so", i%700, i%50, i), Mode: unix.S_IFREG | 0o644, MtimeSec: int64(i), Size: size}
		if size > 0 {
			x.Chunks = []Span{{Len: size, Chunk: uint32(len(l.Chunks))}}
			l.Chunks = append(l.Chunks, Chunk{Size: uint32(size)})
		}
		l.Entries = append(l.Entries, x)
	}
	return []Layer{l}
}

func TestDecodeMetaBig(t *testing.T) {
	b, err := EncodeMeta(many(50_000))
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := time.Now()
	layers, err := DecodeMeta(b)
	took := time.Since(began)
	runtime.ReadMemStats(&after)
	if err != nil || len(layers[0].Entries) != 50_000 {
		t.Fatal(err)
	}
	taken := after.TotalAlloc - before.TotalAlloc
	t.Logf("%d bytes decoded in %v, %d bytes taken in %d pieces", len(b), took, taken, after.Mallocs-before.Mallocs)
	if taken > 3*uint64(len(b)) || after.Mallocs-before.Mallocs > 200 {
		t.Errorf("%d bytes took %d in %d pieces", len(b), taken, after.Mallocs-before.Mallocs)
	}
	if took > time.Minute {
		t.Errorf("decoded in %v", took)
	}
}

// Duplicate paths are not the decoder's business, but must not keep it busy.
func TestDecodeMetaDuplicates(t *testing.T) {
	l := many(10)
	l[0].Entries = slices.Repeat(l[0].Entries, 2)
	b, err := EncodeMeta(l)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := DecodeMeta(b); err != nil || len(got[0].Entries) != 20 {
		t.Errorf("%d entries, %v", len(got[0].Entries), err)
	}
}
