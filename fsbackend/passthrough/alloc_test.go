package passthrough

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// hotPath are the calls that a busy guest makes most, ready to be made again and again.
func hotPath(g *guest) map[string]func() fsbackend.Errno {
	f := g.create(rootID, "file")
	g.put(f.NodeId, f.Fh, 0, "some data in the file", 0, 0)
	g.lookup("file") // gives it a descriptor beyond the handle's
	buf := make([]byte, 16)
	iov := []unix.Iovec{sys.MakeIovec(buf)}
	name := fsbackend.MakeName("file")
	absent := fsbackend.MakeName("absent")
	var (
		read  fuseproto.ReadIn
		write fuseproto.WriteIn
		get   fuseproto.GetattrIn
		open  fuseproto.OpenIn
		rel   fuseproto.ReleaseIn
		entry fuseproto.EntryOut
		attr  fuseproto.AttrOut
		opn   fuseproto.OpenOut
		sink  fsbackend.Sink
		src   fsbackend.Source
	)
	read.NodeId, read.Fh, read.Size = f.NodeId, f.Fh, 16
	write.NodeId, write.Fh, write.Size = f.NodeId, f.Fh, 16
	get.NodeId, open.NodeId, rel.NodeId = f.NodeId, f.NodeId, f.NodeId
	g.write("other", "")
	other, fresh := fsbackend.MakeName("other"), fsbackend.MakeName("fresh")
	var (
		create fuseproto.CreateIn
		made   fuseproto.CreateOut
		dir    fuseproto.OpenIn
		ls     fuseproto.ReadIn
		list   fsbackend.DirList
	)
	create.NodeId, create.Flags, create.Mode = rootID, unix.O_RDWR|unix.O_EXCL, 0o644
	dir.NodeId, ls.NodeId = rootID, rootID
	list.Plus = true
	page := make([]byte, 4096)
	inline := fsbackend.Context{}
	return map[string]func() fsbackend.Errno{
		"READ": func() fsbackend.Errno {
			iov[0] = sys.MakeIovec(buf)
			sink.Reset(iov, 0, 16)
			e := g.fs.Read(&inline, &read, &sink)
			if e == fsbackend.ErrMayBlock { // may be said of a cached page, too
				e = g.fs.Read(&g.ctx, &read, &sink)
			}
			return e
		},
		"WRITE": func() fsbackend.Errno {
			iov[0] = sys.MakeIovec(buf)
			src.Reset(iov, 0, 16)
			_, e := g.fs.Write(&inline, &write, &src)
			return e
		},
		"GETATTR": func() fsbackend.Errno { return g.fs.Getattr(&inline, &get, &attr) },
		"LOOKUP":  func() fsbackend.Errno { return g.fs.Lookup(&inline, rootID, name, &entry) },
		"LOOKUP of nothing": func() fsbackend.Errno {
			if e := g.fs.Lookup(&inline, rootID, absent, &entry); e != unix.ENOENT {
				return unix.EIO
			}
			return fsbackend.OK
		},
		"LOOKUP, FORGET": func() fsbackend.Errno {
			e := g.fs.Lookup(&inline, rootID, other, &entry)
			g.fs.Forget(entry.NodeId, 1)
			return e
		},
		"CREATE, RELEASE, UNLINK, FORGET": func() fsbackend.Errno {
			if e := g.fs.Create(&inline, &create, fresh, &made); e != fsbackend.OK {
				return e
			}
			in := fuseproto.ReleaseIn{Fh: made.Fh}
			in.NodeId = made.NodeId
			g.fs.Release(&inline, &in)
			e := g.fs.Unlink(&inline, rootID, fresh)
			g.fs.Forget(made.NodeId, 1)
			return e
		},
		"OPENDIR, READDIRPLUS, RELEASEDIR": func() fsbackend.Errno {
			if e := g.fs.Opendir(&inline, &dir, &opn); e != fsbackend.OK {
				return e
			}
			iov[0] = sys.MakeIovec(page)
			list.Reset(iov, 0, uint64(len(page)))
			ls.Fh, ls.Size = opn.Fh, uint32(len(page))
			e := g.fs.Readdirplus(&inline, &ls, &list)
			walkEntries(page[:list.Written()], func(e *fuseproto.EntryOut, _ *fuseproto.Dirent) { g.fs.Forget(e.NodeId, 1) })
			in := fuseproto.ReleaseIn{Fh: opn.Fh}
			in.NodeId = rootID
			g.fs.Releasedir(&inline, &in)
			return e
		},
		"OPEN, RELEASE": func() fsbackend.Errno {
			e := g.fs.Open(&inline, &open, &opn)
			rel.Fh = opn.Fh
			g.fs.Release(&inline, &rel)
			return e
		},
	}
}

func TestHotPathDoesNotAllocate(t *testing.T) {
	g := newGuest(t, Config{})
	for name, call := range hotPath(g) {
		t.Run(name, func(t *testing.T) {
			n := testing.AllocsPerRun(200, func() {
				if e := call(); e != fsbackend.OK {
					t.Fatal(e)
				}
			})
			if n != 0 {
				t.Errorf("%v allocations, expected none", n)
			}
		})
	}
}

func BenchmarkHotPath(b *testing.B) {
	g := newGuest(b, Config{})
	for name, call := range hotPath(g) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if e := call(); e != fsbackend.OK {
					b.Fatal(e)
				}
			}
		})
	}
}
