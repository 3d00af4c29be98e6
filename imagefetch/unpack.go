package imagefetch

import (
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

// maxWindow is how much of what was unpacked zstd may refer back to, in bytes: --long of the zstd program takes as much.
const maxWindow = 128 << 20

var (
	gzipReaders = sync.Pool{New: func() any { return new(gzip.Reader) }}
	zstdReaders = sync.Pool{New: func() any {
		// With one it starts no goroutines, which a pool could not end.
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return err
		}
		return d
	}}
)

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
	return r, func() {}, nil
}
