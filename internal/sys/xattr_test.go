package sys

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestProcXattr(t *testing.T) {
	procfd, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(procfd)
	kernel := NewProcXattr(procfd)
	for _, p := range []ProcXattr{kernel, {procfd: procfd, byPath: true}} {
		path := t.TempDir() + "/file"
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		name := append([]byte("user.name"), 0)
		if errno := p.Set(fd, &name[0], []byte("value"), 0); errno != 0 {
			t.Fatalf("byPath=%v: set: %v", p.byPath, errno)
		}
		if errno := p.Set(fd, &name[0], []byte("value"), unix.XATTR_CREATE); errno != unix.EEXIST {
			t.Errorf("byPath=%v: set again with XATTR_CREATE: %v, expected EEXIST", p.byPath, errno)
		}
		buf := make([]byte, 100)
		if n, errno := p.Get(fd, &name[0], buf); errno != 0 || string(buf[:n]) != "value" {
			t.Errorf("byPath=%v: get: %q, %v", p.byPath, buf[:max(n, 0)], errno)
		}
		if n, errno := p.Get(fd, &name[0], nil); errno != 0 || n != 5 {
			t.Errorf("byPath=%v: get of the size: %d, %v", p.byPath, n, errno)
		}
		if n, errno := p.List(fd, buf); errno != 0 || !strings.Contains(string(buf[:n]), "user.name\x00") {
			t.Errorf("byPath=%v: list: %q, %v", p.byPath, buf[:max(n, 0)], errno)
		}
		if errno := p.Remove(fd, &name[0]); errno != 0 {
			t.Errorf("byPath=%v: remove: %v", p.byPath, errno)
		}
		if _, errno := p.Get(fd, &name[0], buf); errno != unix.ENODATA {
			t.Errorf("byPath=%v: get of what was removed: %v, expected ENODATA", p.byPath, errno)
		}
	}
}

func TestFormatDecimal(t *testing.T) {
	for n, want := range map[int]string{0: "0", 7: "7", 10: "10", 1234567890: "1234567890", 1<<31 - 1: "2147483647"} {
		var d Decimal
		first := FormatDecimal(&d, n)
		i := 0
		for &d[i] != first {
			i++
		}
		if got := string(d[i:]); got != want+"\x00" {
			t.Errorf("FormatDecimal(%d) = %q, expected %q", n, got, want)
		}
	}
}
