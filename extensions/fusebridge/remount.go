package fusebridge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/program"
)

// openMounted serves what a program has mounted, as a directory, each time that it has.
func openMounted(in *extensions.Inside, m extensions.Mount, d *given, line *program.Line) (fsbackend.Backend, extensions.Options, error) {
	r := &remounted{
		line: line, wait: cmp.Or(d.RestartWait, defaultRestartWait), log: in.Log, arrival: make(chan struct{}), done: make(chan struct{}),
		open: func(root *os.File) (fsbackend.Backend, error) {
			return passthrough.New(passthrough.Config{
				Dir: "FUSE program", DirFD: int(root.Fd()), ProcFD: in.ProcFD, NoFileHandles: true,
				MaxFDs: in.MaxFDs, MaxInodes: in.MaxInodes, Log: in.Log,
			})
		},
	}
	ctx, cancel := context.WithTimeout(context.Background(), startPatience)
	defer cancel()
	first, err := r.next(ctx)
	if err != nil {
		return nil, extensions.Options{}, errors.Join(err, line.Close())
	}
	r.first = first.Inner
	r.current.Store(first)
	run, stop := context.WithCancel(context.Background())
	r.stop = stop
	go r.accept(run)
	return r, extensions.Options{ReadOnly: m.ReadOnly, Timeout: time.Minute}, nil
}

// A remounted is what a program has mounted, and mounts again when it has been started again. Calls go to what is there now. The
// numbers of files of a mount that is gone are ESTALE to the next one, whose begin at random, whereupon a guest's kernel looks the
// path up anew; an open file is EIO.
type remounted struct {
	line    *program.Line
	wait    time.Duration // for the next mount
	open    func(root *os.File) (fsbackend.Backend, error)
	log     *slog.Logger
	first   *fsbackend.Resolved // what the first one can do, all can
	stop    context.CancelFunc
	done    chan struct{} // accept has returned
	current atomic.Pointer[mount]

	mu       sync.Mutex
	arrival  chan struct{} // closed when current changes, or there will be no other
	over     bool
	features *fsbackend.Features
}

// mount is one mount, which calls use.
type mount struct {
	fsbackend.Forward
	line  *program.Line
	start uint64       // which start of the program it is of
	refs  atomic.Int64 // of calls, and of remounted.current
	dead  atomic.Bool  // the program has ended
	err   chan error   // of Close
}

// next returns the next mount.
func (r *remounted) next(ctx context.Context) (*mount, error) {
	root, err := r.line.Next(ctx)
	if err != nil {
		return nil, fmt.Errorf("wait for the program's mount: %w", err)
	}
	defer root.Close()
	fs, err := r.open(root)
	if err != nil {
		return nil, errMount{err}
	}
	m := &mount{Forward: fsbackend.Forward{Inner: fsbackend.Resolve(fs)}, line: r.line, start: r.line.State().Starts, err: make(chan error, 1)}
	m.refs.Store(1)
	return m, nil
}

// errMount is an error of one mount: the next may do better.
type errMount struct{ error }

// accept takes up what a program that was started again has mounted, until Close.
func (r *remounted) accept(ctx context.Context) {
	defer close(r.done)
	for {
		m, err := r.next(ctx)
		var one errMount
		switch {
		case err == nil:
			r.publish(m)
		case errors.As(err, &one):
			if r.log != nil {
				r.log.Error("what the program has mounted is of no use", "error", err)
			}
		default:
			r.mu.Lock()
			r.over = true
			close(r.arrival)
			r.mu.Unlock()
			return
		}
	}
}

// publish has calls go to m.
func (r *remounted) publish(m *mount) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.features != nil {
		m.Init(*r.features)
	}
	old := r.current.Swap(m)
	old.dead.Store(true)
	old.put()
	close(r.arrival)
	r.arrival = make(chan struct{})
}

