package imagefetch

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// packing is what a blob is compressed with.
type packing int

const (
	packedNot packing = iota
	packedGzip
	packedZstd
)

var magics = []struct {
	p     packing
	magic string
}{{packedGzip, "\x1f\x8b"}, {packedZstd, "\x28\xb5\x2f\xfd"}, {packedZstd, "\x50\x2a\x4d\x18"}}

// packingOf tells by how a blob begins.
func packingOf(start []byte) packing {
	for _, m := range magics {
		if len(start) >= len(m.magic) && string(start[:len(m.magic)]) == m.magic {
			return m.p
		}
	}
	return packedNot
}

// How much of what was unpacked zstd may refer back to, in bytes, and keeps in memory for that.
const (
	maxWindow     = 32 << 20  // of chunks, several of which are unpacked at once
	maxPullWindow = 128 << 20 // of a layer: --long of the zstd program takes as much
)

var (
	gzipReaders = sync.Pool{New: func() any { return new(gzip.Reader) }}
	zstdReaders = sync.Pool{New: func() any {
		d, err := newZstd(nil, maxWindow)
		if err != nil {
			return err
		}
		return d
	}}
)

// newZstd makes a decoder without goroutines, so that it need not be closed.
func newZstd(r io.Reader, window uint64) (*zstd.Decoder, error) {
	return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(window))
}

// unpack reads what was packed into r, until release is called.
func unpack(p packing, r io.Reader) (out io.Reader, release func(), err error) {
	switch p {
	case packedGzip:
		z := gzipReaders.Get().(*gzip.Reader)
		if err := z.Reset(r); err != nil {
			return nil, nil, fmt.Errorf("unpack: %w", err)
		}
		return z, func() { gzipReaders.Put(z) }, nil
	case packedZstd:
		z, ok := zstdReaders.Get().(*zstd.Decoder)
		if !ok {
			return nil, nil, fmt.Errorf("unpack: no decoder can be made")
		}
		if err := z.Reset(r); err != nil {
			return nil, nil, fmt.Errorf("unpack: %w", err)
		}
		return z, func() { _ = z.Reset(nil); zstdReaders.Put(z) }, nil
	}
	return nil, nil, errors.New("unpack: it is not packed")
}

// unpackAll is unpack for a whole layer.
func unpackAll(p packing, r io.Reader) (io.Reader, error) {
	switch p {
	case packedGzip:
		return gzip.NewReader(r)
	case packedZstd:
		return newZstd(r, maxPullWindow)
	}
	return r, nil
}
