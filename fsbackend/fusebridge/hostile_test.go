package fusebridge

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

const root = fsbackendtest.Root

// dir answers every LOOKUP with a file (names that begin with f) or directory whose number is the name's length, and otherwise
// with what else says.
func dir(else_ func(*fake, *fuseproto.InHeader, []byte)) func(*fake, *fuseproto.InHeader, []byte) {
	return func(f *fake, h *fuseproto.InHeader, body []byte) {
		switch fuseproto.Opcode(h.Opcode) {
		case fuseproto.FUSE_LOOKUP:
			name := unix.ByteSliceToString(body)
			mode := uint32(unix.S_IFDIR | 0o755)
			if name[0] == 'f' {
				mode = unix.S_IFREG | 0o644
			}
			f.reply(h.Unique, 0, entryOf(100+uint64(len(name)), mode))
		case fuseproto.FUSE_FORGET, fuseproto.FUSE_BATCH_FORGET, fuseproto.FUSE_INTERRUPT:
		case fuseproto.FUSE_OPEN, fuseproto.FUSE_OPENDIR:
			f.reply(h.Unique, 0, bytesOf(&fuseproto.OpenOut{Fh: 7}))
		case fuseproto.FUSE_RELEASE, fuseproto.FUSE_RELEASEDIR, fuseproto.FUSE_FLUSH:
			f.reply(h.Unique, 0, nil)
		default:
			else_(f, h, body)
		}
	}
}

// TestBadReplies has a program answer a GETATTR or READ as it must not: EIO, and where it does not keep to the protocol, its end.
func TestBadReplies(t *testing.T) {
	attr := func(change func(*fuseproto.AttrOut)) []byte {
		var a fuseproto.AttrOut
		a.Mode, a.Nlink, a.Ino = unix.S_IFREG|0o644, 1, 5
		change(&a)
		return bytesOf(&a)
	}
	good := attr(func(*fuseproto.AttrOut) {})
	raw := func(length uint32, unique uint64, status int32, payload []byte) []byte {
		return append(append([]byte(nil), bytesOf(&fuseproto.OutHeader{Length: length, Status: status, Unique: unique})...), payload...)
	}
	for _, tt := range []struct {
		name   string
		answer func(f *fake, u uint64)
		want   fsbackend.Errno
		broken bool
	}{
		{"good", func(f *fake, u uint64) { f.reply(u, 0, good) }, fsbackend.OK, false},
		{"error", func(f *fake, u uint64) { f.reply(u, -int32(unix.EACCES), nil) }, unix.EACCES, false},
		{"error with data", func(f *fake, u uint64) { f.reply(u, -int32(unix.EACCES), good) }, unix.EACCES, false},
		{"positive error", func(f *fake, u uint64) { f.reply(u, 5, nil) }, unix.EIO, false},
		{"error of the kernel's own", func(f *fake, u uint64) { f.reply(u, -512, nil) }, unix.EIO, false},
		{"least error", func(f *fake, u uint64) { f.reply(u, -1<<31, nil) }, unix.EIO, false},
		{"another type", func(f *fake, u uint64) {
			f.reply(u, 0, attr(func(a *fuseproto.AttrOut) { a.Mode = unix.S_IFDIR }))
		}, unix.EIO, false},
		{"no type", func(f *fake, u uint64) { f.reply(u, 0, attr(func(a *fuseproto.AttrOut) { a.Mode = 0o644 })) }, unix.EIO, false},
		{"negative size", func(f *fake, u uint64) { f.reply(u, 0, attr(func(a *fuseproto.AttrOut) { a.Size = 1 << 63 })) }, unix.EIO, false},
		{"too long", func(f *fake, u uint64) { f.reply(u, 0, append(bytes.Clone(good), 0)) }, unix.EIO, false},
		{"too short", func(f *fake, u uint64) { f.reply(u, 0, good[:len(good)-1]) }, unix.EIO, true},
		{"empty", func(f *fake, u uint64) { f.reply(u, 0, nil) }, unix.EIO, true},
		{"length too large", func(f *fake, u uint64) { f.send(raw(1000, u, 0, good)) }, unix.EIO, true},
		{"length too small", func(f *fake, u uint64) { f.send(raw(16, u, 0, good)) }, unix.EIO, true},
		{"half a header", func(f *fake, u uint64) { f.send(make([]byte, 8)) }, unix.EIO, true},
		{"larger than anything", func(f *fake, u uint64) { f.send(raw(1<<20+1<<19, u, 0, make([]byte, 1<<20+1<<19-16))) }, unix.EIO, true},
		{"to nothing first", func(f *fake, u uint64) {
			f.reply(u+1000, 0, good)
			f.reply(u, 0, good)
		}, fsbackend.OK, false},
		{"twice", func(f *fake, u uint64) {
			f.reply(u, 0, good)
			f.reply(u, 0, good)
		}, fsbackend.OK, false},
		{"to nothing for ever", func(f *fake, u uint64) {
			for range maxUnsolicited + 10 {
				f.reply(u+1000, 0, good)
			}
		}, unix.EIO, true},
		{"notifications first", func(f *fake, u uint64) {
			for code := range int32(12) {
				f.reply(0, code, nil)
				f.reply(0, code, make([]byte, 24))
				f.reply(0, -code, make([]byte, 40))
			}
			f.reply(u, 0, good)
		}, fsbackend.OK, false},
		{"end", func(f *fake, u uint64) { _ = unix.Shutdown(f.fd, unix.SHUT_RDWR) }, unix.EIO, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, b, _, _ := newFake(t, Config{RestartWait: time.Millisecond}, dir(func(f *fake, h *fuseproto.InHeader, _ []byte) {
				tt.answer(f, h.Unique)
			}))
			e, errno := c.Lookup(root, "file")
			if errno != 0 {
				t.Fatal(errno)
			}
			if _, errno := c.Getattr(e.NodeId); errno != tt.want {
				t.Errorf("GETATTR: %v, expected %v", errno, tt.want)
			}
			conn := b.current.Load()
			conn.mu.Lock()
			dead := conn.dead
			conn.mu.Unlock()
			if dead != tt.broken {
				t.Errorf("the connection is dead: %v, expected %v", dead, tt.broken)
			}
		})
	}
}

