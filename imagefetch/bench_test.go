package imagefetch

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/imagefetch/imagetest"
)

// BenchmarkChunkCached is a chunk that is in the cache and verified: what a reader waits for who does not wait for a registry.
func BenchmarkChunkCached(b *testing.B) {
	img := imagetest.New(b, someFiles())
	for _, kind := range []string{"memory", "directory"} {
		b.Run(kind, func(b *testing.B) {
			cfg := quick(img)
			if kind == "directory" {
				cfg.Cache.Dir = b.TempDir() + "/cache"
			}
			m, err := NewFetcher(nil).Open(cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer m.Close()
			b.ReportAllocs()
			for b.Loop() {
				f, err := m.Chunk(b.Context(), 0, 0)
				if err != nil {
					b.Fatal(err)
				}
				f.Close()
			}
		})
	}
}

// BenchmarkChunkFetched is one that comes from the registry each time, over the loopback.
func BenchmarkChunkFetched(b *testing.B) {
	img := imagetest.New(b, []imagetest.File{{Name: "big", Data: noise(1, 64<<10)}})
	cfg := quick(img)
	cfg.Cache.MemoryBudget = 4096 // nothing has room
	m, err := NewFetcher(nil).Open(cfg)
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	b.ReportAllocs()
	b.SetBytes(64 << 10)
	for b.Loop() {
		f, err := m.Chunk(b.Context(), 0, 0)
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
}

// BenchmarkTOC reads the table of contents of a hundred thousand files.
func BenchmarkTOC(b *testing.B) {
	var entries []string
	for i := range 100_000 {
		entries = append(entries, reg(fmt.Sprintf("usr/share/doc/package-%d/file-%d", i/20, i), 1000, i*400, `,"modtime":"2024-01-01T00:00:00Z","mode":420`))
	}
	text := toc(entries...)
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := readTOC(strings.NewReader(text), 100_000*400); err != nil {
			b.Fatal(err)
		}
	}
}
