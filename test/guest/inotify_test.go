package guest_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/share"
	"github.com/sluicefs/sluice/virtiofs"
)

// watched is a guest whose sluice-agent and a program that watches by inotify have a serial line to this process, which serves
// the share and tells of what the test changes in it.
type watched struct {
	*machine
	s     *share.Share
	tty   *os.File
	lines chan string
	id    uint64
	token string
}

// watchedConfig says what is served and watched.
type watchedConfig struct {
	cache     fuseserver.CachePolicy
	readOnly  bool // of the graft
	writeback bool
	agent     string   // more options
	reads     string   // file to read at each event
	watch     []string // below the mount
}

// newWatched serves the share, whose files prepare makes, boots a guest, and waits until all there is ready.
func newWatched(t *testing.T, cfg watchedConfig, prepare func(w *watched)) *watched {
	t.Helper()
	w := &watched{machine: newScratch(t), lines: make(chan string, 1<<16)}
	w.serving = w.ctx
	prepare(w)
	w.serve(cfg)

	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	w.check(err)
	theirs := os.NewFile(uintptr(fds[1]), "serial")
	defer theirs.Close()
	w.check(unix.SetNonblock(fds[0], true)) // so that Close ends a Read
	w.tty = os.NewFile(uintptr(fds[0]), "serial")
	g, err := testguest.Boot(w.ctx, testguest.Config{
		Kind: testguest.UML, Kit: kit, Initrd: initrd, Scratch: w.scratch, Serial: theirs,
		Devices: []testguest.Device{{Socket: filepath.Join(w.scratch, "fs.sock"), Tag: testguest.Tag}},
	})
	w.check(err)
	w.guest = g
	var reading sync.WaitGroup
	reading.Go(func() {
		defer close(w.lines)
		for in := bufio.NewScanner(w.tty); in.Scan(); {
			w.lines <- in.Text()
		}
	})
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := w.trySh("cat /tmp/agent")
			t.Logf("agent:\n%s\nguest's console:\n%s", log, g.Console())
		}
		g.Close()
		w.tty.Close()
		reading.Wait()
	})
	w.mount()
	w.sh("stty raw -echo -F /dev/ttyS1; sluice-agent --mount /mnt --connect stdin %s </dev/ttyS1 >/dev/null 2>/tmp/agent &", cfg.agent)
	paths := []string{}
	for _, p := range append(slices.Clone(cfg.watch), "end") {
		paths = append(paths, "/mnt/"+p)
	}
	w.sh("guestprog watch /dev/ttyS1 '%s' %s >/dev/null 2>&1 &", cfg.reads, strings.Join(paths, ","))
	if line := w.line(); line != "ready" {
		t.Fatalf("the watching program says %q", line)
	}
	w.send(&api.Event{Kind: api.EventHello, Time: time.Now(), Token: w.token})
	return w
}

// serve serves w.share by a server of this process.
func (w *watched) serve(cfg watchedConfig) {
	w.t.Helper()
	w.check(os.WriteFile(w.path("end"), nil, 0o644)) // a change of it ends what happened says
	log := slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	files, err := passthrough.New(passthrough.Config{Dir: w.share})
	w.check(err)
	w.s, err = share.New(share.Config{Grafts: []share.Graft{{Path: "/", Backend: files, ReadOnly: cfg.readOnly}}, Log: log})
	w.check(err)
	w.token = w.s.EnableReplay()
	answers, err := fuseserver.New(fuseserver.Config{Backend: w.s, Log: log, Cache: cfg.cache, Writeback: cfg.writeback})
	w.check(err)
	device, err := virtiofs.New(virtiofs.Config{Server: answers, Tag: testguest.Tag, NumRequestQueues: 1, Log: log})
	w.check(err)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(w.scratch, "fs.sock"), Net: "unix"})
	w.check(err)
	ctx, stop := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer conn.Close()
		_ = device.Serve(ctx, conn) // the guest is killed
	})
	w.t.Cleanup(func() {
		l.Close()
		stop()
		serving.Wait()
		if err := device.Close(); err != nil {
			w.t.Error(err)
		}
	})
}

// line returns what the watching program says next.
func (w *watched) line() string {
	w.t.Helper()
	select {
	case line, ok := <-w.lines:
		if !ok {
			w.t.Fatal("the serial line has ended")
		}
		return line
	case <-time.After(30 * time.Second):
		w.t.Fatal("nothing fires in the guest")
	case <-w.ctx.Done():
		w.t.Fatal(w.ctx.Err())
	}
	return ""
}

