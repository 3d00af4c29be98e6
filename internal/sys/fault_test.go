package sys

import (
	"os"
	"runtime/debug"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCopySurvivesTruncatedFile(t *testing.T) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	fd, err := unix.MemfdCreate("fault", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	page := os.Getpagesize()
	if err := unix.Ftruncate(fd, int64(page)); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	if n := Copy(mem, []byte("guest")); n != 5 {
		t.Fatalf("copied %d bytes to mapped memory, expected 5", n)
	}
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	if n := Copy(mem, []byte("guest")); n != 0 {
		t.Errorf("copied %d bytes to memory whose file is gone, expected 0", n)
	}
	if n := Copy(make([]byte, 8), mem); n != 0 {
		t.Errorf("copied %d bytes from memory whose file is gone, expected 0", n)
	}
}

func TestGuardLetsOtherPanicsPass(t *testing.T) {
	defer func() {
		if r := recover(); r != "ours" {
			t.Errorf("recovered %v, expected the panic's own value", r)
		}
	}()
	faulted := false
	defer Guard(&faulted)
	panic("ours")
}

func BenchmarkCopy(b *testing.B) {
	dst, src := make([]byte, 80), make([]byte, 80)
	b.ReportAllocs()
	for b.Loop() {
		Copy(dst, src)
	}
}
