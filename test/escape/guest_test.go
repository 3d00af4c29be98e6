package escape_test

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
	"github.com/sluicefs/sluice/virtqueue"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

const (
	root = fuseproto.FUSE_ROOT_ID
	// patience is how long a reply may take: a request that hangs is a failure, never a measure.
	patience = 30 * time.Second
	// requestQueue is the index of the only queue that the guest uses.
	requestQueue = 1
	inHeaderSize = 40
	// secretMark is in whatever must not be seen: contents, names and attribute values alike.
	secretMark = "SECRET-of-the-host"
)

// guest sends FUSE requests, one after the other, and believes nothing that it is told about what they may hold.
type guest struct {
	t          testing.TB
	fe         *vhosttest.FrontEnd
	mem        *vqtest.Memory
	ring       *vqtest.Driver
	kick, call *sys.FD
	mark       uint64 // memory behind it is the current request's
	unique     uint64
	caller     fuseproto.Caller
	gone       <-chan struct{} // closed when the daemon has ended
}

// newGuest brings a guest up on a connection to the daemon.
func newGuest(t testing.TB, fe *vhosttest.FrontEnd, gone <-chan struct{}) *guest {
	t.Helper()
	g := &guest{t: t, fe: fe, gone: gone}
	fe.NeedReply = true
	t.Cleanup(g.close)
	_, err := fe.GetFeatures()
	g.check(err)
	_, err = fe.Negotiate()
	g.check(err)
	const features = vhostuser.VIRTIO_F_VERSION_1 | vhostuser.VHOST_USER_F_PROTOCOL_FEATURES | virtqueue.VIRTIO_RING_F_EVENT_IDX
	g.check(fe.SetFeatures(features))
	g.mem, err = vqtest.NewMemory(vqtest.Regions(4 << 20))
	g.check(err)
	for _, m := range g.mem.Regions() {
		g.check(fe.AddMemReg(vhosttest.Region{
			MemRegion: vhostuser.MemRegion{GuestPhysAddr: m.GuestPhysAddr, Size: m.Size, UserAddr: m.UserAddr, MmapOffset: m.MmapOffset},
			FD:        g.mem.FD(),
		}))
	}
	g.ring, err = vqtest.New(vqtest.Config{Num: 256, Features: features, Memory: g.mem})
	g.check(err)
	g.mark = g.mem.Mark()
	g.kick, g.call = g.eventfd(), g.eventfd()
	c := g.ring.QueueConfig()
	g.check(fe.SetupRing(requestQueue, vhosttest.Ring{
		Num: uint32(c.Num), Desc: c.DescUserAddr, Avail: c.AvailUserAddr, Used: c.UsedUserAddr, Kick: g.kick.Int(), Call: g.call.Int(),
	}))
	g.check(fe.SetVringEnable(requestQueue, true))
	return g
}

func (g *guest) eventfd() *sys.FD {
	g.t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	g.check(err)
	return sys.NewFD(fd)
}

// close ends the connection, which ends the daemon.
func (g *guest) close() {
	_ = g.fe.Close()
	_, _ = g.kick.Close(), g.call.Close()
	if g.mem != nil {
		g.check(g.mem.Close())
		g.mem = nil
	}
}

