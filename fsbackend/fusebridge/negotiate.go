package fusebridge

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// minMinor is the oldest protocol spoken, 7.19 of Linux 3.5: the structs of its requests are today's, but for INIT's and those
// that are marked by a flag.
const minMinor = 19

// offered are the INIT flags that a program may have. Not among them is what needs /dev/fuse (splicing, passthrough, io_uring), or
// a kernel with its page cache (writeback), and what would have the guest's kernel check or send what this program has not agreed to.
const offered = fuseproto.FUSE_ASYNC_READ |
	fuseproto.FUSE_POSIX_LOCKS |
	fuseproto.FUSE_ATOMIC_O_TRUNC |
	fuseproto.FUSE_BIG_WRITES |
	fuseproto.FUSE_DONT_MASK |
	fuseproto.FUSE_FLOCK_LOCKS |
	fuseproto.FUSE_HAS_IOCTL_DIR |
	fuseproto.FUSE_AUTO_INVAL_DATA |
	fuseproto.FUSE_DO_READDIRPLUS |
	fuseproto.FUSE_READDIRPLUS_AUTO |
	fuseproto.FUSE_ASYNC_DIO |
	fuseproto.FUSE_NO_OPEN_SUPPORT |
	fuseproto.FUSE_PARALLEL_DIROPS |
	fuseproto.FUSE_HANDLE_KILLPRIV |
	fuseproto.FUSE_MAX_PAGES |
	fuseproto.FUSE_CACHE_SYMLINKS |
	fuseproto.FUSE_NO_OPENDIR_SUPPORT |
	fuseproto.FUSE_HANDLE_KILLPRIV_V2 |
	fuseproto.FUSE_SETXATTR_EXT |
	fuseproto.FUSE_INIT_EXT

// relied are those of them that the guest has only if the program has them, so that a restarted one must have them too. Others the
// bridge makes up for: FUSE_PARALLEL_DIROPS by looking names up one after the other (node.look), FUSE_ATOMIC_O_TRUNC by SETATTR
// (Bridge.cut), FUSE_ASYNC_READ and FUSE_ASYNC_DIO by one request at a time (handle.order).
const relied = fuseproto.FUSE_POSIX_LOCKS |
	fuseproto.FUSE_FLOCK_LOCKS |
	fuseproto.FUSE_DO_READDIRPLUS |
	fuseproto.FUSE_HANDLE_KILLPRIV |
	fuseproto.FUSE_CACHE_SYMLINKS |
	fuseproto.FUSE_HANDLE_KILLPRIV_V2

// never are flags of the guest that no program has here.
const never = fuseproto.FUSE_WRITEBACK_CACHE |
	fuseproto.FUSE_POSIX_ACL |
	fuseproto.FUSE_SUBMOUNTS |
	fuseproto.FUSE_SECURITY_CTX |
	fuseproto.FUSE_CREATE_SUPP_GROUP |
	fuseproto.FUSE_EXPLICIT_INVAL_DATA |
	fuseproto.FUSE_NO_OPEN_SUPPORT |
	fuseproto.FUSE_NO_OPENDIR_SUPPORT |
	fuseproto.FUSE_ALLOW_IDMAP

// WantFlags implements fsbackend.Wanter: the guest gets what the program has agreed to.
func (b *Bridge) WantFlags(defaults uint64) uint64 {
	lacks := relied &^ b.first &^ fuseproto.FUSE_DO_READDIRPLUS // in whose place there is READDIR
	return defaults &^ never &^ lacks
}

// lacks says that the program has not agreed to flag.
func (b *Bridge) lacks(flag uint64) bool { return b.current.Load().flags&flag == 0 }

// Sizes of InitOut: before 7.5, before 7.23, and since (include/uapi/linux/fuse.h).
const (
	initOutOldSize = 24
	initOutMaxSize = 64
)

