package imagetest

import (
	"archive/tar"
	"bytes"
	"io"
	"net/http"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// TestImage reads back, with the library alone, what New has made.
func TestImage(t *testing.T) {
	files := []File{
		{Name: "etc/"},
		{Name: "etc/hostname", Data: []byte("box\n"), Xattrs: map[string]string{"user.k": "v"}},
		{Name: "link", Type: tar.TypeSymlink, Link: "etc/hostname", Mode: 0o777},
	}
	img := New(t, files)
	ref, err := name.ParseReference(img.Ref)
	must(t, err)
	got, err := remote.Image(ref)
	must(t, err)
	m, err := got.Manifest()
	must(t, err)
	if len(m.Layers) != 1 || m.Layers[0].Digest.String() != img.Layers[0].Digest || m.Layers[0].Annotations[estargz.TOCJSONDigestAnnotation] != img.Layers[0].TOCDigest {
		t.Fatalf("the manifest's layers are %+v", m.Layers)
	}
	img.Server.Reset()
	req, err := http.NewRequest(http.MethodGet, img.Server.URL+"/v2/test/image/blobs/"+img.Layers[0].Digest, nil)
	must(t, err)
	req.Header.Set("Range", "bytes=1-4")
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	part, err := io.ReadAll(resp.Body)
	must(t, err)
	must(t, resp.Body.Close())
	if !bytes.Equal(part, img.Layers[0].Blob[1:5]) {
		t.Errorf("bytes 1 to 4 are %x", part)
	}
	http.DefaultClient.CloseIdleConnections()
	if gets, n := img.Server.Blobs(); gets != 1 || n != 4 {
		t.Errorf("%d GETs of %d bytes were counted, want 1 of 4", gets, n)
	}
}

func TestBuild(t *testing.T) {
	files := []File{{Name: "a", Data: bytes.Repeat([]byte("a"), 1000)}, {Name: "b", Data: []byte("b")}}
	for _, tt := range []struct {
		name     string
		o        Options
		landmark string
	}{
		{"estargz", Options{}, estargz.NoPrefetchLandmark},
		{"inner offsets", Options{MinChunkSize: 4096}, estargz.NoPrefetchLandmark},
		{"prioritized", Options{Prioritized: []string{"b"}}, estargz.PrefetchLandmark},
		{"no landmark", Options{NoLandmark: true}, ""},
		{"zstd", Options{Format: ZstdChunked}, estargz.NoPrefetchLandmark},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := Build(t, files, tt.o)
			r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(l.Blob), 0, int64(len(l.Blob))), estargz.WithDecompressors(&zstdchunked.Decompressor{}))
			must(t, err)
			if r.TOCDigest().String() != l.TOCDigest {
				t.Errorf("the table of contents is %s, Build says %s", r.TOCDigest(), l.TOCDigest)
			}
			for _, mark := range []string{estargz.NoPrefetchLandmark, estargz.PrefetchLandmark} {
				if _, ok := r.Lookup(mark); ok != (mark == tt.landmark) {
					t.Errorf("%s is there: %v", mark, ok)
				}
			}
			if _, ok := l.Annotations[zstdchunked.ManifestPositionAnnotation]; ok != (tt.o.Format == ZstdChunked) {
				t.Errorf("annotations are %v", l.Annotations)
			}
		})
	}
}
