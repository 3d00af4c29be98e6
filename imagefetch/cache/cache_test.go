package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	// A test may need a process of its own, to kill or to give a file system.
	if f := helpers[os.Getenv("CACHE_TEST_HELPER")]; f != nil {
		f()
		return
	}
	goleak.VerifyTestMain(m)
}

var helpers = map[string]func(){"write": helperWrite, "full": helperFull}

func helper(name string, env ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), append(env, "CACHE_TEST_HELPER="+name)...)
	cmd.Stderr = os.Stderr
	return cmd
}

func openTest(t *testing.T, cfg Config) *Cache {
	t.Helper()
	cfg.Log = slog.New(slog.NewTextHandler(testWriter{t}, nil))
	c, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimSuffix(p, []byte("\n")))
	return len(p), nil
}

func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)}).Read(b)
	return b
}

func put(c *Cache, data []byte) (*os.File, error) {
	w, err := c.NewWriter(int64(len(data)))
	if err != nil {
		return nil, err
	}
	for len(data) > 0 {
		n := min(len(data), 5000)
		if _, err := w.Write(data[:n]); err != nil {
			w.Abort()
			return nil, err
		}
		data = data[n:]
	}
	return w.Commit(w.Sum())
}

func mustPut(t *testing.T, c *Cache, data []byte) Key {
	t.Helper()
	f, err := put(c, data)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, f, data)
	return sha256.Sum256(data)
}

// expect checks a descriptor that was handed out: what it has, and that it cannot be changed by it.
func expect(t *testing.T, f *os.File, want []byte) {
	t.Helper()
	if f == nil {
		t.Error("a chunk is not there")
		return
	}
	defer f.Close()
	got, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("a chunk has %d bytes that are not the %d it should have: %v", len(got), len(want), err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Error("a chunk can be written to")
	}
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_ACCMODE != unix.O_RDONLY {
		t.Errorf("a chunk is open with the flags %#x, %v", flags, err)
	}
}

