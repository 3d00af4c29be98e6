// Package floor measures what an operation costs when no server is asked: the host system calls that it cannot do without, in
// a loop on one thread. No virtio-fs server that goes through the host's file system can be below it.
package floor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Sizes of what the loops work on, as the front-end's workloads have them: cache misses are part of a cost.
const (
	known     = 64 // files that are looked up, opened and asked for attributes
	inFlight  = 16 // buffers that take turns, as those of 16 requests do
	pageSize  = 4096
	batch     = 16 // operations between two looks at the clock
	largest   = 1 << 20
	dentsSize = 32 << 10
)

// loops are the floors by name.
var loops = []struct {
	name  string
	calls string
	// start returns what does one operation.
	start func(f *Files) func() error
}{
	{"getattr", "fstat", func(f *Files) func() error {
		return func() error { return failed("fstat", fstat(f.next(), &f.st)) }
	}},
	{"statx", "statx of a descriptor", func(f *Files) func() error {
		return func() error { return failed("statx", statx(f.next(), &empty, unix.AT_EMPTY_PATH, &f.stx)) }
	}},
	{"lookup", "fstatat", func(f *Files) func() error {
		return func() error {
			return failed("fstatat", fstatat(f.dir, f.name(), unix.AT_SYMLINK_NOFOLLOW, &f.st))
		}
	}},
	{"lookup-cold", "openat(O_PATH), fstat, close, of many files", func(f *Files) func() error {
		return func() error {
			c := f.cold[f.step()%uint64(len(f.cold))]
			fd, errno := openat(c.dir, &c.name[0], unix.O_PATH|unix.O_NOFOLLOW, 0)
			if errno == 0 {
				errno = join(fstat(fd, &f.st), closeFD(fd))
			}
			return failed("openat, fstat, close", errno)
		}
	}},
	{"lookup-miss", "fstatat that fails", func(f *Files) func() error {
		return func() error {
			if errno := fstatat(f.dir, &missing[0], unix.AT_SYMLINK_NOFOLLOW, &f.st); errno != unix.ENOENT {
				return fmt.Errorf("fstatat of a missing file: %w", errno)
			}
			return nil
		}
	}},
	{"open", "openat of /proc/self/fd/N, close", func(f *Files) func() error {
		return func() error {
			fd, errno := openat(f.procfd, f.link(), unix.O_RDONLY, 0)
			if errno == 0 {
				errno = closeFD(fd)
			}
			return failed("openat, close", errno)
		}
	}},
	{"read-4k", "preadv, random", transfer(unix.SYS_PREADV, 4<<10, false)},
	{"read-128k", "preadv of 32 pages, random", transfer(unix.SYS_PREADV, 128<<10, false)},
	{"read-1m", "preadv of 256 pages, random", transfer(unix.SYS_PREADV, 1<<20, false)},
	{"seqread-4k", "preadv, in order", transfer(unix.SYS_PREADV, 4<<10, true)},
	{"seqread-128k", "preadv of 32 pages, in order", transfer(unix.SYS_PREADV, 128<<10, true)},
	{"seqread-1m", "preadv of 256 pages, in order", transfer(unix.SYS_PREADV, 1<<20, true)},
	{"write-4k", "pwritev, random", transfer(unix.SYS_PWRITEV, 4<<10, false)},
	{"write-128k", "pwritev of 32 pages, random", transfer(unix.SYS_PWRITEV, 128<<10, false)},
	{"write-1m", "pwritev of 256 pages, random", transfer(unix.SYS_PWRITEV, 1<<20, false)},
	{"seqwrite-4k", "pwritev, in order", transfer(unix.SYS_PWRITEV, 4<<10, true)},
	{"seqwrite-128k", "pwritev of 32 pages, in order", transfer(unix.SYS_PWRITEV, 128<<10, true)},
	{"seqwrite-1m", "pwritev of 256 pages, in order", transfer(unix.SYS_PWRITEV, 1<<20, true)},
	{"readdirplus", "getdents64 of all entries, fstatat of each", func(f *Files) func() error { return f.list }},
	{"create-unlink", "openat(O_CREAT), fstat, close, unlinkat", func(f *Files) func() error {
		return func() error {
			fd, errno := openat(f.scratch, &created[0], unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o644)
			if errno == 0 {
				errno = join(fstat(fd, &f.st), closeFD(fd), unlinkat(f.scratch, &created[0]))
			}
			return failed("create, fstat, close, unlinkat", errno)
		}
	}},
	{"rename", "renameat2", func(f *Files) func() error {
		from, to := []byte("own\x00"), []byte("renamed\x00")
		return func() error {
			// There and back, so that the names are as they were; that is two operations of the workload.
			f.ops++
			return failed("renameat2", join(renameat(f.scratch, &from[0], &to[0]), renameat(f.scratch, &to[0], &from[0])))
		}
	}},
	{"setattr", "utimensat, fstat", func(f *Files) func() error {
		times := [2]unix.Timespec{{Sec: 1}, {Sec: 2}}
		return func() error { return failed("utimensat, fstat", join(utimensat(f.own, &times), fstat(f.own, &f.st))) }
	}},
	{"statfs", "fstatfs", func(f *Files) func() error {
		return func() error { return failed("fstatfs", fstatfs(f.own, &f.statfs)) }
	}},
	{"memcpy-128k", "copy from the page cache, no system call", duplicate(128 << 10)},
	{"memcpy-1m", "copy from the page cache, no system call", duplicate(1 << 20)},
}

