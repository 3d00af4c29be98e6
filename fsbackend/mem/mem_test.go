package mem

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// TestReadAllocatesNothing holds READ to the rule for the hot path.
func TestReadAllocatesNothing(t *testing.T) {
	f, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("sluice.."), 512)
	if err := f.WriteFile("dir/file", want); err != nil {
		t.Fatal(err)
	}
	c := new(fsbackend.Context)
	var dir, file fuseproto.EntryOut
	if errno := f.Lookup(c, fuseproto.FUSE_ROOT_ID, fsbackend.MakeName("dir"), &dir); errno != 0 {
		t.Fatal(errno)
	}
	if errno := f.Lookup(c, dir.NodeId, fsbackend.MakeName("file"), &file); errno != 0 {
		t.Fatal(errno)
	}
	var in fuseproto.OpenIn
	var opened fuseproto.OpenOut
	in.NodeId = file.NodeId
	if errno := f.Open(c, &in, &opened); errno != 0 {
		t.Fatal(errno)
	}
	var read fuseproto.ReadIn
	read.NodeId, read.Fh, read.Size = file.NodeId, opened.Fh, 4096
	got := make([]byte, 4096)
	iov := make([]unix.Iovec, 1)
	var dst fsbackend.Sink
	once := func() {
		iov[0] = sys.MakeIovec(got)
		dst.Reset(iov, 0, uint64(len(got)))
		if errno := f.Read(c, &read, &dst); errno != 0 || dst.Written() != len(got) {
			t.Fatalf("read %d bytes: %v, expected all %d", dst.Written(), errno, len(got))
		}
	}
	if allocs := testing.AllocsPerRun(100, once); allocs != 0 {
		t.Errorf("READ of 4 KiB allocates %v times, expected never", allocs)
	}
	if !bytes.Equal(got, want) {
		t.Error("READ returned other bytes than were written")
	}
}
