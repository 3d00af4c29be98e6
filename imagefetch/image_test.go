package imagefetch

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"

	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/imagefetch/registry"
)

// TestMountRequests is T-D1: an image is mounted with two ranges of each layer, a small file is read with one more, and who comes
// after needs none.
func TestMountRequests(t *testing.T) {
	img := someImage(t)
	cfg := quick(img)
	cfg.Cache = cacheDir(t)
	m := open(t, cfg)
	layersOf(t, m)
	reqs := img.Server.Requests()
	var ranges []string
	for _, r := range reqs {
		if r.Range != "" {
			ranges = append(ranges, r.Range)
		}
	}
	blob := img.Layers[0].Blob
	if len(reqs) != 3 || len(ranges) != 2 {
		t.Fatalf("mounting asked %d times, for the ranges %v: expected the manifest, the footer and the table of contents: %+v", len(reqs), ranges, reqs)
	}
	_, toc, _, err := (&estargz.GzipDecompressor{}).ParseFooter(blob[len(blob)-estargz.FooterSize:])
	if err != nil {
		t.Fatal(err)
	}
	footer := int64(len(blob) - estargz.FooterSize)
	if want := []string{byteRange(footer, int64(len(blob))), byteRange(toc, footer)}; !slices.Equal(ranges, want) {
		t.Errorf("mounting asked for %v, expected the footer and the table of contents, %v", ranges, want)
	}
	if _, n := img.Server.Blobs(); n != int64(len(blob))-toc {
		t.Errorf("mounting fetched %d bytes, expected %d", n, int64(len(blob))-toc)
	}
	img.Server.Reset()
	if b, err := read(t, m, 0, "etc/hostname"); err != nil || string(b) != "box\n" {
		t.Fatalf("etc/hostname is %q, %v", b, err)
	}
	if got, want := rangesOf(img), chunkRanges(t, blob, "etc/hostname"); !slices.Equal(got, want) || len(got) != 1 {
		t.Errorf("a small file took the ranges %v, expected the one chunk's, %v", got, want)
	}
	img.Server.Reset()
	if b, err := read(t, m, 0, "etc/hostname"); err != nil || string(b) != "box\n" {
		t.Fatalf("etc/hostname is %q, %v", b, err)
	}
	second := open(t, cfg)
	if b, err := read(t, second, 0, "etc/hostname"); err != nil || string(b) != "box\n" {
		t.Fatalf("etc/hostname is %q, %v", b, err)
	}
	if n := len(img.Server.Requests()); n != 0 {
		t.Errorf("reading it again, also from another process' cache, asked %d times", n)
	}
}

func byteRange(off, end int64) string { return fmt.Sprintf("bytes=%d-%d", off, end-1) }

// rangesOf are those that a registry has been asked for.
func rangesOf(img *imagetest.Image) (ranges []string) {
	for _, r := range img.Server.Requests() {
		ranges = append(ranges, r.Range)
	}
	return ranges
}

// chunkRanges are those of a file's chunks, as the library has them that has built the layer.
func chunkRanges(t *testing.T, blob []byte, name string) (ranges []string) {
	t.Helper()
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
	if err != nil {
		t.Fatal(err)
	}
	file, ok := r.Lookup(name)
	if !ok {
		t.Fatalf("there is no %s", name)
	}
	for off := int64(0); off < file.Size; {
		c, ok := r.ChunkEntryForOffset(name, off)
		if !ok {
			t.Fatalf("%s has no chunk at %d", name, off)
		}
		ranges = append(ranges, byteRange(c.Offset, c.NextOffset()))
		off = c.ChunkOffset + c.ChunkSize
	}
	return ranges
}

