package fsbackendtest

import (
	"fmt"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
)

func testReaddir(t *testing.T, s *suite) {
	d := s.mkdir(t, Root, "d")
	if names := s.List(t, d.NodeId, 4096); len(names) > 0 {
		t.Errorf("an empty directory lists %q", names)
	}
	inos := make(map[string]uint64)
	types := make(map[string]uint32)
	for i := range 50 {
		name := fmt.Sprintf("file%d", i)
		inos[name], types[name] = s.file(t, d.NodeId, name, "").Ino, unix.DT_REG
	}
	inos["sub"], types["sub"] = s.mkdir(t, d.NodeId, "sub").Ino, unix.DT_DIR
	if !s.cfg.NoSymlinks {
		l, errno := s.Symlink(d.NodeId, "link", "x")
		want(t, errno, "SYMLINK", fsbackend.OK)
		inos["link"], types["link"] = l.Ino, unix.DT_LNK
	}
	s.checkListing(t, d.NodeId, inos, types)
}

// checkListing lists a directory in several ways and compares inode numbers and types (DT_*) with those given by name.
func (c *Client) checkListing(t *testing.T, node uint64, inos map[string]uint64, types map[string]uint32) {
	t.Helper()
	longest := 0
	for name := range inos {
		longest = max(longest, len(name))
	}
	for _, size := range []int{64, 100, 1000, 4096, 1 << 16} {
		if size < longest+40 {
			continue // a guest's is always large enough for any name
		}
		names := c.List(t, node, size)
		slices.Sort(names)
		if distinct := slices.Compact(slices.Clone(names)); len(names) != len(inos) || len(distinct) != len(inos) {
			t.Errorf("read %d bytes at a time, the directory lists %d names, %d of them distinct, expected %d", size, len(names), len(distinct), len(inos))
		}
	}
	fh, errno := c.Opendir(node)
	want(t, errno, "OPENDIR", fsbackend.OK)
	defer c.Releasedir(node, fh)
	all, errno := c.Readdir(node, fh, 0, 1<<16, false)
	want(t, errno, "READDIR", fsbackend.OK)
	for i, e := range all {
		if e.Off == 0 {
			t.Errorf("entry %d, %q, has offset 0, which is the start", i, e.Name)
		}
		if e.Name == "." || e.Name == ".." {
			continue
		}
		if e.Ino != inos[e.Name] || e.Type != types[e.Name] && e.Type != unix.DT_UNKNOWN {
			t.Errorf("%q has inode %d, type %d in the listing, expected %d, %d", e.Name, e.Ino, e.Type, inos[e.Name], types[e.Name])
		}
	}
	// Any offset may be gone back to.
	for _, i := range []int{len(all) * 4 / 5, len(all) / 10, len(all) * 2 / 5, 0, len(all) - 1} {
		if i < 0 || i >= len(all) {
			continue // nothing is listed
		}
		rest, errno := c.Readdir(node, fh, all[i].Off, 1<<16, false)
		want(t, errno, "READDIR from an earlier offset", fsbackend.OK)
		if !slices.Equal(rest, all[i+1:]) {
			t.Errorf("READDIR after entry %d of %d gave %d entries, expected the %d after it", i, len(all), len(rest), len(all)-i-1)
		}
	}
	none, errno := c.Readdir(node, fh, 0, 16, false)
	want(t, errno, "READDIR without room", fsbackend.OK, unix.EINVAL)
	if len(none) > 0 {
		t.Errorf("READDIR into 16 bytes gave %d entries", len(none))
	}
}

// testReaddirStable changes a directory between the READDIRs of one listing.
func testReaddirStable(t *testing.T, s *suite) {
	d := s.mkdir(t, Root, "d")
	for i := range 200 {
		s.file(t, d.NodeId, fmt.Sprintf("stay%03d", i), "")
		if i%2 == 0 {
			s.file(t, d.NodeId, fmt.Sprintf("go%03d", i), "")
		}
	}
	fh, errno := s.Opendir(d.NodeId)
	want(t, errno, "OPENDIR", fsbackend.OK)
	defer s.Releasedir(d.NodeId, fh)
	seen := make(map[string]int)
	for off, round := uint64(0), 0; ; round++ {
		entries, errno := s.Readdir(d.NodeId, fh, off, 400, false)
		want(t, errno, "READDIR", fsbackend.OK)
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			seen[e.Name]++
			off = e.Off
		}
		if round < 100 {
			want(t, s.Unlink(d.NodeId, fmt.Sprintf("go%03d", round*2)), "UNLINK", fsbackend.OK)
			s.file(t, d.NodeId, fmt.Sprintf("come%03d", round), "")
		}
		if round > 10_000 {
			t.Fatal("the listing does not end")
		}
	}
	for i := range 200 {
		if name := fmt.Sprintf("stay%03d", i); seen[name] != 1 {
			t.Errorf("%s was listed %d times while others came and went, expected once", name, seen[name])
		}
	}
}

func testReaddirplus(t *testing.T, s *suite) {
	if s.R.DirPlusReader == nil {
		return
	}
	d := s.mkdir(t, Root, "d")
	nodes := make(map[string]uint64)
	for i := range 30 {
		name := fmt.Sprintf("file%02d", i)
		nodes[name] = s.file(t, d.NodeId, name, name).NodeId
	}
	fh, errno := s.Opendir(d.NodeId)
	want(t, errno, "OPENDIR", fsbackend.OK)
	lookups := make(map[string]uint64)
	for off := uint64(0); ; {
		entries, errno := s.Readdir(d.NodeId, fh, off, 1000, true)
		want(t, errno, "READDIRPLUS", fsbackend.OK)
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			off = e.Off
			if e.Name == "." || e.Name == ".." {
				if e.Entry.NodeId != 0 {
					t.Errorf("READDIRPLUS gave %q node %d, expected 0", e.Name, e.Entry.NodeId)
				}
				continue
			}
			if e.Entry.NodeId == 0 {
				continue // not looked up: that is allowed
			}
			lookups[e.Name]++
			checkEntry(t, e.Name, &e.Entry)
			if e.Entry.NodeId != nodes[e.Name] || e.Entry.Ino != e.Ino || e.Entry.Size != uint64(len(e.Name)) {
				t.Errorf("READDIRPLUS gave %q node %d, inode %d and %d, size %d, expected node %d, size %d",
					e.Name, e.Entry.NodeId, e.Entry.Ino, e.Ino, e.Entry.Size, nodes[e.Name], len(e.Name))
			}
		}
	}
	s.Releasedir(d.NodeId, fh)
	// One lookup was CREATE's: exactly those of the listing keep the file.
	for name, node := range nodes {
		s.R.Forget(node, lookups[name])
		if _, errno := s.Getattr(node); errno != 0 {
			t.Fatalf("GETATTR of %s after as many lookups were forgotten as READDIRPLUS gave: %s, expected OK", name, errnoName(errno))
		}
		want(t, s.Unlink(d.NodeId, name), "UNLINK", fsbackend.OK)
		s.R.Forget(node, 1)
		if _, errno := s.Getattr(node); errno != unix.ESTALE {
			t.Fatalf("GETATTR of %s, unlinked and forgotten: %s, expected ESTALE: READDIRPLUS counted more than it gave", name, errnoName(errno))
		}
	}
}
