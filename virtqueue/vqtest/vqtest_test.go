package vqtest_test

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

func TestMemory(t *testing.T) {
	m, err := vqtest.NewMemory(vqtest.Regions(4 << 20))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	low, high, top := m.Regions()[0], m.Regions()[1], m.Regions()[2]
	if high.GuestPhysAddr+high.Size != top.GuestPhysAddr || low.GuestPhysAddr+low.Size == high.GuestPhysAddr {
		t.Fatalf("regions are %+v, expected a gap after the first and none after the second", m.Regions())
	}

	mark := m.Mark()
	first := m.Alloc(10, 8)
	if next := m.Alloc(vqtest.Page, vqtest.Page); next < first+10 || next%vqtest.Page != 0 {
		t.Errorf("a page was allocated at %#x, after 10 bytes at %#x", next, first)
	}
	// What low memory has no room for lies wholly behind the gap.
	if big := m.Alloc(1<<20, 16); big < high.GuestPhysAddr || big+1<<20 > top.GuestPhysAddr {
		t.Errorf("1 MiB was allocated at %#x", big)
	}
	m.Reset(mark)
	if again := m.Alloc(10, 8); again != first {
		t.Errorf("allocated at %#x after Reset, expected %#x again", again, first)
	}

	p, got := []byte("across"), make([]byte, 6)
	m.Write(top.GuestPhysAddr-3, p)
	m.Read(top.GuestPhysAddr-3, got)
	if !bytes.Equal(got, p) {
		t.Errorf("read %q across regions, expected %q", got, p)
	}
	if _, err := unix.Pread(m.FD(), got[:3], int64(top.MmapOffset)); err != nil || string(got[:3]) != "oss" {
		t.Errorf("the upper region's part of the file starts with %q, %v, expected \"oss\"", got[:3], err)
	}
	if got, want := m.UserAddr(top.GuestPhysAddr+5), top.UserAddr+5; got != want {
		t.Errorf("front-end address is %#x, expected %#x", got, want)
	}
}

func TestOfferWithoutRoom(t *testing.T) {
	d, err := vqtest.New(vqtest.Config{Num: 4})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	buffer := vqtest.Buffer{Addr: vqtest.Page, Len: 1}
	if _, ok := d.Offer(vqtest.Chain{buffer, buffer, buffer}); !ok || d.Free() != 1 || d.Num() != 4 {
		t.Errorf("offered %v with %d of %d descriptors left, expected 1 of 4", ok, d.Free(), d.Num())
	}
	if _, ok := d.Offer(vqtest.Chain{buffer, buffer}); ok || d.Free() != 1 {
		t.Errorf("offered %v with %d descriptors left, expected a refusal", ok, d.Free())
	}
	if _, ok := d.OfferIndirect(vqtest.Chain{buffer, buffer}); !ok || d.Free() != 0 {
		t.Errorf("offered %v with %d descriptors left, expected 0", ok, d.Free())
	}
	if _, ok := d.Offer(nil); ok {
		t.Error("offered a chain of nothing")
	}
}