// TestFormats reads everything of layers of each kind.
func TestFormats(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    imagetest.Options
	}{
		{"estargz", imagetest.Options{}},
		{"small chunks", imagetest.Options{ChunkSize: 4096}},
		{"inner offsets", imagetest.Options{MinChunkSize: 50 << 10}},
		{"no landmark", imagetest.Options{NoLandmark: true}},
		{"zstd:chunked", imagetest.Options{Format: imagetest.ZstdChunked}},
		{"zstd:chunked with inner offsets", imagetest.Options{Format: imagetest.ZstdChunked, MinChunkSize: 50 << 10}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img := imagetest.NewServer(t).Push(t, "some/repo", imagetest.Build(t, someFiles(), tt.o))
			caches := []CacheConfig{{}}
			if tt.name == "estargz" {
				caches = append(caches, cacheDir(t))
			}
			for _, c := range caches {
				cfg := quick(img)
				cfg.Cache = c
				m := open(t, cfg)
				check(t, m, img)
				st, err := m.Status(within(t), 0)
				if err != nil || st.Fetched != st.Size || st.Size != int64(len(img.Layers[0].Blob)) || st.Err != "" {
					t.Errorf("the status is %+v, %v; expected all of it", st, err)
				}
				before := len(img.Server.Requests())
				check(t, m, img)
				if n := len(img.Server.Requests()) - before; n != 0 {
					t.Errorf("reading all of it again asked %d times", n)
				}
			}
		})
	}
}

// TestExternalTOC is of layers whose tables of contents are in another image.
func TestExternalTOC(t *testing.T) {
	l := imagetest.Build(t, someFiles(), imagetest.Options{Format: imagetest.ExternalTOC})
	other := imagetest.Build(t, someFiles()[:3], imagetest.Options{Format: imagetest.ExternalTOC})
	swapped := other
	swapped.TOC = l.TOC
	s := imagetest.NewServer(t)
	img := s.Push(t, "a/b:v1", l, other)
	cfg := quick(img)
	cfg.Reference = img.Tag
	cfg.Cache = cacheDir(t)
	if _, err := open(t, cfg).Layers(within(t)); err == nil || !strings.Contains(err.Error(), "status 404") {
		t.Errorf("without the other image: %v", err)
	}
	s.Push(t, "a/b:v1-esgztoc", l.TOCLayer(t))
	if _, err := open(t, cfg).Layers(within(t)); !errors.Is(err, errNoTOC) {
		t.Errorf("with one table of two: %v", err)
	}
	s.Push(t, "a/b:v1-esgztoc", l.TOCLayer(t), swapped.TOCLayer(t))
	if _, err := open(t, cfg).Layers(within(t)); !errors.Is(err, registry.ErrContent) {
		t.Errorf("with another layer's table: %v", err)
	}
	tocs := s.Push(t, "a/b:v1-esgztoc", other.TOCLayer(t), l.TOCLayer(t))
	check(t, open(t, cfg), img)
	cfg.Reference, cfg.Cache = img.Ref, cacheDir(t)
	if _, err := open(t, cfg).Layers(within(t)); !errors.Is(err, errNoTOC) || !strings.Contains(err.Error(), "toc_image") {
		t.Errorf("by digest: %v", err)
	}
	cfg.TOCImage = tocs.Ref
	m := open(t, cfg)
	check(t, m, img)
	shut(t, m)
	s.Close()
	check(t, open(t, cfg), img)
}

// TestRandomReads is T-D2: reading somewhere fetches the bytes of one chunk, exactly.
func TestRandomReads(t *testing.T) {
	img := someImage(t)
	m := open(t, quick(img))
	e := entryOf(t, m, 0, "big")
	img.Server.Reset()
	for _, i := range []int{1, 0, 2} {
		f, err := m.Chunk(within(t), 0, e.Chunks[i].Chunk)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	all := chunkRanges(t, img.Layers[0].Blob, "big")
	if got, want := rangesOf(img), []string{all[1], all[0], all[2]}; !slices.Equal(got, want) {
		t.Errorf("three chunks took the ranges %v, expected %v", got, want)
	}
}