// negotiate sends INIT.
func (c *conn) negotiate(ctx context.Context) error {
	if !c.use() {
		return fmt.Errorf("%w: it is gone", errProgram)
	}
	cfg := &c.b.cfg
	c.timeout = cfg.StartTimeout
	r := c.request(&fsbackend.Context{Cancel: ctx.Done()}, 0)
	defer r.end()
	largest := c.largest()
	in := put(r, fuseproto.FUSE_INIT, &fuseproto.InitIn{})
	in.Major, in.Minor = fuseproto.FUSE_KERNEL_VERSION, fuseproto.FUSE_KERNEL_MINOR_VERSION
	in.MaxReadAhead = uint32(largest)
	in.Flags, in.Flags2 = uint32(offered&0xffffffff), uint32(offered>>32)
	if errno := r.call(&fsbackend.Context{Cancel: ctx.Done()}, initOutMaxSize, true); errno != 0 {
		return fmt.Errorf("%w: INIT: %w", errProgram, errno)
	}
	if err := c.agree(r.reply, largest); err != nil {
		return fmt.Errorf("%w: INIT: %w", errProgram, err)
	}
	c.timeout = cfg.Timeout
	return nil
}

// agree takes up a reply to INIT. largest is the most data that a message of ours may have.
func (c *conn) agree(reply []byte, largest int) error {
	if len(reply) < 8 {
		return fmt.Errorf("reply of %d bytes: expected %d or %d", len(reply), initOutOldSize, initOutMaxSize)
	}
	var o fuseproto.InitOut
	decode(append(append(make([]byte, 0, initOutMaxSize), reply...), make([]byte, initOutMaxSize-len(reply))...), &o)
	if o.Major != fuseproto.FUSE_KERNEL_VERSION || o.Minor < minMinor {
		return fmt.Errorf("version %d.%d: expected %d.%d or later", o.Major, o.Minor, fuseproto.FUSE_KERNEL_VERSION, minMinor)
	}
	want := initOutOldSize
	if o.Minor >= 23 {
		want = initOutMaxSize
	}
	if len(reply) < want {
		return fmt.Errorf("reply of %d bytes: expected %d in version 7.%d", len(reply), want, o.Minor)
	}
	c.minor = min(o.Minor, fuseproto.FUSE_KERNEL_MINOR_VERSION)
	flags := uint64(o.Flags)
	if flags&fuseproto.FUSE_INIT_EXT != 0 {
		flags |= uint64(o.Flags2) << 32
	}
	c.flags = flags & offered
	if c.b.cfg.ParallelLookups {
		c.flags |= fuseproto.FUSE_PARALLEL_DIROPS
	}
	// Without the flag 32 pages, FUSE_DEFAULT_MAX_PAGES_PER_REQ of fs/fuse/fuse_i.h.
	pages := 32
	if c.flags&fuseproto.FUSE_MAX_PAGES != 0 {
		pages = max(int(o.MaxPages), 1)
	}
	c.maxRead = min(largest, pages*pageSize)
	c.maxWrite = min(max(int(o.MaxWrite), pageSize), c.maxRead)
	return nil
}

// largest is the most data that a message may have, either way: both ends of the pair have buffers of one size.
func (c *conn) largest() int {
	limit := c.b.cfg.MaxWrite
	if n, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF); err == nil {
		// net/unix/af_unix.c, unix_dgram_sendmsg: a message may be 32 bytes less; half of it leaves room for a second.
		limit = min(limit, max((n/2-headroom)&^(pageSize-1), pageSize))
	}
	return limit
}

// destroy tells the program that it is unmounted.
func (c *conn) destroy() {
	if !c.use() {
		return
	}
	cancel := make(chan struct{})
	close(cancel) // it is given a second
	ctx := &fsbackend.Context{MayBlock: true, Cancel: cancel}
	r := c.request(ctx, 0)
	defer r.end()
	put(r, fuseproto.FUSE_DESTROY, &fuseproto.InHeader{})
	_ = r.call(ctx, 0, false)
}
