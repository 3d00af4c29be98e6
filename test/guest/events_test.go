package guest_test

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/test/guest/model"
)

// events are a daemon that watches and a guest whose agent hears of it over vsock. The directory of the host that a machine serves is
// grafted at /g; what the test watches in the guest it hears of over a serial line.
type events struct {
	*watched
	control *client.Client
	vsock   *testguest.Vsock
	config  string
}

// eventsConfig says what is served and watched.
type eventsConfig struct {
	kind    testguest.Kind
	reads   string   // a file to read at each event
	watch   []string // below the mount; nil is nothing
	model   bool     // have guestprog keep a model of /g instead
	user    bool     // run the agent as an ordinary user
	noAgent bool
	early   bool // start the agent before anything is watched
}

// eventsPort is the port of the host that guests connect to.
const eventsPort = 1024

// newEvents has all that running. prepare makes files of the host.
func newEvents(t *testing.T, cfg eventsConfig, prepare func(e *events)) *events {
	t.Helper()
	e := &events{watched: &watched{machine: newScratch(t), lines: make(chan string, 1<<18)}}
	e.put("end", "")
	prepare(e)
	e.vsock = e.machine.vsock()
	e.config = filepath.Join(e.scratch, "sluiced.toml")
	e.check(os.WriteFile(e.config, fmt.Appendf(nil, `control-socket = %q
[[hybrid-vsock]]
path = %q
port = %d
allow = ["getHealth", "getEvents"]
shares = [%q]
[[share]]
tag = "other"
[[share]]
tag = %q
socket = %q
`, filepath.Join(e.scratch, "control.sock"), e.vsock.Path(), eventsPort, testguest.Tag, testguest.Tag, filepath.Join(e.scratch, "fs.sock")), 0o644))
	e.run()
	var err error
	e.control, err = client.New(client.Config{Socket: filepath.Join(e.scratch, "control.sock")})
	e.check(err)
	t.Cleanup(func() { e.control.Close() })

	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	e.check(err)
	theirs := os.NewFile(uintptr(fds[1]), "serial")
	defer theirs.Close()
	e.check(unix.SetNonblock(fds[0], true)) // so that Close ends a Read
	e.tty = os.NewFile(uintptr(fds[0]), "serial")
	var reading sync.WaitGroup
	reading.Go(func() {
		defer close(e.lines)
		for in := bufio.NewScanner(e.tty); in.Scan(); {
			e.lines <- in.Text()
		}
	})
	t.Cleanup(func() {
		if e.guest != nil {
			if t.Failed() {
				log, _ := e.trySh("cat /tmp/agent")
				t.Logf("agent:\n%s", log)
			}
			e.guest.Close()
		}
		e.tty.Close()
		reading.Wait()
	})
	if cfg.kind == "" {
		cfg.kind = testguest.UML
	}
	e.boot(testguest.Config{Kind: cfg.kind, Vsock: e.vsock, Serial: theirs})
	if cfg.early {
		e.startAgent(cfg)
	}
	e.graft(api.GraftSpec{Path: "/g", Source: e.machine.share, Watch: true})
	if !cfg.noAgent && !cfg.early {
		e.startAgent(cfg)
	}
	program := "guestprog model /mnt/g end"
	if !cfg.model {
		paths := []string{}
		for _, p := range append(slices.Clone(cfg.watch), "g/end") {
			paths = append(paths, "/mnt/"+p)
		}
		e.end = strconv.Itoa(len(cfg.watch))
		program = fmt.Sprintf("guestprog watch '%s' %s", cfg.reads, strings.Join(paths, ","))
	}
	e.sh("stty raw -echo -F %[1]s 2>/dev/null || true; %[2]s </dev/null >%[1]s 2>/tmp/watch &", testguest.SerialDevice(cfg.kind), program)
	if line := e.line(); line != "ready" {
		t.Fatalf("the watching program says %q", line)
	}
	return e
}

// run starts the daemon.
func (e *events) run() {
	e.t.Helper()
	e.check(e.start(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{"--config", e.config}}))
}

