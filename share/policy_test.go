package share

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func (g *guest) change(path string, c Change) {
	g.t.Helper()
	if err := g.s.Change(path, c); err != nil {
		g.t.Fatal(err)
	}
}

// TestMadeReadOnly makes a graft read-only after its handles were given out, and tries everything.
func TestMadeReadOnly(t *testing.T) {
	writes := map[string]func(*request){
		"Open":   func(r *request) { r.flags = unix.O_WRONLY },
		"Access": func(r *request) { r.mask = unix.W_OK },
		"Ioctl":  func(r *request) { r.cmd = 0x40086602 }, // FS_IOC_SETFLAGS
	}
	for name, o := range ops {
		b := new(spy)
		g := changing(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/g", Backend: b})
		request := func() *request {
			r := in()
			if with := writes[name]; with != nil {
				with(r)
			}
			return r
		}
		if errno := o.call(g.s, request()); errno != fsbackend.OK {
			t.Errorf("%s: %v", name, errno)
		}
		g.change("/g", Change{ReadOnly: new(true)})
		b.taken()
		want := fsbackend.OK
		if o.modifies || writes[name] != nil {
			want = unix.EROFS
		}
		if errno := o.call(g.s, request()); errno != want {
			t.Errorf("%s of what was made read-only: %v, expected %v", name, errno, want)
		}
		if log := b.taken(); (len(log) == 0) != (want != 0) {
			t.Errorf("%s: the backend was asked %+v", name, log)
		}
		g.change("/g", Change{ReadOnly: new(false)})
		if errno := o.call(g.s, request()); errno != fsbackend.OK {
			t.Errorf("%s of what was made writable again: %v", name, errno)
		}
		if p := g.s.parts.get(1); p.calls.sum() != 0 {
			t.Errorf("%s: %#x calls are left", name, p.calls.sum())
		}
	}
}

// TestChangeWaits has a WRITE run while its graft is made read-only.
func TestChangeWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := new(spy)
		release := hang(b, "Write")
		s, err := New(Config{Dynamic: true, Grafts: []Graft{{Path: "/g", Backend: b}}})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan Errno, 1)
		go func() { done <- ops["Write"].call(s, in()) }()
		synctest.Wait()
		begun := time.Now()
		if err := s.Change("/g", Change{ReadOnly: new(true)}); !errors.Is(err, ErrUnsettled) || time.Since(begun) < patience {
			t.Errorf("Change while a WRITE hangs: %v after %v", err, time.Since(begun))
		}
		if errno := ops["Write"].call(s, in()); errno != unix.EROFS {
			t.Errorf("WRITE: %v, expected EROFS", errno)
		}
		time.AfterFunc(time.Second, release)
		begun = time.Now()
		if err := s.Change("/g", Change{ReadOnly: new(true)}); err != nil || time.Since(begun) < time.Second {
			t.Errorf("Change while a WRITE runs: %v after %v", err, time.Since(begun))
		}
		if errno := <-done; errno != 0 {
			t.Errorf("the WRITE that began before: %v", errno)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestPolicies shows a guest the same files under each policy.
func TestPolicies(t *testing.T) {
	m := newMem(t)
	g := changing(t, Graft{Path: "/g", Backend: m})
	dir := g.walk("/g").NodeId
	f := g.put(dir, "f", "x")
	chmod := func(mode uint32) {
		t.Helper()
		in := fuseproto.SetattrIn{}
		in.Valid, in.Mode = fuseproto.FATTR_MODE, mode
		_, errno := g.Setattr(f, in)
		g.want(errno, "SETATTR", 0)
	}
	mode := func(node uint64, want uint32) {
		t.Helper()
		a, errno := g.Getattr(node)
		if g.want(errno, "GETATTR", 0); a.Mode&0o7777 != want {
			t.Errorf("mode is %o, expected %o", a.Mode&0o7777, want)
		}
		fh, errno := g.Opendir(dir)
		g.want(errno, "OPENDIR", 0)
		entries, errno := g.Readdir(dir, fh, 0, 4096, true)
		g.want(errno, "READDIRPLUS", 0)
		for _, e := range entries {
			if e.Entry.NodeId == node && e.Entry.Mode&0o7777 != want {
				t.Errorf("READDIRPLUS gives mode %o, expected %o", e.Entry.Mode&0o7777, want)
			}
		}
		g.Releasedir(dir, fh)
	}
	chmod(0o6755)
	mode(f, 0o6755)
	g.change("/g", Change{NoSUID: new(true)})
	mode(f, 0o755)
	mode(g.walk("/g").NodeId, 0o755)
	if errno := g.Setxattr(f, capability, []byte("x"), 0); errno != unix.EPERM {
		t.Errorf("SETXATTR of capabilities: %v, expected EPERM", errno)
	}
	chmod(0o6711)
	c, errno := g.Create(dir, "set", unix.O_RDWR, 0o6755)
	g.want(errno, "CREATE", 0)
	g.Release(c.NodeId, c.Fh)
	n, errno := g.Mknod(dir, "node", unix.S_IFREG|0o6755, 0)
	g.want(errno, "MKNOD", 0)
	g.change("/g", Change{NoSUID: new(false)})
	mode(f, 0o711)
	mode(c.NodeId, 0o755)
	mode(n.NodeId, 0o755)
	g.want(g.Setxattr(f, capability, []byte("x"), 0), "SETXATTR", 0)
	g.change("/g", Change{NoSUID: new(true)})
	if _, _, errno := g.Getxattr(f, capability, 100); errno != unix.ENODATA {
		t.Errorf("GETXATTR of capabilities: %v, expected ENODATA", errno)
	}
	listed := func(want string) {
		t.Helper()
		for _, size := range []int{0, len(want) - 1, len(want), 1000} {
			list, n, errno := g.Listxattr(f, size)
			ok := errno == 0 && string(list) == want && n == uint32(len(want))
			switch size {
			case 0:
				ok = errno == 0 && len(list) == 0 && n == uint32(len(want))
			case len(want) - 1:
				ok = errno == unix.ERANGE && len(list) == 0
			}
			if !ok {
				t.Errorf("LISTXATTR with room for %d: %q, %d, %v, expected %q", size, list, n, errno, want)
			}
		}
	}
	for _, name := range []string{"user.a", "user.z"} {
		g.want(g.Setxattr(f, name, nil, 0), "SETXATTR", 0)
	}
	listed("user.a\x00user.z\x00")
	g.change("/g", Change{NoSUID: new(false)})
	listed(capability + "\x00user.a\x00user.z\x00")
	g.change("/g", Change{NoSUID: new(false), NoExec: new(true)})
	mode(f, 0o600)
	chmod(0o644)
	mode(f, 0o644)
	c, errno = g.Create(dir, "run", unix.O_RDWR, 0o755)
	g.want(errno, "CREATE", 0)
	g.Release(c.NodeId, c.Fh)
	g.change("/g", Change{NoExec: new(false)})
	mode(f, 0o755) // the execute bits are the host's
	mode(c.NodeId, 0o644)

	link, errno := g.Symlink(dir, "link", "f")
	g.want(errno, "SYMLINK", 0)
	dev, errno := g.Mknod(dir, "dev", unix.S_IFCHR|0o600, 0x103)
	g.want(errno, "MKNOD", 0)
	white, errno := g.Mknod(dir, "white", unix.S_IFCHR|0o600, 0)
	g.want(errno, "MKNOD", 0)
	g.change("/g", Change{NoSymfollow: new(true), NoDev: new(true)})
	_, errno = g.Readlink(link.NodeId)
	g.want(errno, "READLINK", unix.ELOOP)
	if a, errno := g.Getattr(dev.NodeId); errno != 0 || a.Rdev != noDevice || a.Mode&unix.S_IFMT != unix.S_IFCHR {
		t.Errorf("GETATTR of a device: %v, %+v", errno, a)
	}
	if a, errno := g.Getattr(white.NodeId); errno != 0 || a.Rdev != 0 {
		t.Errorf("GETATTR of a whiteout: %v, %+v", errno, a)
	}
	_, errno = g.Open(dev.NodeId, unix.O_RDONLY)
	g.want(errno, "OPEN of a device", unix.EACCES)
	_, errno = g.Mknod(dir, "dev2", unix.S_IFBLK|0o600, 0x103)
	g.want(errno, "MKNOD of a device", unix.EPERM)
	fh, errno := g.Open(f, unix.O_RDONLY)
	g.want(errno, "OPEN of a file", 0)
	g.Release(f, fh)
	if st := g.s.Grafts(); !st[0].Policy.NoDev || st[0].Policy.NoExec {
		t.Errorf("the policy is %+v", st[0].Policy)
	}
}

// TestCacheOfGraft has each cache policy decide what replies say.
func TestCacheOfGraft(t *testing.T) {
	m := newMem(t)
	put(t, m, "f", "")
	g := changing(t, Graft{Path: "/g", Backend: m})
	dir := g.walk("/g").NodeId
	c := &fsbackend.Context{MayBlock: true}
	for _, policy := range []fsbackend.CachePolicy{fsbackend.CacheNever, fsbackend.CacheAuto, fsbackend.CacheMetadata, fsbackend.CacheAlways} {
		own := &policy
		g.change("/g", Change{Cache: &own})
		var e fuseproto.EntryOut
		if errno := g.s.Lookup(c, dir, fsbackend.MakeName("f"), &e); errno != 0 {
			t.Fatal(errno)
		}
		stale := uint32(0)
		if policy == fsbackend.CacheNever {
			stale = 1
		}
		if e.EntryValid != policy.Valid() || e.AttrValid != policy.Valid() || e.EntryValidNsec != stale || e.AttrValidNsec != stale {
			t.Errorf("%v: the entry is %+v", policy, e)
		}
		var a fuseproto.AttrOut
		in := new(fuseproto.GetattrIn)
		in.NodeId = e.NodeId
		if errno := g.s.Getattr(c, in, &a); errno != 0 || a.AttrValid != policy.Valid() || a.AttrValidNsec != stale {
			t.Errorf("%v: GETATTR gives %v, %+v", policy, errno, a)
		}
		var o fuseproto.OpenOut
		open := new(fuseproto.OpenIn)
		open.NodeId = e.NodeId
		if errno := g.s.Open(c, open, &o); errno != 0 || o.OpenFlags != policy.FileFlags()|fsbackend.CacheDecided {
			t.Errorf("%v: OPEN gives %v, flags %#x", policy, errno, o.OpenFlags)
		}
		o, open.NodeId = fuseproto.OpenOut{}, dir
		if errno := g.s.Opendir(c, open, &o); errno != 0 || o.OpenFlags != policy.DirFlags()|fsbackend.CacheDecided {
			t.Errorf("%v: OPENDIR gives %v, flags %#x", policy, errno, o.OpenFlags)
		}
	}
	bad := fsbackend.CachePolicy(9)
	at := &bad
	if err := g.s.Change("/g", Change{Cache: &at}); err == nil {
		t.Error("Change to a policy that is none succeeds")
	}
	var none *fsbackend.CachePolicy
	g.change("/g", Change{Cache: &none})
	// What is on the way is never cached.
	g.add(Graft{Path: "/g/sub", Backend: newMem(t)})
	var o fuseproto.OpenOut
	open := new(fuseproto.OpenIn)
	open.NodeId = dir
	if errno := g.s.Opendir(c, open, &o); errno != 0 || o.OpenFlags != fsbackend.CacheDecided {
		t.Errorf("OPENDIR on the way gives %v, flags %#x", errno, o.OpenFlags)
	}
}

// TestFileFollows has the host replace the one file of a graft.
func TestFileFollows(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/conf", "version 1")
	g := changing(t, Graft{Path: "/conf", Backend: newPassthrough(t, dir), File: "conf"})
	e := g.walk("/conf")
	if e.EntryValid != 0 || e.EntryValidNsec != 1 {
		t.Errorf("the entry is %+v, expected one at once stale", e)
	}
	fh, errno := g.Open(e.NodeId, unix.O_RDONLY)
	g.want(errno, "OPEN", 0)
	write(t, dir+"/new", "version 2")
	if err := unix.Rename(dir+"/new", dir+"/conf"); err != nil {
		t.Fatal(err)
	}
	if got := g.contents(g.walk("/conf").NodeId); got != "version 2" {
		t.Errorf("the file holds %q", got)
	}
	if b, errno := g.Read(e.NodeId, fh, 0, 100); errno != 0 || !slices.Equal(b, []byte("version 1")) {
		t.Errorf("READ of what was open: %v, %q", errno, b)
	}
	g.Release(e.NodeId, fh)
}