// TestBadEntries has a program answer a LOOKUP with entries that cannot be: EIO, and the lookup is given back.
func TestBadEntries(t *testing.T) {
	for _, tt := range []struct {
		name string
		raw  uint64
		mode uint32
	}{
		{"the root", 1, unix.S_IFDIR},
		{"no type", 9, 0o644},
		{"all types", 9, unix.S_IFMT},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, _, _, _ := newFake(t, Config{}, func(f *fake, h *fuseproto.InHeader, _ []byte) {
				if fuseproto.Opcode(h.Opcode) == fuseproto.FUSE_LOOKUP {
					f.reply(h.Unique, 0, entryOf(tt.raw, tt.mode))
				}
			})
			if _, errno := c.Lookup(root, "x"); errno != unix.EIO {
				t.Errorf("LOOKUP: %v", errno)
			}
		})
	}
}

// TestNumberOfAnotherFile has a program give the number of a file that is in use to a directory.
func TestNumberOfAnotherFile(t *testing.T) {
	c, _, f, _ := newFake(t, Config{}, dir(nil))
	file, errno := c.Lookup(root, "f1")
	if errno != 0 {
		t.Fatal(errno)
	}
	if _, errno := c.Lookup(root, "d1"); errno != unix.EIO {
		t.Errorf("LOOKUP: %v", errno)
	}
	c.R.Forget(file.NodeId, 1)
	f.await(fuseproto.FUSE_FORGET)
	if _, errno := c.Lookup(root, "d1"); errno != 0 {
		t.Errorf("LOOKUP when it is free: %v", errno)
	}
}