// take takes a reference, unless all have been given back.
func (m *mount) take() bool {
	for {
		n := m.refs.Load()
		if n == 0 {
			return false
		}
		if m.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// put gives one back.
func (m *mount) put() {
	if m.refs.Add(-1) == 0 {
		m.err <- m.Close()
	}
}

// done ends a call.
func (m *mount) done(errno fsbackend.Errno) fsbackend.Errno {
	defer m.put()
	// fs/fuse/dev.c: a request to a program that has ended, or that was there when it did. Others may say so of their network.
	if (errno == unix.ENOTCONN || errno == unix.ECONNABORTED) && m.ended() {
		return unix.ESTALE
	}
	return errno
}

// late is how long it may take until the end of a program is told of that the kernel has told of already.
const late = time.Second

// ended says whether the program has.
func (m *mount) ended() bool {
	timer := time.NewTimer(late)
	defer timer.Stop()
	for !m.dead.Load() {
		state, news := m.line.Watch()
		if !state.Running || state.Starts != m.start {
			m.dead.Store(true)
			break
		}
		select {
		case <-news:
		case <-timer.C:
			return false
		}
	}
	return true
}

// file ends a call about an open file, which is not opened again.
func (m *mount) file(errno fsbackend.Errno) fsbackend.Errno {
	switch errno = m.done(errno); {
	case errno == unix.ESTALE, errno == unix.EBADF && m.start > 1:
		return unix.EIO
	}
	return errno
}

// enter returns the mount, for a call, once there is one.
func (r *remounted) enter(ctx *fsbackend.Context) (*mount, fsbackend.Errno) {
	if m := r.current.Load(); !m.dead.Load() && m.take() {
		return m, fsbackend.OK
	}
	if !ctx.MayBlock {
		return nil, fsbackend.ErrMayBlock
	}
	timer := time.NewTimer(r.wait)
	defer timer.Stop()
	for {
		r.mu.Lock()
		arrival, over := r.arrival, r.over
		r.mu.Unlock()
		if m := r.current.Load(); !m.dead.Load() && m.take() {
			return m, fsbackend.OK
		}
		if over {
			return nil, unix.EIO
		}
		select {
		case <-arrival:
		case <-ctx.Cancel:
			return nil, unix.EINTR
		case <-timer.C:
			return nil, unix.EIO
		}
	}
}

// call makes a call of the mount that there is.
func (r *remounted) call(ctx *fsbackend.Context, f func(*mount) fsbackend.Errno) fsbackend.Errno {
	m, errno := r.enter(ctx)
	if errno != 0 {
		return errno
	}
	return m.done(f(m))
}

// callFile is call for an open file.
func (r *remounted) callFile(ctx *fsbackend.Context, f func(*mount) fsbackend.Errno) fsbackend.Errno {
	m, errno := r.enter(ctx)
	if errno != 0 {
		return errno
	}
	return m.file(f(m))
}

// now calls f with the mount, if there is one, of which no answer is wanted.
func (r *remounted) now(f func(*mount)) {
	if m := r.current.Load(); m.take() {
		f(m)
		m.put()
	}
}

// Wraps implements fsbackend.Wrapper.
func (r *remounted) Wraps() *fsbackend.Resolved { return r.first }

// Slow implements fsbackend.Slow: the next mount may be waited for.
func (r *remounted) Slow() bool { return true }

// Init implements fsbackend.Initer.
func (r *remounted) Init(f fsbackend.Features) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.features = &f
	r.now(func(m *mount) { m.Init(f) })
}

// WantFlags implements fsbackend.Wanter.
func (r *remounted) WantFlags(defaults uint64) uint64 {
	return fsbackend.Forward{Inner: r.first}.WantFlags(defaults)
}

// Reset implements fsbackend.Backend.
func (r *remounted) Reset() { r.now(func(m *mount) { m.Reset() }) }

// Close implements fsbackend.Backend.
func (r *remounted) Close() error {
	r.stop()
	<-r.done
	err := r.line.Close()
	m := r.current.Load()
	m.put()
	return errors.Join(err, <-m.err)
}

// Stats implements fsbackend.Statser.
func (r *remounted) Stats() (s fsbackend.Stats) {
	r.now(func(m *mount) { s = m.Stats() })
	return s
}

// Forget implements fsbackend.Backend.
func (r *remounted) Forget(node, n uint64) { r.now(func(m *mount) { m.Forget(node, n) }) }

// Release implements fsbackend.Opener.
func (r *remounted) Release(ctx *fsbackend.Context, in *fuseproto.ReleaseIn) {
	r.now(func(m *mount) { m.Release(ctx, in) })
}

// Releasedir implements fsbackend.DirReader.
func (r *remounted) Releasedir(ctx *fsbackend.Context, in *fuseproto.ReleaseIn) {
	r.now(func(m *mount) { m.Releasedir(ctx, in) })
}

// FileOf implements fsbackend.Filer.
func (r *remounted) FileOf(node, fh uint64, use func(fd int) fsbackend.Errno) fsbackend.Errno {
	errno := fsbackend.Errno(unix.EIO)
	r.now(func(m *mount) { errno = m.FileOf(node, fh, use) })
	return errno
}

// Lookup implements fsbackend.Backend.
func (r *remounted) Lookup(ctx *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Lookup(ctx, parent, name, out) })
}

