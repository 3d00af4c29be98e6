package pluginlayer

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/ondemand"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/plugin"
)

// Layers are the layers that one entry of lowerdir, //NAME/DATA/PATH, is.
type Layers struct {
	conn       *Conn
	data, path string
	n          int
}

// layerKey is a layer of a plug-in.
type layerKey struct {
	data, path string
	index      int
}

// layer is a layer in use, by as many backends as have it open.
type layer struct {
	key    layerKey
	text   string // what it is called in lowerdir, and which of those it is
	number uint32 // what the plug-in calls it
	uid    uint32 // owner of its directory, 0 for any
	refs   int    // under Conn.mu

	// Known since it was loaded first. It must be the same again.
	flags uint32
	dev   uint64
	dir   *sys.FD // nil: it is a tree

	// on is the run of the plug-in that it is loaded in; nil: in none.
	on atomic.Pointer[link]
}

// errGone says that the plug-in is not there.
var errGone = errors.New("the plug-in has ended: it must be started again first")

// Layers asks the plug-in how many layers //NAME/data/path is.
func (c *Conn) Layers(ctx context.Context, data, path string) (*Layers, error) {
	c.mu.Lock()
	l := c.current
	c.mu.Unlock()
	text := fmt.Sprintf("//%s/%s/%s", c.cfg.Name, data, path)
	if l == nil {
		return nil, fmt.Errorf("%s: %w", text, errGone)
	}
	a := l.call(plugin.Request{Op: plugin.OpNumLayers, Data: data, Path: path}, wait{ctx.Done(), c.cfg.Timeout})
	if err := a.error(l); err != nil {
		return nil, fmt.Errorf("%s: ask for the number of layers: %w", text, err)
	}
	return &Layers{c, data, path, int(a.Layers)}, nil
}

// error is what to say of an answer that is none, or an error.
func (a *answer) error(l *link) error {
	select {
	case <-l.dead:
		if a.Errno == unix.EIO {
			return fmt.Errorf("the plug-in has ended: %w", l.err)
		}
	default:
	}
	if a.Errno != 0 {
		return a.Errno
	}
	return nil
}

// Len returns how many layers there are, at least 1.
func (s *Layers) Len() int { return s.n }

// Open makes a backend of layer i, 0 being the uppermost. Backends of the same layer share what the plug-in has loaded.
func (s *Layers) Open(ctx context.Context, i int) (Layer, error) {
	if i < 0 || i >= s.n {
		return nil, fmt.Errorf("layer %d of %d", i, s.n)
	}
	c := s.conn
	l, err := c.use(ctx, layerKey{s.data, s.path, i})
	if err != nil {
		return nil, err
	}
	b, err := c.backend(l)
	if err != nil {
		c.giveUp(l)
		return nil, fmt.Errorf("%s: %w", l.text, err)
	}
	return b, nil
}

// Layer is a backend of a layer.
type Layer interface {
	fsbackend.Backend
	// Dev is the layer's st_dev: the plug-in's, or one made up that is the layer's own.
	Dev() uint64
	// ACL says that it has POSIX ACLs.
	ACL() bool
}

// Dev implements Layer.
func (l *layer) Dev() uint64 { return l.dev }

// ACL implements Layer.
func (l *layer) ACL() bool { return l.flags&plugin.LayerACL != 0 }

// use loads a layer, or counts one more user of it.
func (c *Conn) use(ctx context.Context, key layerKey) (*layer, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.layers[key]
	if l == nil {
		c.last++
		l = &layer{key: key, text: fmt.Sprintf("//%s/%s/%s#%d", c.cfg.Name, key.data, key.path, key.index), number: c.last, uid: c.cfg.UID}
		if c.current == nil {
			return nil, fmt.Errorf("%s: %w", l.text, errGone)
		}
		if err := l.load(c.current, wait{ctx.Done(), c.cfg.Timeout}); err != nil {
			return nil, fmt.Errorf("%s: load: %w", l.text, err)
		}
		c.layers[key] = l
	}
	l.refs++
	return l, nil
}

// giveUp takes a user of l back.
func (c *Conn) giveUp(l *layer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l.refs--; l.refs > 0 || c.layers[l.key] != l {
		return
	}
	delete(c.layers, l.key)
	l.call(plugin.Request{Op: plugin.OpCleanup}, wait{c.ctx.Done(), c.cfg.Timeout})
	l.on.Store(nil)
	_ = l.dir.Close()
}

// load has the run k of the plug-in load l.
func (l *layer) load(k *link, w wait) error {
	l.on.Store(nil)
	a := k.call(plugin.Request{Op: plugin.OpLoad, Layer: l.number, Index: uint32(l.key.index), Data: l.key.data, Path: l.key.path}, w)
	err := a.error(k)
	if err == nil {
		err = k.serves(a.Flags)
	}
	if err == nil {
		err = l.check(&a)
	}
	if err != nil {
		_ = a.file.Close()
		return err
	}
	l.on.Store(k)
	return nil
}

