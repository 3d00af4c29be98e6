package fsbackend

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// pieces returns separate memory of the given lengths, its iovecs, and a function that joins what is in it.
func pieces(lengths ...int) ([]unix.Iovec, func() []byte) {
	var iov []unix.Iovec
	var mem [][]byte
	for _, n := range lengths {
		b := make([]byte, n, n+1)
		mem = append(mem, b)
		iov = append(iov, unix.Iovec{Base: &b[:1][0], Len: uint64(n)})
	}
	return iov, func() []byte { return bytes.Join(mem, nil) }
}

// file returns a file with content.
func file(t testing.TB, content []byte) int {
	t.Helper()
	fd, err := unix.MemfdCreate("data", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	for off := 0; off < len(content); {
		n, err := unix.Pwrite(fd, content[off:], int64(off))
		if err != nil {
			t.Fatal(err)
		}
		off += n
	}
	return fd
}

func counting(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

func TestSkipAndLimit(t *testing.T) {
	layouts := [][]int{{}, {0}, {10}, {3, 4, 3}, {0, 3, 0, 0, 7, 0}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}}
	content := counting(64)
	for _, lengths := range layouts {
		size := uint64(0)
		for _, n := range lengths {
			size += uint64(n)
		}
		for skip := range uint64(13) {
			for limit := range uint64(13) {
				iov, joined := pieces(lengths...)
				var s Sink
				s.Reset(iov, skip, limit)
				want := min(limit, size-min(skip, size))
				if uint64(s.Len()) != want || s.Written() != 0 {
					t.Fatalf("%v, skip %d, limit %d: room for %d bytes, expected %d", lengths, skip, limit, s.Len(), want)
				}
				if n := s.Write(content); uint64(n) != want || s.Len() != 0 || uint64(s.Written()) != want {
					t.Fatalf("%v, skip %d, limit %d: %d bytes written, %d left", lengths, skip, limit, n, s.Len())
				}
				expect := make([]byte, size)
				copy(expect[min(skip, size):], content[:want])
				if !bytes.Equal(joined(), expect) {
					t.Fatalf("%v, skip %d, limit %d: memory is %x, expected %x", lengths, skip, limit, joined(), expect)
				}
			}
		}
	}
	iov, _ := pieces(10)
	var s Sink
	s.Reset(iov, 1<<63, 1<<64-1)
	if s.Len() != 0 {
		t.Errorf("room for %d bytes beyond the end", s.Len())
	}
	iov, _ = pieces(10)
	s.Reset(iov, 0, 1<<64-1)
	if s.Len() != 10 {
		t.Errorf("room for %d bytes, expected 10", s.Len())
	}
}

func TestSinkWritesInParts(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	content := counting(200)
	for range 200 {
		var lengths []int
		for range 10 {
			lengths = append(lengths, rng.IntN(30))
		}
		iov, joined := pieces(lengths...)
		var s Sink
		s.Reset(iov, 0, uint64(len(joined())))
		rest := content
		for s.Len() > 0 {
			n := s.Write(rest[:min(rng.IntN(20), len(rest))])
			rest = rest[n:]
			if s.Written()+s.Len() != len(joined()) {
				t.Fatalf("%d bytes written and %d left of %d", s.Written(), s.Len(), len(joined()))
			}
			if len(rest) == 0 {
				break
			}
		}
		if n := len(content) - len(rest); !bytes.Equal(joined()[:n], content[:n]) {
			t.Fatalf("%v: memory is %x", lengths, joined())
		}
	}
}

func TestCommit(t *testing.T) {
	iov, joined := pieces(4, 4)
	var s Sink
	s.Reset(iov, 1, 6)
	s.Write([]byte("abc"))
	if n := s.Commit(); n != 3 || s.Written() != 0 || s.Len() != 3 {
		t.Errorf("%d bytes committed, %d written, %d left", n, s.Written(), s.Len())
	}
	if s.Write([]byte("defg")) != 3 || s.Written() != 3 || string(joined()) != "\x00abcdef\x00" {
		t.Errorf("%d bytes written behind them: %q", s.Written(), joined())
	}
}

func TestReadFrom(t *testing.T) {
	content := counting(5000)
	fd := file(t, content)
	many := make([]int, 2500) // more than one preadv2 takes
	for i := range many {
		many[i] = i % 3
	}
	tests := []struct {
		name        string
		lengths     []int
		off         int64
		n, want     int
		left        int
		wantErrno   Errno
		badfd       bool
		then, then2 int // bytes of a second ReadFrom of then, expected then2
	}{
		{name: "one piece", lengths: []int{100}, off: 7, n: 100, want: 100},
		{name: "less than the room", lengths: []int{30, 30, 40}, off: 7, n: 45, want: 45, left: 55, then: 100, then2: 55},
		{name: "up to a piece's end", lengths: []int{30, 30, 40}, n: 60, want: 60, left: 40, then: 40, then2: 40},
		{name: "more than the room", lengths: []int{30, 30}, n: 100, want: 60},
		{name: "more than 1024 pieces", lengths: many, n: 5000, want: 2499},
		{name: "part of more than 1024 pieces", lengths: many, off: 3, n: 1500, want: 1500, left: 999, then: 999, then2: 999},
		{name: "short at the end of the file", lengths: []int{30, 30, 40}, off: 4950, n: 100, want: 50, left: 50},
		{name: "short with more than 1024 pieces", lengths: many, off: 3000, n: 5000, want: 2000, left: 499},
		{name: "beyond the end", lengths: []int{30}, off: 6000, n: 30, left: 30},
		{name: "nothing", lengths: []int{30}, left: 30},
		{name: "no room", lengths: nil, n: 10},
		{name: "negative offset", lengths: []int{30}, off: -1, n: 10, left: 30, wantErrno: syscall.EINVAL},
		{name: "bad fd", lengths: []int{30}, n: 10, left: 30, wantErrno: syscall.EBADF, badfd: true},
	}
	for _, tt := range tests {
		iov, joined := pieces(tt.lengths...)
		var s Sink
		s.Reset(iov, 0, 1<<32)
		fd := fd
		if tt.badfd {
			fd = -1
		}
		n, errno := s.ReadFrom(fd, tt.off, tt.n, 0)
		if n != tt.want || errno != tt.wantErrno || s.Len() != tt.left || s.Written() != n {
			t.Errorf("%s: %d bytes, %v, %d left; expected %d, %v, %d", tt.name, n, errno, s.Len(), tt.want, tt.wantErrno, tt.left)
			continue
		}
		if tt.then > 0 {
			more, _ := s.ReadFrom(fd, tt.off+int64(n), tt.then, 0)
			if more != tt.then2 {
				t.Errorf("%s: %d bytes after that, expected %d", tt.name, more, tt.then2)
			}
			n += more
		}
		if n > 0 && !bytes.Equal(joined()[:n], content[tt.off:tt.off+int64(n)]) {
			t.Errorf("%s: memory has other bytes", tt.name)
		}
		if rest := joined()[n:]; len(bytes.Trim(rest, "\x00")) > 0 {
			t.Errorf("%s: memory beyond what was read is %x", tt.name, rest)
		}
	}
}

func TestReadFromErrorAfterSome(t *testing.T) {
	iov := make([]unix.Iovec, 0, sys.IOVMax+1)
	for range sys.IOVMax {
		iov = append(iov, sys.MakeIovec(make([]byte, 1)))
	}
	iov = append(iov, unix.Iovec{Base: nil, Len: 10}) // EFAULT, in the second call
	var s Sink
	s.Reset(iov, 0, 1<<32)
	if n, errno := s.ReadFrom(file(t, counting(5000)), 0, 2000, 0); n != sys.IOVMax || errno != syscall.EFAULT {
		t.Errorf("%d bytes, %v, expected %d and EFAULT", n, errno, sys.IOVMax)
	}
}

// A short transfer ends the call: what comes next may block, or fail, and the caller knows best.
func TestShortTransferEnds(t *testing.T) {
	iov, _ := pieces(30, 30)
	var v vector
	v.reset(iov, 0, 60)
	calls := 0
	n, errno := v.move(func(_ int, _ []unix.Iovec, off int64, _ int) (int, unix.Errno) {
		calls++
		return 35, 0
	}, -1, 0, 50, 0)
	if n != 35 || errno != 0 || calls != 1 || v.left != 25 || v.done != 35 {
		t.Errorf("%d bytes, %v, by %d calls, %d left; expected 35 by one, 25 left", n, errno, calls, v.left)
	}
}

func TestReadExtents(t *testing.T) {
	content := counting(5000)
	fd := file(t, content)
	tests := []struct {
		name    string
		room    int
		extents []Extent
		want    []byte
		errno   Errno
	}{
		{"none", 10, nil, nil, 0},
		{"in turn, with a hole", 20000, []Extent{{fd, 10, 5}, {-1, 0, 9000}, {fd, 100, 7}}, bytes.Join([][]byte{content[10:15], make([]byte, 9000), content[100:107]}, nil), 0},
		{"cut to the room", 8, []Extent{{fd, 0, 5}, {-1, 0, 100}, {fd, 0, 5}}, append(bytes.Clone(content[:5]), 0, 0, 0), 0},
		{"ends at a short read", 1000, []Extent{{fd, 4990, 20}, {fd, 0, 5}}, content[4990:], 0},
		{"ends at an error", 1000, []Extent{{fd, 0, 5}, {fd, -1, 5}, {fd, 0, 5}}, content[:5], syscall.EINVAL},
	}
	for _, tt := range tests {
		iov, joined := pieces(tt.room/3, tt.room-tt.room/3)
		for i := range iov {
			for j := range sys.Bytes(&iov[i]) {
				sys.Bytes(&iov[i])[j] = 0xee
			}
		}
		var s Sink
		s.Reset(iov, 0, 1<<32)
		n, errno := s.ReadExtents(tt.extents, 0)
		if n != len(tt.want) || errno != tt.errno || !bytes.Equal(joined()[:n], tt.want) {
			t.Errorf("%s: %d bytes, %v, expected %d, %v", tt.name, n, errno, len(tt.want), tt.errno)
		}
		if rest := joined()[n:]; len(bytes.Trim(rest, "\xee")) > 0 {
			t.Errorf("%s: wrote beyond what it says", tt.name)
		}
	}
}

func TestSource(t *testing.T) {
	content := counting(3000)
	lengths := make([]int, 1500)
	for i := range lengths {
		lengths[i] = 2
	}
	fill := func() Source {
		iov, _ := pieces(lengths...)
		var all Sink
		all.Reset(iov, 0, 1<<32)
		all.Write(content)
		iov2 := bytesOf(iov, lengths)
		var s Source
		s.Reset(iov2, 40, 2900)
		return s
	}
	s := fill()
	fd := file(t, nil)
	if n, errno := s.WriteTo(fd, 5, 100, 0); n != 100 || errno != 0 || s.Len() != 2800 {
		t.Errorf("WriteTo: %d, %v, %d left", n, errno, s.Len())
	}
	head := make([]byte, 301)
	if n := s.Read(head); n != 301 || s.Len() != 2499 {
		t.Errorf("Read: %d bytes, %d left", n, s.Len())
	}
	if n, errno := s.WriteTo(fd, 105, 5000, 0); n != 2499 || errno != 0 || s.Len() != 0 {
		t.Errorf("WriteTo of the rest: %d, %v, %d left", n, errno, s.Len())
	}
	if n := s.Read(head); n != 0 {
		t.Errorf("%d bytes after the end", n)
	}
	got := make([]byte, 4000)
	n, err := unix.Pread(fd, got, 0)
	want := bytes.Join([][]byte{make([]byte, 5), content[40:140], content[441:2940]}, nil)
	if err != nil || !bytes.Equal(got[:n], want) || !bytes.Equal(head, content[140:441]) {
		t.Errorf("file has %d bytes, %v, expected %d", n, err, len(want))
	}

	s = fill()
	if n, errno := s.WriteTo(-1, 0, 10, 0); n != 0 || errno != syscall.EBADF || s.Len() != 2900 {
		t.Errorf("WriteTo nowhere: %d, %v, %d left", n, errno, s.Len())
	}
}

// bytesOf returns iov with its lengths as they were before a Sink used it up.
func bytesOf(iov []unix.Iovec, lengths []int) []unix.Iovec {
	for i := range iov {
		iov[i].Len = uint64(lengths[i])
	}
	return iov
}

func TestDirList(t *testing.T) {
	entry := &fuseproto.EntryOut{NodeId: 9, Generation: 3}
	entry.Ino = 9
	for _, plus := range []bool{false, true} {
		header := direntSize
		add := func(l *DirList, name []byte) bool { return l.Add(9, 5, syscall.DT_DIR, name) }
		if plus {
			header = direntplusSize
			add = func(l *DirList, name []byte) bool { return l.AddPlus(entry, 9, 5, syscall.DT_DIR, name) }
		}
		l := &DirList{Plus: plus} // one for all: what a long name leaves behind is no padding of a short one
		for _, n := range []int{255, 254, 9, 8, 7, 1} {
			name := []byte(strings.Repeat("n", n))
			size := (header + n + 7) &^ 7
			iov, _ := pieces(5, size-1-5)
			l.Reset(iov, 0, 1<<32)
			if l.Fits(n) || add(l, name) || l.Written() != 0 {
				t.Errorf("plus %v: an entry of %d bytes fits into %d", plus, size, size-1)
			}
			iov, joined := pieces(5, size, 20)
			l.Reset(iov, 0, uint64(size))
			if !l.Fits(n) || !add(l, name) || l.Written() != size {
				t.Errorf("plus %v: an entry of %d bytes does not fit exactly", plus, size)
			}
			got := joined()[:size]
			dirent := got[header-direntSize:]
			if plus && (binary.NativeEndian.Uint64(got) != 9 || binary.NativeEndian.Uint64(got[8:]) != 3 || binary.NativeEndian.Uint64(got[40:]) != 9) {
				t.Errorf("entry is %x", got[:header])
			}
			if ino, off := binary.NativeEndian.Uint64(dirent), binary.NativeEndian.Uint64(dirent[8:]); ino != 9 || off != 5 {
				t.Errorf("ino %d, off %d, expected 9 and 5", ino, off)
			}
			if length, typ := binary.NativeEndian.Uint32(dirent[16:]), binary.NativeEndian.Uint32(dirent[20:]); length != uint32(n) || typ != syscall.DT_DIR {
				t.Errorf("namelen %d, type %d", length, typ)
			}
			if want := append(bytes.Clone(name), make([]byte, size-header-n)...); !bytes.Equal(dirent[direntSize:], want) {
				t.Errorf("name %q, expected %q", dirent[direntSize:], want)
			}
		}
		iov, _ := pieces(4096)
		l.Reset(iov, 0, 4096)
		if add(l, nil) || add(l, make([]byte, 256)) || l.Written() != 0 {
			t.Errorf("plus %v: a name of 0 or 256 bytes is added", plus)
		}
		if plus && l.Add(9, 5, syscall.DT_DIR, []byte("n")) || !plus && l.AddPlus(entry, 9, 5, syscall.DT_DIR, []byte("n")) {
			t.Errorf("plus %v: an entry of the other kind is added", plus)
		}
	}
}

func TestDirListTimeouts(t *testing.T) {
	tests := []struct {
		entry                 fuseproto.EntryOut
		entryValid, attrValid uint64
	}{
		{fuseproto.EntryOut{NodeId: 9}, 5, 6},
		{fuseproto.EntryOut{}, 0, 6},
		{fuseproto.EntryOut{NodeId: 9, EntryValid: 1, AttrValid: 2}, 1, 2},
		{fuseproto.EntryOut{NodeId: 9, EntryValidNsec: Stale, AttrValidNsec: Stale}, 0, 0},
	}
	for _, tt := range tests {
		iov, joined := pieces(200)
		l := &DirList{Plus: true, EntryValid: 5, AttrValid: 6}
		l.Reset(iov, 0, 200)
		given := tt.entry
		l.AddPlus(&tt.entry, 1, 1, syscall.DT_REG, []byte("n"))
		got := joined()
		if e, a := binary.NativeEndian.Uint64(got[16:]), binary.NativeEndian.Uint64(got[24:]); e != tt.entryValid || a != tt.attrValid {
			t.Errorf("%+v is valid for %d and %d s, expected %d and %d", given, e, a, tt.entryValid, tt.attrValid)
		}
		if tt.entry != given {
			t.Error("the backend's entry is changed")
		}
	}
}

func TestName(t *testing.T) {
	n := MakeName("name")
	if n.String() != "name" || len(n) != 4 || string((*[5]byte)(n[:5])[:]) != "name\x00" || n.CString() != &n[0] {
		t.Errorf("name is %q", n[:5])
	}
	if empty := MakeName(""); *empty.CString() != 0 {
		t.Error("no NUL behind an empty name")
	}
}

func TestDataDoesNotAllocate(t *testing.T) {
	fd := file(t, counting(8192))
	iov, _ := pieces(100, 4000)
	use := make([]unix.Iovec, len(iov))
	l := new(DirList)
	var src Source
	buf := make([]byte, 300)
	extents := []Extent{{fd, 0, 100}, {-1, 0, 100}}
	name := []byte("name")
	n := testing.AllocsPerRun(100, func() {
		copy(use, iov)
		l.Reset(use, 10, 4000)
		l.ReadFrom(fd, 0, 1000, 0)
		l.ReadExtents(extents, 0)
		l.Add(1, 1, syscall.DT_REG, name)
		copy(use, iov)
		src.Reset(use, 10, 4000)
		src.WriteTo(fd, 0, 1000, 0)
		src.Read(buf)
	})
	if n != 0 {
		t.Errorf("%v allocations, expected none", n)
	}
}

func TestDirListTranslates(t *testing.T) {
	buf := make([]byte, 1024)
	l := &DirList{Plus: true, EntryValid: 5}
	l.Translate = func(e *fuseproto.EntryOut) {
		e.NodeId |= 3 << 48
		e.Uid = 77
	}
	entry := fuseproto.EntryOut{NodeId: 9}
	name := []byte("name")
	iov := make([]unix.Iovec, 1)
	allocs := testing.AllocsPerRun(1, func() {
		iov[0] = sys.MakeIovec(buf)
		l.Reset(iov, 0, uint64(len(buf)))
		l.AddPlus(&entry, 1, 2, unix.DT_REG, name)
	})
	var got fuseproto.EntryOut
	if _, err := binary.Decode(buf, binary.NativeEndian, &got); err != nil {
		t.Fatal(err)
	}
	if got.NodeId != 3<<48|9 || got.Uid != 77 || got.EntryValid != 5 {
		t.Errorf("entry has nodeid %#x, uid %d, valid %d, expected %#x, 77, 5", got.NodeId, got.Uid, got.EntryValid, uint64(3<<48|9))
	}
	if entry.NodeId != 9 || entry.Uid != 0 {
		t.Errorf("the backend's own entry was changed to nodeid %#x, uid %d", entry.NodeId, entry.Uid)
	}
	if allocs > 0 {
		t.Errorf("%v allocations for an entry that is translated", allocs)
	}
}