func (w *watched) send(e *api.Event) {
	w.t.Helper()
	line, err := json.Marshal(e)
	w.check(err)
	_, err = w.tty.Write(append(line, '\n'))
	w.check(err)
}

// tell announces an event and sends it to the agent. The time is long ago: a rescan after it tells of all.
func (w *watched) tell(kind, path, to string, dir bool) {
	w.t.Helper()
	w.id++
	w.s.Announce(share.ReplayEvent{ID: w.id, Kind: share.ReplayKind(kind), Path: path, To: to, Dir: dir})
	w.send(&api.Event{ID: w.id, Time: time.Unix(1, 0), Kind: kind, Path: path, To: to, Dir: dir})
}

// happened returns what has fired in the guest for what was told so far, without the cookies of renames, which it checks.
func (w *watched) happened() (events []string) {
	w.t.Helper()
	w.tell(api.EventModify, "/end", "", false)
	cookies := map[string][]string{}
	for {
		number, rest, _ := strings.Cut(w.line(), " ")
		what, rest, _ := strings.Cut(rest, " ")
		cookie, rest, _ := strings.Cut(rest, " ")
		name, _, _ := strings.Cut(rest, " ")
		if strings.HasPrefix(what, "MODIFY") && name == "." {
			break
		}
		if name == "end" {
			continue // of a watched root
		}
		if cookie != "0" {
			cookies[cookie] = append(cookies[cookie], what)
		}
		events = append(events, strings.TrimSpace(fmt.Sprintf("%s %s %s", number, what, name)))
	}
	for cookie, both := range cookies {
		if len(both) != 2 || !strings.HasPrefix(both[0], "MOVED_FROM") || !strings.HasPrefix(both[1], "MOVED_TO") {
			w.t.Errorf("cookie %s is of %q", cookie, both)
		}
	}
	return events
}

// states describes every file of the share, all of its times but the last access included.
func (w *watched) states() map[string]string {
	w.t.Helper()
	states := map[string]string{}
	w.check(filepath.WalkDir(w.machine.share, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		st.Atim, st.X__unused = unix.Timespec{}, [3]int64{}
		content := ""
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			b, _ := os.ReadFile(path)
			content = string(b)
		}
		states[strings.TrimPrefix(path, w.machine.share)] = fmt.Sprintf("%+v %q", st, content)
		return err
	}))
	return states
}

// expect tells what the host has done, and looks at what fires for it, and that nothing on the host is different after it.
func (w *watched) expect(what string, tell func(), want ...string) {
	w.t.Helper()
	before := w.states()
	tell()
	if got := w.happened(); !slices.Equal(got, want) {
		w.t.Errorf("%s: fires %q, want %q", what, got, want)
	}
	after := w.states()
	for path, state := range before {
		if after[path] != state {
			w.t.Errorf("%s: the host's %s was\n%s\nand is\n%s", what, path, state, after[path])
		}
	}
	if len(after) != len(before) {
		w.t.Errorf("%s: the host had %d files, and has %d", what, len(before), len(after))
	}
}

func (w *watched) put(name, content string) {
	w.t.Helper()
	w.check(os.WriteFile(w.path(name), []byte(content), 0o644))
}

