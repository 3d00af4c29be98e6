package overlay

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
)

// faulty is an upper layer whose calls that change something fail from a certain one on.
type faulty struct {
	*passthrough.FS
	made int  // calls
	fail int  // the number of the call that fails, from 1; 0: none
	on   bool // those after it fail, too: the machine has crashed
	with errno
	list []string
}

func (f *faulty) call(what string) errno {
	f.made++
	f.list = append(f.list, what)
	if f.fail != 0 && (f.made == f.fail || f.on && f.made > f.fail) {
		return f.with
	}
	return 0
}

func (f *faulty) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) errno {
	if e := f.call("mknod " + name.String()); e != 0 {
		return e
	}
	return f.FS.Mknod(c, in, name, out)
}

func (f *faulty) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) errno {
	if e := f.call("mkdir " + name.String()); e != 0 {
		return e
	}
	return f.FS.Mkdir(c, in, name, out)
}

func (f *faulty) Symlink(c *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) errno {
	if e := f.call("symlink " + name.String()); e != 0 {
		return e
	}
	return f.FS.Symlink(c, parent, name, target, out)
}

func (f *faulty) Link(c *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) errno {
	if e := f.call("link " + name.String()); e != 0 {
		return e
	}
	return f.FS.Link(c, in, name, out)
}

func (f *faulty) Unlink(c *fsbackend.Context, parent uint64, name fsbackend.Name) errno {
	if e := f.call("unlink " + name.String()); e != 0 {
		return e
	}
	return f.FS.Unlink(c, parent, name)
}

func (f *faulty) Rmdir(c *fsbackend.Context, parent uint64, name fsbackend.Name) errno {
	if e := f.call("rmdir " + name.String()); e != 0 {
		return e
	}
	return f.FS.Rmdir(c, parent, name)
}

func (f *faulty) Rename(c *fsbackend.Context, in *fuseproto.Rename2In, a, b fsbackend.Name) errno {
	if e := f.call(fmt.Sprint("rename ", a, " ", b, " ", in.Flags)); e != 0 {
		return e
	}
	return f.FS.Rename(c, in, a, b)
}

func (f *faulty) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) errno {
	if e := f.call("create " + name.String()); e != 0 {
		return e
	}
	return f.FS.Create(c, in, name, out)
}

func (f *faulty) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) errno {
	if e := f.call("tmpfile"); e != 0 {
		return e
	}
	return f.FS.Tmpfile(c, in, out)
}

func (f *faulty) Setattr(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) errno {
	if e := f.call("setattr"); e != 0 {
		return e
	}
	return f.FS.Setattr(c, in, out)
}

func (f *faulty) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) errno {
	if e := f.call("setxattr " + name.String()); e != 0 {
		return e
	}
	return f.FS.Setxattr(c, in, name, value)
}

func (f *faulty) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, errno) {
	if e := f.call("write"); e != 0 {
		return 0, e
	}
	return f.FS.Write(c, in, src)
}

func (f *faulty) Fsync(*fsbackend.Context, *fuseproto.FsyncIn) errno {
	if e := f.call("fsync"); e != 0 {
		return e
	}
	return 0 // it is the order of calls that counts
}

// FileOf has data copied by calls that can fail.
func (f *faulty) FileOf(uint64, uint64, func(int) errno) errno { return unix.EOPNOTSUPP }

// memDir returns a directory in memory, where there is one: many files are made.
func memDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sluice-overlay")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

var dirLinks = regexp.MustCompile(`^(004.*) nlink \d+ (.*) mtime -?\d+ `)

// contents is a tree without what an unfinished change may leave changed: link counts and times of directories.
func contents(t *testing.T, what string, o *ourTree) map[string]string {
	t.Helper()
	all := snap(t, what, o)
	for path, s := range all {
		all[path] = dirLinks.ReplaceAllString(s, "$1 $2 ")
	}
	return all
}