func (e *events) graft(g api.GraftSpec) {
	e.t.Helper()
	_, err := e.control.AddGraft(e.ctx, testguest.Tag, g, false)
	e.check(err)
}

// startAgent starts the agent and waits until it hears of what happens.
func (e *events) startAgent(cfg eventsConfig) {
	e.t.Helper()
	command := fmt.Sprintf("exec sluice-agent --mount /mnt --connect vsock:%d:%d --state /tmp/state/agent", testguest.VsockHost, eventsPort)
	if cfg.user {
		command = "exec su user -c '" + command + "'"
	}
	e.sh(`mkdir -p /tmp/state; chmod 777 /tmp/state; rm -f /tmp/state/agent
		( %s ) </dev/null >>/tmp/agent 2>&1 &
		until [ -s /tmp/state/agent ]; do sleep 0.05; done`, command)
}

// happened returns what has fired for what the host has done in /g so far.
func (e *events) happened() []string {
	e.t.Helper()
	e.put("end", "x")
	return e.fired()
}

// do has the host do something, and looks at what fires for it, and that the host's files are as it has left them.
func (e *events) do(what string, change func(), want ...string) {
	e.t.Helper()
	change()
	before := e.states()
	if got := e.happened(); !slices.Equal(got, want) {
		e.t.Errorf("%s: fires %q, want %q", what, got, want)
	}
	after := e.states()
	delete(before, "/end")
	delete(after, "/end")
	if !maps.Equal(before, after) {
		e.t.Errorf("%s: the host had\n%v\nand has\n%v", what, before, after)
	}
}

// look runs a script whose own events are not what the test is about.
func (e *events) look(script string) string {
	e.t.Helper()
	out := e.sh("%s", script)
	e.happened()
	return out
}

// await reads what fires until all of want have, in this order.
func (e *events) await(want ...string) {
	e.t.Helper()
	for len(want) > 0 {
		if e.next() == want[0] {
			want = want[1:]
		}
	}
}

// next is what fires next: watch, event and name.
func (e *events) next() string {
	e.t.Helper()
	f := strings.Fields(e.line())
	return strings.Join([]string{f[0], f[1], f[3]}, " ")
}

// agentSays fails the test if the agent has said anything.
func (e *events) agentSays() {
	e.t.Helper()
	if got := e.sh("cat /tmp/agent"); got != "" {
		e.t.Errorf("the agent complains: %s", got)
	}
}