// Getattr implements fsbackend.Backend.
func (r *remounted) Getattr(ctx *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Getattr(ctx, in, out) })
}

// Readlink implements fsbackend.Readlinker.
func (r *remounted) Readlink(ctx *fsbackend.Context, node uint64, dst *fsbackend.Sink) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Readlink(ctx, node, dst) })
}

// Mknod implements fsbackend.Maker.
func (r *remounted) Mknod(ctx *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Mknod(ctx, in, name, out) })
}

// Mkdir implements fsbackend.Maker.
func (r *remounted) Mkdir(ctx *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Mkdir(ctx, in, name, out) })
}

// Symlink implements fsbackend.Maker.
func (r *remounted) Symlink(ctx *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Symlink(ctx, parent, name, target, out) })
}

// Link implements fsbackend.Linker.
func (r *remounted) Link(ctx *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Link(ctx, in, name, out) })
}

// Unlink implements fsbackend.Remover.
func (r *remounted) Unlink(ctx *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Unlink(ctx, parent, name) })
}

// Rmdir implements fsbackend.Remover.
func (r *remounted) Rmdir(ctx *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Rmdir(ctx, parent, name) })
}

// Rename implements fsbackend.Renamer.
func (r *remounted) Rename(ctx *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Rename(ctx, in, oldName, newName) })
}

// Setattr implements fsbackend.Setattrer.
func (r *remounted) Setattr(ctx *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Setattr(ctx, in, out) })
}

// Open implements fsbackend.Opener.
func (r *remounted) Open(ctx *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Open(ctx, in, out) })
}

// Create implements fsbackend.Creater.
func (r *remounted) Create(ctx *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Create(ctx, in, name, out) })
}

// Tmpfile implements fsbackend.Tmpfiler.
func (r *remounted) Tmpfile(ctx *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Tmpfile(ctx, in, out) })
}

// Read implements fsbackend.Reader.
func (r *remounted) Read(ctx *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	return r.callFile(ctx, func(m *mount) fsbackend.Errno { return m.Read(ctx, in, dst) })
}

// Write implements fsbackend.Writer.
func (r *remounted) Write(ctx *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, fsbackend.Errno) {
	m, errno := r.enter(ctx)
	if errno != 0 {
		return 0, errno
	}
	n, errno := m.Write(ctx, in, src)
	return n, m.file(errno)
}

// Flush implements fsbackend.Flusher.
func (r *remounted) Flush(ctx *fsbackend.Context, in *fuseproto.FlushIn) fsbackend.Errno {
	return r.callFile(ctx, func(m *mount) fsbackend.Errno { return m.Flush(ctx, in) })
}

// Fsync implements fsbackend.Fsyncer.
func (r *remounted) Fsync(ctx *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	return r.callFile(ctx, func(m *mount) fsbackend.Errno { return m.Fsync(ctx, in) })
}

// Fsyncdir implements fsbackend.Fsyncer.
func (r *remounted) Fsyncdir(ctx *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	return r.callFile(ctx, func(m *mount) fsbackend.Errno { return m.Fsyncdir(ctx, in) })
}

// Syncfs implements fsbackend.Syncfser.
func (r *remounted) Syncfs(ctx *fsbackend.Context, node uint64) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Syncfs(ctx, node) })
}

