package fusebridge

import (
	"bytes"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// lister is a fake that lists files named "file0" and so on with READDIR, and takes LOOKUPs of them.
type lister struct {
	files  int
	lookup func(f *fake, h *fuseproto.InHeader, raw uint64)
}

func (l *lister) answer(f *fake, h *fuseproto.InHeader, body []byte) {
	switch fuseproto.Opcode(h.Opcode) {
	case fuseproto.FUSE_OPENDIR:
		f.reply(h.Unique, 0, bytesOf(&fuseproto.OpenOut{Fh: 5}))
	case fuseproto.FUSE_READDIR, fuseproto.FUSE_READDIRPLUS:
		head := 0
		if h.Opcode == uint32(fuseproto.FUSE_READDIRPLUS) {
			head = entryOutSize // of zeros
		}
		var in fuseproto.ReadIn
		copy(bytesOf(&in)[inHeaderSize:], body)
		var out []byte
		for i := int(in.Offset); i < l.files; i++ {
			name := fmt.Sprint("file", i)
			size := (head + direntSize + len(name) + 7) &^ 7
			if len(out)+size > int(in.Size) {
				break
			}
			entry := make([]byte, size)
			copy(entry[head:], bytesOf(&fuseproto.Dirent{Ino: 100 + uint64(i), Off: uint64(i) + 1, Namelen: uint32(len(name)), Type: unix.DT_REG}))
			copy(entry[head+direntSize:], name)
			out = append(out, entry...)
		}
		f.reply(h.Unique, 0, out)
	case fuseproto.FUSE_LOOKUP:
		var i uint64
		if _, err := fmt.Sscanf(string(bytes.TrimRight(body, "\x00")), "file%d", &i); err != nil {
			f.t.Error(err)
		}
		l.lookup(f, h, 100+i)
	case fuseproto.FUSE_RELEASEDIR:
		f.reply(h.Unique, 0, nil)
	}
}

// listPlus lists the root by READDIRPLUS in pieces of size bytes, and checks that all files are there in order, and looked up.
func listPlus(t *testing.T, c *fsbackendtest.Client, files, size int, missing ...int) {
	t.Helper()
	fh, errno := c.Opendir(fsbackendtest.Root)
	if errno != 0 {
		t.Fatal(errno)
	}
	defer c.Releasedir(fsbackendtest.Root, fh)
	next := 0
	for off := uint64(0); ; {
		entries, errno := c.Readdir(fsbackendtest.Root, fh, off, size, true)
		if errno != 0 {
			t.Fatal(errno)
		}
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			if e.Name != fmt.Sprint("file", next) || e.Ino != 100+uint64(next) {
				t.Fatalf("entry %d is %q, inode %d", next, e.Name, e.Ino)
			}
			gone := len(missing) > 0 && missing[0] == next
			if gone != (e.Entry.NodeId == 0) || !gone && e.Entry.Ino != e.Ino {
				t.Fatalf("entry %d is node %d, inode %d", next, e.Entry.NodeId, e.Entry.Ino)
			}
			if gone {
				missing = missing[1:]
			}
			next++
			off = e.Off
		}
	}
	if next != files {
		t.Fatalf("%d entries, expected %d", next, files)
	}
}

// noPlus makes the fake one without READDIRPLUS.
func noPlus(init *fuseproto.InitOut) {
	init.Flags &^= uint32(fuseproto.FUSE_DO_READDIRPLUS | fuseproto.FUSE_READDIRPLUS_AUTO)
}