// TestEvents has the host change files in grafts that were made while the guest ran, and looks at what inotify says in the guest.
func TestEvents(t *testing.T) {
	eachKind(t, func(t *testing.T, kind testguest.Kind) {
		elsewhere := func(e *events, name string) string { return filepath.Join(e.scratch, "elsewhere", name) }
		e := newEvents(t, eventsConfig{kind: kind, watch: []string{"g/d", "g/d/f", "g/e", "g/e/w"}}, func(e *events) {
			e.check(os.MkdirAll(e.path("d/sub"), 0o755))
			e.check(os.Mkdir(e.path("e"), 0o755))
			e.put("e/w", "")
			e.put("d/f", "one")
			e.check(os.Mkdir(elsewhere(e, ""), 0o755))
			e.check(os.WriteFile(elsewhere(e, "f"), []byte("one"), 0o644))
		})
		e.look("find /mnt >/dev/null; cat /mnt/g/d/f")
		e.do("modify", func() { e.put("d/f", "two") }, "0 MODIFY f", "1 MODIFY .")
		if got := e.look("cat /mnt/g/d/f"); got != "two" {
			t.Errorf("the guest reads %q", got)
		}
		e.do("attrib", func() { e.check(os.Chmod(e.path("d/f"), 0o600)) }, "0 ATTRIB f", "1 ATTRIB .")
		e.do("create", func() { e.put("d/new", "content") }, "0 CREATE new", "0 OPEN new", "0 CLOSE_WRITE new")
		e.do("mkdir", func() { e.check(os.Mkdir(e.path("d/dir"), 0o755)) }, "0 CREATE|ISDIR dir")
		e.do("symlink", func() { e.check(os.Symlink("f", e.path("d/link"))) }, "0 CREATE link")
		e.do("rename", func() { e.check(os.Rename(e.path("d/new"), e.path("d/renamed"))) }, "0 MOVED_FROM new", "0 MOVED_TO renamed")
		e.do("move", func() { e.check(os.Rename(e.path("d/renamed"), e.path("e/moved"))) }, "0 MOVED_FROM renamed", "2 MOVED_TO moved")
		e.do("move of a directory", func() { e.check(os.Rename(e.path("d/dir"), e.path("e/dir"))) }, "0 MOVED_FROM|ISDIR dir", "2 MOVED_TO|ISDIR dir")
		e.do("create in a directory that was made and moved", func() { e.put("e/dir/x", "") })
		e.look("[ $(cat /mnt/g/e/moved) = content ]; [ -f /mnt/g/e/dir/x ]; [ $(readlink /mnt/g/d/link) = f ]")
		e.do("delete", func() { e.check(os.Remove(e.path("e/moved"))) }, "2 DELETE moved")
		e.do("delete of what is watched", func() { e.check(os.Remove(e.path("e/w"))) },
			"3 ATTRIB .", "3 DELETE_SELF .", "3 IGNORED .", "2 DELETE w")
		e.do("replace", func() {
			e.put("d/f~", "three")
			e.happened()
			e.check(os.Rename(e.path("d/f~"), e.path("d/f")))
		}, "0 MOVED_FROM f~", "0 MOVED_TO f", "1 ATTRIB .", "1 DELETE_SELF .", "1 IGNORED .")
		if got := e.look("cat /mnt/g/d/f"); got != "three" {
			t.Errorf("the guest reads %q", got)
		}

		// The guest's own doings come back as the host's events, and must not be told of again.
		e.sh(`cd /mnt/g/d
			echo a >own; echo b >>own; mv own moved; chmod 600 moved; mv f f~; echo again >f; rm f~; rm moved
			mkdir dir; touch dir/x; rm -r dir; ln f hard; rm hard; ln -s f soft; rm soft; echo c >kept`)
		fired := e.happened()
		for _, twice := range []string{"0 CREATE own", "0 MOVED_FROM own", "0 MOVED_TO moved", "0 CREATE f", "0 DELETE f~", "0 DELETE moved", "0 CREATE|ISDIR dir", "0 DELETE|ISDIR dir", "0 CREATE soft", "0 CREATE kept", "0 MODIFY kept"} {
			n := 0
			for _, event := range fired {
				if event == twice {
					n++
				}
			}
			if n != 1 {
				t.Errorf("of what the guest has done itself %q fires %d times: %q", twice, n, fired)
			}
		}
		const many = 200
		e.sh("cd /mnt/g/e; for i in $(seq %d); do echo $i >n$i; done; for i in $(seq %[1]d); do echo x >>n$i; done; rm n*", many)
		count := map[string]int{}
		for _, event := range e.happened() {
			if f := strings.Fields(event); f[0] == "2" {
				count[f[1]]++
			}
		}
		t.Logf("%d files made, written to and removed by the guest: %v", many, count)
		if count["CREATE"] != many || count["DELETE"] != many || count["MODIFY"] > 2*many+many/4 {
			t.Errorf("%d files made, written to and removed by the guest fire %v", many, count)
		}
		e.do("modify after the guest", func() { e.put("d/kept", "host") }, "0 MODIFY kept")
		e.agentSays()
		e.single(elsewhere)
		if kind == testguest.UML {
			e.latency(100)
		} else {
			e.latency(20)
		}
	})
}