// check takes what the plug-in says of l, which it must say again each time. It takes a's file over if there is no error.
func (l *layer) check(a *answer) error {
	isDir := a.Flags&plugin.LayerDirectory != 0
	if isDir {
		if err := l.checkDir(a.file); err != nil {
			return err
		}
	} else if a.file != nil {
		return errors.New("a descriptor came with a layer that is not a directory")
	}
	dev := a.Dev
	if dev == 0 {
		dev = hash(l.text)
	}
	if l.dev == 0 {
		l.flags, l.dev, l.dir = a.Flags, dev, a.file
		return nil
	}
	if a.Flags != l.flags || dev != l.dev {
		return fmt.Errorf("it has become another one: flags %#x and device %#x, expected %#x and %#x as before", a.Flags, dev, l.flags, l.dev)
	}
	if isDir {
		if err := sameFile(a.file, l.dir); err != nil {
			return err
		}
		_ = a.file.Close() // the one from before is as good
	}
	return nil
}

// checkDir sees that f is a directory that may be served.
func (l *layer) checkDir(f *sys.FD) error {
	var st unix.Stat_t
	switch {
	case f == nil:
		return errors.New("no descriptor came with a layer that is a directory")
	case sys.Fstat(f.Int(), &st) != 0 || st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return errors.New("the descriptor that came with it is not a directory's")
	case l.uid != 0 && st.Uid != l.uid:
		return fmt.Errorf("its directory belongs to user %d, expected %d, whom the plug-in runs as", st.Uid, l.uid)
	}
	return nil
}

func sameFile(a, b *sys.FD) error {
	var sa, sb unix.Stat_t
	if errno := sys.Fstat(a.Int(), &sa); errno != 0 {
		return errno
	}
	if errno := sys.Fstat(b.Int(), &sb); errno != 0 {
		return errno
	}
	if sa.Dev != sb.Dev || sa.Ino != sb.Ino {
		return errors.New("it has become another directory than before")
	}
	return nil
}

// call asks the plug-in something of the layer.
func (l *layer) call(q plugin.Request, w wait) answer {
	k := l.on.Load()
	if k == nil {
		return answer{Reply: plugin.Reply{Op: q.Op, Errno: unix.EIO}}
	}
	q.Layer = l.number
	a := k.call(q, w)
	if a.Errno == unix.ENOSYS { // would have the guest never ask again, of any layer
		a.Errno = unix.EOPNOTSUPP
	}
	return a
}

// backend makes a backend of l.
func (c *Conn) backend(l *layer) (Layer, error) {
	if l.dir == nil {
		return newTree(c, l), nil
	}
	inner, err := passthrough.New(passthrough.Config{
		Dir: l.text, DirFD: l.dir.Int(), ProcFD: c.cfg.ProcFD, MaxFDs: c.cfg.MaxFDs, MaxInodes: c.cfg.MaxInodes,
		NoFileHandles: c.cfg.NoFileHandles, PosixACL: l.ACL(), Log: c.cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	fs, err := ondemand.New(ondemand.Config{Backend: inner, Materializer: materializer{l}, Timeout: c.cfg.OnDemandTimeout, MaxInodes: c.cfg.MaxInodes})
	if err != nil {
		return nil, errors.Join(err, inner.Close())
	}
	return &directory{FS: fs, layer: l, conn: c}, nil
}

// directory is a backend of a layer that is a directory.
type directory struct {
	*ondemand.FS
	*layer
	conn *Conn
}

// Close implements fsbackend.Backend.
func (d *directory) Close() error {
	err := d.FS.Close()
	d.conn.giveUp(d.layer)
	return err
}

// materializer has the plug-in put files where they are looked for.
type materializer struct{ layer *layer }

// Lookup implements ondemand.Materializer.
func (m materializer) Lookup(ctx context.Context, path string) error {
	return m.ask(ctx, plugin.OpLookup, path)
}

// Open implements ondemand.Materializer.
func (m materializer) Open(ctx context.Context, path string) error {
	return m.ask(ctx, plugin.OpOpen, path)
}

func (m materializer) ask(ctx context.Context, op plugin.Op, path string) error {
	a := m.layer.call(plugin.Request{Op: op, Path: path}, wait{cancel: ctx.Done()})
	switch {
	case a.Errno == 0:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return a.Errno
}

// hash is a number made up of s, neither 0 nor the root's.
func hash(s string) uint64 {
	sum := sha256.Sum256([]byte(s))
	return max(binary.LittleEndian.Uint64(sum[:]), fuseproto.FUSE_ROOT_ID+1)
}
