// Package imagetest makes images for tests, and a registry on the loopback that serves them, counts what is asked of it, and can be
// told to misbehave.
package imagetest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// File is one entry of a layer.
type File struct {
	// Name is its path in the layer, relative. One that ends in a slash is a directory if Type is 0.
	Name string
	// Type is as in package tar; 0 stands for a regular file, or a directory.
	Type byte
	// Mode is 0755 for directories and 0644 for others if it is 0.
	Mode     int64
	UID, GID int
	// ModTime is the 1st of January 2024 if it is zero.
	ModTime time.Time
	Data    []byte
	// Link is the target of a symbolic or hard link.
	Link         string
	Xattrs       map[string]string
	Major, Minor int64
}

// Format is what kind of blob a layer becomes.
type Format int

// Formats.
const (
	EStargz     Format = iota // gzip, with a table of contents
	ZstdChunked               // zstd, with a table of contents
	ExternalTOC               // eStargz whose table of contents is in another image
	PlainGzip                 // as docker build makes them: nothing lazy about it
	PlainZstd
	PlainTar
)

// Options say how a layer is built.
type Options struct {
	Format Format
	// ChunkSize is the largest chunk; 0 is 64 KiB.
	ChunkSize int
	// MinChunkSize puts small files together in one compressed stream, so that the table of contents has inner offsets.
	MinChunkSize int
	// Prioritized are files before the prefetch landmark; with none of them, the landmark is the one against prefetching.
	Prioritized []string
	// NoLandmark leaves the landmark out, as other builders do.
	NoLandmark bool
	// NoAnnotation leaves the digest of the table of contents out of the manifest.
	NoAnnotation bool
}

// Layer is one that has been built.
type Layer struct {
	Files       []File
	Blob        []byte
	MediaType   types.MediaType
	Digest      string // of the blob
	TOCDigest   string // of the table of contents' JSON; "" for a plain layer
	TOC         []byte // as it is packed, of ExternalTOC only
	Annotations map[string]string
}

// Tar packs files.
func Tar(t testing.TB, files []File) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{
			Name: f.Name, Typeflag: f.Type, Mode: f.Mode, Uid: f.UID, Gid: f.GID, ModTime: f.ModTime,
			Linkname: f.Link, Devmajor: f.Major, Devminor: f.Minor, Size: int64(len(f.Data)), Format: tar.FormatPAX,
		}
		if f.Type == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(f.Name, "/") {
				h.Typeflag = tar.TypeDir
			}
		}
		if f.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if f.ModTime.IsZero() {
			h.ModTime = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
		}
		for name, value := range f.Xattrs {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+name] = value
		}
		must(t, w.WriteHeader(h))
		_, err := w.Write(f.Data)
		must(t, err)
	}
	must(t, w.Close())
	return buf.Bytes()
}

// Build makes a layer of files.
func Build(t testing.TB, files []File, o Options) Layer {
	t.Helper()
	l := Layer{Files: files, Annotations: map[string]string{}, MediaType: types.OCILayer}
	packed := Tar(t, files)
	switch o.Format {
	case EStargz, ZstdChunked, ExternalTOC:
		l.buildLazy(t, packed, o)
	case PlainGzip:
		var buf bytes.Buffer
		w := gzip.NewWriter(&buf)
		_, err := w.Write(packed)
		must(t, err)
		must(t, w.Close())
		l.Blob = buf.Bytes()
	case PlainZstd:
		w, err := zstd.NewWriter(nil)
		must(t, err)
		l.Blob, l.MediaType = w.EncodeAll(packed, nil), types.OCILayerZStd
		must(t, w.Close())
	case PlainTar:
		l.Blob, l.MediaType = packed, types.OCIUncompressedLayer
	}
	if o.NoAnnotation {
		l.Annotations = nil
	}
	sum, _, err := v1.SHA256(bytes.NewReader(l.Blob))
	must(t, err)
	l.Digest = sum.String()
	return l
}

func (l *Layer) buildLazy(t testing.TB, packed []byte, o Options) {
	t.Helper()
	if o.ChunkSize == 0 {
		o.ChunkSize = 64 << 10
	}
	var c estargz.Compression = struct {
		*estargz.GzipCompressor
		*estargz.GzipDecompressor
	}{estargz.NewGzipCompressorWithLevel(gzip.BestSpeed), &estargz.GzipDecompressor{}}
	if o.Format == ZstdChunked {
		l.MediaType = types.OCILayerZStd
		c = struct {
			*zstdchunked.Compressor
			*zstdchunked.Decompressor
		}{
			&zstdchunked.Compressor{CompressionLevel: zstd.SpeedFastest, Metadata: l.Annotations},
			&zstdchunked.Decompressor{},
		}
	}
	var elsewhere *externaltoc.GzipCompressor
	if o.Format == ExternalTOC {
		elsewhere = externaltoc.NewGzipCompressorWithLevel(gzip.BestSpeed)
		c = struct {
			*externaltoc.GzipCompressor
			*estargz.GzipDecompressor
		}{elsewhere, &estargz.GzipDecompressor{}}
	}
	if o.NoLandmark {
		// Build puts one in whatever is asked for; the writer below it does not.
		var buf bytes.Buffer
		w := estargz.NewWriterWithCompressor(&buf, c)
		w.ChunkSize, w.MinChunkSize = o.ChunkSize, o.MinChunkSize
		must(t, w.AppendTar(bytes.NewReader(packed)))
		sum, err := w.Close()
		must(t, err)
		l.Blob, l.TOCDigest = buf.Bytes(), sum.String()
	} else {
		b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(packed), 0, int64(len(packed))), estargz.WithChunkSize(o.ChunkSize),
			estargz.WithMinChunkSize(o.MinChunkSize), estargz.WithPrioritizedFiles(o.Prioritized), estargz.WithParallelism(1), estargz.WithCompression(c))
		must(t, err)
		l.Blob, err = io.ReadAll(b)
		must(t, err)
		l.TOCDigest = b.TOCDigest().String()
		must(t, b.Close())
	}
	l.Annotations[estargz.TOCJSONDigestAnnotation] = l.TOCDigest
	if elsewhere != nil {
		var buf bytes.Buffer
		_, err := elsewhere.WriteTOCTo(&buf)
		must(t, err)
		l.TOC = buf.Bytes()
	}
}

// TOCLayer is the layer of an image of tables of contents that has l's.
func (l Layer) TOCLayer(t testing.TB) Layer {
	t.Helper()
	sum, _, err := v1.SHA256(bytes.NewReader(l.TOC))
	must(t, err)
	return Layer{Blob: l.TOC, MediaType: types.OCILayer, Digest: sum.String(), Annotations: map[string]string{"containerd.io/snapshot/stargz/layer.digest": l.Digest}}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