// TestBadListings has a program answer READDIR and READDIRPLUS.
func TestBadListings(t *testing.T) {
	dirent := func(name string, off uint64) []byte {
		d := fuseproto.Dirent{Ino: 3, Off: off, Namelen: uint32(len(name)), Type: 8}
		b := append(bytes.Clone(bytesOf(&d)), name...)
		return append(b, make([]byte, -len(b)&7)...)
	}
	plus := func(name string, off uint64) []byte { return append(entryOf(9, unix.S_IFREG), dirent(name, off)...) }
	for _, tt := range []struct {
		name    string
		listing func(entry func(string, uint64) []byte) []byte
		want    []string
		errno   fsbackend.Errno
	}{
		{"good", func(e func(string, uint64) []byte) []byte { return append(e("a", 1), e("b", 2)...) }, []string{"a", "b"}, 0},
		{"cut off", func(e func(string, uint64) []byte) []byte { return append(e("a", 1), e("b", 2)[:20]...) }, []string{"a"}, 0},
		{"slash", func(e func(string, uint64) []byte) []byte { return e("a/b", 1) }, nil, unix.EIO},
		{"NUL", func(e func(string, uint64) []byte) []byte { return e("a\x00b", 1) }, nil, unix.EIO},
		{"no name", func(e func(string, uint64) []byte) []byte { return e("", 1) }, nil, unix.EIO},
		{"long name", func(e func(string, uint64) []byte) []byte { return e(strings.Repeat("n", 256), 1) }, nil, unix.EIO},
		{"no offset", func(e func(string, uint64) []byte) []byte { return e("a", 0) }, nil, unix.EIO},
		{"bad after good", func(e func(string, uint64) []byte) []byte { return append(e("a", 1), e("a/b", 2)...) }, []string{"a"}, 0},
	} {
		for _, isPlus := range []bool{false, true} {
			t.Run(tt.name, func(t *testing.T) {
				entry := dirent
				if isPlus {
					entry = plus
				}
				c, _, _, _ := newFake(t, Config{}, dir(func(f *fake, h *fuseproto.InHeader, _ []byte) {
					f.reply(h.Unique, 0, tt.listing(entry))
				}))
				fh, errno := c.Opendir(root)
				if errno != 0 {
					t.Fatal(errno)
				}
				list, errno := c.Readdir(root, fh, 0, 4096, isPlus)
				var names []string
				for _, e := range list {
					names = append(names, e.Name)
				}
				if errno != tt.errno || !slices.Equal(names, tt.want) {
					t.Errorf("plus %v: %q, %v; expected %q, %v", isPlus, names, errno, tt.want, tt.errno)
				}
			})
		}
	}
}

// TestBadInit has a program answer INIT as none does.
func TestBadInit(t *testing.T) {
	for _, tt := range []struct {
		name  string
		reply []byte
		ok    bool
	}{
		{"good", bytesOf(&fakeInit), true},
		{"old", bytesOf(&fuseproto.InitOut{Major: 7, Minor: 19})[:24], true},
		{"too old", bytesOf(&fuseproto.InitOut{Major: 7, Minor: 18})[:24], false},
		{"too new", bytesOf(&fuseproto.InitOut{Major: 8, Minor: 19}), false},
		{"short for its version", bytesOf(&fuseproto.InitOut{Major: 7, Minor: 31})[:24], false},
		{"empty", nil, false},
		{"everything", bytes.Repeat([]byte{0xff}, 64), false},
		{"no sizes", bytesOf(&fuseproto.InitOut{Major: 7, Minor: 40, Flags: 0xffffffff, Flags2: 0xffffffff}), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &conn{b: &Bridge{cfg: Config{MaxWrite: LimitMaxWrite}}, fd: -1}
			err := c.agree(tt.reply, LimitMaxWrite)
			if (err == nil) != tt.ok {
				t.Fatalf("%v, expected success: %v", err, tt.ok)
			}
			if err == nil && (c.maxRead < pageSize || c.maxWrite < pageSize || c.maxRead > LimitMaxWrite || c.maxWrite > LimitMaxWrite || c.flags&^offered != 0) {
				t.Errorf("agreed on READ %d, WRITE %d, flags %#x", c.maxRead, c.maxWrite, c.flags)
			}
		})
	}
}

