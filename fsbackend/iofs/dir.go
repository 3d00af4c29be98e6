package iofs

import (
	"io/fs"
	"path"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// dir is an open directory: the listing that it had when it was last read from the start, so that offsets, which count its
// entries, stay valid.
type dir struct {
	handle
	fs *FS

	mu      sync.Mutex
	read    bool // entries is filled in
	entries []fs.DirEntry
}

// Opendir implements fsbackend.DirReader.
func (f *FS) Opendir(_ *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	n, errno := f.directory(in.NodeId)
	if errno != 0 {
		return errno
	}
	out.Fh, errno = insert(f, f.dirs, &dir{handle: handle{node: n}, fs: f})
	return errno
}

// Releasedir implements fsbackend.DirReader.
func (f *FS) Releasedir(_ *fsbackend.Context, in *fuseproto.ReleaseIn) { release(f, f.dirs, in) }

// Close gives the listing back; nobody uses it any more.
func (d *dir) Close() error {
	d.fs.listed.give(len(d.entries))
	return nil
}

// Readdir implements fsbackend.DirReader.
func (f *FS) Readdir(_ *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return f.readdir(in, out)
}

// Readdirplus implements fsbackend.DirPlusReader.
func (f *FS) Readdirplus(_ *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return f.readdir(in, out)
}

func (f *FS) readdir(in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	d, errno := pin(f, f.dirs, in.NodeId, in.Fh)
	if errno != 0 {
		return errno
	}
	defer unpin(f, d)
	entries, errno := d.list(in.Offset == 0)
	if errno != 0 {
		return errno
	}
	for off := in.Offset; off < uint64(len(entries))+dots; off++ {
		if !f.addEntry(d.node, entries, off, out) {
			break
		}
	}
	return fsbackend.OK
}

// dots are the entries "." and "..", which come first.
const dots = 2

// list returns the listing, made anew for a reader that starts.
func (d *dir) list(anew bool) ([]fs.DirEntry, fsbackend.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.read && !anew {
		return d.entries, fsbackend.OK
	}
	entries, err := fs.ReadDir(d.fs.cfg.FS, d.node.path)
	if err != nil {
		return nil, staleErrnoOf(err)
	}
	served := entries[:0:0]
	for _, e := range entries {
		if servable(e.Name()) {
			served = append(served, e)
		}
	}
	d.fs.listed.give(len(d.entries))
	d.read, d.entries = false, nil
	if !d.fs.listed.take(len(served)) {
		return nil, unix.ENOMEM
	}
	d.read, d.entries = true, served
	return served, fsbackend.OK
}

// addEntry adds entry number off to out, if it fits.
func (f *FS) addEntry(n *node, entries []fs.DirEntry, off uint64, out *fsbackend.DirList) bool {
	name, p, typ := ".", n.path, uint32(unix.S_IFDIR)
	var e fs.DirEntry
	switch off {
	case 0:
	case 1:
		name, p = "..", path.Dir(n.path)
	default:
		e = entries[off-dots]
		name = e.Name()
		p = path.Join(n.path, name)
		// Without ReadLinkFS, a LOOKUP may follow what is a link to READDIR.
		if typ, _ = typeOf(e.Type()); typ == unix.S_IFLNK && !f.links {
			typ = 0
		}
	}
	if !out.Fits(len(name)) {
		return false
	}
	if !out.Plus {
		return out.Add(inode(p), off+1, typ>>12, []byte(name))
	}
	var entry fuseproto.EntryOut
	if e != nil {
		f.lookupEntry(p, e, &entry)
	}
	if entry.NodeId == 0 {
		entry.Ino, entry.Mode = inode(p), typ
	}
	return out.AddPlus(&entry, inode(p), off+1, entry.Mode&unix.S_IFMT>>12, []byte(name))
}

// lookupEntry is LOOKUP of an entry of a listing. Where that fails, the guest asks again by name, if it wants to know.
func (f *FS) lookupEntry(p string, e fs.DirEntry, out *fuseproto.EntryOut) {
	info, err := e.Info()
	if err == nil && info.Mode().Type() == fs.ModeSymlink && !f.links {
		info, err = fs.Stat(f.cfg.FS, p)
	}
	if err != nil || f.entry(p, info, out) != fsbackend.OK {
		*out = fuseproto.EntryOut{}
	}
}
