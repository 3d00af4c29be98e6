package guest_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
	end   string // the number of the watch on the file that ends what happened says
}

// watchedConfig says what is served and watched.
type watchedConfig struct {
	cache     fuseserver.CachePolicy
	readOnly  bool // of the graft
	writeback bool
	grafts    func(w *watched) []share.Graft // beside the root
	kind      testguest.Kind                 // UML if empty
	agent     string                         // more options
	user      bool                           // run the agent as an ordinary user
	reads     string                         // file to read at each event
	watch     []string                       // below the mount
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
	if cfg.kind == "" {
		cfg.kind = testguest.UML
	}
	g, err := testguest.Boot(w.ctx, testguest.Config{
		Kind: cfg.kind, Kit: kit, Initrd: initrd, Scratch: w.scratch, Serial: theirs,
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
	paths := []string{}
	for _, p := range append(slices.Clone(cfg.watch), "end") {
		paths = append(paths, "/mnt/"+p)
	}
	agent := "exec sluice-agent --mount /mnt --connect stdin " + cfg.agent
	if cfg.user {
		agent = "exec su user -c '" + agent + "'"
	}
	// Some serial ports can be opened only once.
	w.sh(`stty raw -echo -F %[1]s 2>/dev/null || true
		exec 3<>%[1]s
		( %[2]s ) <&3 >/dev/null 2>/tmp/agent 3<&- &
		guestprog watch '%[3]s' %[4]s </dev/null >&3 2>/dev/null 3<&- &`, testguest.SerialDevice(cfg.kind), agent, cfg.reads, strings.Join(paths, ","))
	if line := w.line(); line != "ready" {
		t.Fatalf("the watching program says %q", line)
	}
	w.send(&api.Event{Kind: api.EventHello, Time: time.Now(), Token: w.token})
	return w
}

// serve serves w.share by a server of this process.
func (w *watched) serve(cfg watchedConfig) {
	w.t.Helper()
	w.check(os.WriteFile(w.path("end"), nil, 0o644))
	w.end = strconv.Itoa(len(cfg.watch))
	log := slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	files, err := passthrough.New(passthrough.Config{Dir: w.share})
	w.check(err)
	grafts := []share.Graft{{Path: "/", Backend: files, Policy: share.Policy{ReadOnly: cfg.readOnly}}}
	if cfg.grafts != nil {
		grafts = append(grafts, cfg.grafts(w)...)
	}
	w.s, err = share.New(share.Config{Grafts: grafts, Log: log})
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
	case <-time.After(time.Minute):
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

// contents are what the file that is read at each event held, by event.
func (w *watched) contents(of string) (held []string) {
	w.t.Helper()
	w.tell(api.EventModify, "/end", "", false)
	for {
		line := w.line()
		if strings.HasPrefix(line, w.end+" ") {
			if strings.Contains(line, "MODIFY") {
				return held
			}
			continue
		}
		if what, content, _ := strings.Cut(line, " \""); strings.Contains(what, of) {
			held = append(held, strings.TrimSuffix(content, "\""))
		}
	}
}

// happened returns what has fired in the guest for what was told so far, without the cookies of renames, which it checks.
func (w *watched) happened() (events []string) {
	w.t.Helper()
	w.tell(api.EventModify, "/end", "", false)
	return w.fired()
}

// fired returns what has fired up to the end.
func (w *watched) fired() (events []string) {
	w.t.Helper()
	cookies := map[string][]string{}
	for {
		number, rest, _ := strings.Cut(w.line(), " ")
		what, rest, _ := strings.Cut(rest, " ")
		cookie, rest, _ := strings.Cut(rest, " ")
		name, _, _ := strings.Cut(rest, " ")
		if number == w.end && what == "MODIFY" {
			break
		}
		if number == w.end || name == "end" {
			continue
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
		st.Atim = unix.Timespec{}
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

// look runs a script whose own events are not what the test is about.
func (w *watched) look(script string) string {
	w.t.Helper()
	out := w.sh("%s", script)
	w.happened()
	return out
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
		{"stock kernel", watchedConfig{kind: testguest.QEMU}},
		{"read-only", watchedConfig{readOnly: true}},
		{"never", watchedConfig{cache: fuseserver.CacheNever}},
		{"metadata", watchedConfig{cache: fuseserver.CacheMetadata}},
		{"always", watchedConfig{cache: fuseserver.CacheAlways}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := tt.cfg
			cfg.watch = []string{"d", "d/f", "e", "e/w", "e/wd", "e/mv"}
			w := newWatched(t, cfg, func(w *watched) {
				w.check(os.MkdirAll(w.path("d/sub/deep"), 0o755))
				w.check(os.MkdirAll(w.path("e/wd"), 0o755))
				w.put("e/w", "")
				w.put("e/mv", "")
				w.put("d/f", "one")
				w.put("d/sub/x", "")
			})
			w.look("find /mnt >/dev/null; cat /mnt/d/f")
			fds := func() string { return w.look("ls /proc/$(pidof sluice-agent)/fd | wc -l") }
			before := fds()

			w.put("d/f", "two")
			w.expect("modify", func() { w.tell(api.EventModify, "/d/f", "", false) }, "0 MODIFY f", "1 MODIFY .")
			if got := w.look("cat /mnt/d/f"); got != "two" {
				t.Errorf("the guest reads %q", got)
			}
			w.check(os.Chmod(w.path("d/f"), 0o600))
			w.expect("attrib", func() { w.tell(api.EventAttrib, "/d/f", "", false) }, "0 ATTRIB f", "1 ATTRIB .")
			if got := w.look("stat -c %a /mnt/d/f"); got != "600" {
				t.Errorf("the guest sees mode %q", got)
			}
			w.expect("attrib of a directory", func() { w.tell(api.EventAttrib, "/d", "", true) }, "0 ATTRIB|ISDIR .")

			w.put("d/new", "content")
			w.expect("create", func() { w.tell(api.EventCreate, "/d/new", "", false) }, "0 CREATE new", "0 OPEN new", "0 CLOSE_WRITE new")
			w.put("d/seen", "content")
			w.look("stat /mnt/d/seen") // before the agent hears of it
			w.expect("create of what the guest has seen", func() { w.tell(api.EventCreate, "/d/seen", "", false) },
				"0 CREATE seen", "0 OPEN seen", "0 CLOSE_WRITE seen")
			if got := w.look("cat /mnt/d/new /mnt/d/seen"); got != "contentcontent" {
				t.Errorf("the guest reads %q", got)
			}
			w.check(os.Mkdir(w.path("d/dir"), 0o755))
			w.expect("mkdir", func() { w.tell(api.EventCreate, "/d/dir", "", true) }, "0 CREATE|ISDIR dir")
			w.check(os.Symlink("f", w.path("d/link")))
			w.expect("symlink", func() { w.tell(api.EventCreate, "/d/link", "", false) }, "0 CREATE link")
			w.check(unix.Mkfifo(w.path("d/fifo"), 0o644))
			w.expect("fifo", func() { w.tell(api.EventCreate, "/d/fifo", "", false) }, "0 CREATE fifo")
			w.look("[ $(readlink /mnt/d/link) = f ]; [ -p /mnt/d/fifo ]; ls /mnt/d | tr '\\n' ' '")

			w.check(os.Rename(w.path("d/new"), w.path("d/renamed")))
			w.expect("rename", func() { w.tell(api.EventRename, "/d/new", "/d/renamed", false) }, "0 MOVED_FROM new", "0 MOVED_TO renamed")
			w.check(os.Rename(w.path("d/renamed"), w.path("e/moved")))
			w.look("stat /mnt/e/moved >/dev/null") // the guest knows it there already
			w.expect("move", func() { w.tell(api.EventRename, "/d/renamed", "/e/moved", false) }, "0 MOVED_FROM renamed", "2 MOVED_TO moved")
			w.check(os.Rename(w.path("d/dir"), w.path("e/dir")))
			w.expect("move of a directory", func() { w.tell(api.EventRename, "/d/dir", "/e/dir", true) }, "0 MOVED_FROM|ISDIR dir", "2 MOVED_TO|ISDIR dir")
			w.look("touch /tmp/t; [ -d /mnt/e/dir ]; [ ! -e /mnt/d/dir ]; [ $(cat /mnt/e/moved) = content ]")
			w.check(os.Rename(w.path("e/dir"), w.path("d/again")))
			w.look("cd /mnt/d/again; sleep 1000 >/dev/null 2>&1 &") // and cannot forget it
			w.expect("move of a directory that is known", func() { w.tell(api.EventRename, "/e/dir", "/d/again", true) },
				"2 MOVED_FROM|ISDIR dir", "0 MOVED_TO|ISDIR again")

			w.check(os.Remove(w.path("d/seen")))
			w.expect("delete", func() { w.tell(api.EventDelete, "/d/seen", "", false) }, "0 DELETE seen")
			w.check(os.Remove(w.path("d/again")))
			w.expect("rmdir", func() { w.tell(api.EventDelete, "/d/again", "", true) }, "0 DELETE|ISDIR again")
			w.expect("delete of what the guest does not know", func() { w.tell(api.EventDelete, "/d/unheard", "", false) }, "0 DELETE unheard")
			w.look("[ ! -e /mnt/d/seen ]; [ ! -e /mnt/d/again ]; [ ! -e /mnt/d/unheard ]")

			w.check(os.Remove(w.path("e/w")))
			w.check(os.Remove(w.path("e/wd")))
			w.look("sleep 1.1") // what the guest knows holds no more
			w.expect("delete of what is watched", func() { w.tell(api.EventDelete, "/e/w", "", false) },
				"3 ATTRIB .", "3 DELETE_SELF .", "3 IGNORED .", "2 DELETE w")
			w.expect("rmdir of what is watched", func() { w.tell(api.EventDelete, "/e/wd", "", true) },
				"4 DELETE_SELF .", "4 IGNORED .", "2 DELETE|ISDIR wd")

			w.check(os.Rename(w.path("e/mv"), w.path("d/mv")))
			w.expect("move of what is watched", func() { w.tell(api.EventRename, "/e/mv", "/d/mv", false) },
				"2 MOVED_FROM mv", "0 MOVED_TO mv", "5 MOVE_SELF .")

			// An editor's way: a new file takes the place of the one that is watched.
			w.put("d/f~", "three")
			w.check(os.Rename(w.path("d/f~"), w.path("d/f")))
			w.expect("replace", func() { w.tell(api.EventRename, "/d/f~", "/d/f", false) },
				"0 MOVED_FROM f~", "0 MOVED_TO f", "1 ATTRIB .", "1 DELETE_SELF .", "1 IGNORED .")
			if got := w.look("cat /mnt/d/f"); got != "three" {
				t.Errorf("the guest reads %q", got)
			}
			if got := w.sh("cat /tmp/agent"); got != "" {
				t.Errorf("the agent complains: %s", got)
			}
			if after := fds(); after != before {
				t.Errorf("the agent has %s descriptors, and had %s", after, before)
			}
		})
	}
}

// TestInotifyContent has the guest read a file at each event of it: what it reads must be the new content whatever it has cached,
// even if neither the size nor the time of the last change is another.
func TestInotifyContent(t *testing.T) {
	t.Parallel()
	for _, cache := range []fuseserver.CachePolicy{fuseserver.CacheAuto, fuseserver.CacheNever, fuseserver.CacheMetadata, fuseserver.CacheAlways} {
		t.Run(cache.String(), func(t *testing.T) {
			w := newWatched(t, watchedConfig{cache: cache, reads: "/mnt/d/f", watch: []string{"d"}}, func(w *watched) {
				w.check(os.Mkdir(w.path("d"), 0o755))
				w.put("d/f", "0000")
			})
			same := time.Unix(1_700_000_000, 0)
			w.check(os.Chtimes(w.path("d/f"), same, same))
			for i := range 5 {
				content := strings.Repeat(strconv.Itoa(i+1), 4)
				if got := w.sh("cat /mnt/d/f"); len(got) != 4 {
					t.Fatalf("the guest reads %q", got)
				}
				w.put("d/f", content)
				w.check(os.Chtimes(w.path("d/f"), same, same))
				w.tell(api.EventModify, "/d/f", "", false)
				if got := w.contents("MODIFY 0 f"); !slices.Equal(got, []string{content}) {
					t.Errorf("at the event the guest reads %q, want %q", got, content)
				}
			}
			if got := w.sh("stat -c %%Y.%%y /mnt/d/f"); !strings.HasPrefix(got, "1700000000.") || !strings.Contains(got, ".000000000") {
				t.Errorf("the guest sees the time %s", got)
			}
		})
	}
}

// TestInotifyKubelet updates a volume as the kubelet does (atomic_writer.go): the rename of ..data is seen when what it leads to is
// there, and a key that is gone is gone (C10, C12).
func TestInotifyKubelet(t *testing.T) {
	t.Parallel()
	for _, cache := range []fuseserver.CachePolicy{fuseserver.CacheAuto, fuseserver.CacheAlways} {
		t.Run(cache.String(), func(t *testing.T) {
			w := newWatched(t, watchedConfig{cache: cache, readOnly: true, reads: "/mnt/v/key", watch: []string{"v"}}, func(w *watched) {
				w.check(os.MkdirAll(w.path("v/..1"), 0o755))
				w.put("v/..1/key", "old")
				w.put("v/..1/going", "")
				w.check(os.Symlink("..1", w.path("v/..data")))
				w.check(os.Symlink("..data/key", w.path("v/key")))
				w.check(os.Symlink("..data/going", w.path("v/going")))
			})
			if got := w.look("cd /mnt/v; cat key going; ls -lR . >/dev/null"); got != "old" {
				t.Fatalf("the guest reads %q", got)
			}
			w.check(os.Mkdir(w.path("v/..2"), 0o755))
			w.put("v/..2/key", "new")
			w.check(os.Symlink("..2", w.path("v/..data_tmp")))
			w.check(os.Rename(w.path("v/..data_tmp"), w.path("v/..data")))
			w.check(os.Remove(w.path("v/going")))
			w.check(os.RemoveAll(w.path("v/..1")))
			before := w.states()
			w.tell(api.EventCreate, "/v/..2", "", true)
			w.tell(api.EventCreate, "/v/..2/key", "", false)
			w.tell(api.EventCreate, "/v/..data_tmp", "", false)
			w.tell(api.EventRename, "/v/..data_tmp", "/v/..data", false)
			w.tell(api.EventDelete, "/v/going", "", false)
			w.tell(api.EventDelete, "/v/..1/key", "", false)
			w.tell(api.EventDelete, "/v/..1/going", "", false)
			w.tell(api.EventDelete, "/v/..1", "", true)
			if got := w.contents("MOVED_TO"); !slices.Equal(got, []string{"new"}) {
				t.Errorf("at MOVED_TO the guest reads %q", got)
			}
			if got := w.look("cd /mnt/v; cat key; ls -A | sort | tr '\\n' ' '; [ ! -e going ]; [ ! -e ..1 ]"); got != "new..2 ..data key " {
				t.Errorf("the guest has %q", got)
			}
			if after := w.states(); !maps.Equal(before, after) {
				t.Errorf("the host had\n%v\nand has\n%v", before, after)
			}
		})
	}
}

// TestInotifyRescan loses events: what has changed since is told of, and what has not is not.
func TestInotifyRescan(t *testing.T) {
	t.Parallel()
	w := newWatched(t, watchedConfig{watch: []string{"d", "d/sub", "old"}}, func(w *watched) {
		w.check(os.MkdirAll(w.path("d/sub"), 0o755))
		w.check(os.Mkdir(w.path("old"), 0o755))
		for _, name := range []string{"d/a", "d/sub/b", "d/sub/c"} {
			w.put(name, "")
		}
	})
	w.happened()
	count := func(events []string, what string) (n int) {
		for _, e := range events {
			if e == what {
				n++
			}
		}
		return n
	}
	before := w.states()
	w.tell(api.EventRescan, "/d", "", true)
	events := w.happened()
	for _, want := range []string{"0 MODIFY a", "1 MODIFY b", "1 MODIFY c", "0 ATTRIB|ISDIR sub", "1 ATTRIB|ISDIR ."} {
		if count(events, want) == 0 {
			t.Errorf("%s does not fire: %q", want, events)
		}
	}
	if after := w.states(); !maps.Equal(before, after) {
		t.Errorf("the host had\n%v\nand has\n%v", before, after)
	}
	// From here on the time of the last event is what the host's clock says: nothing has changed for longer than the slack.
	w.id++
	w.s.Announce(share.ReplayEvent{ID: w.id, Kind: share.ReplayModify, Path: "/end"})
	w.send(&api.Event{ID: w.id, Time: time.Now().Add(time.Hour), Kind: api.EventModify, Path: "/end"})
	w.tell(api.EventRescan, "/d", "", true)
	for _, e := range w.happened() {
		if strings.Contains(e, "MODIFY") || strings.Contains(e, "ATTRIB") {
			t.Errorf("%s fires for what has not changed", e)
		}
	}
}

// TestInotifyOptions has more fire, and less where the guest writes back its cache.
func TestInotifyOptions(t *testing.T) {
	t.Parallel()
	prepare := func(w *watched) {
		w.check(os.Mkdir(w.path("d"), 0o777))
		w.check(os.Chmod(w.path("d"), 0o777))
		w.put("d/f", "one")
	}
	t.Run("close-write", func(t *testing.T) {
		w := newWatched(t, watchedConfig{agent: "--close-write", watch: []string{"d"}, readOnly: true}, prepare)
		w.happened()
		w.put("d/f", "two")
		w.expect("modify", func() { w.tell(api.EventModify, "/d/f", "", false) }, "0 OPEN f", "0 MODIFY f", "0 CLOSE_WRITE f")
	})
	t.Run("writeback", func(t *testing.T) {
		w := newWatched(t, watchedConfig{agent: "--close-write", watch: []string{"d"}, writeback: true}, prepare)
		w.look("cat /mnt/d/f")
		w.put("d/f", "longer")
		w.expect("modify", func() { w.tell(api.EventModify, "/d/f", "", false) }, "0 MODIFY f")
		if got := w.look("cat /mnt/d/f"); got != "longer" {
			t.Errorf("the guest reads %q", got)
		}
		w.put("d/new", "x")
		w.expect("create", func() { w.tell(api.EventCreate, "/d/new", "", false) }, "0 CREATE new")
	})
	t.Run("ordinary user", func(t *testing.T) {
		w := newWatched(t, watchedConfig{user: true, watch: []string{"d"}}, prepare)
		w.check(os.Chmod(w.path("end"), 0o666))
		w.sh("cat /mnt/end")
		w.put("d/new", "x")
		w.expect("create", func() { w.tell(api.EventCreate, "/d/new", "", false) }, "0 CREATE new", "0 OPEN new", "0 CLOSE_WRITE new")
		w.expect("modify of another's file", func() { w.tell(api.EventModify, "/d/new", "", false) })
		w.check(os.Remove(w.path("d/new")))
		w.expect("delete", func() { w.tell(api.EventDelete, "/d/new", "", false) }, "0 DELETE new")
		if got := w.sh("cat /tmp/agent"); !strings.Contains(got, "replay modify of /d/new: permission denied") {
			t.Errorf("the agent says %q", got)
		}
	})
}

// TestInotifyStale tells of what has not happened, or is no longer so: no file of the host is harmed.
func TestInotifyStale(t *testing.T) {
	t.Parallel()
	w := newWatched(t, watchedConfig{watch: []string{"d"}}, func(w *watched) {
		w.check(os.MkdirAll(w.path("d/dir/below"), 0o755))
		w.put("d/f", "kept")
		w.put("d/g", "kept, too")
	})
	w.look("ls -lR /mnt; cat /mnt/d/f")
	before := w.states()
	for _, e := range []struct {
		kind, path, to string
		dir            bool
	}{
		{api.EventDelete, "/d/f", "", false},
		{api.EventRename, "/d/f", "/d/g", false},
		{api.EventRename, "/d/g", "/d/h", false},
		{api.EventDelete, "/d/dir", "", true},
		{api.EventRename, "/d/dir", "/d/f", true},
		{api.EventCreate, "/d/nothing", "", false},
		{api.EventCreate, "/nowhere/f", "", false},
		{api.EventModify, "/d/dir", "", false},
		{api.EventModify, "/d/nothing", "", false},
		{api.EventDelete, "/d/g", "", true},
		{api.EventCreate, "/d/g", "", true},
	} {
		w.tell(e.kind, e.path, e.to, e.dir)
		w.happened()
	}
	// An event that the server has never heard of, and one with a token that it does not know.
	w.send(&api.Event{ID: w.id + 1000, Time: time.Unix(1, 0), Kind: api.EventDelete, Path: "/d/f"})
	// It does so when nothing else is waiting, and what it looks at is the end, too.
	if got := slices.Concat(w.happened(), w.happened(), w.happened()); !slices.Contains(got, "0 MODIFY f") || !slices.Contains(got, "0 MODIFY g") {
		t.Errorf("the agent does not look at everything after an event that the server has forgotten: %q", got)
	}
	token := w.token
	w.send(&api.Event{Kind: api.EventHello, Token: strings.Repeat("0", 32)})
	w.send(&api.Event{ID: w.id, Kind: api.EventDelete, Path: "/d/f"})
	w.send(&api.Event{Kind: api.EventHello, Token: token})
	w.happened()
	if after := w.states(); !maps.Equal(before, after) {
		t.Errorf("the host had\n%v\nand has\n%v", before, after)
	}
	w.sh("sleep 1.1") // the guest's own mistakes last as long as its cache
	if got := w.look("cat /mnt/d/f; cat /mnt/d/g; ls /mnt/d/dir"); got != "keptkept, too"+"below" {
		t.Errorf("the guest has %q", got)
	}
}

// TestInotifyLatency measures from before the host's change to after the event has come back from the guest.
func TestInotifyLatency(t *testing.T) {
	t.Parallel()
	w := newWatched(t, watchedConfig{watch: []string{"d"}}, func(w *watched) {
		w.check(os.Mkdir(w.path("d"), 0o755))
		w.put("d/f", "")
	})
	w.happened()
	until := func(what string) {
		t.Helper()
		for !strings.Contains(w.line(), what) {
		}
	}
	took := map[string][]time.Duration{}
	for i := range 40 {
		name := fmt.Sprint("n", i)
		for _, step := range []struct {
			kind, path, to, until string
			change                func()
		}{
			{api.EventModify, "/d/f", "", " MODIFY 0 f ", func() { w.put("d/f", strings.Repeat("x", i)) }},
			{api.EventCreate, "/d/" + name, "", " CLOSE_WRITE 0 " + name + " ", func() { w.put("d/"+name, "x") }},
			{api.EventRename, "/d/" + name, "/d/r", " r ", func() { w.check(os.Rename(w.path("d/"+name), w.path("d/r"))) }},
			{api.EventDelete, "/d/r", "", " DELETE 0 r ", func() { w.check(os.Remove(w.path("d/r"))) }},
		} {
			begun := time.Now()
			step.change()
			w.tell(step.kind, step.path, step.to, false)
			until(step.until)
			took[step.kind] = append(took[step.kind], time.Since(begun))
		}
	}
	for kind, times := range took {
		slices.Sort(times)
		median := times[len(times)/2]
		t.Logf("%s: median %v, longest %v", kind, median, times[len(times)-1])
		if median > latencyLimit() {
			t.Errorf("%s takes %v, want at most %v", kind, median, latencyLimit())
		}
	}
}

// TestInotifyGrafts changes files in grafts: a directory, which is a mount of its own to the guest, and a single file.
func TestInotifyGrafts(t *testing.T) {
	t.Parallel()
	elsewhere := func(w *watched, name string) string { return filepath.Join(w.scratch, "elsewhere", name) }
	passes := func(w *watched) *passthrough.FS {
		files, err := passthrough.New(passthrough.Config{Dir: filepath.Join(w.scratch, "elsewhere")})
		w.check(err)
		return files
	}
	w := newWatched(t, watchedConfig{
		watch: []string{"g/.", "g/f", "single", "."}, // only what leads into it makes the kernel mount a graft
		grafts: func(w *watched) []share.Graft {
			return []share.Graft{
				{Path: "/g", Backend: passes(w), Policy: share.Policy{ReadOnly: true}},
				{Path: "/single", Backend: passes(w), File: "f", Policy: share.Policy{ReadOnly: true}},
			}
		},
	}, func(w *watched) {
		w.check(os.Mkdir(elsewhere(w, ""), 0o755))
		w.check(os.WriteFile(elsewhere(w, "f"), []byte("one"), 0o644))
	})
	if got := w.look("cat /mnt/g/f /mnt/single"); got != "oneone" {
		t.Fatalf("the guest reads %q", got)
	}
	w.check(os.WriteFile(elsewhere(w, "f"), []byte("two"), 0o644))
	w.expect("modify in a graft", func() { w.tell(api.EventModify, "/g/f", "", false) }, "0 MODIFY f", "1 MODIFY .")
	w.expect("modify of a graft", func() { w.tell(api.EventModify, "/single", "", false) }, "3 MODIFY single", "2 MODIFY .")
	if got := w.look("cat /mnt/g/f /mnt/single"); got != "twotwo" {
		t.Errorf("the guest reads %q", got)
	}
	w.check(os.WriteFile(elsewhere(w, "new"), nil, 0o644))
	w.expect("create in a graft", func() { w.tell(api.EventCreate, "/g/new", "", false) }, "0 CREATE new", "0 OPEN new", "0 CLOSE_WRITE new")
	// The single file is replaced: its graft follows the name, and who watches it must hear that it is another.
	w.check(os.WriteFile(elsewhere(w, "f~"), []byte("three"), 0o644))
	w.check(os.Rename(elsewhere(w, "f~"), elsewhere(w, "f")))
	w.expect("a graft that is replaced", func() {
		w.tell(api.EventDelete, "/single", "", false)
		w.tell(api.EventCreate, "/single", "", false)
	}, "2 ATTRIB .", "2 DELETE_SELF .", "2 IGNORED .", "3 DELETE single", "3 CREATE single", "3 OPEN single", "3 CLOSE_WRITE single")
	if got := w.look("cat /mnt/single"); got != "three" {
		t.Errorf("the guest reads %q", got)
	}
	if got := w.sh("cat /tmp/agent"); got != "" {
		t.Errorf("the agent complains: %s", got)
	}
}

// TestInotifyStorm has the host change names faster than the agent can tell of it, and the same in a tree that nobody serves: in
// the end both are the same, and so is what the guest sees.
func TestInotifyStorm(t *testing.T) {
	t.Parallel()
	w := newWatched(t, watchedConfig{kind: testguest.QEMU, watch: []string{"d", "d/0", "d/1"}}, func(w *watched) {
		for _, dir := range []string{"d/0", "d/1"} {
			w.check(os.MkdirAll(w.path(dir), 0o755))
		}
	})
	w.look("ls -lR /mnt")
	model := filepath.Join(w.scratch, "model")
	w.check(os.MkdirAll(filepath.Join(model, "0"), 0o755))
	w.check(os.MkdirAll(filepath.Join(model, "1"), 0o755))
	rnd := rand.New(rand.NewPCG(3, 4))
	rounds := size{400, 4000}
	for i := range rounds.n() {
		name := func() string { return fmt.Sprintf("%d/%d", rnd.IntN(2), rnd.IntN(6)) }
		a, b := name(), name()
		at := func(tree, name string) string { return filepath.Join(tree, name) }
		info, err := os.Lstat(at(model, a))
		isDir := err == nil && info.IsDir()
		change := func(f func(tree string) error) (done bool) {
			err := f(model)
			if other := f(w.path("d")); (err == nil) != (other == nil) {
				t.Fatalf("change %d of %s: %v, and %v where nobody serves it", i, a, other, err)
			}
			return err == nil
		}
		switch n := rnd.IntN(10); {
		case err != nil && n < 8:
			if change(func(tree string) error { return os.WriteFile(at(tree, a), fmt.Append(nil, i), 0o644) }) {
				w.tell(api.EventCreate, "/d/"+a, "", false)
			}
		case err != nil:
			if change(func(tree string) error { return os.Mkdir(at(tree, a), 0o755) }) {
				w.tell(api.EventCreate, "/d/"+a, "", true)
			}
		case n < 3:
			if change(func(tree string) error { return os.Remove(at(tree, a)) }) {
				w.tell(api.EventDelete, "/d/"+a, "", isDir)
			}
		case n < 7:
			if a != b && change(func(tree string) error { return os.Rename(at(tree, a), at(tree, b)) }) {
				w.tell(api.EventRename, "/d/"+a, "/d/"+b, isDir)
			}
		case !isDir:
			if change(func(tree string) error { return os.WriteFile(at(tree, a), bytes.Repeat(fmt.Append(nil, i), n), 0o644) }) {
				w.tell(api.EventModify, "/d/"+a, "", false)
			}
		}
		if i%40 == 0 {
			w.sh("cat $(find /mnt/d -type f) >/dev/null || true") // so that there is something to be mistaken about
		}
	}
	w.happened()
	want := digest(t, model)
	if got := digest(t, w.path("d")); got != want {
		t.Errorf("the host has %s, want %s", got, want)
	}
	w.sh("sleep 1.1") // the guest's cache holds no longer
	if got := w.sh("guestprog sum /mnt/d"); got != want {
		t.Errorf("the guest has %s, want %s", got, want)
	}
	if got := w.sh("cat /tmp/agent"); got != "" {
		t.Errorf("the agent complains: %s", got)
	}
}