var (
	empty   byte
	missing = []byte("missing\x00")
	created = []byte("created\x00")
)

// failed is the error of calls, nil if errno is 0.
func failed(calls string, errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return fmt.Errorf("%s: %w", calls, errno)
}

// join is the first of the errors.
func join(errnos ...unix.Errno) unix.Errno {
	for _, errno := range errnos {
		if errno != 0 {
			return errno
		}
	}
	return 0
}

// Names returns the names of all loops, in their order.
func Names() []string {
	names := make([]string, len(loops))
	for i, l := range loops {
		names[i] = l.name
	}
	return names
}

// Calls says which system calls a loop makes; "" means that there is no such loop.
func Calls(name string) string {
	if i := slices.Index(Names(), name); i >= 0 {
		return loops[i].calls
	}
	return ""
}

// transfer is the loop of preadv or pwritev, by trap, of size bytes in pages, at random or one after the other.
func transfer(trap uintptr, size int, sequential bool) func(f *Files) func() error {
	return func(f *Files) func() error {
		var buffers [inFlight][]unix.Iovec
		for i := range buffers {
			buffers[i] = iovecs(f.memory[i*size:(i+1)*size], pageSize)
		}
		fd, blocks := f.read, uint64(len(f.data)/size)
		if trap == unix.SYS_PWRITEV {
			fd = f.written
		}
		return func() error {
			block := f.step()
			if !sequential {
				block = f.random()
			}
			n, errno := vectored(trap, fd, buffers[f.turn%inFlight], int64(block%blocks)*int64(size))
			if errno == 0 && n != size {
				return fmt.Errorf("%d of %d bytes were moved", n, size)
			}
			return failed("preadv or pwritev", errno)
		}
	}
}

// duplicate is the loop of copying size bytes from the page cache to memory such as a guest's.
func duplicate(size int) func(f *Files) func() error {
	return func(f *Files) func() error {
		return func() error {
			from := int(f.random()%uint64(len(f.data)/size)) * size
			to := int(f.step()%inFlight) * size
			copy(f.memory[to:to+size], f.data[from:from+size])
			return nil
		}
	}
}

// Config says what the loops work on. What is only read should be what the servers serve: how the page cache holds a file,
// which depends on how it was written, can double what a READ costs.
type Config struct {
	Read    string // a file to read, of some MiB
	Written string // a file to write to, of the same size
	Dir     string // a directory of some hundred files to look up, open and list
	Cold    string // a tree of files to look up for the first time
	Scratch string // a directory for what is made and removed, on the same file system
}

