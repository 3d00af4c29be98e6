package guest_test

import (
	"context"
	"fmt"
	"math/rand/v2"
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
	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/test/guest/selfcheck"
)

// startShares starts a daemon by a configuration file with these shares, whose sockets are in the scratch directory.
func (s *steered) startShares(shares string) {
	s.t.Helper()
	file := filepath.Join(s.scratch, "sluiced.toml")
	s.check(os.WriteFile(file, []byte(shares), 0o644))
	s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{"--config", file}})
}

// on boots a guest on shares, each mounted at /mnt/TAG.
func (s *steered) on(tags ...string) *machine {
	s.t.Helper()
	m := &machine{t: s.t, ctx: s.ctx, serving: s.serving, daemon: s.daemon}
	var err error
	m.scratch, err = os.MkdirTemp(s.scratch, "g")
	s.check(err)
	cfg := testguest.Config{Kind: testguest.UML, Kit: kit, Initrd: initrd, Scratch: m.scratch}
	for _, tag := range tags {
		cfg.Devices = append(cfg.Devices, testguest.Device{Socket: filepath.Join(s.scratch, tag+".sock"), Tag: tag})
	}
	ctx, cancel := context.WithTimeout(m.serving, bootTime)
	defer cancel()
	m.guest, err = testguest.Boot(ctx, cfg)
	s.check(err)
	s.t.Cleanup(func() {
		if s.t.Failed() {
			s.t.Logf("console of the guest of %v:\n%s", tags, m.guest.Console())
		}
		m.guest.Close()
	})
	for _, tag := range tags {
		m.sh("mkdir /mnt/%[1]s; mount -t virtiofs %[1]s /mnt/%[1]s", tag)
	}
	return m
}

// shareNow is a share as the daemon has it now.
func (s *steered) shareNow(tag string) api.Share {
	s.t.Helper()
	shares, err := s.c.Shares(s.ctx)
	s.check(err)
	i := slices.IndexFunc(shares, func(sh api.Share) bool { return sh.Tag == tag })
	if i < 0 {
		s.t.Fatalf("there is no share %s", tag)
	}
	return shares[i]
}

