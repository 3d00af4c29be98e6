package passthrough

import (
	"fmt"
	"os"
	"testing"
)

// TestListingsBegun leaves more listings in their middle than may keep what they have read, and ends them all.
func TestListingsBegun(t *testing.T) {
	g := newGuest(t, Config{Dir: fastDir(t)})
	const files, dirs = 50, maxKept + 8
	for i := range files {
		g.write(fmt.Sprint("file", i), "")
	}
	handles := make([]uint64, dirs)
	next := make([]uint64, dirs)
	seen := make([]map[string]bool, dirs)
	list := func(i int) bool {
		entries, e := g.readdirAt(rootID, handles[i], next[i], i%2 == 0, 1000)
		g.ok("READDIR", e)
		for _, d := range entries {
			if seen[i][d.name] {
				t.Fatalf("listing %d has %q twice", i, d.name)
			}
			seen[i][d.name] = true
			next[i] = d.off
		}
		return len(entries) > 0
	}
	for i := range dirs {
		handles[i], seen[i] = g.opendir(rootID), map[string]bool{}
		list(i)
	}
	if n := g.fs.handles.kept.Load(); n != maxKept {
		t.Errorf("%d listings keep what they have read, expected %d", n, maxKept)
	}
	for i := range dirs - 4 {
		for list(i) {
		}
		if len(seen[i]) != files+2 {
			t.Errorf("listing %d has %d entries, expected %d", i, len(seen[i]), files+2)
		}
	}
	for i := range dirs {
		g.releasedir(rootID, handles[i]) // the last have not come to their end
	}
	if n := g.fs.handles.kept.Load(); n != 0 {
		t.Errorf("%d listings keep what they have read after all have ended", n)
	}
}

// TestListingAnew has a guest rewind a directory that it has read in part: it sees it as it is then.
func TestListingAnew(t *testing.T) {
	g := newGuest(t, Config{Dir: fastDir(t)})
	for i := range 20 {
		g.write(fmt.Sprint("old", i), "")
	}
	fh := g.opendir(rootID)
	defer g.releasedir(rootID, fh)
	if _, e := g.readdirAt(rootID, fh, 0, false, 200); e != 0 {
		t.Fatal(e)
	}
	for i := range 20 {
		if err := os.Rename(g.path(fmt.Sprint("old", i)), g.path(fmt.Sprint("new", i))); err != nil {
			t.Fatal(err)
		}
	}
	entries, e := g.readdirAt(rootID, fh, 0, false, 1<<16)
	g.ok("READDIR", e)
	for _, d := range entries {
		if d.name[0] == 'o' {
			t.Errorf("%q is listed, which was renamed before the directory was rewound", d.name)
		}
	}
	if len(entries) != 22 {
		t.Errorf("%d entries, expected 22", len(entries))
	}
}

// TestListsAll knows file systems that list all that a lookup finds.
func TestListsAll(t *testing.T) {
	for dir, want := range map[string]bool{fastDir(t): true, "/proc/self": false, "/sys": false} {
		g := newGuest(t, Config{Dir: dir})
		fh := g.opendir(rootID)
		if got := g.fs.ListsAll(rootID, fh); got != want {
			t.Errorf("%s lists all: %v, expected %v", dir, got, want)
		}
		g.releasedir(rootID, fh)
		if g.fs.ListsAll(rootID, fh) {
			t.Errorf("%s lists all, though it is not open", dir)
		}
	}
}