// single grafts a single file, which the host changes and replaces.
func (e *events) single(elsewhere func(e *events, name string) string) {
	e.t.Helper()
	e.graft(api.GraftSpec{Path: "/single", Source: elsewhere(e, "f"), Watch: true})
	e.sh("cat /mnt/single >/dev/null; guestprog watch '' /mnt/single,/mnt/. </dev/null >/tmp/single 2>&1 & until grep -q ready /tmp/single; do sleep 0.05; done")
	wait := func(what string) string {
		return e.sh("until grep -q '%s' /tmp/single; do sleep 0.05; done; cat /tmp/single; cat /mnt/single", what)
	}
	e.check(os.WriteFile(elsewhere(e, "f"), []byte("two"), 0o644))
	if got := wait("MODIFY 0 single"); !strings.HasSuffix(got, "two") || !strings.Contains(got, "0 MODIFY 0 .") {
		e.t.Errorf("modify of a single file: %q", got)
	}
	e.check(os.WriteFile(elsewhere(e, "f~"), []byte("three"), 0o644))
	e.check(os.Rename(elsewhere(e, "f~"), elsewhere(e, "f")))
	if got := wait("CREATE 0 single"); !strings.HasSuffix(got, "three") || !strings.Contains(got, "0 DELETE_SELF 0 .") {
		e.t.Errorf("replace of a single file: %q", got)
	}
	e.check(os.Remove(elsewhere(e, "f")))
	e.sh("until tail -n 1 /tmp/single | grep -q 'DELETE 0 single'; do sleep 0.05; done")
}

// latencyLimit is how long the median change may take to be heard of. Where other things run it says only that nothing waits for a timer.
func latencyLimit() time.Duration {
	if full() {
		return 100 * time.Millisecond
	}
	return 5 * time.Second
}

// latency measures from before the host's change to after the watcher's answer.
func (e *events) latency(n int) {
	e.t.Helper()
	times := []time.Duration{}
	for i := range n {
		begun := time.Now()
		e.put("d/f", strconv.Itoa(i))
		for !strings.Contains(e.line(), "0 MODIFY 0 f ") {
		}
		times = append(times, time.Since(begun))
	}
	slices.Sort(times)
	median, p99 := times[n/2], times[min(n-1, n*99/100)]
	e.t.Logf("from the host's change to the guest's watcher: median %v, 99th percentile %v", median, p99)
	if median > latencyLimit() {
		e.t.Errorf("a change takes %v (median) to be heard of, want less than %v", median, latencyLimit())
	}
}