// TestManyShares has one daemon serve several guests, of which one is killed, and one loses its share.
func TestManyShares(t *testing.T) {
	t.Parallel()
	m := &steered{machine: newScratch(t)}
	var config strings.Builder
	for i, tag := range []string{"a", "b", "c", "d"} {
		dir := m.source(tag, map[string]string{"name": tag + "\n", "file": string(selfcheck.Content(uint64(i)))})
		if tag != "d" {
			fmt.Fprintf(&config, "[[share]]\ntag = %q\n[[share.graft]]\npath = \"/\"\nsource = %q\n", tag, dir)
		}
	}
	m.startShares(config.String())
	guests := map[string]*machine{}
	reading := map[string]*pausing{}
	for _, tag := range []string{"a", "b", "c"} {
		g := m.on(tag)
		guests[tag] = g
		g.says(tag, "cat /mnt/%s/name", tag)
		reading[tag] = g.pausing(func(say, hear string) string {
			return fmt.Sprintf("guestprog readwhile /mnt/%s/file %s.stop", tag, say)
		})
	}
	guests["a"].guest.Close()
	m.await("share a waits again", func() bool { return m.shareNow("a").State == api.StateWaiting })
	again := m.on("a")
	again.says("a", "cat /mnt/a/name")

	// Another share while they run, for a guest that is started later, which has one of the others' as well.
	if err := m.c.RemoveShare(m.ctx, "a", false); apiCode(err) != api.CodeBusy {
		t.Errorf("remove a share with a guest: %v, want that it is busy", err)
	}
	added, err := m.c.AddShare(m.ctx, api.ShareSpec{Tag: "d", Grafts: []api.GraftSpec{{Path: "/", Source: filepath.Join(m.scratch, "d")}, {Path: "/c", Source: filepath.Join(m.scratch, "c")}}})
	m.check(err)
	if want := filepath.Join(m.scratch, "d.sock"); added.Socket != want {
		t.Errorf("the share's socket is %s, want %s", added.Socket, want)
	}
	late := m.on("d")
	late.says("d\nc", "cat /mnt/d/name /mnt/d/c/name")
	late.sh("echo of d >/mnt/d/c/new")
	guests["c"].says("of d", "cat /mnt/c/new")

	// A share is taken away from a guest that uses it.
	m.check(m.c.RemoveShare(m.ctx, "b", true))
	if _, err := m.c.Grafts(m.ctx, "b"); apiCode(err) != api.CodeNotFound {
		t.Errorf("grafts of a share that was removed: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(m.scratch, "b.sock")); !os.IsNotExist(err) {
		t.Errorf("the socket of a share that was removed: %v", err)
	}
	again.says("a", "cat /mnt/a/name; echo x >/mnt/a/new; rm /mnt/a/new")
	late.says("d", "cat /mnt/d/name")
	guests["c"].sh("touch %s.stop", reading["c"].say)
	if got := reading["c"].end(); strings.Contains(got, "\n") || !strings.HasSuffix(got, " read") {
		t.Errorf("while the others came and went, a guest's reads ended as %q", got)
	}
	for _, use := range []string{"cat /mnt/b/file", "ls /mnt/b", "echo x >/mnt/b/new"} {
		guests["b"].denies("Transport endpoint is not connected", use)
	}
	guests["b"].guest.Close() // what was in its queue then, nobody answers
	<-reading["b"].ended
	// And there again.
	_, err = m.c.AddShare(m.ctx, api.ShareSpec{Tag: "b", Grafts: []api.GraftSpec{{Path: "/", Source: filepath.Join(m.scratch, "d")}}})
	m.check(err)
	m.on("b").says("d", "cat /mnt/b/name")
	select {
	case <-m.daemon.Exited():
		t.Error("the daemon has ended")
	default:
	}
}

// TestManyGrafts has a share with a thousand grafts beside one with a single one, and compares them.
func TestManyGrafts(t *testing.T) {
	t.Parallel()
	const n = 1000
	m := &steered{machine: newScratch(t)}
	files := map[string]string{}
	for i := range n {
		files[fmt.Sprint(i, "/file")] = fmt.Sprintln(i)
	}
	sources := m.source("sources", files)
	m.startShares("[[share]]\ntag = \"many\"\ncache = \"never\"\n[[share]]\ntag = \"one\"\ncache = \"never\"\n")
	graft := func(tag, path string, i int) {
		t.Helper()
		_, err := m.c.AddGraft(m.ctx, tag, api.GraftSpec{Path: path, Source: filepath.Join(sources, strconv.Itoa(i))}, false)
		m.check(err)
	}
	graft("one", "/g/500", 500)
	begin := time.Now()
	for i := range n {
		graft("many", fmt.Sprint("/g/", i), i)
	}
	took := time.Since(begin)
	g := m.on("many", "one")
	t.Logf("%d grafts added in %v", n, took)
	var want strings.Builder
	for i := range n {
		fmt.Fprintln(&want, i)
	}
	begin = time.Now()
	if got := g.sh("ls /mnt/many/g | sort -n"); got+"\n" != want.String() {
		t.Errorf("the guest lists %d names, not those of the grafts", strings.Count(got, "\n")+1)
	}
	t.Logf("the guest has listed them in %v", time.Since(begin))
	g.sh("ls /mnt/one/g/500")
	begin = time.Now()
	if got := g.sh("cd /mnt/many/g; for i in $(seq 0 %d); do read -r line <$i/file; echo $line; done", n-1); got+"\n" != want.String() {
		t.Errorf("the guest reads %d lines, not what is in the grafts", strings.Count(got, "\n")+1)
	}
	t.Logf("and read a file in each in %v", time.Since(begin))
	g.says(fmt.Sprint(n), "find /mnt/many -type f | wc -l")
	g.says(fmt.Sprint(n), "grep -c ' /mnt/many/g/' /proc/self/mountinfo")
	times := strings.Fields(g.sh("guestprog timestat %d /mnt/one/g/500/file /mnt/many/g/500/file", size{200, 50_000}.n()))
	t.Logf("a stat takes %s ns with one graft, %s ns with %d", times[0], times[1], n)
	begin = time.Now()
	for i := range n {
		m.check(m.c.RemoveGraft(m.ctx, "many", fmt.Sprint("/g/", i)))
	}
	t.Logf("%d grafts removed in %v", n, time.Since(begin))
	g.says("", "ls -A /mnt/many")
	g.says("500", "cat /mnt/one/g/500/file")
}

// processesOf are the processes that have text among their arguments and have not ended.
func processesOf(text string) (pids []string) {
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		args, err := os.ReadFile(name)
		if err != nil || !strings.Contains(string(args), text) {
			continue
		}
		pid := filepath.Base(filepath.Dir(name))
		if stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat")); err == nil && !strings.Contains(string(stat), ") Z ") {
			pids = append(pids, pid)
		}
	}
	return pids
}