// TestLookupsTogether lists a directory of a program without READDIRPLUS, which has many LOOKUPs before it answers the first, and answers
// the last one first.
func TestLookupsTogether(t *testing.T) {
	const files, together = 200, 50
	type question struct {
		h   fuseproto.InHeader
		raw uint64
	}
	var open []question
	answered := 0
	l := lister{files: files}
	l.lookup = func(f *fake, h *fuseproto.InHeader, raw uint64) {
		open = append(open, question{*h, raw})
		if len(open) < min(together, files-answered) {
			return
		}
		for i := range open {
			q := open[len(open)-1-i]
			answered++
			if q.raw == 100+7 {
				f.reply(q.h.Unique, -int32(unix.ENOENT), nil) // it has gone meanwhile
				continue
			}
			f.reply(q.h.Unique, 0, entryOf(q.raw, unix.S_IFREG|0o644))
		}
		open = nil
	}
	init := fakeInit
	noPlus(&init)
	// 50 entries of 152 bytes and a name, padded.
	c, _, f, _ := newFakeInit(t, init, Config{}, l.answer)
	listPlus(t, c, files, together*160, 7)
	count := map[fuseproto.Opcode]int{}
	for _, op := range f.seen() {
		count[op]++
	}
	// What a reply to READDIR has beyond one to READDIRPLUS is kept for the next: 200 names are in the first, and the second says that there are no more.
	if count[fuseproto.FUSE_READDIR] != 2 || count[fuseproto.FUSE_LOOKUP] != files {
		t.Errorf("asked %v", count)
	}
}

// TestBareReaddirplus has a program whose READDIRPLUS looks nothing up: it is asked for it once.
func TestBareReaddirplus(t *testing.T) {
	const files = 200
	l := lister{files: files}
	l.lookup = func(f *fake, h *fuseproto.InHeader, raw uint64) {
		f.reply(h.Unique, 0, entryOf(raw, unix.S_IFREG|0o644))
	}
	c, _, f, _ := newFake(t, Config{}, l.answer)
	for range 2 {
		listPlus(t, c, files, 50*160)
	}
	count := map[fuseproto.Opcode]int{}
	for _, op := range f.seen() {
		count[op]++
	}
	if count[fuseproto.FUSE_READDIRPLUS] != 1 || count[fuseproto.FUSE_READDIR] > 4 {
		t.Errorf("asked %v", count)
	}
}

// TestLookupsInTurn is the same for a program that can look up only one name at a time in a directory.
func TestLookupsInTurn(t *testing.T) {
	l := lister{files: 20}
	l.lookup = func(f *fake, h *fuseproto.InHeader, raw uint64) {
		var b [1]byte
		if n, _, err := unix.Recvfrom(f.fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT); err != unix.EAGAIN {
			f.t.Errorf("there is another request behind a LOOKUP: %d bytes, %v", n, err)
		}
		f.reply(h.Unique, 0, entryOf(raw, unix.S_IFREG|0o644))
	}
	init := fakeInit
	noPlus(&init)
	init.Flags &^= uint32(fuseproto.FUSE_PARALLEL_DIROPS)
	c, _, _, _ := newFakeInit(t, init, Config{}, l.answer)
	listPlus(t, c, 20, 8000)
}

// TestLookupsFail lists all the same what a program fails to look up, and does not try them all.
func TestLookupsFail(t *testing.T) {
	l := lister{files: 200}
	l.lookup = func(f *fake, h *fuseproto.InHeader, raw uint64) { f.reply(h.Unique, -int32(unix.EACCES), nil) }
	init := fakeInit
	noPlus(&init)
	c, _, f, _ := newFakeInit(t, init, Config{}, l.answer)
	fh, errno := c.Opendir(fsbackendtest.Root)
	if errno != 0 {
		t.Fatal(errno)
	}
	entries, errno := c.Readdir(fsbackendtest.Root, fh, 0, 64<<10, true)
	if errno != 0 || len(entries) != 200 || entries[0].Entry.NodeId != 0 {
		t.Fatalf("%d entries, %v", len(entries), errno)
	}
	asked := 0
	for _, op := range f.seen() {
		if op == fuseproto.FUSE_LOOKUP {
			asked++
		}
	}
	if asked == 0 || asked > maxBurst {
		t.Errorf("%d LOOKUPs", asked)
	}
	c.Releasedir(fsbackendtest.Root, fh)
}