// TestEventsKubelet updates a volume as kubelet's atomic writer does, and one with more files than are watched.
func TestEventsKubelet(t *testing.T) {
	t.Parallel()
	few := func(e *events, name string) string { return filepath.Join(e.scratch, "few", name) }
	e := newEvents(t, eventsConfig{watch: []string{"g/v"}, reads: "/mnt/g/v/key"}, func(e *events) {
		e.check(os.MkdirAll(e.path("v/..0"), 0o755))
		e.put("v/..0/key", "0")
		e.check(os.Symlink("..0", e.path("v/..data")))
		e.check(os.Symlink("..data/key", e.path("v/key")))
		e.check(os.Mkdir(few(e, ""), 0o755))
		for i := range 9 {
			e.check(os.WriteFile(few(e, fmt.Sprint("f", i)), []byte("old"), 0o644))
		}
	})
	const rounds = 20
	for i := 1; i <= rounds; i++ {
		name := func(n int) string { return fmt.Sprint("v/..", n) }
		e.check(os.Mkdir(e.path(name(i)), 0o755))
		e.put(name(i)+"/key", strconv.Itoa(i))
		e.put(fmt.Sprintf("%s/new%d", name(i), i), "")
		e.check(os.Symlink(fmt.Sprint("..", i), e.path("v/..data_tmp")))
		e.check(os.Rename(e.path("v/..data_tmp"), e.path("v/..data")))
		e.check(os.Symlink(fmt.Sprintf("..data/new%d", i), e.path(fmt.Sprintf("v/new%d", i))))
		if i > 1 {
			e.check(os.Remove(e.path(fmt.Sprintf("v/new%d", i-1))))
		}
		e.check(os.RemoveAll(e.path(name(i - 1))))
		moved := ""
		for moved == "" {
			if line := e.line(); strings.Contains(line, " MOVED_TO ") {
				if !strings.Contains(line, " ..data ") {
					t.Fatalf("what moves is %q", line)
				}
				moved = line
			}
		}
		if !strings.HasSuffix(moved, strconv.Quote(strconv.Itoa(i))) {
			t.Errorf("update %d: at IN_MOVED_TO the guest reads: %s", i, moved)
		}
		e.put("end", "")
		for !strings.HasPrefix(e.line(), "1 MODIFY") {
		}
		if got := e.sh("cd /mnt/g/v; cat key new%d; ls -A | sort | tr '\\n' ' '; ! cat new%d 2>/dev/null", i, i-1); got != fmt.Sprintf("%d..%d ..data key new%d ", i, i, i) {
			t.Errorf("update %d: the guest has %q", i, got)
		}
	}
	e.agentSays()

	e.graft(api.GraftSpec{Path: "/few", Source: few(e, ""), Watch: true, WatchMaxFiles: 8})
	e.sh("cd /mnt/few; cat f*; guestprog watch '' /mnt/few/. </dev/null >/tmp/few 2>&1 & until grep -q ready /tmp/few; do sleep 0.05; done")
	for i := range 9 {
		e.check(os.WriteFile(few(e, fmt.Sprint("f", i)), []byte("current"), 0o644))
	}
	stats, err := e.control.Stats(e.ctx)
	e.check(err)
	for e.ctx.Err() == nil && (len(stats.Events) < 1 || stats.Events[0].Limited == 0) {
		stats, err = e.control.Stats(e.ctx)
		e.check(err)
	}
	told := e.sh("until [ $(grep -c MODIFY /tmp/few) -ge 8 ]; do sleep 0.05; done; grep MODIFY /tmp/few")
	if n := strings.Count(told, "\n") + 1; n != 8 {
		t.Errorf("of a graft with a limit of 8 files and 9 in it, changes of %d are told of:\n%s", n, told)
	}
	e.sh("sleep 1.1") // what the guest has cached of the ninth holds no longer
	if got := e.sh("cat /mnt/few/f*"); got != strings.Repeat("current", 9) {
		t.Errorf("the guest reads %q", got)
	}
	if n := strings.Count(e.daemon.Log(), "has more files than its limit"); n != 1 {
		t.Errorf("the daemon says %d times that there is a limit:\n%s", n, e.daemon.Log())
	}
}

// TestEventsCheckout changes thousands of files as git does between two branches: in the end, a program in the guest that goes by
// inotify alone knows what is there.
func TestEventsCheckout(t *testing.T) {
	t.Parallel()
	n := size{1000, 10_000}.n()
	name := func(i int) string { return fmt.Sprintf("repo/%d/%d/f%d", i%10, i%100/10, i) }
	checkout := func(e *events, i int, content string) {
		path := e.path(name(i))
		e.check(os.MkdirAll(filepath.Dir(path), 0o755))
		_ = os.Remove(path)
		e.check(os.WriteFile(path, []byte(content), 0o644))
	}
	e := newEvents(t, eventsConfig{model: true}, func(e *events) {
		e.check(os.Mkdir(e.path("repo"), 0o755))
		for i := range n {
			checkout(e, i, fmt.Sprint("old ", i))
		}
	})
	begun := time.Now()
	for i := range n {
		switch i % 3 {
		case 0:
			checkout(e, i, fmt.Sprint("new ", i))
		case 1:
			e.check(os.Remove(e.path(name(i))))
		}
		if i%3 == 1 || i%7 == 0 {
			checkout(e, n+i, fmt.Sprint("added ", i))
		}
	}
	e.check(os.RemoveAll(e.path("repo/3")))
	wrote := time.Since(begun)
	files, err := model.Read(e.machine.share)
	e.check(err)
	want := files.Sum(e.machine.share, "end")
	got := ""
	// A rescan tells of the file that ends it in no order; a change that was lost is never told of.
	for late := time.After(3 * time.Minute); got != want && late != nil; {
		e.put("end", "x")
		select {
		case line := <-e.lines:
			got = strings.TrimPrefix(line, "model ")
		case <-time.After(10 * time.Second):
		case <-late:
			late = nil
		}
	}
	stats, err := e.control.Stats(e.ctx)
	e.check(err)
	t.Logf("%d files: written in %v, known in the guest after %v; %+v", n, wrote, time.Since(begun), stats.Events)
	if got != want {
		t.Errorf("the guest's program believes %s, the host has %s", got, want)
	}
}

