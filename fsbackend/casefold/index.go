package casefold

import (
	"container/list"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// stamp is what changes with a directory's names.
type stamp struct {
	ino, mtime, ctime    uint64
	mtimensec, ctimensec uint32
}

// assumedFor is how long an index may be used that the stamp does not vouch for: because it was changed along with the directory,
// and something else may have been changed in between, or because the directory had only just changed when it was read, and its
// clock may not have moved on since. It is no longer than a guest with cache=auto trusts a name.
const assumedFor = time.Second

// youngAge is how old a change has to be for the next one to have another time, whatever file system and clock the host has.
const youngAge = 2 * time.Second

// index knows the names of a directory by their keys. It is guarded by the cache's mu.
type index struct {
	dir     uint64
	stamp   stamp
	read    time.Time // when it was read from the directory
	assumed bool      // see assumedFor
	// first has, for each key, the name that comes first in byte order; more the others, sorted.
	first map[string]string
	more  map[string][]string
	size  int // names
	at    *list.Element
}

// add adds a name.
func (x *index) add(key, name string) {
	first, ok := x.first[key]
	if !ok {
		x.first[key] = name
		x.size++
		return
	}
	if name == first {
		return
	}
	if name < first {
		x.first[key], name = name, first
	}
	at, has := slices.BinarySearch(x.more[key], name)
	if !has {
		x.more[key] = slices.Insert(x.more[key], at, name)
		x.size++
	}
}

// remove removes a name.
func (x *index) remove(key, name string) {
	more := x.more[key]
	if x.first[key] != name {
		if at, has := slices.BinarySearch(more, name); has {
			x.setMore(key, slices.Delete(more, at, at+1))
			x.size--
		}
		return
	}
	x.size--
	if len(more) == 0 {
		delete(x.first, key)
		return
	}
	x.first[key] = more[0]
	x.setMore(key, slices.Delete(more, 0, 1))
}

func (x *index) setMore(key string, names []string) {
	if len(names) == 0 {
		delete(x.more, key)
	} else {
		x.more[key] = names
	}
}

// find returns the name that name stands for: itself if there is one, otherwise the first that is the same.
func (x *index) find(key, name string) (string, bool) {
	first, ok := x.first[key]
	if ok && first != name {
		if _, exact := slices.BinarySearch(x.more[key], name); exact {
			return name, true
		}
	}
	return first, ok
}

// cache keeps the indexes that were used last.
type cache struct {
	maxNames int
	now      func() time.Time

	mu    sync.Mutex
	dirs  map[uint64]*index
	used  *list.List // of *index, that used last in front
	names int        // in all of them
}

func (k *cache) init(maxNames int, now func() time.Time) {
	k.maxNames, k.now = maxNames, now
	k.dirs, k.used = make(map[uint64]*index), list.New()
}

// has says whether there is an index of dir, valid or not.
func (k *cache) has(dir uint64) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.dirs[dir] != nil
}

// find looks name up in the index of dir. known is false where there is none that is valid at s.
func (k *cache) find(dir uint64, s stamp, key, name string) (host string, found, known bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	x := k.dirs[dir]
	if x == nil {
		return "", false, false
	}
	if x.stamp != s || x.assumed && !k.recent(x.read) {
		k.drop(x)
		return "", false, false
	}
	k.used.MoveToFront(x.at)
	host, found = x.find(key, name)
	return host, found, true
}

// recent says whether at was less than assumedFor ago.
func (k *cache) recent(at time.Time) bool {
	age := k.now().Sub(at)
	return age >= 0 && age < assumedFor
}

// put keeps x, and drops others, and x too if it is too large, to stay within maxNames.
func (k *cache) put(x *index) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if old := k.dirs[x.dir]; old != nil {
		k.drop(old)
	}
	x.at = k.used.PushFront(x)
	k.dirs[x.dir] = x
	k.names += x.cost()
	k.trim()
}

// cost is what an index takes, in names: an empty one counts, too.
func (x *index) cost() int { return x.size + 1 }

func (k *cache) trim() {
	for k.names > k.maxNames {
		k.drop(k.used.Back().Value.(*index))
	}
}

func (k *cache) drop(x *index) {
	delete(k.dirs, x.dir)
	k.used.Remove(x.at)
	k.names -= x.cost()
}

// forget drops the index of dir.
func (k *cache) forget(dir uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if x := k.dirs[dir]; x != nil {
		k.drop(x)
	}
}

func (k *cache) reset() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.dirs)
	k.used.Init()
	k.names = 0
}

// change is a name that is there now, or no more.
type change struct {
	key, name string
	gone      bool
}

