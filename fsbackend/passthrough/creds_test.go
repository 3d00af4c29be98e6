package passthrough

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// checkThreads makes sure that no thread is left acting as a caller.
func checkThreads(t *testing.T) {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil || len(tasks) == 0 {
		t.Fatalf("no threads found: %v", err)
	}
	lines := map[string]string{}
	for _, task := range tasks {
		data, err := os.ReadFile(task)
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(data)) {
			what, ids, _ := strings.Cut(line, ":")
			switch what {
			case "Uid", "Gid", "Groups", "CapEff":
				if have, seen := lines[what]; seen && have != ids {
					t.Errorf("threads differ in %s: %q and %q", what, have, ids)
				}
				lines[what] = ids
			}
		}
	}
	if !strings.HasPrefix(strings.TrimSpace(lines["Uid"]), "0\t0\t0\t0") {
		t.Errorf("threads run as %q", lines["Uid"])
	}
}

func TestCreatesAsCaller(t *testing.T) {
	needRoot(t)
	g := newGuest(t, Config{})
	defer checkThreads(t)
	if err := os.Chmod(g.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	user := g.as(1000, 1001)
	_, e := user.tryCreate(rootID, "f", unix.O_RDWR, 0o644)
	g.fails("CREATE where only root may", e, unix.EACCES)
	_, e = user.tryMkdir(rootID, "d", 0o755)
	g.fails("MKDIR where only root may", e, unix.EACCES)
	_, e = user.symlink(rootID, "s", "x")
	g.fails("SYMLINK where only root may", e, unix.EACCES)
	_, e = user.tryMknod(rootID, "p", unix.S_IFIFO|0o600, 0)
	g.fails("MKNOD where only root may", e, unix.EACCES)

	if err := os.Chmod(g.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	owned := func(what string, a fuseproto.Attr, e fsbackend.Errno, uid, gid uint32) {
		t.Helper()
		g.ok(what, e)
		if a.Uid != uid || a.Gid != gid {
			t.Errorf("%s: belongs to %d:%d, expected %d:%d", what, a.Uid, a.Gid, uid, gid)
		}
	}
	f, e := user.tryCreate(rootID, "f", unix.O_RDWR, 0o644)
	owned("CREATE", f.Attr, e, 1000, 1001)
	d, e := user.tryMkdir(rootID, "d", 0o755)
	owned("MKDIR", d.Attr, e, 1000, 1001)
	s, e := user.symlink(rootID, "s", "x")
	owned("SYMLINK", s.Attr, e, 1000, 1001)
	p, e := user.tryMknod(rootID, "p", unix.S_IFIFO|0o600, 0)
	owned("MKNOD", p.Attr, e, 1000, 1001)
	_, e = user.tryMknod(rootID, "dev", unix.S_IFCHR|0o600, 0x103)
	g.fails("MKNOD of a device by a user", e, unix.EPERM)
	dev, e := g.tryMknod(rootID, "dev", unix.S_IFCHR|0o600, 0x103)
	owned("MKNOD of a device", dev.Attr, e, 0, 0)
	if dev.Attr.Rdev != 0x103 {
		t.Errorf("device number %#x, expected 0x103", dev.Attr.Rdev)
	}
	var tmp fuseproto.CreateOut
	in := fuseproto.CreateIn{Flags: unix.O_RDWR, Mode: 0o600}
	in.NodeId = rootID
	e = g.fs.Tmpfile(&user.ctx, &in, &tmp)
	owned("TMPFILE", tmp.Attr, e, 1000, 1001)
	sg, e := g.as(0, 1001).tryCreate(rootID, "sg", unix.O_RDWR, 0o644)
	owned("CREATE by root in another group", sg.Attr, e, 0, 1001)
	_, e = g.as(invalidID, 0).tryCreate(rootID, "unmapped", unix.O_RDWR, 0o644)
	g.fails("CREATE by an unmapped user", e, unix.EOVERFLOW)
	_, e = g.as(0, invalidID).tryMkdir(rootID, "unmapped", 0o755)
	g.fails("MKDIR by an unmapped group", e, unix.EOVERFLOW)
	g.fails("LOOKUP of what was refused", func() fsbackend.Errno { _, e := g.tryLookup(rootID, "unmapped"); return e }(), unix.ENOENT)
}

func TestSupplementaryGroups(t *testing.T) {
	needRoot(t)
	g := newGuest(t, Config{})
	defer checkThreads(t)
	if err := os.Chown(g.dir, 0, 2000); err != nil {
		t.Fatal(err)
	}
	if err := unix.Chmod(g.dir, 0o2775); err != nil {
		t.Fatal(err)
	}
	_, e := g.as(1000, 1000).tryCreate(rootID, "no", unix.O_RDWR, 0o644)
	g.fails("CREATE by a user outside the group", e, unix.EACCES)
	f, e := g.as(1000, 1000, 2000).tryCreate(rootID, "yes", unix.O_RDWR, 0o644)
	g.ok("CREATE by a member", e)
	if f.Attr.Gid != 2000 {
		t.Errorf("file in a set-group-id directory has group %d, expected 2000", f.Attr.Gid)
	}
	d, e := g.as(1000, 1000, 2000).tryMkdir(rootID, "dir", 0o755)
	g.ok("MKDIR by a member", e)
	if d.Attr.Mode&unix.S_ISGID == 0 || d.Attr.Gid != 2000 {
		t.Errorf("directory in a set-group-id directory: mode %#o group %d", d.Attr.Mode, d.Attr.Gid)
	}
	// A guest without the extension has checked groups that it cannot name.
	g.fs.Init(fsbackend.Features{Minor: 36, Flags: sessionFlags &^ fuseproto.FUSE_CREATE_SUPP_GROUP})
	_, e = g.as(1000, 1000).tryCreate(rootID, "old guest", unix.O_RDWR, 0o644)
	g.ok("CREATE by a guest that cannot name groups", e)
}

func TestOrdinaryUserCreates(t *testing.T) {
	uid, gid := uint32(os.Getuid()), uint32(os.Getgid())
	if uid == 0 {
		return // TestAsOrdinaryUser runs it
	}
	g := newGuest(t, Config{})
	for _, caller := range []*guest{g.as(0, 0), g.as(uid, gid), g.as(uid, 0)} {
		f, e := caller.tryCreate(rootID, "f", unix.O_RDWR|unix.O_EXCL, 0o644)
		g.ok("CREATE as the daemon", e)
		if f.Attr.Uid != uid {
			t.Errorf("file belongs to %d, expected %d", f.Attr.Uid, uid)
		}
		g.release(f.NodeId, f.Fh)
		g.ok("UNLINK", g.unlink(rootID, "f"))
	}
	for _, caller := range []*guest{g.as(uid+1, gid), g.as(uid, gid+1), g.as(0, gid+1)} {
		_, e := caller.tryCreate(rootID, "f", unix.O_RDWR|unix.O_EXCL, 0o644)
		g.fails("CREATE as somebody else", e, unix.EPERM)
		_, e = caller.tryMkdir(rootID, "d", 0o755)
		g.fails("MKDIR as somebody else", e, unix.EPERM)
	}
	f := g.create(rootID, "mine")
	_, e := g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid = fuseproto.FATTR_UID; in.Uid = uid + 1 })
	g.fails("chown by an ordinary user", e, unix.EPERM)
	if g.fs.mounts.at(0).state.Load() == handlesWork {
		t.Error("file handles work without CAP_DAC_READ_SEARCH")
	}
}