// diskUse is what a cache's directory takes, by asking for each file in it, while no file appears or goes.
func diskUse(t *testing.T, dir string) (total int64) {
	t.Helper()
	if f, err := os.Open(dir + "/usage"); err == nil {
		defer f.Close()
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			t.Error(err)
		}
	}
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err == nil {
			total += fi.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

func temps(t *testing.T, dir string) []string {
	list, err := filepath.Glob(dir + "/tmp/*")
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestKinds is what all caches do.
func TestKinds(t *testing.T) {
	for _, dir := range []string{"", t.TempDir() + "/c"} {
		t.Run("dir="+filepath.Base(dir), func(t *testing.T) {
			c := openTest(t, Config{Dir: dir})
			data := content(1, 100_000)
			k := Key(sha256.Sum256(data))
			if f := c.Get(k, int64(len(data))); f != nil || c.Has(k, int64(len(data))) {
				t.Error("a chunk is there that nobody has put there")
			}
			mustPut(t, c, data)
			mustPut(t, c, data)
			if dir != "" {
				// The second took the first one's place.
				before := c.Usage()
				if err := c.dir.locked(func() error { return c.dir.makeRoom(0) }); err != nil || c.Usage() != before {
					t.Errorf("usage says %d, counting %d, %v", before, c.Usage(), err)
				}
			}
			expect(t, c.Get(k, int64(len(data))), data)
			if !c.Has(k, int64(len(data))) {
				t.Error("a chunk that is there is not")
			}

			w, err := c.NewWriter(10)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(make([]byte, 11)); !errors.Is(err, ErrContent) {
				t.Errorf("more than the size: %v", err)
			}
			if _, err := w.Write(make([]byte, 9)); err != nil {
				t.Error(err)
			}
			if _, err := w.Commit(w.Sum()); !errors.Is(err, ErrContent) {
				t.Errorf("less than the size: %v", err)
			}
			if w, err = c.NewWriter(10); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(make([]byte, 10)); err != nil {
				t.Error(err)
			}
			if _, err := w.Commit(k); !errors.Is(err, ErrContent) {
				t.Errorf("another digest: %v", err)
			}
			if dir != "" {
				if list := temps(t, dir); len(list) > 0 {
					t.Errorf("%v are left over", list)
				}
			}
		})
	}
}

// TestBudget is T-D12: what was not used for longest goes, and there is never more than may be.
func TestBudget(t *testing.T) {
	dir := t.TempDir() + "/c"
	const budget = 2 << 20
	c := openTest(t, Config{Dir: dir, Budget: budget})
	var keys []Key
	for i := range 100 {
		keys = append(keys, mustPut(t, c, content(uint64(i), 60_000)))
		if n := diskUse(t, dir); n > budget {
			t.Fatalf("the directory takes %d bytes of %d", n, budget)
		}
		// The first is used all the time, with a clock that a test can wait for.
		old := time.Now().Add(-time.Hour + time.Duration(i)*time.Second)
		for _, k := range []Key{keys[0], keys[i]} {
			if i == 0 || k != keys[0] {
				_ = os.Chtimes(filepath.Join(dir, chunkName(k)), old, time.Time{})
			}
		}
		f := c.Get(keys[0], 60_000)
		expect(t, f, content(0, 60_000))
	}
	there := 0
	for i, k := range keys {
		if !c.Has(k, 60_000) {
			if i > 90 {
				t.Errorf("chunk %d of 100 is gone already", i)
			}
			continue
		}
		there++
	}
	if there < 20 || !c.Has(keys[0], 60_000) {
		t.Errorf("%d chunks are left, the one that was in use all the time among them: %v", there, c.Has(keys[0], 60_000))
	}
	// The count is right: what a new count finds is the same.
	before := c.Usage()
	if err := c.dir.locked(func() error { return c.dir.makeRoom(0) }); err != nil {
		t.Fatal(err)
	}
	if after := c.Usage(); after != before {
		t.Errorf("usage says %d, counting %d", before, after)
	}
	// One that is larger than the budget is served and not kept.
	big := content(1000, 3<<20)
	k := mustPut(t, c, big)
	if !c.mem.has(k) || diskUse(t, dir) > budget {
		t.Errorf("a chunk larger than the budget: in memory %v, on disk %d", c.mem.has(k), diskUse(t, dir))
	}
	// A smaller budget is kept to from the start.
	c.Close()
	openTest(t, Config{Dir: dir, Budget: budget / 2})
	if n := diskUse(t, dir); n > budget/2 {
		t.Errorf("the directory takes %d bytes of %d", n, budget/2)
	}
}

func TestMemoryBudget(t *testing.T) {
	c := openTest(t, Config{MemoryBudget: 1 << 20})
	first := mustPut(t, c, content(0, 60_000))
	for i := range 50 {
		mustPut(t, c, content(uint64(i+1), 60_000))
		expect(t, c.Get(first, 60_000), content(0, 60_000))
		if c.mem.used > 1<<20 {
			t.Fatalf("%d bytes are in memory", c.mem.used)
		}
	}
	if n := c.mem.order.Len(); n < 10 || n > 17 {
		t.Errorf("%d chunks are in memory", n)
	}
	k := mustPut(t, c, content(99, 2<<20))
	if c.Has(k, 2<<20) {
		t.Error("a chunk larger than the budget is kept")
	}
}

// TestRestart finds what was there before, and what was damaged in between.
func TestRestart(t *testing.T) {
	dir := t.TempDir() + "/c"
	c := openTest(t, Config{Dir: dir})
	good, flipped, cut := content(1, 50_000), content(2, 50_000), content(3, 50_000)
	for _, b := range [][]byte{good, flipped, cut} {
		mustPut(t, c, b)
	}
	c.PutMeta("toc", []byte("entries"))
	c.PutMeta("bad", []byte("other"))
	c.Close()
	name := func(b []byte) string { return filepath.Join(dir, chunkName(sha256.Sum256(b))) }
	damage(t, name(flipped), 25_000)
	if err := os.Truncate(name(cut), 49_999); err != nil {
		t.Fatal(err)
	}
	damage(t, filepath.Join(dir, "meta/bad"), 33)

	c = openTest(t, Config{Dir: dir})
	expect(t, c.Get(sha256.Sum256(good), 50_000), good)
	for _, b := range [][]byte{flipped, cut} {
		if f := c.Get(sha256.Sum256(b), 50_000); f != nil {
			t.Error("a damaged chunk was handed out")
		}
		if _, err := os.Stat(name(b)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a damaged chunk is still there: %v", err)
		}
		mustPut(t, c, b)
		expect(t, c.Get(sha256.Sum256(b), 50_000), b)
	}
	if got := c.Meta("toc"); string(got) != "entries" {
		t.Errorf("the other data are %q", got)
	}
	if got := c.Meta("bad"); got != nil {
		t.Errorf("damaged data are %q", got)
	}
	if got := c.Meta("none"); got != nil {
		t.Errorf("data that are not there are %q", got)
	}
}

func damage(t *testing.T, name string, at int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// helperWrite writes chunks for ever, each half and then whole.
func helperWrite() {
	c, err := Open(Config{Dir: os.Getenv("CACHE_TEST_DIR"), Budget: 2 << 20})
	if err != nil {
		panic(err)
	}
	for i := uint64(0); ; i++ {
		data := content(i*1000+uint64(os.Getpid()), 60_000)
		w, err := c.NewWriter(60_000)
		if err != nil {
			panic(err)
		}
		for j := range 10 {
			if _, err := w.Write(data[j*6000 : (j+1)*6000]); err != nil {
				panic(err)
			}
		}
		f, err := w.Commit(w.Sum())
		if err != nil {
			panic(err)
		}
		f.Close()
		if i == 10 {
			fmt.Println("going")
		}
	}
}

// TestKilled kills processes that write: what they leave is complete chunks, nothing else that stays, and never too much.
func TestKilled(t *testing.T) {
	dir := t.TempDir() + "/c"
	const budget = 2 << 20
	for round := range 4 {
		var cmds []*exec.Cmd
		for range 2 {
			cmd := helper("write", "CACHE_TEST_DIR="+dir)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			cmds = append(cmds, cmd)
			if _, err := io.ReadFull(out, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}
		}
		for range 20 {
			if n := diskUse(t, dir); n > budget {
				t.Errorf("the directory takes %d bytes of %d", n, budget)
			}
			time.Sleep(time.Millisecond)
		}
		for _, cmd := range cmds {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
		}
		c := openTest(t, Config{Dir: dir, Budget: budget})
		if list := temps(t, dir); len(list) > 0 {
			t.Errorf("round %d: %v are left over", round, list)
		}
		names, err := filepath.Glob(dir + "/chunks/*/*")
		if err != nil || len(names) < 5 {
			t.Fatalf("there are %d chunks, %v", len(names), err)
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if fmt.Sprintf("%x", sha256.Sum256(b)) != filepath.Base(name) {
				t.Errorf("%s has other content", name)
			}
		}
		if used := c.Usage(); used < diskUse(t, dir+"/chunks") || used > budget {
			t.Errorf("usage says %d, and it is %d", used, diskUse(t, dir+"/chunks"))
		}
		c.Close()
	}
}

// TestShared has two caches write to one directory: together they keep to the budget, and each sees what the other has.
func TestShared(t *testing.T) {
	dir := t.TempDir() + "/c"
	const budget = 2 << 20
	caches := []*Cache{openTest(t, Config{Dir: dir, Budget: budget}), openTest(t, Config{Dir: dir, Budget: budget})}
	var all sync.WaitGroup
	for n, c := range caches {
		for g := range 3 {
			all.Go(func() {
				for i := range 30 {
					data := content(uint64(g*30+i), 40_000) // the same ones in both
					f, err := put(c, data)
					if err != nil {
						t.Errorf("cache %d: %v", n, err)
						return
					}
					expect(t, f, data)
				}
			})
		}
	}
	stop := make(chan struct{})
	watched := make(chan int64)
	go func() {
		most := int64(0)
		for {
			select {
			case <-stop:
				watched <- most
				return
			case <-time.After(time.Millisecond):
				most = max(most, diskUse(t, dir))
			}
		}
	}()
	all.Wait()
	close(stop)
	if most := <-watched; most > budget {
		t.Errorf("the directory took %d bytes of %d", most, budget)
	}
	data := content(5000, 1000)
	mustPut(t, caches[0], data)
	expect(t, caches[1].Get(sha256.Sum256(data), 1000), data)
	before := caches[0].Usage()
	if err := caches[1].dir.locked(func() error { return caches[1].dir.makeRoom(0) }); err != nil {
		t.Fatal(err)
	}
	if after := caches[0].Usage(); after != before {
		t.Errorf("usage says %d, counting %d", before, after)
	}
}

// TestLock is of two processes that want the same chunk.
func TestLock(t *testing.T) {
	dir := t.TempDir() + "/c"
	a, b := openTest(t, Config{Dir: dir}), openTest(t, Config{Dir: dir})
	k, other := Key{1}, Key{2}
	unlock, err := a.Lock(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := b.Lock(ctx, k); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("locked twice: %v", err)
	}
	unlockOther, err := b.Lock(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	unlockOther()
	got := make(chan error)
	go func() {
		unlock, err := b.Lock(t.Context(), k)
		if err == nil {
			unlock()
		}
		got <- err
	}()
	unlock()
	if err := <-got; err != nil {
		t.Error(err)
	}
	mem := openTest(t, Config{})
	if unlock, err = mem.Lock(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	unlock()
}

// TestUnusable is of directories that cannot be written to: what is there is served, the rest kept in memory.
func TestUnusable(t *testing.T) {
	data := content(1, 50_000)
	t.Run("a file", func(t *testing.T) {
		name := filepath.Join(t.TempDir(), "c")
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		c := openTest(t, Config{Dir: name})
		k := mustPut(t, c, data)
		expect(t, c.Get(k, 50_000), data)
	})
	t.Run("in nothing", func(t *testing.T) {
		c := openTest(t, Config{Dir: filepath.Join(t.TempDir(), "a", "b")})
		k := mustPut(t, c, data)
		expect(t, c.Get(k, 50_000), data)
		c.PutMeta("a", []byte("b"))
	})
	t.Run("later", func(t *testing.T) {
		dir := t.TempDir() + "/c"
		c := openTest(t, Config{Dir: dir})
		k := mustPut(t, c, data)
		if err := os.Remove(dir + "/tmp"); err != nil {
			t.Fatal(err)
		}
		more := content(2, 50_000)
		k2 := mustPut(t, c, more)
		expect(t, c.Get(k, 50_000), data)
		expect(t, c.Get(k2, 50_000), more)
		if !c.mem.has(k2) {
			t.Error("it is not in memory")
		}
		if err := os.Mkdir(dir+"/tmp", 0o700); err != nil {
			t.Fatal(err)
		}
		if k := mustPut(t, c, content(3, 50_000)); c.mem.has(k) {
			t.Error("the directory is not used again")
		}
	})
	t.Run("without chunks while writing", func(t *testing.T) {
		dir := t.TempDir() + "/c"
		c := openTest(t, Config{Dir: dir})
		w, err := c.NewWriter(50_000)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data[:20_000]); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(dir + "/chunks"); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data[20_000:]); err != nil {
			t.Fatal(err)
		}
		f, err := w.Commit(sha256.Sum256(data))
		if err != nil {
			t.Fatal(err)
		}
		expect(t, f, data)
	})
}

// helperFull runs where the cache's file system has one MiB and then is read-only. It prints what is wrong.
func helperFull() {
	dir := os.Getenv("CACHE_TEST_DIR")
	check := func(what string, err error) {
		if err != nil {
			fmt.Println(what, err)
			os.Exit(0)
		}
	}
	check("mount", unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"))
	c, err := Open(Config{Dir: dir, Budget: 64 << 20, MemoryBudget: 8 << 20})
	check("open", err)
	onDisk := 0
	read := func(i int) {
		data := content(uint64(i), 100_000)
		f := c.Get(sha256.Sum256(data), 100_000)
		if f == nil {
			check("get", fmt.Errorf("chunk %d is not there", i))
		}
		got, err := io.ReadAll(f)
		check("read", err)
		if !bytes.Equal(got, data) {
			check("read", fmt.Errorf("chunk %d has other content", i))
		}
		f.Close()
	}
	for i := range 30 {
		f, err := put(c, content(uint64(i), 100_000))
		check("put", err)
		f.Close()
		read(i)
	}
	for i := range 30 {
		if c.dir.has(sha256.Sum256(content(uint64(i), 100_000)), 100_000) {
			onDisk++
		}
		read(i)
	}
	if onDisk < 5 || onDisk > 10 {
		check("disk", fmt.Errorf("%d chunks are on a disk of 1 MiB", onDisk))
	}
	c.Close()
	check("remount", unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	c, err = Open(Config{Dir: dir, Budget: 64 << 20})
	check("open read-only", err)
	read(0)
	f, err := put(c, content(77, 100_000))
	check("put read-only", err)
	f.Close()
	read(77)
	fmt.Println("good")
}

// TestFull is T-D12's full disk, and one that is read-only, in a mount namespace of its own.
func TestFull(t *testing.T) {
	cmd := helper("full", "CACHE_TEST_DIR="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.Output()
	if got := strings.TrimSpace(string(out)); err != nil || got != "good" {
		t.Errorf("%v: %s", err, got)
	}
}

// TestStuck has another process hold the lock for good.
func TestStuck(t *testing.T) {
	dir := t.TempDir() + "/c"
	c := openTest(t, Config{Dir: dir})
	c.dir.patience = 20 * time.Millisecond
	f, err := os.Open(dir + "/usage")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	data := content(1, 1000)
	k := mustPut(t, c, data)
	if !c.mem.has(k) {
		t.Error("it is not in memory")
	}
}

// TestTouch has a chunk's use remembered without a system call each time.
func TestTouch(t *testing.T) {
	dir := t.TempDir() + "/c"
	c := openTest(t, Config{Dir: dir})
	k := mustPut(t, c, content(1, 1000))
	name := filepath.Join(dir, chunkName(k))
	for _, tt := range []struct {
		age     time.Duration
		changes bool
	}{{time.Second, false}, {time.Hour, true}} {
		// A file system that keeps times itself would not, with the change after the access.
		old := time.Now().Add(-tt.age)
		if err := os.Chtimes(name, old, old.Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
		f := c.Get(k, 1000)
		st, err := fstat(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		if changed := atime(&st).After(old.Add(time.Millisecond)); changed != tt.changes {
			t.Errorf("a chunk used %v ago: its time changes: %v", tt.age, changed)
		}
	}
}

func TestValidate(t *testing.T) {
	for _, cfg := range []Config{{Budget: -1}, {MemoryBudget: -1}} {
		if _, err := Open(cfg); err == nil {
			t.Errorf("%+v is taken", cfg)
		}
	}
}

// BenchmarkMakeRoom is of what writing waits for now and then.
func BenchmarkMakeRoom(b *testing.B) {
	c, err := Open(Config{Dir: b.TempDir() + "/c"})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	for i := range 2000 {
		f, err := put(c, content(uint64(i), 100))
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
	b.ResetTimer()
	for b.Loop() {
		if err := c.dir.locked(func() error { return c.dir.makeRoom(0) }); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(2000, "chunks")
}

// TestKept is the order that makeRoom takes things in.
func TestKept(t *testing.T) {
	dir := t.TempDir() + "/c"
	c := openTest(t, Config{Dir: dir})
	k := mustPut(t, c, content(1, 1000))
	c.PutMeta("toc", []byte("x"))
	var files []kept
	if err := c.dir.locked(func() (err error) {
		_, files, err = c.dir.scan()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(files, func(a, b kept) int { return a.used.Compare(b.used) })
	if len(files) != 2 || files[0].name != chunkName(k) || files[1].name != "meta/toc" {
		t.Errorf("what could go is %v", files)
	}
}