// TestTimeout has a program not answer: INTERRUPT, then EIO, and its late answer is undone.
func TestTimeout(t *testing.T) {
	var mu sync.Mutex
	var kept []uint64
	c, _, f, _ := newFake(t, Config{Timeout: 600 * time.Millisecond}, func(f *fake, h *fuseproto.InHeader, body []byte) {
		if fuseproto.Opcode(h.Opcode) == fuseproto.FUSE_LOOKUP {
			mu.Lock()
			kept = append(kept, h.Unique)
			mu.Unlock()
		}
	})
	began := time.Now()
	if _, errno := c.Lookup(root, "x"); errno != unix.EIO {
		t.Errorf("LOOKUP: %v", errno)
	}
	if d := time.Since(began); d < 600*time.Millisecond || d > 20*time.Second {
		t.Errorf("it took %s", d)
	}
	f.await(fuseproto.FUSE_INTERRUPT)
	mu.Lock()
	f.reply(kept[0], 0, entryOf(9, unix.S_IFREG))
	mu.Unlock()
	f.await(fuseproto.FUSE_FORGET) // the late lookup is given back
}

// TestCancel has the guest lose interest.
func TestCancel(t *testing.T) {
	_, b, f, _ := newFake(t, Config{}, func(*fake, *fuseproto.InHeader, []byte) {})
	cancel := make(chan struct{})
	ctx := &fsbackend.Context{MayBlock: true, Cancel: cancel}
	time.AfterFunc(10*time.Millisecond, func() { close(cancel) })
	began := time.Now()
	var out fuseproto.EntryOut
	if errno := b.Lookup(ctx, root, fsbackend.MakeName("x"), &out); errno != unix.EIO {
		t.Errorf("LOOKUP: %v", errno)
	}
	if d := time.Since(began); d > 20*time.Second {
		t.Errorf("it took %s", d)
	}
	f.await(fuseproto.FUSE_INTERRUPT)
}

// TestForgetDoesNotWait gives nodes back to a program that reads nothing.
func TestForgetDoesNotWait(t *testing.T) {
	block := make(chan struct{})
	c, b, f, _ := newFake(t, Config{}, dir(func(*fake, *fuseproto.InHeader, []byte) { <-block }))
	const n = 50
	var nodes []uint64
	for i := range n {
		e, errno := c.Lookup(root, strings.Repeat("d", i+1))
		if errno != 0 {
			t.Fatal(errno)
		}
		nodes = append(nodes, e.NodeId)
	}
	b.mu.Lock()
	conn := b.current.Load()
	b.mu.Unlock()
	done := make(chan fsbackend.Errno)
	go func() {
		_, errno := c.Statfs(root)
		done <- errno
	}()
	f.await(fuseproto.FUSE_STATFS)
	for sendTo(conn.fd, make([]byte, 100_000)) == 0 { // until nothing fits any more: it is read by nobody yet
	}
	began := time.Now()
	for _, id := range nodes {
		c.R.Forget(id, 1)
	}
	if d := time.Since(began); d > 20*time.Second {
		t.Errorf("it took %s", d)
	}
	conn.kill()
	if errno := <-done; errno != unix.EIO {
		t.Errorf("STATFS: %v", errno)
	}
	close(block)
}