func modeOf(t *testing.T, path string) uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Mode
}

func TestKillsPrivileges(t *testing.T) {
	needRoot(t)
	g := newGuest(t, Config{})
	defer checkThreads(t)
	f := g.create(rootID, "f")
	path := g.path("f")
	const suid = unix.S_IFREG | unix.S_ISUID | 0o755
	reset := func() {
		t.Helper()
		if _, e := g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Mode = fuseproto.FATTR_MODE, unix.S_ISUID|0o755 }); e != fsbackend.OK {
			t.Fatal(e)
		}
		if mode := modeOf(t, path); mode != suid {
			t.Fatalf("mode %#o, expected %#o", mode, suid)
		}
	}
	cleared := func(what string, want bool) {
		t.Helper()
		if mode := modeOf(t, path); mode&unix.S_ISUID == 0 != want {
			t.Errorf("%s: mode %#o afterwards", what, mode)
		}
	}
	reset()
	g.put(f.NodeId, f.Fh, 0, "x", 0, 0)
	cleared("WRITE by root", false)
	g.put(f.NodeId, f.Fh, 0, "x", 0, fuseproto.FUSE_WRITE_KILL_SUIDGID)
	cleared("WRITE by a user", true)
	reset()
	_, e := g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Size = fuseproto.FATTR_SIZE, 0 })
	g.ok("SETATTR", e)
	cleared("truncation by root", false)
	_, e = g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) {
		in.Valid, in.Size = fuseproto.FATTR_SIZE|fuseproto.FATTR_KILL_SUIDGID, 1
	})
	g.ok("SETATTR", e)
	cleared("truncation by a user", true)
	reset()
	g.put(f.NodeId, f.Fh, 0, "x", 0, 0)
	in := fuseproto.OpenIn{Flags: unix.O_RDWR | unix.O_TRUNC, Mode: fuseproto.FUSE_OPEN_KILL_SUIDGID}
	in.NodeId = f.NodeId
	var out fuseproto.OpenOut
	g.ok("OPEN", g.fs.Open(&g.ctx, &in, &out))
	cleared("OPEN with O_TRUNC by a user", true)
	reset()
	_, e = g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid = fuseproto.FATTR_UID; in.Uid = 5 })
	g.ok("SETATTR", e)
	cleared("chown", true)
	// Group ids that the daemon is not in survive a chmod by the guest's root.
	_, e = g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid = fuseproto.FATTR_GID; in.Gid = 77 })
	g.ok("SETATTR", e)
	_, e = g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Mode = fuseproto.FATTR_MODE, 0o2755 })
	g.ok("SETATTR", e)
	if mode := modeOf(t, path); mode&unix.S_ISGID == 0 {
		t.Errorf("chmod g+s: mode %#o", mode)
	}
}

