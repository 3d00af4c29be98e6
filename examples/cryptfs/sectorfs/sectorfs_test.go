package sectorfs_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/examples/cryptfs/sectorfs"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/gofuse"
)

func newBackend(t *testing.T, dir string) fsbackend.Backend {
	t.Helper()
	aead, err := sectorfs.AESGCM(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	root, err := sectorfs.New(dir, aead)
	if err != nil {
		t.Fatal(err)
	}
	b, err := gofuse.NewFromRoot(root, nil, gofuse.Config{MaxFileSize: sectorfs.MaxFileSize})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestSuite leaves out what the loopback does not do (see the test of gofuse) and what sealed files cannot.
func TestSuite(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	fsbackendtest.Run(t, fsbackendtest.Config{
		New:             func(t *testing.T) fsbackend.Backend { return newBackend(t, t.TempDir()) },
		AsRoot:          os.Getuid() == 0,
		NoSetgid:        true,
		NoTmpfileLink:   true,
		NoAppend:        true,
		NoUnlinked:      true,
		NoRaces:         true,
		NewNodeOnCreate: true,
		NoFallocate:     true,
		NoCopy:          true,
	})
}

func TestCiphers(t *testing.T) {
	if _, err := sectorfs.AESGCM(make([]byte, 16)); err == nil {
		t.Error("a key of 16 bytes is taken")
	}
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sectorfs.New(t.TempDir(), gcm); err == nil {
		t.Error("a cipher that wants to be given nonces is taken")
	}
}

// TestModel compares random writes, truncations and reads of two handles with a plain slice, over two sessions.
// TestReadKey refuses keys of another size, and those that others may read.
func TestReadKey(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	for _, row := range []struct {
		size int
		mode os.FileMode
		says string
	}{
		{32, 0o600, ""},
		{32, 0o400, ""},
		{32, 0o640, "chmod 600 " + key},
		{32, 0o604, "mode 0604"},
		{31, 0o600, "31 bytes"},
		{100, 0o600, "100 bytes"},
	} {
		_ = os.Remove(key)
		if err := os.WriteFile(key, make([]byte, row.size), row.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(key, row.mode); err != nil {
			t.Fatal(err)
		}
		_, err := sectorfs.ReadKey(key)
		if (err == nil) != (row.says == "") || err != nil && !strings.Contains(err.Error(), row.says) {
			t.Errorf("%d bytes of mode %#o: %v, expected an error that says %q", row.size, row.mode, err, row.says)
		}
	}
	if _, err := sectorfs.ReadKey(filepath.Dir(key)); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a directory: %v", err)
	}
}

func TestModel(t *testing.T) {
	const limit = 40_000 // some sectors
	dir := t.TempDir()
	b := newBackend(t, dir)
	defer b.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b), Piece: 1000}
	f, errno := c.Create(fsbackendtest.Root, "f", unix.O_WRONLY, 0o600)
	if errno != 0 {
		t.Fatal(errno)
	}
	rd, errno := c.Open(f.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	var model []byte
	rnd := rand.New(rand.NewPCG(1, 2))
	// Places about sectors' ends, for that is where things go wrong.
	place := func() int {
		n := rnd.IntN(limit)
		if rnd.IntN(2) == 0 {
			n = n/4096*4096 + rnd.IntN(5) - 2
		}
		return max(n, 0)
	}
	grow := func(n int) {
		if n > len(model) {
			model = append(model, make([]byte, n-len(model))...)
		}
	}
	for i := range 3000 {
		what := ""
		switch rnd.IntN(5) {
		case 0:
			size := place()
			what = fmt.Sprintf("truncate from %d to %d", len(model), size)
			if errno := c.Truncate(f.NodeId, uint64(size)); errno != 0 {
				t.Fatalf("%s: %v", what, errno)
			}
			grow(size)
			model = model[:size:size]
		default:
			off := place()
			if rnd.IntN(4) == 0 {
				off = len(model) // append
			}
			data := make([]byte, 1+rnd.IntN(10_000))
			for j := range data {
				data[j] = byte(rnd.Uint32())
			}
			what = fmt.Sprintf("write %d bytes at %d of %d", len(data), off, len(model))
			if n, errno := c.Write(f.NodeId, f.Fh, uint64(off), data, unix.O_WRONLY); errno != 0 || int(n) != len(data) {
				t.Fatalf("%s: %d, %v", what, n, errno)
			}
			grow(off + len(data))
			copy(model[off:], data)
			if len(model) > limit {
				if errno := c.Truncate(f.NodeId, limit); errno != 0 {
					t.Fatal(errno)
				}
				model = model[:limit:limit]
			}
		}
		attr, errno := c.GetattrFh(f.NodeId, rd)
		if errno != 0 || attr.Size != uint64(len(model)) {
			t.Fatalf("step %d, %s: %d bytes, %v, expected %d", i, what, attr.Size, errno, len(model))
		}
		off, n := place(), rnd.IntN(20_000)
		if i%10 == 0 {
			off, n = 0, 2*limit
		}
		got, errno := c.Read(f.NodeId, rd, uint64(off), n)
		start := min(off, len(model))
		if expected := model[start:min(start+n, len(model))]; errno != 0 || !bytes.Equal(got, expected) {
			t.Fatalf("step %d, %s: reading %d bytes at %d gives %d, %v, expected %d others", i, what, n, off, len(got), errno, len(expected))
		}
	}
	b.Reset()
	e, errno := c.Lookup(fsbackendtest.Root, "f")
	if errno != 0 || e.Size != uint64(len(model)) {
		t.Fatalf("in the next session: %d bytes, %v, expected %d", e.Size, errno, len(model))
	}
	if got := read(t, c, "f"); !bytes.Equal(got, model) {
		t.Error("in the next session the file holds other data")
	}
}

func read(t *testing.T, c *fsbackendtest.Client, name string) []byte {
	t.Helper()
	data, errno := tryRead(c, name)
	if errno != 0 {
		t.Fatalf("read %s: %v", name, errno)
	}
	return data
}

func tryRead(c *fsbackendtest.Client, name string) ([]byte, fsbackend.Errno) {
	e, errno := c.Lookup(fsbackendtest.Root, name)
	if errno != 0 {
		return nil, errno
	}
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		return nil, errno
	}
	defer c.Release(e.NodeId, fh)
	return c.Read(e.NodeId, fh, 0, 1<<20)
}

