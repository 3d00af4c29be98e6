package cache

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/ratelog"
)

const (
	// entryCharge is what a name takes in its directory.
	entryCharge = 128
	// dirCharge is what a directory takes, beside its names.
	dirCharge = pageSize + entryCharge
	// baseCharge is what is there without any chunk: four directories, which may grow, and usage.
	baseCharge = 8 * pageSize
	// touchEvery is how old a chunk's access time may be before using it changes it.
	touchEvery = time.Minute
	// metaBonus is how much longer than a chunk something in meta is kept: without it, no chunk can be served.
	metaBonus = 24 * time.Hour
	// lockWait is how long another process may take with usage before it is done without the directory.
	lockWait = 5 * time.Second
	// maxVerified bounds what is remembered about chunks that this process has verified.
	maxVerified = 1 << 18
	maxMeta     = 512 << 20
)

// directory is a cache on disk.
type directory struct {
	root     *os.Root
	at       *os.File // the same directory, for what is done for every read
	budget   int64
	log      *ratelog.Logger
	count    *os.File // usage
	fetching *os.File
	patience time.Duration // lockWait, but for a test

	// mu is held with the flock of count.
	mu sync.Mutex

	verifiedMu sync.Mutex
	verified   map[Key]uint64 // inode numbers
}

func openDirectory(name string, budget int64, log *ratelog.Logger) (*directory, error) {
	if err := os.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make the cache's directory: %w", err)
	}
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, fmt.Errorf("open the cache's directory: %w", err)
	}
	at, err := root.Open(".")
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("open the cache's directory: %w", err)
	}
	d := &directory{root: root, at: at, budget: budget, log: log, verified: map[Key]uint64{}, patience: lockWait}
	if err := d.prepare(); err != nil {
		// What is there can still be read.
		log.Warn("cannot write to the cache: what is fetched is kept in memory", "err", err)
		d.closeFiles()
	}
	return d, nil
}