// Opendir implements fsbackend.DirReader.
func (r *remounted) Opendir(ctx *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Opendir(ctx, in, out) })
}

// Readdir implements fsbackend.DirReader.
func (r *remounted) Readdir(ctx *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return r.callFile(ctx, func(m *mount) fsbackend.Errno { return m.Readdir(ctx, in, out) })
}

// Readdirplus implements fsbackend.DirPlusReader.
func (r *remounted) Readdirplus(ctx *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return r.callFile(ctx, func(m *mount) fsbackend.Errno { return m.Readdirplus(ctx, in, out) })
}

// Statfs implements fsbackend.StatFSer.
func (r *remounted) Statfs(ctx *fsbackend.Context, node uint64, out *fuseproto.StatfsOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Statfs(ctx, node, out) })
}

// Getxattr implements fsbackend.XattrReader.
func (r *remounted) Getxattr(ctx *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	m, errno := r.enter(ctx)
	if errno != 0 {
		return 0, errno
	}
	n, errno := m.Getxattr(ctx, in, name, dst)
	return n, m.done(errno)
}

// Listxattr implements fsbackend.XattrReader.
func (r *remounted) Listxattr(ctx *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	m, errno := r.enter(ctx)
	if errno != 0 {
		return 0, errno
	}
	n, errno := m.Listxattr(ctx, in, dst)
	return n, m.done(errno)
}

// Setxattr implements fsbackend.XattrWriter.
func (r *remounted) Setxattr(ctx *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Setxattr(ctx, in, name, value) })
}

// Removexattr implements fsbackend.XattrWriter.
func (r *remounted) Removexattr(ctx *fsbackend.Context, node uint64, name fsbackend.Name) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Removexattr(ctx, node, name) })
}

// Access implements fsbackend.Accesser.
func (r *remounted) Access(ctx *fsbackend.Context, in *fuseproto.AccessIn) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Access(ctx, in) })
}

// Fallocate implements fsbackend.Fallocater.
func (r *remounted) Fallocate(ctx *fsbackend.Context, in *fuseproto.FallocateIn) fsbackend.Errno {
	return r.callFile(ctx, func(m *mount) fsbackend.Errno { return m.Fallocate(ctx, in) })
}

// Lseek implements fsbackend.Lseeker.
func (r *remounted) Lseek(ctx *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) fsbackend.Errno {
	return r.callFile(ctx, func(m *mount) fsbackend.Errno { return m.Lseek(ctx, in, out) })
}

// CopyFileRange implements fsbackend.CopyFileRanger.
func (r *remounted) CopyFileRange(ctx *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (uint64, fsbackend.Errno) {
	m, errno := r.enter(ctx)
	if errno != 0 {
		return 0, errno
	}
	n, errno := m.CopyFileRange(ctx, in)
	return n, m.file(errno)
}

// Statx implements fsbackend.Statxer.
func (r *remounted) Statx(ctx *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) fsbackend.Errno {
	return r.call(ctx, func(m *mount) fsbackend.Errno { return m.Statx(ctx, in, out) })
}

// Ioctl implements fsbackend.Ioctler.
func (r *remounted) Ioctl(ctx *fsbackend.Context, in *fuseproto.IoctlIn, arg []byte, dst *fsbackend.Sink) (int32, fsbackend.Errno) {
	m, errno := r.enter(ctx)
	if errno != 0 {
		return 0, errno
	}
	n, errno := m.Ioctl(ctx, in, arg, dst)
	return n, m.file(errno)
}

// Getlk implements fsbackend.Locker.
func (r *remounted) Getlk(ctx *fsbackend.Context, in *fuseproto.LkIn, out *fuseproto.LkOut) fsbackend.Errno {
	return r.callFile(ctx, func(m *mount) fsbackend.Errno { return m.Getlk(ctx, in, out) })
}

// Setlk implements fsbackend.Locker.
func (r *remounted) Setlk(ctx *fsbackend.Context, in *fuseproto.LkIn) fsbackend.Errno {
	return r.callFile(ctx, func(m *mount) fsbackend.Errno { return m.Setlk(ctx, in) })
}
