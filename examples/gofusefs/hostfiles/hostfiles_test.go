package hostfiles

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/gofuse"
	"github.com/sluicefs/sluice/fuseproto"
)

// TestLive reads a file that changes, and whose name is gone by then.
func TestLive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "live")
	if err := os.WriteFile(path, []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	host, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	b, err := gofuse.NewFromRoot(New([]*os.File{host}), nil, gofuse.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	if names := c.List(t, fsbackendtest.Root, 4096); len(names) != 1 || names[0] != "live" {
		t.Errorf("the root lists %q, expected live", names)
	}
	e, errno := c.Lookup(fsbackendtest.Root, "live")
	if errno != 0 || e.Mode != unix.S_IFREG|0o444 || e.Size != 6 || time.Since(time.Unix(int64(e.Mtime), 0)) > time.Minute {
		t.Fatalf("LOOKUP: %v, %+v, expected a file of mode 0444 with 6 bytes, just changed", errno, e)
	}
	in := &fuseproto.OpenIn{InHeader: fuseproto.InHeader{NodeId: e.NodeId}}
	var open fuseproto.OpenOut
	if errno := b.Open(&fsbackend.Context{MayBlock: true}, in, &open); errno != 0 || open.OpenFlags&fuseproto.FOPEN_DIRECT_IO == 0 {
		t.Fatalf("OPEN: %v, flags %#x, expected direct I/O, for the size is not known", errno, open.OpenFlags)
	}
	for _, expected := range []string{"before", "after!"} {
		if _, err := host.WriteAt([]byte(expected), 0); err != nil {
			t.Fatal(err)
		}
		if data, errno := c.Read(e.NodeId, open.Fh, 0, 100); errno != 0 || string(data) != expected {
			t.Errorf("READ gave %q, %v, expected %q", data, errno, expected)
		}
	}
}

// TestProc has a file of /proc, whose size is not known before it is read.
func TestProc(t *testing.T) {
	host, err := os.Open("/proc/version")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	want, err := os.ReadFile("/proc/version")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := (&file{host: host}).size(); err != nil || got != int64(len(want)) {
		t.Errorf("it has %d bytes, %v, expected %d", got, err, len(want))
	}
}

// TestOpen refuses what cannot be served by its name.
func TestOpen(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b/a"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for says, names := range map[string][]string{
		"":                      {"a", "/proc/uptime"},
		"no such file":          {"a", "absent"},
		"not a regular file":    {"b"},
		"fifo is not a regular": {"fifo"},
		"are both to be a":      {"a", "b/a"},
	} {
		for i, name := range names {
			if !filepath.IsAbs(name) {
				names[i] = filepath.Join(dir, name)
			}
		}
		files, err := Open(names)
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, expected an error that says %q", names, err, says)
		}
		if err == nil && len(files) != len(names) {
			t.Errorf("%q: %d files", names, len(files))
		}
		for _, f := range files {
			if closed := f.Close() != nil; closed != (err != nil) {
				t.Errorf("%q: %s is closed: %v", names, f.Name(), closed)
			}
		}
	}
}
