package fusebridge

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// A call on a queue's own thread (Context.MayBlock) must not sleep for long, and handing it to another thread takes about as long as a
// quick program does to answer. So the bridge goes by what it has seen: as long as a program answers an operation in no time, and
// nobody else waits for it, the next one of that kind is waited for on the queue's thread, as passthrough waits for a disk.

const (
	// quickAnswer is how long an answer may take to speak for an operation, and slowAnswer how long it must to put an end to it.
	quickAnswer = 300 * time.Microsecond
	slowAnswer  = 2 * time.Millisecond
	// A quick answer counts 1, up to mostQuick, one that is not takes some away, and from enoughQuick on the operation is quick.
	mostQuick, enoughQuick = 16, 8
	lessQuick, leastQuick  = 2, -256
)

// mayBeQuick are the operations that take one request or two, and nobody else's doing, by number.
const mayBeQuick = 1<<fuseproto.FUSE_LOOKUP | 1<<fuseproto.FUSE_GETATTR | 1<<fuseproto.FUSE_SETATTR | 1<<fuseproto.FUSE_READLINK |
	1<<fuseproto.FUSE_SYMLINK | 1<<fuseproto.FUSE_MKNOD | 1<<fuseproto.FUSE_MKDIR | 1<<fuseproto.FUSE_UNLINK | 1<<fuseproto.FUSE_RMDIR |
	1<<fuseproto.FUSE_RENAME | 1<<fuseproto.FUSE_LINK | 1<<fuseproto.FUSE_OPEN | 1<<fuseproto.FUSE_READ | 1<<fuseproto.FUSE_WRITE |
	1<<fuseproto.FUSE_STATFS | 1<<fuseproto.FUSE_FLUSH | 1<<fuseproto.FUSE_GETXATTR | 1<<fuseproto.FUSE_LISTXATTR |
	1<<fuseproto.FUSE_SETXATTR | 1<<fuseproto.FUSE_OPENDIR | 1<<fuseproto.FUSE_ACCESS | 1<<fuseproto.FUSE_CREATE

// quickData is how many bytes a READ or WRITE may have to be quick: no more than go into one request.
func (b *Bridge) quickData() int {
	c := b.current.Load()
	return min(32<<10, c.maxRead, c.maxWrite)
}

// begun is ctx for the rest of a call that has been quick so far: it cannot be made again from its beginning.
func begun(ctx *fsbackend.Context) *fsbackend.Context {
	if ctx.MayBlock {
		return ctx
	}
	own := *ctx
	own.MayBlock = true
	return &own
}

// quick returns the connection, with a reference, if an op about n is likely to be answered in no time.
func (b *Bridge) quick(op fuseproto.Opcode, n *node) *conn {
	c := b.current.Load()
	if uint64(mayBeQuick)>>op&1 == 0 || c.pace[op].Load() < enoughQuick {
		return nil
	}
	if n != b.root {
		b.mu.Lock()
		known := n.at.conn == c
		b.mu.Unlock()
		if !known {
			return nil // it takes more requests
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead || c.leading || len(c.pending) > 0 {
		return nil
	}
	c.refs.Add(1)
	return c
}

// answered notes how long the answer to an op took, and whether the program knows of it.
func (c *conn) answered(op fuseproto.Opcode, took time.Duration, errno fsbackend.Errno) {
	if errno == unix.ENOSYS {
		c.missing.Or(uint64(onceENOSYS) & (1 << op))
	}
	if uint64(mayBeQuick)>>op&1 == 0 {
		return
	}
	pace := &c.pace[op]
	switch n := pace.Load(); {
	case took > slowAnswer:
		pace.Store(leastQuick)
	case took > quickAnswer:
		pace.Store(max(n-lessQuick, leastQuick))
	case n < mostQuick:
		pace.Store(n + 1)
	}
}

// onceENOSYS are the operations of which a program that has answered ENOSYS is not asked again, as a kernel does not (fs/fuse).
const onceENOSYS = 1<<fuseproto.FUSE_GETXATTR | 1<<fuseproto.FUSE_SETXATTR | 1<<fuseproto.FUSE_LISTXATTR | 1<<fuseproto.FUSE_REMOVEXATTR |
	1<<fuseproto.FUSE_ACCESS | 1<<fuseproto.FUSE_FSYNC | 1<<fuseproto.FUSE_FSYNCDIR | 1<<fuseproto.FUSE_SYNCFS | 1<<fuseproto.FUSE_LSEEK |
	1<<fuseproto.FUSE_FALLOCATE | 1<<fuseproto.FUSE_COPY_FILE_RANGE | 1<<fuseproto.FUSE_STATX | 1<<fuseproto.FUSE_TMPFILE