// TestNotify has a program take back what it had promised.
func TestNotify(t *testing.T) {
	var mu sync.Mutex
	size := uint64(1)
	attrs := 0
	c, b, f, _ := newFake(t, Config{}, func(f *fake, h *fuseproto.InHeader, body []byte) {
		mu.Lock()
		defer mu.Unlock()
		switch fuseproto.Opcode(h.Opcode) {
		case fuseproto.FUSE_LOOKUP:
			e := fuseproto.EntryOut{NodeId: 9, EntryValid: 1000, AttrValid: 1000}
			e.Mode, e.Ino, e.Nlink, e.Size = unix.S_IFREG, 9, 1, size
			f.reply(h.Unique, 0, bytesOf(&e))
		case fuseproto.FUSE_GETATTR:
			attrs++
			a := fuseproto.AttrOut{AttrValid: 1000}
			a.Mode, a.Ino, a.Nlink, a.Size = unix.S_IFREG, 9, 1, size
			f.reply(h.Unique, 0, bytesOf(&a))
		}
	})
	e, errno := c.Lookup(root, "x")
	if errno != 0 || e.EntryValid < 900 || e.AttrValid < 900 {
		t.Fatalf("%v, good for %d and %d s", errno, e.EntryValid, e.AttrValid)
	}
	look := func() uint64 {
		t.Helper()
		a, errno := c.Getattr(e.NodeId)
		if errno != 0 {
			t.Fatal(errno)
		}
		again, errno := c.Lookup(root, "x")
		if errno != 0 || again.NodeId != e.NodeId || again.Size != a.Size {
			t.Fatalf("%v, node %d, size %d", errno, again.NodeId, again.Size)
		}
		return a.Size
	}
	if got := look(); got != 1 || attrs != 0 {
		t.Errorf("size %d, %d times asked", got, attrs)
	}
	for i, notify := range []func(){
		func() { f.reply(0, notifyInvalInode, binary.NativeEndian.AppendUint64(nil, 9)) }, // too short: nothing
		func() {
			f.reply(0, notifyInvalInode, append(binary.NativeEndian.AppendUint64(nil, 9), make([]byte, 16)...))
		},
		func() {
			f.reply(0, notifyInvalEntry, append(append(binary.NativeEndian.AppendUint64(nil, 1), 1, 0, 0, 0, 0, 0, 0, 0), "x\x00"...))
		},
		func() {
			b := binary.NativeEndian.AppendUint64(nil, 1)
			b = binary.NativeEndian.AppendUint64(b, 9)
			f.reply(0, notifyDelete, append(append(b, 1, 0, 0, 0, 0, 0, 0, 0), "x\x00"...))
		},
		func() { f.reply(0, notifyIncEpoch, nil) },
	} {
		mu.Lock()
		size++
		want := size
		if i == 0 {
			want--
		}
		mu.Unlock()
		heard := b.current.Load().heard.Load()
		notify()
		f.reply(0, notifyPoll, nil) // when it is heard, the other one has been handled
		for b.current.Load().heard.Load() < heard+2 {
			time.Sleep(time.Millisecond)
		}
		if got := look(); got != want {
			t.Errorf("notification %d: size %d, expected %d", i, got, want)
		}
	}
}