// apply makes changes of our own in the index of dir, which was valid at before; after is the directory's stamp behind them. Where
// somebody else has changed the index since, it goes.
func (k *cache) apply(dir uint64, before, after stamp, changes []change) {
	k.mu.Lock()
	defer k.mu.Unlock()
	x := k.dirs[dir]
	if x == nil {
		return
	}
	if x.stamp != before {
		k.drop(x)
		return
	}
	k.names -= x.cost()
	for _, c := range changes {
		if c.gone {
			x.remove(c.key, c.name)
		} else {
			x.add(c.key, c.name)
		}
	}
	k.names += x.cost()
	x.stamp, x.assumed = after, true
	k.trim()
}

// stampOf asks for a directory's stamp.
func (f *FS) stampOf(c *fsbackend.Context, dir uint64) (stamp, fsbackend.Errno) {
	q := queries.Get().(*query)
	defer queries.Put(q)
	q.in, q.out = fuseproto.GetattrIn{}, fuseproto.AttrOut{}
	q.in.NodeId, q.in.Caller = dir, c.Caller
	errno := f.Inner.Getattr(c, &q.in, &q.out)
	switch {
	case errno != fsbackend.OK:
		return stamp{}, errno
	case q.out.Mode&unix.S_IFMT != unix.S_IFDIR:
		return stamp{}, unix.ENOTDIR
	}
	a := &q.out.Attr
	return stamp{a.Ino, a.Mtime, a.Ctime, a.Mtimensec, a.Ctimensec}, fsbackend.OK
}

// query is room for a GETATTR.
type query struct {
	in  fuseproto.GetattrIn
	out fuseproto.AttrOut
}

var queries = sync.Pool{New: func() any { return new(query) }}

// resolve returns the name of the host that name in dir stands for, and the directory's stamp. Where it has to read the directory,
// which may take long, it needs a thread that may sleep.
func (f *FS) resolve(c *fsbackend.Context, dir uint64, name fsbackend.Name) (host string, found bool, s stamp, errno fsbackend.Errno) {
	if s, errno = f.stampOf(c, dir); errno != fsbackend.OK {
		return "", false, s, errno
	}
	key, own := f.key(name), name.String()
	host, found, known := f.cache.find(dir, s, key, own)
	if known {
		return host, found, s, fsbackend.OK
	}
	if !c.MayBlock {
		return "", false, s, fsbackend.ErrMayBlock
	}
	x := &index{dir: dir, stamp: s, read: f.cache.now(), first: make(map[string]string), more: make(map[string][]string)}
	changed := time.Unix(int64(s.ctime), int64(s.ctimensec))
	x.assumed = x.read.Sub(changed) < youngAge
	// A directory that is larger than all that may be kept is searched and not kept.
	rest := f.cache.maxNames
	errno = f.list(c, dir, func(entry []byte) {
		k := f.norm.appendKey(nil, entry)
		if rest--; rest > 0 || string(k) == key {
			x.add(string(k), string(entry))
		}
	})
	if errno != fsbackend.OK {
		return "", false, s, errno
	}
	host, found = x.find(key, own)
	if rest > 0 {
		f.cache.put(x)
	}
	return host, found, s, fsbackend.OK
}

// listSize is how much of a directory is read at a time, in bytes.
const listSize = 64 << 10

func (f *FS) key(name []byte) string { return string(f.norm.appendKey(nil, name)) }

var listings = sync.Pool{New: func() any { return new(fsbackend.Listing) }}

// list reads a directory and calls each with its names.
func (f *FS) list(c *fsbackend.Context, dir uint64, each func(name []byte)) fsbackend.Errno {
	l := listings.Get().(*fsbackend.Listing)
	defer listings.Put(l)
	var open fuseproto.OpenIn
	var opened fuseproto.OpenOut
	open.NodeId, open.Caller, open.Flags = dir, c.Caller, unix.O_RDONLY|unix.O_DIRECTORY
	switch errno := f.Forward.Opendir(c, &open, &opened); errno {
	case fsbackend.OK:
		defer f.Forward.Releasedir(c, &fuseproto.ReleaseIn{InHeader: open.InHeader, Fh: opened.Fh})
	case unix.ENOSYS: // it is read without
	default:
		return errno
	}
	in := fuseproto.ReadIn{InHeader: open.InHeader, Fh: opened.Fh}
	for {
		in.Size = l.Begin(false, listSize)
		if errno := f.Forward.Readdir(c, &in, &l.DirList); l.Written() == 0 {
			return errno
		}
		from := in.Offset
		if !l.Each(func(_ *fuseproto.EntryOut, d fuseproto.Dirent, name []byte) bool {
			if in.Offset = d.Off; string(name) != "." && string(name) != ".." {
				each(name)
			}
			return true
		}) {
			return unix.EIO
		}
		if in.Offset == from {
			return unix.EIO
		}
		select {
		case <-c.Cancel:
			return unix.EINTR
		default:
		}
	}
}