// TestEventsInterrupted has all that takes part end and begin again while the host goes on.
func TestEventsInterrupted(t *testing.T) {
	t.Parallel()
	e := newEvents(t, eventsConfig{watch: []string{"g/."}}, func(e *events) { e.put("f", "") })
	kill := func() {
		e.sh("kill -9 $(pidof sluice-agent); while pidof sluice-agent >/dev/null; do sleep 0.02; done")
	}
	start := func() {
		e.sh("sluice-agent --mount /mnt --connect vsock:%d:%d --state /tmp/state/agent </dev/null >>/tmp/agent 2>&1 &", testguest.VsockHost, eventsPort)
	}
	kill()
	e.put("created", "x")
	e.put("f", "x")
	e.check(os.Rename(e.path("created"), e.path("renamed")))
	start()
	e.await("0 MODIFY f", "0 MOVED_FROM created", "0 MOVED_TO renamed")
	// The kernel's queue of the daemon overflows.
	e.check(unix.Kill(e.daemon.PID(), unix.SIGSTOP))
	e.check(os.Remove(e.path("renamed")))
	e.alternate("f", "f~", 9_000) // 16,384 is the usual limit of fs.inotify.max_queued_events
	e.put("lost", "x")
	e.check(unix.Kill(e.daemon.PID(), unix.SIGCONT))
	e.await("0 MODIFY lost")
	stats, err := e.control.Stats(e.ctx)
	e.check(err)
	if len(stats.Events) != 1 || stats.Events[0].Overflows == 0 || stats.Events[0].Rescans == 0 {
		t.Errorf("after an overflow the daemon counts %+v", stats.Events)
	}
	e.sh("[ ! -e /mnt/g/renamed ]")

	// As an ordinary user of the guest, as far as that user may.
	kill()
	e.check(os.Chmod(e.path(""), 0o777))
	e.sh("sleep 1.1")
	e.startAgent(eventsConfig{user: true})
	e.put("by-user", "x")
	e.await("0 CREATE by-user")

	// The daemon is killed: this guest's file system has ended with it, its agent has not.
	state := strings.Fields(e.sh("cat /tmp/state/agent"))[0]
	e.check(unix.Kill(-e.daemon.PID(), unix.SIGKILL))
	e.check(e.daemon.Ended(e.ctx))
	e.run()
	e.graft(api.GraftSpec{Path: "/g", Source: e.machine.share, Watch: true})
	stream := e.ask("GET /v1/shares/%s/events?since=%s HTTP/1.0\r\n\r\n", testguest.Tag, strings.TrimLeft(state, "0"))
	if !strings.Contains(stream, `"kind":"hello"`) || !strings.Contains(stream, `"kind":"rescan","path":"/g"`) {
		t.Errorf("who comes back to another daemon is told %q", stream)
	}
	e.sh("until grep -q 'connect again' /tmp/agent; do sleep 0.05; done")
}

// alternate has the host write to two files in turn, so that each time is an event of its own.
func (e *events) alternate(a, b string, times int) {
	e.t.Helper()
	var files []*os.File
	for _, name := range []string{a, b} {
		f, err := os.OpenFile(e.path(name), os.O_RDWR|os.O_CREATE, 0o644)
		e.check(err)
		defer f.Close()
		files = append(files, f)
	}
	for range times {
		for _, f := range files {
			_, err := f.WriteAt([]byte("x"), 0)
			e.check(err)
		}
	}
}

