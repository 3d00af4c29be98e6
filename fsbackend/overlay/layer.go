package overlay

import (
	"fmt"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// layer is a backend as a layer.
type layer struct {
	r      *fsbackend.Resolved
	root   uint64
	name   string
	index  int  // 0 is the uppermost
	bottom bool // nothing is below
	noACL  bool
	// complete says of which of its directories the names can be known; nil: of none.
	complete fsbackend.Complete
	// domain goes to the upper bits of inode numbers, unless keepIno.
	domain  uint64
	keepIno bool
}

func newLayer(r *fsbackend.Resolved, root uint64, name string) *layer {
	if root == 0 {
		root = rootID
	}
	complete, _ := r.Backend.(fsbackend.Complete)
	return &layer{r: r, root: root, name: name, complete: complete}
}

// real is a file of a layer.
type real struct {
	l    *layer
	node uint64
}

// forget takes one lookup back.
func (r real) forget() { r.l.r.Forget(r.node, 1) }

// may says whether the layer can be called in this context.
func (l *layer) may(c *fsbackend.Context) bool { return c.MayBlock || !l.r.Slow }

// wants returns what the backend's WantFlags does.
func (l *layer) wants(defaults uint64) uint64 {
	if l.r.Wanter == nil {
		return defaults &^ fuseproto.FUSE_POSIX_ACL
	}
	return l.r.WantFlags(defaults)
}

func (l *layer) wantsACL() bool {
	return !l.noACL && l.r.XattrReader != nil && l.wants(0)&fuseproto.FUSE_POSIX_ACL != 0
}

// inoBits are those that a file's own number keeps where layers lie on different file systems.
const inoBits = 56

// ino makes the overlay's inode number of a layer's.
func (l *layer) ino(ino uint64) uint64 {
	if l.keepIno {
		return ino
	}
	if ino>>inoBits != 0 {
		ino = ino*0x9e3779b97f4a7c15>>(64-inoBits) | 1 // it does not fit: something made of it
	}
	return ino | l.domain<<inoBits
}

// numberLayers gives layers on different file systems different domains. The first one's has number 0, so that a tree that
// lies on one file system has its numbers.
func (fs *FS) numberLayers() error {
	type device struct{ major, minor uint32 }
	byDevice := make(map[device]uint64)
	byBackend := make(map[fsbackend.Backend]uint64)
	next := uint64(0)
	for _, l := range fs.layers {
		if domain, ok := byBackend[l.r.Backend]; ok {
			l.domain = domain
			continue
		}
		var dev device
		if l.r.Statxer != nil {
			in := fuseproto.StatxIn{InHeader: header(l.root)}
			var out fuseproto.StatxOut
			if e := l.r.Statx(&fsbackend.Context{MayBlock: true}, &in, &out); e == 0 {
				dev = device{out.Statx.DevMajor, out.Statx.DevMinor}
			}
		}
		domain, known := byDevice[dev]
		if !known || dev == (device{}) {
			domain, next = next, next+1
			byDevice[dev] = domain
		}
		l.domain = domain
		byBackend[l.r.Backend] = domain
	}
	const most = 1 << (64 - inoBits)
	if next > most && fs.cfg.Xino == XinoOn {
		return fmt.Errorf("xino=on, but the layers lie on %d file systems: expected at most %d", next, most)
	}
	for _, l := range fs.layers {
		l.keepIno = next == 1 || fs.cfg.Xino == XinoOff
		l.domain %= most
	}
	return nil
}

// header is the header of a request of the overlay's own.
func header(node uint64) fuseproto.InHeader {
	return fuseproto.InHeader{NodeId: node}
}

// own returns a context for what the overlay does by itself, which belongs to nobody in the guest. c may sleep.
func own(c *fsbackend.Context) *fsbackend.Context {
	return &fsbackend.Context{MayBlock: true, Cancel: c.Cancel, Shard: c.Shard}
}

// as returns a context for what is made for the caller, with its ids as the layers have them.
func (fs *FS) as(c *fsbackend.Context) (*fsbackend.Context, errno) {
	if len(fs.cfg.UIDMap)+len(fs.cfg.GIDMap) == 0 {
		return c, 0
	}
	d := *c
	ok1, ok2 := false, false
	d.Caller.Uid, ok1 = fs.cfg.UIDMap.host(c.Caller.Uid)
	d.Caller.Gid, ok2 = fs.cfg.GIDMap.host(c.Caller.Gid)
	if !ok1 || !ok2 {
		return nil, eOverflow
	}
	d.SuppGroups = nil
	for _, g := range c.SuppGroups {
		if g, ok := fs.cfg.GIDMap.host(g); ok {
			d.SuppGroups = append(d.SuppGroups, g)
		}
	}
	return &d, 0
}