func (g *guest) check(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

// call is one request: the header is the guest's to fill in, what follows it may be anything.
type call struct {
	op      fuseproto.Opcode
	node    uint64
	args    []byte
	data    []byte
	outArgs int // room for the reply's struct
	outData int // room for data behind it
	noReply bool
}

// args returns what follows the header: in is a struct of fuseproto that begins with it, or nil, strings get their NUL.
func args(in any, tail ...any) []byte {
	var b []byte
	if in != nil {
		var err error
		if b, err = binary.Append(nil, binary.NativeEndian, in); err != nil {
			panic(err)
		}
		b = b[inHeaderSize:]
	}
	for _, t := range tail {
		switch t := t.(type) {
		case string:
			b = append(append(b, t...), 0)
		case []byte:
			b = append(b, t...)
		default:
			panic("args: string or []byte")
		}
	}
	return b
}

// request returns the buffers of c.
func (g *guest) request(c call) vqtest.Chain {
	g.unique++
	header, err := binary.Append(nil, binary.NativeEndian, fuseproto.InHeader{
		Length: uint32(inHeaderSize + len(c.args) + len(c.data)), Opcode: uint32(c.op), Unique: g.unique, NodeId: c.node, Caller: g.caller,
	})
	g.check(err)
	return g.mem.Build(vqtest.Request{Header: header, Args: c.args, Data: c.data, OutArgs: c.outArgs, OutData: c.outData, NoReply: c.noReply})
}

// do sends c and returns its reply: EIO stands for no reply at all.
func (g *guest) do(c call) ([]byte, unix.Errno) {
	g.t.Helper()
	defer g.mem.Reset(g.mark)
	reply, errno := g.send(g.request(c))
	if bytes.Contains(reply, []byte(secretMark)) {
		g.t.Fatalf("the reply to %v of node %#x holds a secret: %q", c.op, c.node, reply)
	}
	return reply, errno
}

// send puts chain to the daemon and waits for it to be used.
func (g *guest) send(chain vqtest.Chain) ([]byte, unix.Errno) {
	g.t.Helper()
	head, ok := g.ring.Offer(chain)
	if !ok {
		g.t.Fatalf("a request of %d buffers does not fit the ring", len(chain))
	}
	if g.ring.Kick() {
		_, err := unix.Write(g.kick.Int(), []byte{1, 0, 0, 0, 0, 0, 0, 0})
		g.check(err)
	}
	for {
		used, written, ok := g.ring.Used()
		switch {
		case !ok && !g.ring.EnableInterrupt():
			g.await()
		case !ok:
		case used != head:
			g.t.Fatalf("the daemon used head %d, expected %d", used, head)
		case written == 0:
			return nil, unix.EIO
		default:
			reply := g.mem.Reply(chain, written)
			var h fuseproto.OutHeader
			n := decode(reply, &h)
			if h.Length != written || h.Unique != g.unique {
				g.t.Fatalf("used.len is %d, and the reply %+v to request %d", written, h, g.unique)
			}
			return reply[n:], unix.Errno(-h.Status)
		}
	}
}

// await waits for the daemon's notification.
func (g *guest) await() {
	g.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		fds := []unix.PollFd{{Fd: int32(g.call.Int()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 100)
		if err != nil && err != unix.EINTR {
			g.t.Fatal(err)
		}
		if n > 0 {
			var b [8]byte
			_, err := unix.Read(g.call.Int(), b[:])
			g.check(err)
			return
		}
		select {
		case <-g.gone:
			g.t.Fatal("the daemon has ended instead of replying")
		default:
		}
		if time.Now().After(deadline) {
			g.t.Fatal("the request hangs: expected a reply")
		}
	}
}

// decode fills the struct that v points to from the front of b and returns its size.
func decode(b []byte, v any) int {
	n, err := binary.Decode(b, binary.NativeEndian, v)
	if err != nil {
		panic(err)
	}
	return n
}

// get sends c, whose reply's struct is a T.
func get[T any](g *guest, c call) (out T, errno unix.Errno) {
	g.t.Helper()
	c.outArgs = binary.Size(out)
	reply, errno := g.do(c)
	if errno == 0 {
		decode(reply, &out)
	}
	return out, errno
}

// init begins a session with all that a guest could offer.
func (g *guest) init() {
	g.t.Helper()
	in := fuseproto.InitIn{Major: 7, Minor: 45, MaxReadAhead: 1 << 20, Flags: ^uint32(0), Flags2: ^uint32(0)}
	if _, errno := g.do(call{op: fuseproto.FUSE_INIT, args: args(in), outArgs: 64}); errno != 0 {
		g.t.Fatalf("INIT: %v", errno)
	}
}

// destroy ends the session: the daemon lets go of all nodes and handles.
func (g *guest) destroy() {
	g.t.Helper()
	if _, errno := g.do(call{op: fuseproto.FUSE_DESTROY}); errno != 0 {
		g.t.Fatalf("DESTROY: %v", errno)
	}
}

// Requests as a guest's kernel makes them; names may be what it never sends.

func (g *guest) lookup(parent uint64, name string) (fuseproto.EntryOut, unix.Errno) {
	g.t.Helper()
	return get[fuseproto.EntryOut](g, call{op: fuseproto.FUSE_LOOKUP, node: parent, args: args(nil, name)})
}

// node returns the node at a path of the share, by one lookup for each name.
func (g *guest) node(path ...string) uint64 {
	g.t.Helper()
	at := uint64(root)
	for _, name := range path {
		e, errno := g.lookup(at, name)
		if errno != 0 {
			g.t.Fatalf("LOOKUP %q of %q: %v", name, path, errno)
		}
		at = e.NodeId
	}
	return at
}

func (g *guest) forget(node, nlookup uint64) {
	g.t.Helper()
	g.do(call{op: fuseproto.FUSE_FORGET, node: node, args: args(fuseproto.ForgetIn{Nlookup: nlookup}), noReply: true})
}

func (g *guest) getattr(node uint64) (fuseproto.Attr, unix.Errno) {
	g.t.Helper()
	out, errno := get[fuseproto.AttrOut](g, call{op: fuseproto.FUSE_GETATTR, node: node, args: args(fuseproto.GetattrIn{})})
	return out.Attr, errno
}

// statx returns the inode number that STATX says.
func (g *guest) statx(node uint64) (uint64, unix.Errno) {
	g.t.Helper()
	const inoOffset = 64 // in fuse_statx_out, which binary.Decode cannot fill
	in := fuseproto.StatxIn{SxMask: unix.STATX_BASIC_STATS}
	reply, errno := g.do(call{op: fuseproto.FUSE_STATX, node: node, args: args(in), outArgs: binary.Size(fuseproto.StatxOut{})})
	if errno != 0 {
		return 0, errno
	}
	return binary.NativeEndian.Uint64(reply[inoOffset:]), 0
}

func (g *guest) setattr(node uint64, in fuseproto.SetattrIn) unix.Errno {
	g.t.Helper()
	_, errno := get[fuseproto.AttrOut](g, call{op: fuseproto.FUSE_SETATTR, node: node, args: args(in)})
	return errno
}

// setattrs are the changes that a guest can ask for, one at a time.
func setattrs() map[string]fuseproto.SetattrIn {
	all := make(map[string]fuseproto.SetattrIn)
	for name, valid := range map[string]uint32{
		"mode": fuseproto.FATTR_MODE, "owner": fuseproto.FATTR_UID | fuseproto.FATTR_GID, "size": fuseproto.FATTR_SIZE,
		"times": fuseproto.FATTR_ATIME | fuseproto.FATTR_MTIME,
		"now":   fuseproto.FATTR_ATIME | fuseproto.FATTR_ATIME_NOW | fuseproto.FATTR_MTIME | fuseproto.FATTR_MTIME_NOW,
	} {
		var in fuseproto.SetattrIn
		in.Valid, in.Mode, in.Size, in.Atime, in.Mtime = valid, 0o6711, 5, 1000, 2000
		in.Uid, in.Gid = nobody, nobody
		all[name] = in
	}
	return all
}

func (g *guest) readlink(node uint64) (string, unix.Errno) {
	g.t.Helper()
	reply, errno := g.do(call{op: fuseproto.FUSE_READLINK, node: node, outData: 4096})
	return string(reply), errno
}

func (g *guest) open(node uint64, flags uint32) (uint64, unix.Errno) {
	g.t.Helper()
	out, errno := get[fuseproto.OpenOut](g, call{op: fuseproto.FUSE_OPEN, node: node, args: args(fuseproto.OpenIn{Flags: flags})})
	return out.Fh, errno
}

func (g *guest) mustOpen(node uint64, flags uint32) uint64 {
	g.t.Helper()
	fh, errno := g.open(node, flags)
	if errno != 0 {
		g.t.Fatalf("OPEN of node %#x: %v", node, errno)
	}
	return fh
}

func (g *guest) opendir(node uint64) (uint64, unix.Errno) {
	g.t.Helper()
	out, errno := get[fuseproto.OpenOut](g, call{op: fuseproto.FUSE_OPENDIR, node: node, args: args(fuseproto.OpenIn{Flags: unix.O_DIRECTORY})})
	return out.Fh, errno
}

func (g *guest) release(node, fh uint64) {
	g.t.Helper()
	g.do(call{op: fuseproto.FUSE_RELEASE, node: node, args: args(fuseproto.ReleaseIn{Fh: fh})})
}

func (g *guest) releasedir(node, fh uint64) {
	g.t.Helper()
	g.do(call{op: fuseproto.FUSE_RELEASEDIR, node: node, args: args(fuseproto.ReleaseIn{Fh: fh})})
}

func (g *guest) read(node, fh uint64) (string, unix.Errno) {
	g.t.Helper()
	const size = 4096
	reply, errno := g.do(call{op: fuseproto.FUSE_READ, node: node, args: args(fuseproto.ReadIn{Fh: fh, Size: size}), outData: size})
	return string(reply), errno
}

func (g *guest) write(node, fh uint64, data string) unix.Errno {
	g.t.Helper()
	in := fuseproto.WriteIn{Fh: fh, Size: uint32(len(data))}
	_, errno := get[fuseproto.WriteOut](g, call{op: fuseproto.FUSE_WRITE, node: node, args: args(in), data: []byte(data)})
	return errno
}

func (g *guest) create(parent uint64, name string, flags, mode uint32) (fuseproto.CreateOut, unix.Errno) {
	g.t.Helper()
	in := fuseproto.CreateIn{Flags: flags | unix.O_CREAT, Mode: unix.S_IFREG | mode}
	return get[fuseproto.CreateOut](g, call{op: fuseproto.FUSE_CREATE, node: parent, args: args(in, name)})
}

func (g *guest) tmpfile(parent uint64, name string) (fuseproto.CreateOut, unix.Errno) {
	g.t.Helper()
	in := fuseproto.CreateIn{Flags: unix.O_RDWR, Mode: unix.S_IFREG | 0o644}
	return get[fuseproto.CreateOut](g, call{op: fuseproto.FUSE_TMPFILE, node: parent, args: args(in, name)})
}

func (g *guest) mkdir(parent uint64, name string) (fuseproto.EntryOut, unix.Errno) {
	g.t.Helper()
	return get[fuseproto.EntryOut](g, call{op: fuseproto.FUSE_MKDIR, node: parent, args: args(fuseproto.MkdirIn{Mode: 0o755}, name)})
}

func (g *guest) mknod(parent uint64, name string, mode, rdev uint32) (fuseproto.EntryOut, unix.Errno) {
	g.t.Helper()
	return get[fuseproto.EntryOut](g, call{op: fuseproto.FUSE_MKNOD, node: parent, args: args(fuseproto.MknodIn{Mode: mode, Rdev: rdev}, name)})
}

func (g *guest) symlink(parent uint64, name, target string) (fuseproto.EntryOut, unix.Errno) {
	g.t.Helper()
	return get[fuseproto.EntryOut](g, call{op: fuseproto.FUSE_SYMLINK, node: parent, args: args(nil, name, target)})
}

func (g *guest) link(node, parent uint64, name string) (fuseproto.EntryOut, unix.Errno) {
	g.t.Helper()
	return get[fuseproto.EntryOut](g, call{op: fuseproto.FUSE_LINK, node: parent, args: args(fuseproto.LinkIn{Oldnodeid: node}, name)})
}

func (g *guest) unlink(parent uint64, name string) unix.Errno {
	g.t.Helper()
	_, errno := g.do(call{op: fuseproto.FUSE_UNLINK, node: parent, args: args(nil, name)})
	return errno
}

func (g *guest) rmdir(parent uint64, name string) unix.Errno {
	g.t.Helper()
	_, errno := g.do(call{op: fuseproto.FUSE_RMDIR, node: parent, args: args(nil, name)})
	return errno
}

func (g *guest) rename(from uint64, oldName string, to uint64, newName string) unix.Errno {
	g.t.Helper()
	_, errno := g.do(call{op: fuseproto.FUSE_RENAME, node: from, args: args(fuseproto.RenameIn{Newdir: to}, oldName, newName)})
	return errno
}

func (g *guest) rename2(from uint64, oldName string, to uint64, newName string, flags uint32) unix.Errno {
	g.t.Helper()
	in := fuseproto.Rename2In{Newdir: to, Flags: flags}
	_, errno := g.do(call{op: fuseproto.FUSE_RENAME2, node: from, args: args(in, oldName, newName)})
	return errno
}

func (g *guest) getxattr(node uint64, name string) ([]byte, unix.Errno) {
	g.t.Helper()
	const size = 1024
	return g.do(call{op: fuseproto.FUSE_GETXATTR, node: node, args: args(fuseproto.GetxattrIn{Size: size}, name), outData: size})
}

func (g *guest) listxattr(node uint64) ([]byte, unix.Errno) {
	g.t.Helper()
	const size = 1024
	return g.do(call{op: fuseproto.FUSE_LISTXATTR, node: node, args: args(fuseproto.GetxattrIn{Size: size}), outData: size})
}

func (g *guest) setxattr(node uint64, name, value string) unix.Errno {
	g.t.Helper()
	in := fuseproto.SetxattrIn{Size: uint32(len(value))}
	_, errno := g.do(call{op: fuseproto.FUSE_SETXATTR, node: node, args: args(in, name, []byte(value))})
	return errno
}

func (g *guest) removexattr(node uint64, name string) unix.Errno {
	g.t.Helper()
	_, errno := g.do(call{op: fuseproto.FUSE_REMOVEXATTR, node: node, args: args(nil, name)})
	return errno
}

// ioctl has room for a reply of 256 bytes.
func (g *guest) ioctl(node, fh uint64, cmd, flags uint32, arg []byte) unix.Errno {
	g.t.Helper()
	const room = 256
	in := fuseproto.IoctlIn{Fh: fh, Cmd: cmd, Flags: flags, InSize: uint32(len(arg)), OutSize: room}
	_, errno := g.do(call{op: fuseproto.FUSE_IOCTL, node: node, args: args(in, arg), outArgs: 16, outData: room})
	return errno
}

// list returns what one reply to READDIR, or READDIRPLUS with plus, holds of a directory.
func (g *guest) list(node, fh uint64, plus bool) ([]fsbackendtest.Dirent, unix.Errno) {
	g.t.Helper()
	const size = 32 << 10
	op := fuseproto.FUSE_READDIR
	if plus {
		op = fuseproto.FUSE_READDIRPLUS
	}
	reply, errno := g.do(call{op: op, node: node, args: args(fuseproto.ReadIn{Fh: fh, Size: size}), outData: size})
	if errno != 0 {
		return nil, errno
	}
	return fsbackendtest.ParseDirents(reply, plus), 0
}

// names lists a directory.
func (g *guest) names(node uint64) []string {
	g.t.Helper()
	fh, errno := g.opendir(node)
	if errno != 0 {
		g.t.Fatalf("OPENDIR of node %#x: %v", node, errno)
	}
	defer g.releasedir(node, fh)
	entries, errno := g.list(node, fh, false)
	if errno != 0 {
		g.t.Fatalf("READDIR of node %#x: %v", node, errno)
	}
	var names []string
	for _, e := range entries {
		if e.Name != "." && e.Name != ".." {
			names = append(names, e.Name)
		}
	}
	return names
}
