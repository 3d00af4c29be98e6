package frontend

import (
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// client is what a program prepares and cleans up with: one request at a time, not measured. It keeps count of lookups,
// so that a Run leaves the server knowing nothing.
type client struct {
	q       *queue
	callers map[fuseproto.Opcode]*caller
	lookups map[uint64]uint64 // by node
}

func newClient(q *queue) *client {
	return &client{q: q, callers: make(map[fuseproto.Opcode]*caller), lookups: make(map[uint64]uint64)}
}

func (c *client) caller(s shape) *caller {
	if c.callers[s.op] == nil {
		c.callers[s.op] = c.q.caller(s)
	}
	return c.callers[s.op]
}

// do sends what k has and expects an answer of n bytes.
func (k *caller) do(n int) error {
	r, err := k.call()
	if err != nil {
		return err
	}
	return k.m.success(r, n)
}

// Shapes of the requests.
var (
	lookupShape      = shape{op: fuseproto.FUSE_LOOKUP, in: 256, out: 128}
	getattrShape     = shape{op: fuseproto.FUSE_GETATTR, in: 16, out: 104}
	setattrShape     = shape{op: fuseproto.FUSE_SETATTR, in: 88, out: 104}
	openShape        = shape{op: fuseproto.FUSE_OPEN, in: 8, out: 16}
	releaseShape     = shape{op: fuseproto.FUSE_RELEASE, in: 24}
	opendirShape     = shape{op: fuseproto.FUSE_OPENDIR, in: 8, out: 16}
	releasedirShape  = shape{op: fuseproto.FUSE_RELEASEDIR, in: 24}
	readdirplusShape = shape{op: fuseproto.FUSE_READDIRPLUS, in: 40, outData: 32 << 10}
	createShape      = shape{op: fuseproto.FUSE_CREATE, in: 16 + 256, out: 128 + 16}
	unlinkShape      = shape{op: fuseproto.FUSE_UNLINK, in: 256}
	renameShape      = shape{op: fuseproto.FUSE_RENAME, in: 8 + 2*256}
	statfsShape      = shape{op: fuseproto.FUSE_STATFS, out: 80}
	bmapShape        = shape{op: fuseproto.FUSE_BMAP, in: 16, out: 8}
)

func readShape(n int) shape { return shape{op: fuseproto.FUSE_READ, in: 40, outData: n} }

func writeShape(n int) shape { return shape{op: fuseproto.FUSE_WRITE, in: 40, inData: n, out: 8} }

// lookup looks one name up.
func (c *client) lookup(parent uint64, name string) (fuseproto.EntryOut, error) {
	k := c.caller(lookupShape)
	k.m.header().NodeId = parent
	k.m.name(0, name)
	if err := k.do(128); err != nil {
		return fuseproto.EntryOut{}, fmt.Errorf("%q: %w", name, err)
	}
	e := *as[fuseproto.EntryOut](k.m.out[outHeader:])
	if e.NodeId == 0 {
		return e, fmt.Errorf("%q: FUSE_LOOKUP says that there is none: has MakeTree made the files in the directory that the server shares?", name)
	}
	c.lookups[e.NodeId]++
	return e, nil
}

// walk looks the names of path up, one after the other, and returns the last one's node.
func (c *client) walk(path string) (uint64, error) {
	node := uint64(fuseproto.FUSE_ROOT_ID)
	for name := range strings.SplitSeq(path, "/") {
		e, err := c.lookup(node, name)
		if err != nil {
			return 0, err
		}
		node = e.NodeId
	}
	return node, nil
}

// open opens a file or, with openShape's other, a directory.
func (c *client) open(s shape, node uint64, flags uint32) (fh uint64, err error) {
	k := c.caller(s)
	k.m.header().NodeId = node
	as[fuseproto.OpenIn](k.m.in).Flags = flags
	if err := k.do(16); err != nil {
		return 0, err
	}
	return as[fuseproto.OpenOut](k.m.out[outHeader:]).Fh, nil
}

// release is for files and directories, as s says.
func (c *client) release(s shape, node, fh uint64) error {
	k := c.caller(s)
	k.m.header().NodeId = node
	as[fuseproto.ReleaseIn](k.m.in).Fh = fh
	return k.do(0)
}

// create makes an empty file, and closes it.
func (c *client) create(parent uint64, name string) (uint64, error) {
	k := c.caller(createShape)
	k.m.header().NodeId = parent
	in := as[fuseproto.CreateIn](k.m.in)
	in.Flags, in.Mode, in.Umask = unix.O_RDWR|unix.O_CREAT, unix.S_IFREG|0o644, 0o022
	k.m.name(16, name)
	if err := k.do(128 + 16); err != nil {
		return 0, fmt.Errorf("%q: %w", name, err)
	}
	out := *as[fuseproto.CreateOut](k.m.out[outHeader:])
	c.lookups[out.NodeId]++
	return out.NodeId, c.release(releaseShape, out.NodeId, out.Fh)
}

func (c *client) unlink(parent uint64, name string) error {
	k := c.caller(unlinkShape)
	k.m.header().NodeId = parent
	k.m.name(0, name)
	if err := k.do(0); err != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	return nil
}

// list reads the whole directory and calls each with what it has but "." and "..".
func (c *client) list(node uint64, each func(name []byte, e *fuseproto.EntryOut) error) error {
	fh, err := c.open(opendirShape, node, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	k := c.caller(readdirplusShape)
	k.m.header().NodeId = node
	in := as[fuseproto.ReadIn](k.m.in)
	*in = fuseproto.ReadIn{InHeader: in.InHeader, Fh: fh, Size: uint32(len(k.m.data))}
	buf := make([]byte, len(k.m.data))
	for {
		r, err := k.call()
		if err != nil {
			return err
		}
		if r.errno != 0 {
			return k.m.success(r, 0)
		}
		if r.size == 0 {
			return c.release(releasedirShape, node, fh)
		}
		k.m.copyData(buf[:r.size])
		if in.Offset, err = entries(buf[:r.size], func(name []byte, e *fuseproto.EntryOut) error {
			if e.NodeId != 0 {
				c.lookups[e.NodeId]++
			}
			return each(name, e)
		}); err != nil {
			return err
		}
	}
}

// direntplus is the size of fuse_direntplus without its name; entryOut is where the fuse_dirent begins in it.
const (
	entryOut   = 128
	direntplus = entryOut + 24
)

// entries calls each with what a READDIRPLUS has answered, without "." and "..", and returns where the next one goes on.
func entries(b []byte, each func(name []byte, e *fuseproto.EntryOut) error) (next uint64, err error) {
	for len(b) > 0 {
		if len(b) < direntplus {
			return 0, fmt.Errorf("FUSE_READDIRPLUS: %d bytes are left at the end, expected a whole entry", len(b))
		}
		e := as[fuseproto.EntryOut](b)
		next = binary.LittleEndian.Uint64(b[entryOut+8:])
		n := int(binary.LittleEndian.Uint32(b[entryOut+16:]))
		size := (direntplus + n + 7) &^ 7
		if n == 0 || n > 255 || size > len(b) {
			return 0, fmt.Errorf("FUSE_READDIRPLUS: a name of %d bytes with %d left", n, len(b)-direntplus)
		}
		name := b[direntplus : direntplus+n]
		b = b[size:]
		if string(name) == "." || string(name) == ".." {
			continue
		}
		if err := each(name, e); err != nil {
			return 0, err
		}
	}
	return next, nil
}

// forgetAll takes back all lookups.
func (c *client) forgetAll() error {
	nodes := make([]forget, 0, forgetBatch)
	for node, n := range c.lookups {
		nodes = append(nodes, forget{Nodeid: node, Nlookup: n})
		if len(nodes) == forgetBatch {
			if err := c.q.f.hiprio.send(nodes); err != nil {
				return err
			}
			nodes = nodes[:0]
		}
	}
	clear(c.lookups)
	if len(nodes) == 0 {
		return nil
	}
	return c.q.f.hiprio.send(nodes)
}
