package sectorfs

import (
	"context"
	"encoding/binary"
	"slices"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// sector is how many bytes of a file are sealed together.
const sector = 4096

// file is an open file. It has no more of the loopback's methods than those below: the others would see sealed sectors.
type file struct {
	host *fs.LoopbackFile
	fd   int // host's
	tree *tree
	lock *sync.RWMutex
}

var (
	_ fs.FileReader   = (*file)(nil)
	_ fs.FileWriter   = (*file)(nil)
	_ fs.FileReleaser = (*file)(nil)
	_ fs.FileFlusher  = (*file)(nil)
	_ fs.FileFsyncer  = (*file)(nil)
)

// Release implements fs.FileReleaser.
func (f *file) Release(ctx context.Context) syscall.Errno { return f.host.Release(ctx) }

// Flush implements fs.FileFlusher.
func (f *file) Flush(ctx context.Context) syscall.Errno { return f.host.Flush(ctx) }

// Fsync implements fs.FileFsyncer.
func (f *file) Fsync(ctx context.Context, flags uint32) syscall.Errno {
	return f.host.Fsync(ctx, flags)
}

// Read implements fs.FileReader.
func (f *file) Read(_ context.Context, dst []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	f.lock.RLock()
	defer f.lock.RUnlock()
	size, errno := f.size()
	if errno != 0 || off >= size {
		return fuse.ReadResultData(nil), errno
	}
	end := min(off+int64(len(dst)), size)
	plain, errno := f.load(off/sector, end, size)
	if errno != 0 {
		return nil, errno
	}
	return fuse.ReadResultData(plain[off%sector:][:end-off]), 0
}

// Write implements fs.FileWriter.
func (f *file) Write(_ context.Context, data []byte, off int64) (uint32, syscall.Errno) {
	if len(data) == 0 {
		return 0, 0
	}
	end := off + int64(len(data))
	if end > MaxFileSize {
		return 0, syscall.EFBIG
	}
	f.lock.Lock()
	defer f.lock.Unlock()
	size, errno := f.size()
	if errno == 0 && off > size {
		errno, size = f.resize(size, off), off
	}
	if errno != 0 {
		return 0, errno
	}
	first := off / sector
	var plain []byte
	if off%sector != 0 || end%sector != 0 && end < size {
		// What stays of the first and last sector is sealed anew with the rest.
		if plain, errno = f.load(first, min(roundUp(end), size), size); errno != 0 {
			return 0, errno
		}
	}
	if n := int(end - first*sector); len(plain) < n {
		plain = append(plain, make([]byte, n-len(plain))...)
	}
	copy(plain[off%sector:], data)
	if errno := f.store(first, plain); errno != 0 {
		return 0, errno
	}
	return uint32(len(data)), 0
}

// truncate makes the file size bytes long.
func (f *file) truncate(size int64) syscall.Errno {
	if size < 0 || size > MaxFileSize {
		return syscall.EFBIG
	}
	f.lock.Lock()
	defer f.lock.Unlock()
	old, errno := f.size()
	if errno != 0 {
		return errno
	}
	return f.resize(old, size)
}

// resize is truncate of a file of old bytes. The sector that is last in the shorter of the two is sealed anew; a hole of
// zeros does for what follows it.
func (f *file) resize(old, size int64) syscall.Errno {
	end := min(old, size)
	last := end / sector
	var plain []byte
	if end%sector != 0 && size != old {
		var errno syscall.Errno
		if plain, errno = f.load(last, end, old); errno != 0 {
			return errno
		}
		plain = plain[:end%sector]
		if grown := min(size-last*sector, sector); int64(len(plain)) < grown {
			plain = append(plain, make([]byte, grown-int64(len(plain)))...)
		}
	}
	// A crash may have left too few bytes for a sector behind the last one: they must not become part of a hole.
	for _, n := range []int64{end, size} {
		if err := syscall.Ftruncate(f.fd, f.tree.sealedSize(n)); err != nil {
			return fs.ToErrno(err)
		}
	}
	return f.store(last, plain)
}

// size is how large the file is to the guest.
func (f *file) size() (int64, syscall.Errno) {
	var st syscall.Stat_t
	err := syscall.Fstat(f.fd, &st)
	return f.tree.plainSize(st.Size), fs.ToErrno(err)
}

// sealedSize is how large a file of size bytes is on the host.
func (t *tree) sealedSize(size int64) int64 {
	overhead := int64(t.aead.Overhead())
	sealed := size / sector * (sector + overhead)
	if rest := size % sector; rest > 0 {
		sealed += rest + overhead
	}
	return sealed
}

// plainSize is how large a file of sealed bytes on the host is to the guest.
func (t *tree) plainSize(sealed int64) int64 {
	overhead := int64(t.aead.Overhead())
	return sealed/(sector+overhead)*sector + max(sealed%(sector+overhead)-overhead, 0)
}

func roundUp(n int64) int64 { return (n + sector - 1) / sector * sector }

// load reads from sector first on up to byte end, which is not beyond size, the file's. It returns at least that.
func (f *file) load(first, end, size int64) ([]byte, syscall.Errno) {
	full := sector + f.tree.aead.Overhead()
	upTo := min(roundUp(end), size)
	raw := make([]byte, f.tree.sealedSize(upTo)-first*int64(full))
	for got := 0; got < len(raw); {
		n, err := syscall.Pread(f.fd, raw[got:], first*int64(full)+int64(got))
		if err != nil {
			return nil, fs.ToErrno(err)
		}
		if n == 0 {
			return nil, syscall.EIO // the file is shorter than it was a moment ago
		}
		got += n
	}
	plain := make([]byte, 0, upTo-first*sector)
	for sealed := range slices.Chunk(raw, full) {
		if allZero(sealed) {
			plain = append(plain, sealed[:len(sealed)-f.tree.aead.Overhead()]...)
			first++
			continue
		}
		var err error
		if plain, err = f.tree.aead.Open(plain, nil, sealed, number(first)); err != nil {
			return nil, syscall.EIO
		}
		first++
	}
	return plain, 0
}

// store seals plain and writes it from sector first on.
func (f *file) store(first int64, plain []byte) syscall.Errno {
	overhead := f.tree.aead.Overhead()
	at := first * int64(sector+overhead)
	sealed := make([]byte, 0, len(plain)+(len(plain)/sector+1)*overhead)
	for part := range slices.Chunk(plain, sector) {
		sealed = f.tree.aead.Seal(sealed, nil, part, number(first))
		first++
	}
	for len(sealed) > 0 {
		n, err := syscall.Pwrite(f.fd, sealed, at)
		if err != nil {
			return fs.ToErrno(err)
		}
		sealed, at = sealed[n:], at+int64(n)
	}
	return 0
}

// number is what sector n is sealed together with.
func number(n int64) []byte { return binary.LittleEndian.AppendUint64(nil, uint64(n)) }

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
