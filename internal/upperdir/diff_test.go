package upperdir

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDiff lists every kind of change, of an upper whose marks are in all three name spaces.
func TestDiff(t *testing.T) {
	s := openStore(t)
	dir := t.TempDir()
	u := s.given(t, dir)
	lower := dir + "/lower"
	old := time.Unix(1_600_000_000, 0)
	write := func(path, data string) {
		t.Helper()
		must(t, os.WriteFile(path, []byte(data), 0o644))
		must(t, os.Chtimes(path, old, old))
	}
	for _, d := range []string{lower + "/dir/sub", lower + "/moved", lower + "/opaque", lower + "/mode", u.Path() + "/dir", u.Path() + "/opaque", u.Path() + "/renamed", u.Path() + "/mode", u.Path() + "/was-file"} {
		must(t, os.MkdirAll(d, 0o755))
	}
	for _, f := range []string{"same", "data", "time", "owner", "gone", "dir/gone", "moved/in", "opaque/hidden", "was-file", "attr"} {
		write(lower+"/"+f, "0123")
	}
	for _, f := range []string{"same", "time", "attr"} {
		write(u.Path()+"/"+f, "0123")
	}
	write(u.Path()+"/data", "4567") // the same size, and the same time
	write(u.Path()+"/dir/new", "new")
	write(u.Path()+"/renamed/too", "")
	must(t, os.Chtimes(u.Path()+"/time", old, old.Add(time.Nanosecond)))
	must(t, unix.Setxattr(u.Path()+"/attr", "user.x", []byte("1"), 0))
	must(t, unix.Setxattr(u.Path()+"/same", "user.overlay.origin", []byte("1"), 0))
	must(t, os.Chmod(u.Path()+"/mode", 0o700))
	must(t, os.Symlink("/nowhere", u.Path()+"/dir/link"))
	for _, f := range []string{"gone", "dir/gone", "dir/never", "moved"} {
		i := strings.LastIndexByte(f, '/') + 1
		write(u.Path()+"/"+f[:i]+whPrefix+f[i:], "")
	}
	must(t, unix.Setxattr(u.Path()+"/renamed", "user.overlay.redirect", []byte("/moved"), 0))
	must(t, unix.Setxattr(u.Path()+"/opaque", "user.fuseoverlayfs.opaque", []byte("y"), 0))
	must(t, unix.Setxattr(u.Path()+"/was-file", "user.overlay.opaque", []byte("y"), 0))

	var lines []string
	must(t, u.Diff(t.Context(), s.lowersOf(t, lower), func(c *Change) error {
		lines = append(lines, fmt.Sprintf("%s %s %s %q %q %d", c.Path, c.Kind, c.Type, c.Was, c.From, c.Size))
		return nil
	}))
	expected := []string{
		`attr metadata file "" "" 4`,
		`data modified file "" "" 4`,
		`dir/gone deleted file "" "" 4`,
		`dir/link added symlink "" "" 0`,
		`dir/new added file "" "" 3`,
		`gone deleted file "" "" 4`,
		`mode metadata directory "" "" 0`,
		`moved deleted directory "" "" 0`,
		`opaque/hidden deleted file "" "" 4`,
		`renamed added directory "" "moved" 0`,
		`renamed/too added file "" "" 0`,
		`time metadata file "" "" 4`,
		`was-file modified directory "file" "" 0`,
	}
	if got, want := strings.Join(lines, "\n"), strings.Join(expected, "\n"); got != want {
		t.Errorf("the changes are\n%s\nexpected\n%s", got, want)
	}

	stop := errors.New("stop")
	if err := u.Diff(t.Context(), s.lowersOf(t, lower), func(*Change) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("Diff ended with %v, expected the error of emit", err)
	}
}

// TestDiffAllocates bounds what comparing a file costs: guests write many.
func TestDiffAllocates(t *testing.T) {
	s := openStore(t)
	dir := t.TempDir()
	u := s.given(t, dir)
	lower := dir + "/lower"
	must(t, os.Mkdir(lower, 0o755))
	const files = 200
	for i := range files {
		must(t, os.WriteFile(fmt.Sprintf("%s/%d", u.Path(), i), []byte("1"), 0o644))
		must(t, os.WriteFile(fmt.Sprintf("%s/%d", lower, i), []byte("2"), 0o644))
	}
	below := s.lowersOf(t, lower)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	must(t, u.Diff(t.Context(), below, func(*Change) error { return nil }))
	runtime.ReadMemStats(&after)
	if got := (after.TotalAlloc - before.TotalAlloc) / files; got > 192<<10 { // the race detector has a pool forget things
		t.Errorf("%d bytes are allocated for each file, expected less than its buffers", got)
	}
}