// ask sends a request to the daemon over vsock and returns its answer.
func (e *events) ask(format string, args ...any) string {
	e.t.Helper()
	// A stream of events has no end.
	return e.sh("timeout 1 guestprog vsock %d %d '%s' || [ $? -ge 124 ]", testguest.VsockHost, eventsPort, fmt.Sprintf(format, args...))
}

// TestEventsRemoved removes the share that the agent follows, which was there before anything was watched.
func TestEventsRemoved(t *testing.T) {
	t.Parallel()
	e := newEvents(t, eventsConfig{early: true, watch: []string{"g/."}}, func(*events) {})
	e.put("new", "")
	e.await("0 CREATE new")
	e.agentSays()
	e.check(e.control.RemoveShare(e.ctx, testguest.Tag, true))
	e.sh("until grep -q 'there is no share' /tmp/agent; do sleep 0.05; done")
}

// TestEventsAllowed has a guest ask the daemon over vsock for everything that there is.
func TestEventsAllowed(t *testing.T) {
	t.Parallel()
	e := newEvents(t, eventsConfig{noAgent: true}, func(*events) {})
	page, err := os.ReadFile("../../docs/openapi.yaml")
	e.check(err)
	path, method, asked := "", "", 0
	for _, line := range strings.Split(string(page), "\n") {
		if m := regexp.MustCompile(`^  (/\S*):$`).FindStringSubmatch(line); m != nil {
			path = m[1]
		}
		if m := regexp.MustCompile(`^    (get|put|post|patch|delete|head):$`).FindStringSubmatch(line); m != nil {
			method = strings.ToUpper(m[1])
		}
		m := regexp.MustCompile(`^      operationId: (\S+)$`).FindStringSubmatch(line)
		if m == nil {
			continue
		}
		asked++
		for _, tag := range []string{testguest.Tag, "other", "none"} {
			body := fmt.Sprintf(`{"path":"/x","source":"%s","tag":"x"}`, e.machine.share)
			answer := e.ask("%s %s HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
				method, strings.ReplaceAll(path, "{tag}", tag), len(body), body)
			status, _, _ := strings.Cut(strings.TrimPrefix(answer, "HTTP/1.0 "), " ")
			switch allowed := m[1] == "getHealth" || m[1] == "getEvents" && tag == testguest.Tag; {
			case allowed && status != "200":
				t.Errorf("%s of %s: %q", m[1], tag, answer)
			case !allowed && status != "403" && status != "404":
				t.Errorf("%s of %s, which is not allowed: %q", m[1], tag, answer)
			}
			if strings.Contains(answer, e.scratch) || strings.Contains(answer, `"pid"`) {
				t.Errorf("%s of %s tells of the host: %q", m[1], tag, answer)
			}
		}
		if m[1] == "getEvents" {
			unknown, other := e.ask("GET /v1/shares/none/events HTTP/1.0\r\n\r\n"), e.ask("GET /v1/shares/other/events HTTP/1.0\r\n\r\n")
			head := regexp.MustCompile(`(Date|Content-Length): .*`)
			if a, b := head.ReplaceAllString(unknown, ""), head.ReplaceAllString(other, ""); strings.ReplaceAll(a, "none", "other") != b {
				t.Errorf("a share that is not allowed is told from none:\n%s\n%s", a, b)
			}
		}
	}
	if asked < 10 {
		t.Fatalf("the document has %d operations", asked)
	}
	for _, garbage := range []string{
		"", "GET", strings.Repeat("x", 100_000), "GET / HTTP/9.9\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\x16\x03\x01\x02\x00\x01",
		"GET /v1/shares/../../etc/passwd HTTP/1.0\r\n\r\n", "POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
		"GET /healthz HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("A: b\r\n", 10_000),
	} {
		_, _ = e.trySh(fmt.Sprintf("timeout 1 guestprog vsock %d %d '%s'", testguest.VsockHost, eventsPort, garbage))
	}
	if got := e.ask("GET /healthz HTTP/1.0\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.0 200") {
		t.Errorf("after garbage: %q", got)
	}
	if _, err := e.control.Info(context.WithoutCancel(e.ctx)); err != nil {
		t.Error(err)
	}
}