// operate makes random changes until the daemon is gone.
func (s *steered) operate(rnd *rand.Rand, sources []string) {
	for {
		tag := fmt.Sprint("extra", rnd.IntN(3))
		in := []string{testguest.Tag, tag}[rnd.IntN(2)]
		path := fmt.Sprint("/", rnd.IntN(3), "/", rnd.IntN(2))
		spec := api.GraftSpec{Path: path, Source: sources[rnd.IntN(len(sources))], Watch: rnd.IntN(4) == 0}
		var err error
		switch rnd.IntN(7) {
		case 0:
			_, err = s.c.AddShare(s.ctx, api.ShareSpec{Tag: tag, Grafts: []api.GraftSpec{spec}})
		case 1:
			err = s.c.RemoveShare(s.ctx, tag, rnd.IntN(2) == 0)
		case 2, 3:
			_, err = s.c.AddGraft(s.ctx, in, spec, false)
		case 4:
			_, err = s.c.AddGraft(s.ctx, in, spec, true)
		case 5:
			err = s.c.RemoveGraft(s.ctx, in, path)
		case 6:
			_, err = s.c.ChangeGraft(s.ctx, in, path, api.GraftChange{ReadOnly: new(rnd.IntN(2) == 0), MaxBytes: new(rnd.Uint64N(2) << 20)})
		}
		// Only what is there or not, or in use, may be said; anything else is said by a daemon that ends.
		switch apiCode(err) {
		case "", api.CodeExists, api.CodeNotFound, api.CodeBusy:
		default:
			return
		}
		if err != nil && apiCode(err) == "" {
			return
		}
	}
}

// TestKilled kills one of the daemon's processes in the middle of changes. The other ends, nothing goes on, and the next daemon at
// the same place finds nothing in its way.
func TestKilled(t *testing.T) {
	t.Parallel()
	m := newSteered(t)
	m.check(os.WriteFile(m.path("file"), []byte("served\n"), 0o644))
	sources := []string{m.source("dir", map[string]string{"file": "x", "sub/file": "x"}), filepath.Join(m.scratch, "dir/file")}
	rounds := size{15, 200}.n()
	var slowest time.Duration
	for i := range 2 * rounds {
		if i > 0 {
			m.startSteered(testguest.DaemonConfig{Program: program, Share: m.share})
		}
		if names, err := filepath.Glob(filepath.Join(m.scratch, "*.sock")); err != nil || len(names) != 1 {
			t.Errorf("a new daemon has the sockets %v, %v, want its own", names, err)
		}
		shares, err := m.c.Shares(m.ctx)
		if err != nil || len(shares) != 1 {
			t.Errorf("a new daemon has %d shares, %v, want one", len(shares), err)
		}
		guest := i == rounds/2 || i == rounds+rounds/2
		if guest {
			m.boot(testguest.Config{Kind: testguest.UML})
			m.says("served", "cat /mnt/file")
		}
		rnd := rand.New(rand.NewPCG(uint64(i), 1))
		var operators sync.WaitGroup
		for j := range 3 {
			operators.Go(func() { m.operate(rand.New(rand.NewPCG(uint64(i), uint64(2+j))), sources) })
		}
		time.Sleep(time.Duration(rnd.Int64N(int64(40 * time.Millisecond)))) // any moment is one to be killed at
		victim := m.daemon.PID()
		if i >= rounds {
			victim = m.daemon.Server()
		}
		begin := time.Now()
		m.check(unix.Kill(victim, unix.SIGKILL))
		left := []string{}
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if left = processesOf(m.scratch + "/ctl"); len(left) == 0 {
				break
			}
		}
		if len(left) > 0 {
			t.Fatalf("round %d: 30 s after one process was killed there are %v of %d and %d", i, left, m.daemon.PID(), m.daemon.Server())
		}
		slowest = max(slowest, time.Since(begin))
		operators.Wait()
		if guest {
			m.guest.Close()
		}
		if err := m.daemon.Ended(m.ctx); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d times both processes were gone, within %v at most", 2*rounds, slowest)
	if full() && slowest > 4*time.Second {
		t.Errorf("it took %v until both processes were gone: something was waited for", slowest)
	}
	m.startSteered(testguest.DaemonConfig{Program: program, Share: m.share})
	m.check(unix.Kill(m.daemon.PID(), unix.SIGTERM))
	m.check(m.daemon.Wait(m.ctx))
	entries, err := os.ReadDir(m.scratch)
	m.check(err)
	for _, e := range entries { // uml is the guest's
		if !slices.Contains([]string{"dir", "share", "uml"}, e.Name()) {
			t.Errorf("%s is left behind", e.Name())
		}
	}
}