// TestOnTheHost looks at what is on the host, and changes it.
func TestOnTheHost(t *testing.T) {
	dir := t.TempDir()
	b := newBackend(t, dir)
	defer b.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	secret := bytes.Repeat([]byte("attack at dawn! "), 4096/16*2+10)
	for _, name := range []string{"f", "g"} {
		f, errno := c.Create(fsbackendtest.Root, name, unix.O_RDWR, 0o600)
		if errno != 0 {
			t.Fatal(errno)
		}
		if _, errno := c.Write(f.NodeId, f.Fh, 0, secret, unix.O_RDWR); errno != 0 {
			t.Fatal(errno)
		}
		c.Release(f.NodeId, f.Fh)
	}
	path := filepath.Join(dir, "f")
	sealed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.ReadFile(filepath.Join(dir, "g"))
	if err != nil {
		t.Fatal(err)
	}
	const full = 4096 + 28
	if len(sealed) != len(secret)+3*28 || bytes.Contains(sealed, []byte("dawn")) {
		t.Errorf("%d bytes are %d on the host, expected 28 more for each sector, and none in clear", len(secret), len(sealed))
	}
	if bytes.Equal(sealed[:full], other[:full]) || bytes.Equal(sealed[28:4096], sealed[full+28:full+4096]) {
		t.Error("equal sectors look equal on the host")
	}
	for what, row := range map[string]struct {
		change func(b []byte) []byte
		errno  fsbackend.Errno
	}{
		"nothing": {func(b []byte) []byte { return b }, 0},
		"a bit":   {func(b []byte) []byte { b[100] ^= 1; return b }, unix.EIO},
		"sectors' places": {func(b []byte) []byte {
			return append(bytes.Clone(b[full:2*full]), append(bytes.Clone(b[:full]), b[2*full:]...)...)
		}, unix.EIO},
		"the end within a sector": {func(b []byte) []byte { return b[:len(b)-1] }, unix.EIO},
		// These the documentation owns up to.
		"the end between sectors":  {func(b []byte) []byte { return b[:2*full] }, 0},
		"a sector to zeros":        {func(b []byte) []byte { clear(b[:full]); return b }, 0},
		"a sector to another file": {func(b []byte) []byte { copy(b[:full], other); return b }, 0},
	} {
		if err := os.WriteFile(path, row.change(bytes.Clone(sealed)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, errno := tryRead(c, "f"); errno != row.errno {
			t.Errorf("reading after a change of %s on the host: %v, expected %v", what, errno, row.errno)
		}
	}
	// Too few bytes for a sector, as a crash may leave them, are nothing, also once the file has grown.
	if err := os.WriteFile(path, append(bytes.Clone(sealed[:full]), 1, 2, 3), 0o600); err != nil {
		t.Fatal(err)
	}
	f, errno := c.Lookup(fsbackendtest.Root, "f")
	if errno != 0 || f.Size != 4096 {
		t.Errorf("a sector and 3 bytes are %d bytes, %v, expected 4096", f.Size, errno)
	}
	if errno := c.Truncate(f.NodeId, 10_000); errno != 0 {
		t.Fatal(errno)
	}
	if got, expected := read(t, c, "f"), append(bytes.Clone(secret[:4096]), make([]byte, 10_000-4096)...); !bytes.Equal(got, expected) {
		t.Errorf("after it has grown, the file is %d bytes that are not a sector and zeros", len(got))
	}
}