// prepare makes what should be there, and removes what a process that was killed has left.
func (d *directory) prepare() (err error) {
	if d.count, err = d.root.OpenFile("usage", os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if d.fetching, err = d.root.OpenFile("fetching", os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	return d.locked(func() error {
		for _, name := range []string{"tmp", "meta", "chunks"} {
			if err := d.root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
		}
		return d.makeRoom(0)
	})
}

func (d *directory) close() error {
	d.closeFiles()
	return errors.Join(d.at.Close(), d.root.Close())
}

func (d *directory) closeFiles() {
	for _, f := range []**os.File{&d.count, &d.fetching} {
		if *f != nil {
			(*f).Close()
			*f = nil
		}
	}
}

var errReadOnly = errors.New("the cache's directory could not be written to when it was opened")

// locked has f run while no one else changes the number in usage, in this process or another.
func (d *directory) locked(f func() error) error {
	if d.count == nil {
		return errReadOnly
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), d.patience)
	defer cancel()
	err := poll(ctx, func() error { return unix.Flock(int(d.count.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err != nil {
		return fmt.Errorf("lock the cache, which another process holds: %w", err)
	}
	defer func() { _ = unix.Flock(int(d.count.Fd()), unix.LOCK_UN) }()
	return f()
}

// poll tries to lock until it is locked. The lock's own waiting could not be ended.
func poll(ctx context.Context, try func() error) error {
	pause := time.Millisecond
	for {
		err := try()
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
		pause = min(2*pause, 20*time.Millisecond)
	}
}

// used reads usage, -1 if it is not known. Under the lock.
func (d *directory) used() int64 {
	var b [8]byte
	if _, err := d.count.ReadAt(b[:], 0); err != nil {
		return -1
	}
	n := int64(binary.LittleEndian.Uint64(b[:]))
	return max(n, -1)
}

func (d *directory) setUsed(n int64) error {
	_, err := d.count.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(max(n, 0))), 0)
	return err
}

func (d *directory) usage() (n int64) {
	_ = d.locked(func() error {
		n = d.used()
		return nil
	})
	return n
}

// reserve adds need to usage, after making room for it. Under the lock.
func (d *directory) reserve(need int64) error {
	n := d.used()
	if n < 0 || n+need > d.budget {
		if err := d.makeRoom(need); err != nil {
			return err
		}
		if n = d.used(); n+need > d.budget {
			return fmt.Errorf("a chunk of %d bytes has no room in the cache's budget of %d", need, d.budget)
		}
	}
	return d.setUsed(n + need)
}

// giveBack undoes it.
func (d *directory) giveBack(n int64) {
	_ = d.locked(func() error {
		if used := d.used(); used >= 0 {
			return d.setUsed(used - n)
		}
		return nil
	})
}

// kept is a file that could go.
type kept struct {
	name   string
	used   time.Time
	charge int64
}

// makeRoom counts what is there, removes what dead processes left, and what was not used for longest until need more bytes have room
// and a tenth of the budget with them, so that this is not done for every chunk. Under the lock.
func (d *directory) makeRoom(need int64) error {
	total, files, err := d.scan()
	if err != nil {
		return err
	}
	if total+need > d.budget {
		slices.SortFunc(files, func(a, b kept) int { return cmp.Or(a.used.Compare(b.used), strings.Compare(a.name, b.name)) })
		target := min(d.budget-need, d.budget/10*9)
		for _, f := range files {
			if total <= target {
				break
			}
			if err := d.root.Remove(f.name); err == nil || errors.Is(err, fs.ErrNotExist) {
				total -= f.charge
			}
		}
	}
	return d.setUsed(total)
}

// scan lists what is there. Under the lock.
func (d *directory) scan() (total int64, files []kept, err error) {
	total = baseCharge
	err = d.each("chunks", func(name string, st *unix.Stat_t) error {
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil
		}
		total += dirCharge
		return d.each(name, func(name string, st *unix.Stat_t) error {
			files = append(files, kept{name, atime(st), charge(st)})
			return nil
		})
	})
	if err != nil {
		return 0, nil, err
	}
	if err := d.each("meta", func(name string, st *unix.Stat_t) error {
		files = append(files, kept{name, atime(st).Add(metaBonus), charge(st)})
		return nil
	}); err != nil {
		return 0, nil, err
	}
	for _, f := range files {
		total += f.charge
	}
	err = d.each("tmp", func(name string, st *unix.Stat_t) error {
		if d.abandoned(name) {
			return d.root.Remove(name)
		}
		_, reserved, _ := strings.Cut(path.Base(name), ".")
		n, _ := strconv.ParseInt(reserved, 10, 64)
		total += max(n, charge(st))
		return nil
	})
	return total, files, err
}

// each has f see what is in a directory.
func (d *directory) each(dir string, f func(name string, st *unix.Stat_t) error) error {
	in, err := d.root.Open(dir)
	if err != nil {
		return err
	}
	defer in.Close()
	for {
		names, err := in.Readdirnames(1024)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(int(in.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				continue // it is gone
			}
			if err := f(dir+"/"+name, &st); err != nil {
				return err
			}
		}
	}
}

// abandoned says whether the process that made a temporary file is gone: it held its flock from the first moment.
func (d *directory) abandoned(name string) bool {
	f, err := d.root.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
}

// charge is what a file takes. The file system may not have decided yet how many blocks it needs.
func charge(st *unix.Stat_t) int64 {
	return max(st.Blocks*512, roundUp(st.Size)) + entryCharge
}

func atime(st *unix.Stat_t) time.Time { return time.Unix(st.Atim.Unix()) }

// stat is of a name in the cache, fstat of a file that is open.
func (d *directory) stat(name string) (st unix.Stat_t, err error) {
	err = unix.Fstatat(int(d.at.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

func fstat(f *os.File) (st unix.Stat_t, err error) {
	err = unix.Fstat(int(f.Fd()), &st)
	return st, err
}

// temp is a file that is being written.
type temp struct {
	d        *directory
	f        *os.File
	name     string
	reserved int64
}

func (d *directory) newTemp(size int64) (t *temp, err error) {
	need := roundUp(size) + entryCharge + dirCharge // a directory may have to be made for it
	err = d.locked(func() error {
		if err := d.reserve(need); err != nil {
			return err
		}
		name := fmt.Sprintf("tmp/%016x.%d", rand.Uint64(), need)
		f, err := d.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err == nil {
			// Before the lock on usage goes: who counts takes a file without a lock for abandoned.
			if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
				f.Close()
				_ = d.root.Remove(name)
			}
		}
		if err != nil {
			return errors.Join(err, d.setUsed(d.used()-need))
		}
		t = &temp{d, f, name, need}
		return nil
	})
	return t, err
}

func (t *temp) abort() {
	_ = t.d.root.Remove(t.name)
	t.f.Close()
	t.d.giveBack(t.reserved)
}

// commit gives the file its name, and returns it for reading only.
func (t *temp) commit(k Key) (*os.File, error) {
	f, err := t.rename(chunkName(k))
	if err != nil {
		return nil, err
	}
	if st, err := fstat(f); err == nil {
		t.d.setVerified(k, st.Ino)
	}
	return f, nil
}

func (t *temp) rename(name string) (*os.File, error) {
	f, err := t.d.root.Open(t.name)
	if err != nil {
		return nil, err
	}
	err = t.d.locked(func() error {
		used := t.d.used()
		if st, err := t.d.stat(name); err == nil {
			used -= charge(&st) // somebody else was faster: theirs goes
		}
		err := t.d.root.Rename(t.name, name)
		if errors.Is(err, fs.ErrNotExist) {
			if t.d.root.Mkdir(path.Dir(name), 0o700) == nil {
				used += dirCharge
			}
			err = t.d.root.Rename(t.name, name)
		}
		if err != nil {
			return err
		}
		if st, err := fstat(f); err == nil {
			used += charge(&st) - t.reserved
		}
		return t.d.setUsed(used)
	})
	if err != nil {
		f.Close()
		return nil, err
	}
	t.f.Close()
	return f, nil
}

func chunkName(k Key) string {
	s := hex.EncodeToString(k[:])
	return "chunks/" + s[:2] + "/" + s
}

func (d *directory) has(k Key, size int64) bool {
	st, err := d.stat(chunkName(k))
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == size
}

func (d *directory) get(k Key, size int64) *os.File {
	name := chunkName(k)
	fd, err := unix.Openat(int(d.at.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), "chunk")
	st, err := fstat(f)
	if err == nil && !d.isVerified(k, st.Ino) {
		err = verify(f, &st, k, size)
		if err == nil {
			d.setVerified(k, st.Ino)
		}
	}
	if err != nil {
		f.Close()
		d.log.Warn("a chunk in the cache is damaged: it is fetched again", "chunk", hex.EncodeToString(k[:]), "err", err)
		d.remove(name)
		return nil
	}
	if now := time.Now(); now.Sub(atime(&st)) > touchEvery {
		// The zero time leaves the other one as it is.
		_ = d.root.Chtimes(name, now, time.Time{})
	}
	return f
}

func (d *directory) remove(name string) {
	_ = d.locked(func() error {
		st, err := d.stat(name)
		if err != nil {
			return err
		}
		if err := d.root.Remove(name); err != nil {
			return err
		}
		return d.setUsed(d.used() - charge(&st))
	})
}

func verify(f *os.File, st *unix.Stat_t, k Key, size int64) error {
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != size {
		return fmt.Errorf("it has %d bytes and should have %d", st.Size, size)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, size)); err != nil {
		return err
	}
	if !bytes.Equal(h.Sum(nil), k[:]) {
		return ErrContent
	}
	return nil
}

func (d *directory) isVerified(k Key, ino uint64) bool {
	d.verifiedMu.Lock()
	defer d.verifiedMu.Unlock()
	known, ok := d.verified[k]
	return ok && known == ino
}

func (d *directory) setVerified(k Key, ino uint64) {
	d.verifiedMu.Lock()
	defer d.verifiedMu.Unlock()
	if len(d.verified) >= maxVerified {
		clear(d.verified) // they are verified again, that is all
	}
	d.verified[k] = ino
}

func (d *directory) meta(name string) []byte {
	f, err := d.root.Open("meta/" + name)
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxMeta))
	if err != nil || len(b) < sha256.Size {
		return nil
	}
	if sum := sha256.Sum256(b[sha256.Size:]); !bytes.Equal(sum[:], b[:sha256.Size]) {
		d.log.Warn("a file in the cache is damaged: what it has is fetched again", "file", "meta/"+name)
		d.remove("meta/" + name)
		return nil
	}
	_ = d.root.Chtimes("meta/"+name, time.Now(), time.Time{})
	return b[sha256.Size:]
}

func (d *directory) putMeta(name string, data []byte) error {
	t, err := d.newTemp(int64(len(data)) + sha256.Size)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(data)
	_, err = t.f.Write(sum[:])
	if err == nil {
		_, err = t.f.Write(data)
	}
	if err == nil {
		var f *os.File
		if f, err = t.rename("meta/" + name); err == nil {
			return f.Close()
		}
	}
	t.abort()
	return err
}
