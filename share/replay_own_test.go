package share

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// TestReplayOwn tells of what the guest has done itself, and of what the host has done to the same files.
func TestReplayOwn(t *testing.T) {
	h := newHelper(t, Graft{})
	user := *h.Client // who works in the guest
	user.Caller.Pid = 5
	d := h.walk("/d").NodeId
	host := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	told := func(what string, want Errno, kind ReplayKind, path, to string) {
		t.Helper()
		parent := h.walk("/d").NodeId
		errno := h.arm(parent, h.announce(kind, path, to, false), "")
		if errno == ReplayArmed && kind == ReplayRename {
			errno = h.arm(parent, h.id, "-to")
		}
		if errno != want {
			t.Errorf("%s: %s of %s: %v, want %v", what, kind, path, errno, want)
		}
		if armed := h.pending(); armed != (want == ReplayArmed) {
			t.Errorf("%s: armed is %v", what, armed)
		}
	}
	own, others := ReplayOwn, ReplayArmed

	c, errno := user.Create(d, "new", unix.O_EXCL|unix.O_RDWR, 0o644)
	h.want(errno, "CREATE", fsbackend.OK)
	told("created by the guest", own, ReplayCreate, "/d/new", "")
	_, errno = user.Write(c.NodeId, c.Fh, 0, []byte("guest"), unix.O_RDWR)
	h.want(errno, "WRITE", fsbackend.OK)
	told("created and written to by the guest", own, ReplayCreate, "/d/new", "")
	told("written to by the guest", own, ReplayModify, "/d/new", "")
	host(os.WriteFile(h.dir+"/d/new", []byte("host's"), 0))
	told("written to by the host since", others, ReplayModify, "/d/new", "")
	told("created by the guest, and written to by the host since", others, ReplayCreate, "/d/new", "")
	in := &fuseproto.SetattrIn{}
	in.NodeId, in.Valid, in.Mode = c.NodeId, fuseproto.FATTR_MODE, 0o600
	h.want(h.s.Setattr(&fsbackend.Context{Caller: user.Caller, MayBlock: true}, in, &fuseproto.AttrOut{}), "SETATTR", fsbackend.OK)
	told("changed by the guest", own, ReplayAttrib, "/d/new", "")
	told("written to by the host before the guest changed it", others, ReplayModify, "/d/new", "")
	told("created by the guest, and written to by the host before that", others, ReplayCreate, "/d/new", "")
	host(os.Chmod(h.dir+"/d/new", 0o640))
	told("changed by the host since", others, ReplayAttrib, "/d/new", "")
	_, errno = user.Write(c.NodeId, c.Fh, 0, []byte("guest"), unix.O_RDWR)
	h.want(errno, "WRITE", fsbackend.OK)
	told("changed by the host before the guest wrote to it", others, ReplayAttrib, "/d/new", "")
	h.want(h.s.Setattr(&fsbackend.Context{Caller: user.Caller, MayBlock: true}, in, &fuseproto.AttrOut{}), "SETATTR", fsbackend.OK)
	told("written to and changed by the guest", own, ReplayModify, "/d/new", "")
	_, errno = user.Link(c.NodeId, d, "link")
	h.want(errno, "LINK", fsbackend.OK)
	told("linked by the guest", own, ReplayCreate, "/d/link", "")
	told("linked elsewhere by the guest", own, ReplayModify, "/d/new", "")
	h.want(user.Unlink(d, "link"), "UNLINK", fsbackend.OK)
	told("unlinked by the guest", own, ReplayDelete, "/d/link", "")
	told("unlinked elsewhere by the guest", own, ReplayModify, "/d/new", "")
	user.Release(c.NodeId, c.Fh)

	h.want(user.Rename(d, "new", d, "moved", 0), "RENAME", fsbackend.OK)
	told("renamed by the guest", own, ReplayRename, "/d/new", "/d/moved")
	told("renamed elsewhere by the host", others, ReplayRename, "/d/new", "/d/elsewhere")
	told("found after the guest's rename", own, ReplayCreate, "/d/moved", "")
	h.want(user.Unlink(d, "moved"), "UNLINK", fsbackend.OK)
	told("removed by the guest", own, ReplayDelete, "/d/moved", "")
	told("removed by the host", others, ReplayDelete, "/d/unheard", "")
	_, errno = user.Mkdir(d, "moved", 0o755)
	h.want(errno, "MKDIR", fsbackend.OK)
	told("removed and made again by the guest", own, ReplayDelete, "/d/moved", "")
	host(os.Remove(h.dir + "/d/moved"))
	host(os.WriteFile(h.dir+"/d/moved", nil, 0o644))
	told("made by the host since", others, ReplayCreate, "/d/moved", "")
	_, errno = user.Lookup(d, "moved")
	h.want(errno, "LOOKUP", fsbackend.OK)
	told("removed by the guest before it has seen the host's", others, ReplayDelete, "/d/moved", "")

	// What is replayed after all takes a name away that the guest has made again.
	h.want(user.Rename(d, "g", d, "g~", 0), "RENAME", fsbackend.OK)
	c, errno = user.Create(d, "g", unix.O_EXCL|unix.O_RDWR, 0o644)
	h.want(errno, "CREATE", fsbackend.OK)
	told("renamed by the guest, and made again", own, ReplayRename, "/d/g", "/d/g~")
	told("made again by the guest", own, ReplayCreate, "/d/g", "")
	h.armed(ReplayRename, "/d/g", "/d/h", false)
	_, errno = h.Lookup(d, "g")
	h.want(errno, "LOOKUP of the old name", fsbackend.OK)
	h.want(h.Rename(d, "g", d, "h", 0), "RENAME of a replay", fsbackend.OK)
	told("made again by the guest, and taken away", others, ReplayCreate, "/d/g", "")
	user.Release(c.NodeId, c.Fh)
}