// TestKeptAttributes counts how often the program is asked, also where its answer is overtaken by a change.
func TestKeptAttributes(t *testing.T) {
	for _, noCache := range []bool{false, true} {
		var mu sync.Mutex
		asked := 0
		held := make(chan struct{}, 1)
		c, _, f, _ := newFake(t, Config{NoCache: noCache}, dir(func(f *fake, h *fuseproto.InHeader, _ []byte) {
			a := fuseproto.AttrOut{AttrValid: 1000}
			a.Mode, a.Ino, a.Nlink = unix.S_IFREG, 9, 1
			switch fuseproto.Opcode(h.Opcode) {
			case fuseproto.FUSE_GETATTR:
				mu.Lock()
				asked++
				first := asked == 1
				mu.Unlock()
				if first {
					u := h.Unique
					go func() { // once the other request has been answered
						<-held
						f.reply(u, 0, bytesOf(&a))
					}()
					return
				}
				f.reply(h.Unique, 0, bytesOf(&a))
			case fuseproto.FUSE_SETATTR:
				f.reply(h.Unique, 0, bytesOf(&a))
			}
		}))
		e, errno := c.Lookup(root, "file")
		if errno != 0 {
			t.Fatal(errno)
		}
		slow := make(chan fsbackend.Errno)
		go func() {
			_, errno := c.Getattr(e.NodeId)
			slow <- errno
		}()
		f.await(fuseproto.FUSE_GETATTR)
		if _, errno := c.Chmod(e.NodeId, 0o600); errno != 0 {
			t.Fatal(errno)
		}
		held <- struct{}{}
		if errno := <-slow; errno != 0 {
			t.Fatal(errno)
		}
		for range 3 {
			if _, errno := c.Getattr(e.NodeId); errno != 0 {
				t.Fatal(errno)
			}
		}
		want := 2 // what was asked for before the change is not kept, what was after it is
		if noCache {
			want = 4
		}
		mu.Lock()
		if asked != want {
			t.Errorf("without keeping %v: asked %d times, expected %d", noCache, asked, want)
		}
		mu.Unlock()
	}
}

// TestRestartedProgramLacks has a restarted program agree to less than the first.
func TestRestartedProgramLacks(t *testing.T) {
	answer := dir(func(f *fake, h *fuseproto.InHeader, _ []byte) {
		if fuseproto.Opcode(h.Opcode) == fuseproto.FUSE_STATFS {
			f.reply(h.Unique, 0, bytesOf(&fuseproto.StatfsOut{}))
		}
	})
	c, b, f, l := newFake(t, Config{RestartWait: 20 * time.Millisecond}, answer)
	less := &fake{t: t, answer: answer, init: fakeInit}
	less.init.Flags &^= uint32(fuseproto.FUSE_POSIX_LOCKS)
	_ = unix.Shutdown(f.fd, unix.SHUT_RDWR)
	l <- less.start()
	less.await(fuseproto.FUSE_INIT)
	if _, errno := c.Statfs(root); errno != unix.EIO {
		t.Errorf("STATFS: %v", errno)
	}
	same := &fake{t: t, answer: answer, init: fakeInit}
	l <- same.start()
	b.cfg.RestartWait = 30 * time.Second
	if _, errno := c.Statfs(root); errno != 0 {
		t.Errorf("STATFS with another that does it all: %v", errno)
	}
}