// Files are what the loops work on.
type Files struct {
	root               string   // a directory in Scratch
	read, written, dir int      // of Config
	scratch, own       int      // root, and a file in it
	procfd             int      // /proc/self/fd
	fds                []int    // of known files
	names              [][]byte // of them and all others in dir, C strings
	links              [][]byte // the fds, as names in procfd
	cold               []entry
	dirs               []int  // that the cold files are in
	memory             []byte // of a memfd, as a guest's
	data               []byte // the page cache of the file that is read
	dents              []byte

	turn, ops uint64
	state     uint64
	st        unix.Stat_t
	stx       unix.Statx_t
	statfs    unix.Statfs_t
}

// entry is a name in a directory.
type entry struct {
	dir  int
	name []byte // a C string
}

// Open opens what the loops work on.
func Open(cfg Config) (f *Files, err error) {
	f = &Files{read: -1, written: -1, dir: -1, scratch: -1, own: -1, procfd: -1, state: 88172645463325252, dents: make([]byte, dentsSize)}
	if err := f.open(cfg); err != nil {
		return nil, fmt.Errorf("open the files of the floor: %w", errors.Join(err, f.Close()))
	}
	return f, nil
}

func (f *Files) open(cfg Config) (err error) {
	if f.root, err = os.MkdirTemp(cfg.Scratch, "floor-"); err != nil {
		return err
	}
	own := filepath.Join(f.root, "own")
	if err := os.WriteFile(own, nil, 0o644); err != nil {
		return err
	}
	for _, o := range []struct {
		fd    *int
		path  string
		flags int
	}{
		{&f.read, cfg.Read, unix.O_RDONLY},
		{&f.written, cfg.Written, unix.O_RDWR},
		{&f.dir, cfg.Dir, unix.O_RDONLY | unix.O_DIRECTORY},
		{&f.scratch, f.root, unix.O_RDONLY | unix.O_DIRECTORY},
		{&f.own, own, unix.O_RDWR},
		{&f.procfd, "/proc/self/fd", unix.O_PATH},
	} {
		if *o.fd, err = unix.Open(o.path, o.flags|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open %s: %w", o.path, err)
		}
	}
	if err := f.openKnown(cfg.Dir); err != nil {
		return err
	}
	if err := f.openCold(cfg.Cold); err != nil {
		return err
	}
	return f.mapMemory(cfg)
}

// mapMemory maps the file that is read and what it is read into.
func (f *Files) mapMemory(cfg Config) error {
	var sizes [2]int64
	for i, fd := range []int{f.read, f.written} {
		if err := unix.Fstat(fd, &f.st); err != nil {
			return err
		}
		sizes[i] = f.st.Size
	}
	if sizes[0] != sizes[1] || sizes[0] < largest {
		return fmt.Errorf("%s and %s have %d and %d bytes, expected the same and at least %d", cfg.Read, cfg.Written, sizes[0], sizes[1], largest)
	}
	var err error
	if f.data, err = unix.Mmap(f.read, 0, int(sizes[0]), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map %s: %w", cfg.Read, err)
	}
	memfd, err := unix.MemfdCreate("floor", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(memfd)
	if err := unix.Ftruncate(memfd, inFlight*largest); err != nil {
		return err
	}
	f.memory, err = unix.Mmap(memfd, 0, inFlight*largest, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	return err
}

// openKnown opens some of the files in the directory and notes the names of all.
func (f *Files) openKnown(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if len(entries) < known {
		return fmt.Errorf("%s has %d entries, expected at least %d", dir, len(entries), known)
	}
	for _, e := range entries {
		f.names = append(f.names, append([]byte(e.Name()), 0))
	}
	for i := range known {
		fd, errno := openat(f.dir, &f.names[i][0], unix.O_PATH|unix.O_NOFOLLOW, 0)
		if errno != 0 {
			return failed("open "+entries[i].Name(), errno)
		}
		f.fds = append(f.fds, fd)
		f.links = append(f.links, append(fmt.Append(nil, fd), 0))
	}
	return nil
}

// openCold opens the directories below root and notes the files in them.
func (f *Files) openCold(root string) error {
	opened := map[string]int{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			opened[path] = fd
			f.dirs = append(f.dirs, fd)
		case d.Type().IsRegular():
			f.cold = append(f.cold, entry{opened[filepath.Dir(path)], append([]byte(d.Name()), 0)})
		}
		return nil
	})
	if err == nil && len(f.cold) == 0 {
		err = fmt.Errorf("there are no files in %s", root)
	}
	return err
}

