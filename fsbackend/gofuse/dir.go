package gofuse

import (
	"golang.org/x/sys/unix"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Readdir implements fsbackend.DirReader.
func (b *Backend) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return b.list("READDIR", c, in, out, b.fs.ReadDir, b.addEntries)
}

// Readdirplus implements fsbackend.DirPlusReader.
func (b *Backend) Readdirplus(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return b.list("READDIRPLUS", c, in, out, b.fs.ReadDirPlus, b.addPlusEntries)
}

func (b *Backend) list(op string, c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList,
	call func(<-chan struct{}, *fuse.ReadIn, *fuse.DirEntryList) fuse.Status, add func(*fsbackend.DirList, []byte) error,
) fsbackend.Errno {
	return b.inFile(op, in.NodeId, in.Fh, true, func(h *handle) fsbackend.Errno {
		p := b.buffer(out.Len())
		defer b.buffers.Put(p)
		req := *in
		req.InHeader, req.Fh, req.Size = header(c, h.node), h.raw, uint32(len(*p))
		entries := fuse.NewDirEntryList(*p, in.Offset)
		errno := errnoOf(call(c.Cancel, &req, entries))
		// A file system that fails after some entries has looked those up.
		if err := add(out, entries.Bytes()); err != nil && errno == 0 {
			errno = unix.EIO
		}
		if out.Written() > 0 {
			return fsbackend.OK
		}
		return errno
	})
}

// addEntries copies what go-fuse has laid out as READDIR's reply.
func (b *Backend) addEntries(out *fsbackend.DirList, reply []byte) error {
	entries, err := fuse.ParseDirEntries(reply)
	for _, e := range entries {
		if !out.Add(e.Ino, e.Off, typeOf(&e), []byte(e.Name)) {
			break
		}
	}
	return err
}

// addPlusEntries is addEntries for READDIRPLUS: lookups of entries that the guest does not get go back.
func (b *Backend) addPlusEntries(out *fsbackend.DirList, reply []byte) error {
	entries, lookups, err := fuse.ParseDirLookupEntries(reply)
	full := false
	for i, e := range entries {
		entry := &lookups[i]
		b.adopt(entry, false)
		if !full {
			full = !out.AddPlus(entry, e.Ino, e.Off, typeOf(&e), []byte(e.Name))
		}
		if full && entry.NodeId != 0 {
			b.Forget(entry.NodeId, 1)
		}
	}
	return err
}

// typeOf is the entry's DT_*.
func typeOf(e *fuse.DirEntry) uint32 { return e.Mode & unix.S_IFMT >> 12 }
