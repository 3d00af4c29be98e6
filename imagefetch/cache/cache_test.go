package cache

import (
	"testing"
)

func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir() + "/c"
	for b.Loop() {
		c, err := Open(Config{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}