// Close closes what Open has opened and removes what it has made.
func (f *Files) Close() error {
	var errs []error
	for _, fd := range slices.Concat(f.fds, f.dirs, []int{f.read, f.written, f.dir, f.scratch, f.own, f.procfd}) {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	for _, m := range [][]byte{f.memory, f.data} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	if f.root != "" {
		errs = append(errs, os.RemoveAll(f.root))
	}
	return errors.Join(errs...)
}

// step counts operations.
func (f *Files) step() uint64 {
	f.turn++
	return f.turn
}

// next, name and link are what the next operation is about: a descriptor, a name in dir, a name in procfd.
func (f *Files) next() int   { return f.fds[f.step()%known] }
func (f *Files) name() *byte { return &f.names[f.step()%known][0] }
func (f *Files) link() *byte { return &f.links[f.step()%known][0] }

// random is xorshift64: cheap beside a system call, unlike math/rand's.
func (f *Files) random() uint64 {
	f.state ^= f.state << 13
	f.state ^= f.state >> 7
	f.state ^= f.state << 17
	return f.state
}

// direntName is where the name begins in struct linux_dirent64, and direntLen its length.
const direntLen, direntName = 16, 19

// list reads the whole directory, with the attributes of each entry.
func (f *Files) list() error {
	if errno := rewind(f.dir); errno != 0 {
		return failed("lseek", errno)
	}
	found := 0
	for {
		n, errno := getdents(f.dir, f.dents)
		if errno != 0 {
			return failed("getdents64", errno)
		}
		if n == 0 {
			break
		}
		for b := f.dents[:n]; len(b) > 0; b = b[binary.NativeEndian.Uint16(b[direntLen:]):] {
			if errno := fstatat(f.dir, &b[direntName], unix.AT_SYMLINK_NOFOLLOW, &f.st); errno != 0 {
				return failed("fstatat", errno)
			}
			found++
		}
	}
	if found != len(f.names)+2 {
		return fmt.Errorf("the directory has %d entries, expected %d", found, len(f.names)+2)
	}
	return nil
}

// Result is what a loop has cost.
type Result struct {
	Ops     uint64
	CPU     time.Duration // of the thread, in user and kernel mode
	Elapsed time.Duration
}

// Run runs a loop for about the duration d on the CPU cpu, or on any if cpu is negative.
func (f *Files) Run(loop string, cpu int, d time.Duration) (Result, error) {
	i := slices.Index(Names(), loop)
	if i < 0 {
		return Result{}, fmt.Errorf("there is no floor %q, expected one of %v", loop, Names())
	}
	var r Result
	err := onThread(cpu, func() error {
		step := loops[i].start(f)
		// The first round fills caches and is not counted.
		for range batch {
			if err := step(); err != nil {
				return err
			}
		}
		f.ops = 0
		used, begin := threadCPU(), time.Now()
		for r.Elapsed < d {
			for range batch {
				if err := step(); err != nil {
					return err
				}
			}
			r.Ops += batch
			r.Elapsed = time.Since(begin)
		}
		r.CPU = threadCPU() - used
		r.Ops += f.ops
		return nil
	})
	if err != nil {
		return r, fmt.Errorf("floor %s: %w", loop, err)
	}
	return r, nil
}

// onThread calls f on a thread of its own that may run on one CPU only, or on any if cpu is negative. The thread ends with f.
func onThread(cpu int, f func() error) error {
	done := make(chan error)
	go func() {
		// Never unlocked: no other goroutine is to be on this CPU.
		runtime.LockOSThread()
		if cpu >= 0 {
			var set unix.CPUSet
			set.Set(cpu)
			if err := unix.SchedSetaffinity(0, &set); err != nil {
				done <- fmt.Errorf("run on CPU %d: %w", cpu, err)
				return
			}
		}
		done <- f()
	}()
	return <-done
}

// threadCPU is what this thread has used. getrusage(RUSAGE_THREAD) would know it as of the last tick only.
func threadCPU() time.Duration {
	var ts unix.Timespec
	// It can only fail for a bad argument.
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano())
}
