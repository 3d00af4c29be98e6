package fsbackend

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// Behind a closed gate no method moves a byte, whatever was moved before.
func TestClosedGate(t *testing.T) {
	fd := file(t, counting(64))
	iov, joined := pieces(8, 8, 48)
	var g Gate
	var s Sink
	s.SetGate(&g)
	s.Reset(iov, 0, 64)
	if n := s.Write([]byte("before")); n != 6 {
		t.Fatalf("%d bytes written through an open gate", n)
	}
	if g.Closed() || !g.Close() || !g.Closed() {
		t.Fatal("the gate does not close")
	}
	before := bytes.Clone(joined())
	if n := s.Write([]byte("after")); n != 0 {
		t.Errorf("Write put in %d bytes", n)
	}
	if n, errno := s.ReadFrom(fd, 0, 8, 0); n != 0 || errno != unix.EIO {
		t.Errorf("ReadFrom: %d, %v", n, errno)
	}
	if n, errno := s.ReadExtents([]Extent{{FD: -1, Len: 8}, {FD: fd, Len: 8}}, 0); n != 0 || errno != unix.EIO {
		t.Errorf("ReadExtents: %d, %v", n, errno)
	}
	if !bytes.Equal(joined(), before) {
		t.Errorf("memory is %x, was %x", joined(), before)
	}

	iov, _ = pieces(8)
	var src Source
	src.SetGate(&g)
	src.Reset(iov, 0, 8)
	if n := src.Read(make([]byte, 8)); n != 0 {
		t.Errorf("Read took %d bytes", n)
	}
	if n, errno := src.WriteTo(fd, 0, 8, 0); n != 0 || errno != unix.EIO {
		t.Errorf("WriteTo: %d, %v", n, errno)
	}
}

// A gate does not close over a transfer that is under way, and does not wait for it.
func TestGateDuringATransfer(t *testing.T) {
	var g Gate
	if !g.enter() {
		t.Fatal("an open gate lets nothing through")
	}
	if g.Close() || !g.Closed() {
		t.Error("the gate closed over a transfer")
	}
	g.leave()
	if g.enter() {
		t.Error("a transfer began after Close")
	}
	if !g.Close() {
		t.Error("the gate does not close though nothing is under way")
	}
}

func TestListBehindAGate(t *testing.T) {
	iov, _ := pieces(1024)
	var g Gate
	l := DirList{Plus: true}
	l.SetGate(&g)
	l.Reset(iov, 0, 1024)
	add := func(node uint64) bool {
		return l.AddPlus(&fuseproto.EntryOut{NodeId: node}, 1, 1, unix.DT_REG, []byte("name"))
	}
	if !add(7) || !add(0) || !add(8) {
		t.Fatal("an entry does not fit")
	}
	g.Close()
	if add(9) {
		t.Error("an entry is taken behind a closed gate")
	}
	if len(l.Lookups) != 2 || l.Lookups[0] != 7 || l.Lookups[1] != 8 {
		t.Errorf("lookups counted are %v, expected 7 and 8", l.Lookups)
	}
}
