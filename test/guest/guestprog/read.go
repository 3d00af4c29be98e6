package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// readMany reads n pieces of 4 KiB of a file past the guest's cache, one after the other or at random, and says how many nanoseconds
// each took.
func readMany(file string, n int64, random bool) error {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	pages := st.Size() / 4096
	begin := time.Now()
	for i := range n {
		page := i % pages
		if random {
			page = rand.Int64N(pages)
		}
		if got, err := f.ReadAt(buf, page<<12); err != nil || got != len(buf) {
			return fmt.Errorf("read page %d: %d bytes, %w", page, got, err)
		}
	}
	fmt.Println(time.Since(begin).Nanoseconds() / n)
	return nil
}