func FuzzReplies(f *testing.F) {
	f.Add([]byte{0}, uint8(0))
	f.Add(append([]byte{0, 1}, entryOf(9, unix.S_IFREG)...), uint8(3))
	f.Add(append([]byte{0, 2, 255, 3, 17}, bytes.Repeat(entryOf(7, unix.S_IFDIR), 3)...), uint8(9))
	d := fuseproto.Dirent{Ino: 1, Off: 1, Namelen: 3, Type: 4}
	f.Add(append(append(append([]byte{5}, entryOf(9, unix.S_IFREG)...), bytesOf(&d)...), "abc\x00\x00\x00\x00\x00"...), uint8(7))
	f.Fuzz(func(t *testing.T, data []byte, step uint8) {
		at := 0
		take := func(n int) []byte {
			b := make([]byte, n)
			if at < len(data) {
				at += copy(b, data[at:])
			}
			return b
		}
		// Each answer is made of the input: what is wrong with its header, and a payload of a plausible length or not.
		answer := func(fk *fake, h *fuseproto.InHeader, _ []byte) {
			switch op := fuseproto.Opcode(h.Opcode); op {
			case fuseproto.FUSE_FORGET, fuseproto.FUSE_BATCH_FORGET, fuseproto.FUSE_INTERRUPT:
				return
			}
			kind := take(1)[0]
			sizes := []int{entryOutSize, 104, 16, 0, 144, 152 + 8, 80, 8, 24, 288, int(take(1)[0])}
			payload := take(sizes[(int(kind)+int(step))%len(sizes)])
			o := fuseproto.OutHeader{Length: uint32(outHeaderSize + len(payload)), Unique: h.Unique}
			switch kind >> 5 {
			case 1:
				o.Status = -int32(take(1)[0])
			case 2:
				o.Unique += uint64(take(1)[0])
			case 3:
				fk.reply(0, int32(take(1)[0]%10), payload)
			case 4:
				o.Length += uint32(take(1)[0])
			}
			fk.send(append(bytes.Clone(bytesOf(&o)), payload...))
			if kind>>5 == 2 {
				fk.reply(h.Unique, 0, payload)
			}
		}
		c, b, _, _ := newFake(t, Config{Timeout: 30 * time.Millisecond, RestartWait: time.Microsecond, MaxNodes: 8}, answer)
		e, _ := c.Lookup(root, "x")
		id := cmp.Or(e.NodeId, root)
		_, _ = c.Getattr(id)
		_, _ = c.Chmod(id, 0o600)
		_, _ = c.Readlink(id)
		if fh, errno := c.Open(id, unix.O_RDWR); errno == 0 {
			_, _ = c.Read(id, fh, 0, 100)
			_, _ = c.Write(id, fh, 0, []byte("data"), unix.O_RDWR)
			_, _ = c.Lseek(id, fh, 0, unix.SEEK_DATA)
			c.Release(id, fh)
		}
		for _, plus := range []bool{false, true} {
			if fh, errno := c.Opendir(root); errno == 0 {
				_, _ = c.Readdir(root, fh, 0, 1000, plus)
				c.Releasedir(root, fh)
			}
		}
		_, _ = c.Mkdir(root, "d", 0o755)
		_, _ = c.Create(root, "c", unix.O_RDWR, 0o644)
		_ = c.Rename(root, "d", root, "c", 0)
		_ = c.Unlink(root, "c")
		_, _ = c.Statfs(root)
		_, _, _ = c.Getxattr(id, "user.x", 10)
		_, _, _ = c.Listxattr(id, 0)
		if n := b.Stats().Inodes; n > 10 {
			t.Errorf("%d nodes", n)
		}
	})
}

// FuzzDirents parses listings.
func FuzzDirents(f *testing.F) {
	f.Add([]byte{}, true)
	d := fuseproto.Dirent{Ino: 1, Off: 1, Namelen: 3, Type: 4}
	f.Add(append(bytes.Clone(bytesOf(&d)), "abc\x00\x00\x00\x00\x00"...), false)
	f.Fuzz(func(t *testing.T, reply []byte, plus bool) {
		var d dirent
		for {
			rest, ok, bad := d.next(reply, plus)
			if !ok {
				return
			}
			if bad || len(rest) >= len(reply) || !checkName(d.name) {
				t.Fatalf("%q is left of %q, bad %v, name %q", rest, reply, bad, d.name)
			}
			reply = rest
		}
	})
}

// TestOneAtATime has a program that takes one operation in a directory at a time, as squashfuse: a share that it is grafted into later can
// have more, for the others wait here.
func TestOneAtATime(t *testing.T) {
	b := &Bridge{first: offered &^ fuseproto.FUSE_PARALLEL_DIROPS}
	const guests = fuseproto.FUSE_PARALLEL_DIROPS | fuseproto.FUSE_ASYNC_READ | fuseproto.FUSE_WRITEBACK_CACHE
	if got := b.WantFlags(guests); got != guests&^fuseproto.FUSE_WRITEBACK_CACHE {
		t.Errorf("of the guest's flags %#x it wants %#x", guests, got)
	}
	n := new(node)
	c := &conn{flags: b.first}
	if n.look(c) || n.names.TryRLock() {
		t.Error("two operations in a directory go on at a time")
	}
	n.unlook(false)
}
