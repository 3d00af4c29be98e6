package lazyimage

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/imagefetch/imagetest"
)

// diskUse is what a cache's directory takes on its disk, all files and directories in it, temporary ones too, as du(1) counts it. Nothing
// is added or removed meanwhile, for the lock on usage is held.
func diskUse(dir string) (total int64, err error) {
	f, err := os.Open(filepath.Join(dir, "usage"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return 0, err
	}
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil {
			total += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) { // a file that was given its name
		return 0, nil
	}
	return total, err
}

// T-D12 from outside, with the real program: while an image is read that is much larger than the cache, by several at a time, the
// cache's directory is never larger than it may be, and what is read is right.
func TestCacheBudget(t *testing.T) {
	const (
		budget  = 600 << 10
		readers = 4
	)
	var files []imagetest.File
	for i := range 8 {
		data := make([]byte, 300_000)
		_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(data)
		files = append(files, imagetest.File{Name: fmt.Sprint("f", i), Data: data})
	}
	image := imagetest.New(t, files)
	h, _ := host(t)
	h.MaxFDs = 8 // so that chunks are asked for again
	dir := filepath.Join(t.TempDir(), "cache")
	g := tryOpen(t, h, mount("image="+image.Ref, "cache-dir="+dir, fmt.Sprint("cache-bytes=", budget), "cache-memory=1M"))

	done := make(chan struct{})
	var most int64
	samples := 0
	var watch, all sync.WaitGroup
	watch.Go(func() {
		for {
			n, err := diskUse(dir)
			if err != nil {
				t.Error(err)
			}
			if n > budget {
				t.Errorf("the cache takes %d bytes of %d", n, int64(budget))
			}
			most = max(most, n)
			samples++
			select {
			case <-done:
				return
			case <-time.After(time.Millisecond):
			}
		}
	})
	for r := range readers {
		all.Go(func() {
			c := g.Client()
			for i := range files {
				f := &files[(i*3+r*5)%len(files)]
				out, errno := c.Lookup(1, f.Name)
				fh, errno2 := c.Open(out.NodeId, unix.O_RDONLY)
				if errno != 0 || errno2 != 0 {
					t.Errorf("%s: %v, %v", f.Name, errno, errno2)
					return
				}
				b, errno := c.Read(out.NodeId, fh, 0, len(f.Data)+1)
				if errno != 0 || !bytes.Equal(b, f.Data) {
					t.Errorf("%s: %d bytes that are not its %d, %v", f.Name, len(b), len(f.Data), errno)
				}
				c.Release(out.NodeId, fh)
			}
		})
	}
	all.Wait()
	close(done)
	watch.Wait()
	if most < budget/2 || samples < 10 {
		t.Errorf("the cache took at most %d bytes in %d looks: it was not used", most, samples)
	}
}