// TestInotify has the host change files in each way, and looks at what inotify says in the guest.
func TestInotify(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		cfg  watchedConfig
	}{
		{"auto", watchedConfig{}},
		{"read-only", watchedConfig{readOnly: true}},
		{"never", watchedConfig{cache: fuseserver.CacheNever}},
		{"metadata", watchedConfig{cache: fuseserver.CacheMetadata}},
		{"always", watchedConfig{cache: fuseserver.CacheAlways}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := tt.cfg
			cfg.watch = []string{"d", "d/f", "e"}
			w := newWatched(t, cfg, func(w *watched) {
				w.check(os.MkdirAll(w.path("d/sub/deep"), 0o755))
				w.check(os.MkdirAll(w.path("e"), 0o755))
				w.put("d/f", "one")
				w.put("d/sub/x", "")
			})
			w.sh("find /mnt >/dev/null; cat /mnt/d/f")
			w.happened()

			w.put("d/f", "two")
			w.expect("modify", func() { w.tell(api.EventModify, "/d/f", "", false) }, "0 MODIFY f", "1 MODIFY .")
			if got := w.sh("cat /mnt/d/f"); got != "two" {
				t.Errorf("the guest reads %q", got)
			}
			w.happened()
			w.check(os.Chmod(w.path("d/f"), 0o600))
			w.expect("attrib", func() { w.tell(api.EventAttrib, "/d/f", "", false) }, "0 ATTRIB f", "1 ATTRIB .")
			if got := w.sh("stat -c %%a /mnt/d/f"); got != "600" {
				t.Errorf("the guest sees mode %q", got)
			}
			w.expect("attrib of a directory", func() { w.tell(api.EventAttrib, "/d", "", true) }, "0 ATTRIB|ISDIR .")

			w.put("d/new", "content")
			w.expect("create", func() { w.tell(api.EventCreate, "/d/new", "", false) }, "0 CREATE new", "0 OPEN new", "0 CLOSE_WRITE new")
			w.put("d/seen", "content")
			w.sh("stat /mnt/d/seen") // before the agent hears of it
			w.expect("create of what the guest has seen", func() { w.tell(api.EventCreate, "/d/seen", "", false) },
				"0 CREATE seen", "0 OPEN seen", "0 CLOSE_WRITE seen")
			if got := w.sh("cat /mnt/d/new /mnt/d/seen"); got != "contentcontent" {
				t.Errorf("the guest reads %q", got)
			}
			w.happened()
			w.check(os.Mkdir(w.path("d/dir"), 0o755))
			w.expect("mkdir", func() { w.tell(api.EventCreate, "/d/dir", "", true) }, "0 CREATE|ISDIR dir")
			w.check(os.Symlink("f", w.path("d/link")))
			w.expect("symlink", func() { w.tell(api.EventCreate, "/d/link", "", false) }, "0 CREATE link")
			w.check(unix.Mkfifo(w.path("d/fifo"), 0o644))
			w.expect("fifo", func() { w.tell(api.EventCreate, "/d/fifo", "", false) }, "0 CREATE fifo")
			w.sh("[ $(readlink /mnt/d/link) = f ]; [ -p /mnt/d/fifo ]; ls /mnt/d | tr '\\n' ' '")

			w.check(os.Rename(w.path("d/new"), w.path("d/renamed")))
			w.expect("rename", func() { w.tell(api.EventRename, "/d/new", "/d/renamed", false) }, "0 MOVED_FROM new", "0 MOVED_TO renamed")
			w.check(os.Rename(w.path("d/renamed"), w.path("e/moved")))
			w.sh("stat /mnt/e/moved >/dev/null") // the guest knows it there already
			w.expect("move", func() { w.tell(api.EventRename, "/d/renamed", "/e/moved", false) }, "0 MOVED_FROM renamed", "2 MOVED_TO moved")
			w.check(os.Rename(w.path("d/dir"), w.path("e/dir")))
			w.expect("move of a directory", func() { w.tell(api.EventRename, "/d/dir", "/e/dir", true) }, "0 MOVED_FROM|ISDIR dir", "2 MOVED_TO|ISDIR dir")
			w.sh("touch /tmp/t; [ -d /mnt/e/dir ]; [ ! -e /mnt/d/dir ]; [ $(cat /mnt/e/moved) = content ]")
			w.happened()
			w.check(os.Rename(w.path("e/dir"), w.path("d/again")))
			w.sh("ls /mnt/d/again")
			w.happened()
			w.expect("move of a directory that is known", func() { w.tell(api.EventRename, "/e/dir", "/d/again", true) },
				"2 MOVED_FROM|ISDIR dir", "0 MOVED_TO|ISDIR again")

			w.check(os.Remove(w.path("d/seen")))
			w.expect("delete", func() { w.tell(api.EventDelete, "/d/seen", "", false) }, "0 DELETE seen")
			w.check(os.Remove(w.path("d/again")))
			w.expect("rmdir", func() { w.tell(api.EventDelete, "/d/again", "", true) }, "0 DELETE|ISDIR again")
			w.expect("delete of what the guest does not know", func() { w.tell(api.EventDelete, "/d/unheard", "", false) }, "0 DELETE unheard")
			w.sh("[ ! -e /mnt/d/seen ]; [ ! -e /mnt/d/again ]; [ ! -e /mnt/d/unheard ]")

			// An editor's way: a new file takes the place of the one that is watched.
			w.put("d/f~", "three")
			w.check(os.Rename(w.path("d/f~"), w.path("d/f")))
			w.expect("replace", func() { w.tell(api.EventRename, "/d/f~", "/d/f", false) },
				"0 MOVED_FROM f~", "0 MOVED_TO f", "1 ATTRIB .", "1 DELETE_SELF .", "1 IGNORED .")
			if got := w.sh("cat /mnt/d/f"); got != "three" {
				t.Errorf("the guest reads %q", got)
			}
			w.sh("sleep 0; cat /tmp/agent; [ ! -s /tmp/agent ]")
		})
	}
}