func TestUmaskLeftToTheServer(t *testing.T) {
	g := newGuest(t, Config{PosixACL: true})
	want := g.fs.WantFlags(sessionFlags)
	if want&(fuseproto.FUSE_POSIX_ACL|fuseproto.FUSE_DONT_MASK) == 0 {
		t.Fatal("ACLs are not wanted")
	}
	g.fs.Init(fsbackend.Features{Minor: 45, Flags: want})
	make := func(name string) uint32 {
		in := fuseproto.CreateIn{Flags: unix.O_RDWR, Mode: 0o666, Umask: 0o027}
		in.NodeId = rootID
		var out fuseproto.CreateOut
		g.ok("CREATE", g.fs.Create(&g.ctx, &in, fsbackend.MakeName(name), &out))
		return out.Attr.Mode & 0o777
	}
	if mode := make("masked"); mode != 0o640 {
		t.Errorf("mode %#o, expected 0640", mode)
	}
	// user::rw- group::rw- other::r--, as acl_from_text(3) has it in the attribute's version 2
	acl := []byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 4, 0, 6, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255}
	var in fuseproto.SetxattrIn
	in.NodeId = rootID
	g.ok("SETXATTR", g.fs.Setxattr(&g.ctx, &in, fsbackend.MakeName(defaultACLStr), acl))
	if mode := make("by acl"); mode != 0o664 {
		t.Errorf("mode %#o, expected 0664, which the default ACL gives", mode)
	}
}