// TestFaults has each call of the upper layer fail in turn, for want of room or because the machine crashes, in changes that take
// several: the tree is what it was, or what it was to become, also when it is opened again.
func TestFaults(t *testing.T) {
	needRoot(t)
	lower := []string{"d/", "d/f", "d/g", "d/sub/", "d/sub/x", "e/", "e/y", "f", "g", "empty/", "l>g"}
	for _, row := range []struct {
		what   string
		before func(o *ourTree) error
		do     func(o *ourTree) error
	}{
		{"write", nil, func(o *ourTree) error { return o.write("d/sub/x", 2, "written") }},
		{"truncate", nil, func(o *ourTree) error { return o.truncate("d/f", 3) }},
		{"chmod", nil, func(o *ourTree) error { return o.chmod("f", 0o600) }},
		{"copy a link", nil, func(o *ourTree) error { return o.chown("l", 5, 6) }},
		{"copy a directory", nil, func(o *ourTree) error { return o.setxattr("d/sub", "trusted.x", "y") }},
		{"unlink", nil, func(o *ourTree) error { return o.unlink("d/f") }},
		{"unlink a copy", func(o *ourTree) error { return o.write("d/f", 0, "x") }, func(o *ourTree) error { return o.unlink("d/f") }},
		{"create over a whiteout", func(o *ourTree) error { return o.unlink("f") }, func(o *ourTree) error { return o.create("f", 0o644) }},
		{"mkdir over a whiteout", func(o *ourTree) error { return o.unlink("f") }, func(o *ourTree) error { return o.mkdir("f", 0o755) }},
		{"rmdir", nil, func(o *ourTree) error { return o.rmdir("empty") }},
		{"rmdir with whiteouts", func(o *ourTree) error { return o.unlink("e/y") }, func(o *ourTree) error { return o.rmdir("e") }},
		{"link", nil, func(o *ourTree) error { return o.link("f", "d/new") }},
		{"link over a whiteout", func(o *ourTree) error { return o.unlink("d/g") }, func(o *ourTree) error { return o.link("f", "d/g") }},
		{"rename a file", nil, func(o *ourTree) error { return o.rename("d/f", "new", 0) }},
		{"rename over a file", nil, func(o *ourTree) error { return o.rename("d/f", "g", 0) }},
		{"rename over a whiteout", func(o *ourTree) error { return o.unlink("g") }, func(o *ourTree) error { return o.rename("d/f", "g", 0) }},
		{"rename a directory", nil, func(o *ourTree) error { return o.rename("d/sub", "e/moved", 0) }},
		{"rename a directory in its own", nil, func(o *ourTree) error { return o.rename("d", "new", 0) }},
		{"rename a directory over an empty one", nil, func(o *ourTree) error { return o.rename("d/sub", "empty", 0) }},
		{"rename a directory over whiteouts", func(o *ourTree) error { return o.unlink("e/y") }, func(o *ourTree) error { return o.rename("d/sub", "e", 0) }},
		{"rename a directory over a whiteout", func(o *ourTree) error { return o.unlink("f") }, func(o *ourTree) error { return o.rename("d/sub", "f", 0) }},
		{"exchange", nil, func(o *ourTree) error { return o.rename("d/f", "g", unix.RENAME_EXCHANGE) }},
		{"exchange directories", nil, func(o *ourTree) error { return o.rename("d/sub", "e", unix.RENAME_EXCHANGE) }},
		{"exchange a file and a directory", nil, func(o *ourTree) error { return o.rename("d/f", "e", unix.RENAME_EXCHANGE) }},
	} {
		for _, crash := range []bool{false, true} {
			t.Run(fmt.Sprint(row.what, ", crash ", crash), func(t *testing.T) {
				dir := memDir(t)
				var after map[string]string
				for n := 0; ; n++ {
					s := newStackIn(t, fmt.Sprint(dir, "/", n), 1)
					put(t, s.lowers[0], 0, lower...)
					cfg := s.config(t)
					f := &faulty{FS: cfg.Upper.(*passthrough.FS), on: crash, with: unix.ENOSPC}
					cfg.Upper, cfg.Volatile = f, false
					o := newOurTree(newOverlay(t, cfg))
					if row.before != nil {
						if err := row.before(o); err != nil {
							t.Fatal(err)
						}
					}
					before := contents(t, "before", o)
					f.made, f.fail, f.list = 0, n, nil
					err := row.do(o)
					failed := n > 0 && f.made >= n
					f.fail = 0
					if !failed && err != nil {
						t.Fatal(err)
					}
					got := contents(t, "after", o)
					if n == 0 {
						after = got // the first time nothing fails
					}
					if failed && crash {
						_ = o.fs.Close()
						o = s.open(t)
						got = contents(t, "after the crash", o)
					}
					what := fmt.Sprintf("call %d of %v fails", n, f.list)
					if !maps.Equal(got, before) {
						differences(t, what, got, after)
					}
					// What is cut off is not copied first.
					if !crash && maps.Equal(got, after) != (err == nil) && row.what != "truncate" {
						t.Errorf("%s: the answer is %v, but the tree has changed: %v", what, err, maps.Equal(got, after))
					}
					if err := o.fs.check(); err != nil {
						t.Error(err)
					}
					_ = o.fs.Close()
					if !crash {
						again := s.open(t)
						differences(t, what+", and opened again", contents(t, "again", again), got)
						_ = again.fs.Close()
					}
					if left, err := os.ReadDir(s.work); err != nil || len(left) > 0 {
						t.Errorf("%s: the work directory has %v, %v", what, left, err)
					}
					if n > 0 && !failed || t.Failed() {
						return
					}
				}
			})
		}
	}
}
