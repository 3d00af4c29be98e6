package watch

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a reader that writes down.
type recorder struct {
	t   *testing.T
	dir string
	w   *Watcher

	mu   sync.Mutex
	evs  []Event
	more chan struct{} // closed and replaced at each event
	seen func(Event)   // called with each event before it is written down
}

// follow watches cfg until the end of the test.
func follow(t *testing.T, cfg Config, open func() (source, error), seen func(Event)) *recorder {
	t.Helper()
	w, err := newWatcher(cfg, open)
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{t: t, dir: cfg.Dir, w: w, more: make(chan struct{}), seen: seen}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- w.Run(ctx, r.emit) }()
	t.Cleanup(func() {
		begun := time.Now()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if took := time.Since(begun); took > 20*time.Second {
			t.Errorf("stopping took %v", took)
		}
	})
	return r
}

func (r *recorder) emit(ev Event) {
	if r.seen != nil {
		r.seen(ev)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.evs = append(r.evs, ev)
	close(r.more)
	r.more = make(chan struct{})
}

// until waits until what has been emitted satisfies ok.
func (r *recorder) until(what string, ok func([]Event) bool) []Event {
	r.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		r.mu.Lock()
		evs, more := slices.Clone(r.evs), r.more
		r.mu.Unlock()
		if ok(evs) {
			return evs
		}
		select {
		case <-more:
		case <-deadline:
			r.t.Fatalf("no %s among %q", what, texts(evs))
		}
	}
}

func (ev Event) text() string {
	s := ev.Kind.String() + " " + ev.Path
	if ev.To != "" {
		s += " " + ev.To
	}
	if ev.Dir && ev.Kind != Rescan {
		s += " dir"
	}
	return s
}

func texts(evs []Event) []string {
	var s []string
	for _, ev := range evs {
		s = append(s, ev.text())
	}
	return s
}

// fence makes a file, waits for its Create and returns what came before it. Everything done before the fence is told before it.
func (r *recorder) fence(name string) []string {
	r.t.Helper()
	write(r.t, filepath.Join(r.dir, name), "")
	got := texts(r.until("fence", func(evs []Event) bool {
		return slices.ContainsFunc(evs, func(ev Event) bool { return ev.Path == "/"+name })
	}))
	return got[:slices.Index(got, "create /"+name)]
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func TestScenarios(t *testing.T) {
	outside := t.TempDir()
	for _, tt := range []struct {
		name   string
		before func(t *testing.T, dir string)
		do     func(t *testing.T, dir string)
		want   []string
	}{
		{"create", nil, func(t *testing.T, d string) { write(t, d+"/a", "1") }, []string{"create /a"}},
		{"create and modify", nil, func(t *testing.T, d string) {
			write(t, d+"/a", "1")
			write(t, d+"/b", "1")
		}, []string{"create /a", "create /b"}},
		{"modify", func(t *testing.T, d string) { write(t, d+"/a", "1") }, func(t *testing.T, d string) { write(t, d+"/a", "2") }, []string{"modify /a"}},
		{"modify without close", func(t *testing.T, d string) { write(t, d+"/a", "12") }, func(t *testing.T, d string) {
			must(t, os.Truncate(d+"/a", 1), os.Mkdir(d+"/order", 0o755))
		}, []string{"create /order dir", "modify /a"}},
		{"attrib", func(t *testing.T, d string) { write(t, d+"/a", "1") }, func(t *testing.T, d string) { must(t, os.Chmod(d+"/a", 0o600)) }, []string{"attrib /a"}},
		{"attrib of the root", nil, func(t *testing.T, d string) { must(t, os.Chmod(d, 0o700)) }, []string{"attrib / dir"}},
		{"delete", func(t *testing.T, d string) { write(t, d+"/a", "1") }, func(t *testing.T, d string) { must(t, os.Remove(d+"/a")) }, []string{"delete /a"}},
		{"rename", func(t *testing.T, d string) { write(t, d+"/a", "1") }, func(t *testing.T, d string) { must(t, os.Rename(d+"/a", d+"/b")) }, []string{"rename /a /b"}},
		{"replace by rename", func(t *testing.T, d string) { write(t, d+"/a", "1") }, func(t *testing.T, d string) {
			write(t, d+"/.tmp", "2")
			must(t, os.Rename(d+"/.tmp", d+"/a"))
		}, []string{"create /.tmp", "rename /.tmp /a"}},
		{"rename of a file that is open", nil, func(t *testing.T, d string) {
			f, err := os.Create(d + "/a")
			must(t, err)
			defer f.Close()
			_, err = f.WriteString("1")
			must(t, err, os.Rename(d+"/a", d+"/b"))
		}, []string{"create /a", "rename /a /b"}},
		{"move out", func(t *testing.T, d string) { write(t, d+"/a", "1") }, func(t *testing.T, d string) {
			must(t, os.Rename(d+"/a", outside+"/out"), os.Mkdir(d+"/a", 0o755))
		}, []string{"delete /a", "create /a dir"}},
		{"move in", nil, func(t *testing.T, d string) {
			write(t, outside+"/in", "1")
			must(t, os.Rename(outside+"/in", d+"/a"))
		}, []string{"create /a"}},
		{"move a directory in", nil, func(t *testing.T, d string) {
			must(t, os.MkdirAll(outside+"/din/sub", 0o755))
			write(t, outside+"/din/sub/f", "1")
			must(t, os.Chtimes(outside+"/din/sub/f", time.Unix(1, 0), time.Unix(1, 0)), os.Rename(outside+"/din", d+"/d"))
		}, []string{"create /d dir", "create /d/sub dir", "create /d/sub/f"}},
		{"symbolic link", nil, func(t *testing.T, d string) { must(t, os.Symlink("/", d+"/l")) }, []string{"create /l"}},
		{"hard link", func(t *testing.T, d string) { write(t, d+"/a", "1") }, func(t *testing.T, d string) { must(t, os.Link(d+"/a", d+"/b")) }, []string{"create /b"}},
		{"fifo", nil, func(t *testing.T, d string) { must(t, unix.Mkfifo(d+"/p", 0o644)) }, []string{"create /p"}},
		{"rename of a directory", func(t *testing.T, d string) { must(t, os.MkdirAll(d+"/a/sub", 0o755)) }, func(t *testing.T, d string) {
			must(t, os.Rename(d+"/a", d+"/b"))
			write(t, d+"/b/sub/f", "1")
		}, []string{"rename /a /b dir", "create /b/sub/f"}},
		{"strange names", nil, func(t *testing.T, d string) {
			write(t, d+"/new\nline", "")
			write(t, d+"/\xff\xfe", "")
		}, []string{"create /new\nline", "create /\xff\xfe"}},
		{"delete of a tree", func(t *testing.T, d string) {
			must(t, os.MkdirAll(d+"/a/b", 0o755))
			write(t, d+"/a/b/f", "")
		}, func(t *testing.T, d string) { must(t, os.RemoveAll(d+"/a")) }, []string{"delete /a/b/f", "delete /a/b dir", "delete /a dir"}},
		{"links that loop", func(t *testing.T, d string) { must(t, os.Symlink(".", d+"/l"), os.Symlink("l2", d+"/l2")) }, func(t *testing.T, d string) {
			write(t, d+"/l/l/f", "")
		}, []string{"create /f"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if tt.before != nil {
				tt.before(t, dir)
			}
			r := follow(t, Config{Dir: dir}, newInotify, nil)
			tt.do(t, dir)
			// What waits for its end may be told after a fence, so the last that is expected is waited for.
			r.until("event expected", func(evs []Event) bool { return slices.Contains(texts(evs), tt.want[len(tt.want)-1]) })
			// A file of which nothing is heard for a while is told of, be it that its writer has yet to write.
			got := slices.DeleteFunc(r.fence("fence"), func(ev string) bool {
				path, modified := strings.CutPrefix(ev, "modify ")
				return modified && !slices.Contains(tt.want, ev) && slices.Contains(tt.want, "create "+path)
			})
			if !slices.Equal(got, tt.want) {
				t.Errorf("told %q, expected %q", got, tt.want)
			}
		})
	}
}

// TestCoalesce lets events wait while the reader is busy.
func TestCoalesce(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, dir string)
		want []string
	}{
		{"create and modify", func(t *testing.T, d string) {
			write(t, d+"/a", "1")
			write(t, d+"/a", "2")
			must(t, os.Chmod(d+"/a", 0o600))
		}, []string{"create /a"}},
		{"modify twice", func(t *testing.T, d string) {
			write(t, d+"/old", "1")
			write(t, d+"/old", "2")
		}, []string{"modify /old"}},
		{"create and delete", func(t *testing.T, d string) {
			write(t, d+"/a", "1")
			must(t, os.Remove(d+"/a"), os.Mkdir(d+"/b", 0o755), os.Remove(d+"/b"))
		}, nil},
		{"modify and delete", func(t *testing.T, d string) {
			write(t, d+"/old", "1")
			must(t, os.Remove(d+"/old"))
		}, []string{"delete /old"}},
		{"create, rename and delete", func(t *testing.T, d string) {
			write(t, d+"/a", "1")
			must(t, os.Rename(d+"/a", d+"/old"), os.Remove(d+"/old"))
		}, []string{"create /a", "rename /a /old", "delete /old"}},
		{"create, delete, create", func(t *testing.T, d string) {
			write(t, d+"/a", "1")
			must(t, os.Remove(d+"/a"))
			write(t, d+"/a", "2")
		}, []string{"create /a"}},
		{"delete and create", func(t *testing.T, d string) {
			must(t, os.Remove(d+"/old"))
			write(t, d+"/old", "2")
			must(t, os.Remove(d+"/old"))
		}, []string{"delete /old"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir+"/old", "0")
			entered, leave := make(chan struct{}), make(chan struct{})
			r := follow(t, Config{Dir: dir}, newInotify, func(ev Event) {
				if ev.Path == "/busy" {
					close(entered)
					<-leave
				}
			})
			write(t, dir+"/busy", "")
			<-entered
			tt.do(t, dir)
			write(t, dir+"/read", "")
			// The queue is as long as it gets when the last of what was done has come into it.
			for !r.w.queue.has("/read") {
				time.Sleep(time.Millisecond)
			}
			close(leave)
			got := r.fence("fence")
			want := append(append([]string{"create /busy"}, tt.want...), "create /read")
			if !slices.Equal(got, want) {
				t.Errorf("told %q, expected %q", got, want)
			}
		})
	}
}

func (q *queue) has(path string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.last[path] != nil
}

func TestOneFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "0")
	r := follow(t, Config{Dir: dir, File: "f"}, newInotify, nil)
	wait := func(want ...string) {
		t.Helper()
		r.until(want[len(want)-1], func(evs []Event) bool { return len(evs) == len(want) })
		if got := texts(r.evs); !slices.Equal(got, want) {
			t.Fatalf("told %q, expected %q", got, want)
		}
		r.mu.Lock()
		r.evs = nil
		r.mu.Unlock()
	}
	write(t, dir+"/f", "1")
	wait("modify /f")
	write(t, dir+"/g", "2")
	must(t, os.Rename(dir+"/g", dir+"/f"))
	wait("create /f")
	write(t, dir+"/f", "3")
	wait("modify /f")
	must(t, os.Remove(dir+"/f"))
	wait("delete /f")
	write(t, dir+"/f", "4")
	wait("create /f")
	must(t, os.Rename(dir+"/f", dir+"/h"))
	wait("delete /f")
	must(t, os.Rename(dir+"/h", dir+"/f"))
	wait("create /f")
}

// TestKubelet does what kubelet's atomic writer does, and reads each file when ..data says that it is there.
func TestKubelet(t *testing.T) {
	dir := t.TempDir()
	round := 0
	content := func(round int) string { return strings.Repeat(fmt.Sprintf("round %d\n", round), 1000) }
	created := make(map[string]bool)
	var mistakes []string
	r := follow(t, Config{Dir: dir}, newInotify, func(ev Event) {
		switch {
		case ev.Kind == Create && strings.HasPrefix(ev.Path, "/..2026"):
			created[ev.Path] = true
		case ev.Kind == Rescan:
			mistakes = append(mistakes, "rescan")
		case ev.Kind == Rename && ev.To == "/..data":
			var n int
			target, err := os.Readlink(dir + "/..data")
			if err != nil {
				mistakes = append(mistakes, err.Error())
				return
			}
			fmt.Sscanf(target, "..2026_%d", &n)
			for key := range 3 {
				name := fmt.Sprintf("/%s/key%d", target, key)
				got, err := os.ReadFile(dir + name)
				if err != nil || string(got) != content(n) {
					mistakes = append(mistakes, fmt.Sprintf("%s is not complete: %d bytes, %v", name, len(got), err))
				}
				if !created[name] {
					mistakes = append(mistakes, fmt.Sprintf("%s comes after ..data", name))
				}
			}
		}
	})
	for ; round < 200; round++ {
		ts := fmt.Sprintf("..2026_%d", round)
		must(t, os.Mkdir(dir+"/"+ts, 0o755))
		for key := range 3 {
			f, err := os.Create(fmt.Sprintf("%s/%s/key%d", dir, ts, key))
			must(t, err)
			all := content(round)
			_, err = f.WriteString(all[:len(all)/2])
			must(t, err)
			_, err = f.WriteString(all[len(all)/2:])
			must(t, err, f.Close())
		}
		must(t, os.Symlink(ts, dir+"/..data_tmp"), os.Rename(dir+"/..data_tmp", dir+"/..data"))
		if round == 0 {
			for key := range 3 {
				must(t, os.Symlink(fmt.Sprintf("..data/key%d", key), fmt.Sprintf("%s/key%d", dir, key)))
			}
		}
		// The next update comes when this one has been seen, or the reader would look at the next.
		r.until("..data", func(evs []Event) bool {
			n := 0
			for _, ev := range evs {
				if ev.Kind == Rename && ev.To == "/..data" {
					n++
				}
			}
			return n == round+1
		})
		if round > 0 {
			must(t, os.RemoveAll(fmt.Sprintf("%s/..2026_%d", dir, round-1)))
		}
	}
	r.fence("fence")
	for _, m := range mistakes {
		t.Error(m)
	}
}

// TestRenameWaits has a rename wait for a file in a new directory that is still open, but not for ever.
func TestRenameWaits(t *testing.T) {
	dir := t.TempDir()
	r := follow(t, Config{Dir: dir, Settle: time.Hour}, newInotify, nil)
	must(t, os.Mkdir(dir+"/new", 0o755))
	f, err := os.Create(dir + "/new/f")
	must(t, err)
	_, err = f.WriteString("half")
	must(t, err, os.Symlink("new", dir+"/tmp"))
	r.until("link", func(evs []Event) bool { return slices.Contains(texts(evs), "create /tmp") })
	must(t, os.Rename(dir+"/tmp", dir+"/data"))
	if got, want := texts(r.until("rename", func(evs []Event) bool { return evs[len(evs)-1].Kind == Rename })),
		[]string{"create /new dir", "create /tmp", "create /new/f", "rename /tmp /data"}; !slices.Equal(got, want) {
		t.Errorf("told %q, expected %q", got, want)
	}
	_, err = f.WriteString("whole")
	must(t, err, f.Close())
	r.until("modify", func(evs []Event) bool { return texts(evs)[len(evs)-1] == "modify /new/f" })
}

func TestRootComesBack(t *testing.T) {
	for name, lose := range map[string]func(dir string) error{
		"removed": os.RemoveAll,
		"moved":   func(dir string) error { return os.Rename(dir, dir+".old") },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir() + "/root"
			must(t, os.MkdirAll(dir+"/sub", 0o755))
			r := follow(t, Config{Dir: dir}, newInotify, nil)
			for round := 1; round < 4; round++ {
				must(t, lose(dir))
				rescans := func(n int) {
					r.until("rescan", func(evs []Event) bool {
						found := 0
						for _, ev := range evs {
							if ev.Kind == Rescan && ev.Path == "/" {
								found++
							}
						}
						return found >= n
					})
				}
				rescans(2*round - 1)
				must(t, os.MkdirAll(dir+"/sub", 0o755))
				rescans(2 * round)
				file := fmt.Sprintf("/sub/%d", round)
				write(t, dir+file, "")
				r.until(file, func(evs []Event) bool { return slices.Contains(texts(evs), "create "+file) })
				must(t, os.RemoveAll(dir+".old"))
			}
			if w := r.w.Stats().Watches; w != 2 {
				t.Errorf("%d watches, expected 2", w)
			}
		})
	}
}

// faulty is inotify with errors.
type faulty struct {
	source
	watches int // that the kernel gives; -1: any
	mu      sync.Mutex
	next    []byte // what read finds instead
	err     error
}

func (f *faulty) watch(fd int, mask uint32) (int32, error) {
	if f.watches == 0 && mask == treeMask {
		return -1, unix.ENOSPC
	}
	if mask == treeMask {
		f.watches--
	}
	return f.source.watch(fd, mask)
}

func (f *faulty) read(b []byte) (int, error) {
	n, err := f.source.read(b)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		err, f.err = f.err, nil
		return 0, err
	}
	if f.next != nil && err == nil {
		n = copy(b, f.next)
		f.next = nil
	}
	return n, err
}

// TestUnknownGone has the kernel tell that something is gone of which it did not tell that it came, and which the reader can have seen.
func TestUnknownGone(t *testing.T) {
	for name, mask := range map[string]uint32{"deleted": unix.IN_DELETE, "moved": unix.IN_MOVED_FROM} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var f *faulty
			r := follow(t, Config{Dir: dir}, func() (source, error) {
				i, err := newInotify()
				f = &faulty{source: i, watches: -1}
				return f, err
			}, nil)
			r.w.queue.rescan("/")
			r.until("rescan", func(evs []Event) bool { return len(evs) == 1 })
			f.mu.Lock()
			f.next = raw(record{wd: 2, mask: mask, name: "ghost"})
			f.mu.Unlock()
			write(t, dir+"/wakes", "")
			r.until("delete", func(evs []Event) bool { return slices.Contains(texts(evs), "delete /ghost") })
		})
	}
}

// TestRenamedAfterExchange has a directory, which the reader takes for a file after an exchange, renamed before a doubt is settled.
func TestRenamedAfterExchange(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(dir+"/d/x", 0o755))
	write(t, dir+"/f", "1")
	w, err := New(Config{Dir: dir})
	must(t, err)
	// All this is done before anything is read.
	must(t, unix.Renameat2(unix.AT_FDCWD, dir+"/f", unix.AT_FDCWD, dir+"/d", unix.RENAME_EXCHANGE), os.Rename(dir+"/f", dir+"/e"))
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var evs []Event
	must(t, w.Run(ctx, func(ev Event) {
		evs = append(evs, ev)
		if ev == (Event{Kind: Create, Path: "/e/x", Dir: true}) {
			cancel()
		}
	}))
	if !slices.Contains(texts(evs), "create /e/x dir") {
		t.Errorf("told %q, expected what is in /e, too", texts(evs))
	}
}

// renaming is inotify of which nothing is read until ready is closed, and under which something happens as soon as nothing waits any more.
type renaming struct {
	source
	ready chan struct{}
	late  func()
}

func (s *renaming) read(buf []byte) (int, error) {
	<-s.ready
	return s.source.read(buf)
}

func (s *renaming) pending() bool {
	if s.source.pending() {
		return true
	}
	select {
	case <-s.ready:
		if late := s.late; late != nil {
			s.late = nil
			late()
		}
	default:
	}
	return false
}

// TestRenamedWhileInDoubt has a directory renamed when a doubt about a file in it is about to be settled: the file is not gone.
func TestRenamedWhileInDoubt(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(dir+"/d", 0o755))
	write(t, dir+"/c", "1")
	ready := make(chan struct{})
	r := follow(t, Config{Dir: dir}, func() (source, error) {
		i, err := newInotify()
		return &renaming{source: i, ready: ready, late: func() { must(t, os.Rename(dir+"/d", dir+"/e")) }}, err
	}, nil)
	// There is another /c when the rename is read, which may have been an exchange.
	must(t, os.Rename(dir+"/c", dir+"/d/c"))
	write(t, dir+"/c", "2")
	close(ready)
	r.until("rename", func(evs []Event) bool { return slices.Contains(texts(evs), "rename /d /e dir") })
	if got := r.fence("fence"); slices.ContainsFunc(got, func(ev string) bool { return strings.HasPrefix(ev, "delete") }) {
		t.Errorf("told %q, expected nothing to be gone", got)
	}
}

// removing is inotify under which a directory is removed when it is watched, and before it is listed.
type removing struct {
	source
	path    string
	removed chan struct{}
}

func (s *removing) watch(fd int, mask uint32) (int32, error) {
	wd, err := s.source.watch(fd, mask)
	if path, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); path == s.path {
		err = errors.Join(err, os.Remove(path))
		close(s.removed)
	}
	return wd, err
}

// TestGoneBeforeListed is about no limit.
func TestGoneBeforeListed(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	removed := make(chan struct{})
	r := follow(t, Config{Dir: dir}, func() (source, error) {
		i, err := newInotify()
		return &removing{source: i, path: dir + "/d", removed: removed}, err
	}, nil)
	must(t, os.Mkdir(dir+"/d", 0o755))
	<-removed
	got, want := r.fence("fence"), []string{"create /d dir", "delete /d dir"}
	// What came and went at once need not be told.
	if len(got) > 0 && !slices.Equal(got, want) || r.w.Stats().Limited != 0 {
		t.Errorf("told %q, and %d limited; expected %q or nothing, and none", got, r.w.Stats().Limited, want)
	}
}

func TestFaults(t *testing.T) {
	for name, fault := range map[string]func(f *faulty){
		"overflow":      func(f *faulty) { f.next = raw(record{wd: -1, mask: unix.IN_Q_OVERFLOW}) },
		"broken record": func(f *faulty) { f.next = []byte{1, 2, 3} },
		"error":         func(f *faulty) { f.err = unix.EIO },
		"unmounted":     func(f *faulty) { f.next = raw(record{wd: 2, mask: unix.IN_IGNORED}) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			sources := make(chan *faulty, 10)
			r := follow(t, Config{Dir: dir}, func() (source, error) {
				i, err := newInotify()
				f := &faulty{source: i, watches: -1}
				sources <- f
				return f, err
			}, nil)
			f := <-sources
			f.mu.Lock()
			fault(f)
			f.mu.Unlock()
			must(t, os.MkdirAll(dir+"/lost/with/all", 0o755))
			r.until("rescan", func(evs []Event) bool { return slices.Contains(texts(evs), "rescan /") })
			<-sources
			if name == "unmounted" { // once when it is lost, and once when it is back
				r.until("second rescan", func(evs []Event) bool { return len(evs) == 2 })
			}
			write(t, dir+"/lost/with/all/f", "")
			r.until("create", func(evs []Event) bool { return slices.Contains(texts(evs), "create /lost/with/all/f") })
			if want := map[bool]uint64{true: 1}[name == "overflow"]; r.w.Stats().Overflows != want {
				t.Errorf("%d overflows, expected %d", r.w.Stats().Overflows, want)
			}
		})
	}
}

// TestRealOverflow makes more events than the kernel's queue holds before they are read.
func TestRealOverflow(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(dir+"/d", 0o755))
	w, err := New(Config{Dir: dir})
	must(t, err)
	text, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	must(t, err)
	var limit int
	fmt.Sscan(string(text), &limit)
	for i := range limit/2 + 10 {
		must(t, os.Symlink("x", dir+"/d/tmp"), os.Rename(dir+"/d/tmp", fmt.Sprintf("%s/d/%d", dir, i%10)))
	}
	ctx, cancel := context.WithCancel(context.Background())
	err = w.Run(ctx, func(ev Event) {
		if ev.Kind == Rescan && ev.Path == "/" {
			cancel()
		}
	})
	if s := w.Stats(); err != nil || s.Overflows != 1 || s.Rescans != 1 {
		t.Errorf("%v, %+v: expected 1 overflow and 1 rescan", err, s)
	}
}

func TestLimits(t *testing.T) {
	nine := func(t *testing.T, d string) {
		for i := range 9 {
			write(t, fmt.Sprintf("%s/%d", d, i), "1234")
		}
	}
	for _, tt := range []struct {
		name   string
		limits Limits
		kernel int
		before func(t *testing.T, d string)
		do     func(t *testing.T, d string, r *recorder)
		want   []string
		log    string
	}{
		{"files", Limits{MaxFiles: 9}, -1, nil, func(t *testing.T, d string, r *recorder) {
			nine(t, d)
			write(t, d+"/ninth", "")
			r.until("limit", func(evs []Event) bool { return len(evs) == 10 })
			write(t, d+"/0", "2")
		}, []string{"create /0", "create /1", "create /2", "create /3", "create /4", "create /5", "create /6", "create /7", "create /8", "limit /ninth", "modify /0"}, "more files"},
		{"room again", Limits{MaxFiles: 9}, -1, nine, func(t *testing.T, d string, _ *recorder) {
			write(t, d+"/ninth", "")
			must(t, os.Remove(d+"/0"))
			write(t, d+"/tenth", "")
		}, []string{"limit /ninth", "delete /0", "create /tenth"}, "more files"},
		{"bytes", Limits{MaxBytes: 10}, -1, nil, func(t *testing.T, d string, r *recorder) {
			write(t, d+"/a", "12345")
			write(t, d+"/b", "123456")
			r.until("limit", func(evs []Event) bool { return slices.Contains(texts(evs), "limit /b") })
			must(t, os.Truncate(d+"/b", 7)) // and not written anew, which empties it for a moment, in which it fits
			write(t, d+"/c", "12345")
		}, []string{"create /a", "limit /b", "create /c"}, "more bytes"},
		{"grows", Limits{MaxBytes: 10}, -1, func(t *testing.T, d string) { write(t, d+"/a", "1234") }, func(t *testing.T, d string, r *recorder) {
			write(t, d+"/a", "12345678901")
			r.until("limit", func(evs []Event) bool { return len(evs) == 1 })
			write(t, d+"/a", "1234567890")
		}, []string{"limit /a", "modify /a"}, "more bytes"},
		{"watches", Limits{MaxWatches: 2}, -1, nil, func(t *testing.T, d string, _ *recorder) {
			must(t, os.Mkdir(d+"/1", 0o755), os.Mkdir(d+"/2", 0o755))
			write(t, d+"/1/f", "")
			write(t, d+"/2/f", "")
		}, []string{"create /1 dir", "create /2 dir", "limit /2 dir", "create /1/f"}, "more directories"},
		{"kernel", Limits{}, 2, func(t *testing.T, d string) {
			must(t, os.Mkdir(d+"/1", 0o755), os.Mkdir(d+"/2", 0o755), os.Mkdir(d+"/3", 0o755))
		}, func(t *testing.T, d string, r *recorder) { write(t, d+"/f", "") }, []string{"limit /2 dir", "create /f"}, "fs.inotify.max_user_watches"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if tt.before != nil {
				tt.before(t, dir)
			}
			var log lockedBuilder
			r := follow(t, Config{Dir: dir, Limits: tt.limits, Log: log.logger()}, func() (source, error) {
				i, err := newInotify()
				return &faulty{source: i, watches: tt.kernel}, err
			}, nil)
			tt.do(t, dir, r)
			got := texts(r.until("last event", func(evs []Event) bool { return slices.Contains(texts(evs), tt.want[len(tt.want)-1]) }))
			if !slices.Equal(got, tt.want) {
				t.Errorf("told %q, expected %q", got, tt.want)
			}
			if n := strings.Count(log.String(), tt.log); n != 1 || strings.Count(log.String(), "\n") != 1 {
				t.Errorf("%q is not once in the log:\n%s", tt.log, log.String())
			}
			if r.w.Stats().Limited == 0 {
				t.Error("nothing is counted as limited")
			}
		})
	}
}

// TestSlowReader has more events than the queue holds while the reader does nothing.
func TestSlowReader(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(dir+"/other/deep", 0o755))
	entered, leave := make(chan struct{}), make(chan struct{})
	r := follow(t, Config{Dir: dir}, newInotify, func(ev Event) {
		if ev.Path == "/busy" {
			close(entered)
			<-leave
		}
	})
	write(t, dir+"/busy", "")
	<-entered
	for i := range maxQueue + 10 {
		write(t, fmt.Sprintf("%s/other/deep/%d", dir, i), "")
	}
	write(t, dir+"/last", "")
	for !r.w.queue.has("/last") {
		time.Sleep(time.Millisecond)
	}
	close(leave)
	got := r.fence("fence")
	if want := []string{"create /busy", "rescan /other/deep", "create /last"}; !slices.Equal(got, want) {
		t.Errorf("told %d events, the first of them %q, expected %q", len(got), got[:min(len(got), 10)], want)
	}
}

func TestRunOnce(t *testing.T) {
	before := descriptors(t)
	w, err := New(Config{Dir: t.TempDir()})
	must(t, err)
	done := make(chan error)
	go func() { done <- w.Run(context.Background(), func(Event) {}) }()
	for running := false; !running; time.Sleep(time.Millisecond) {
		w.mu.Lock()
		running = w.running
		w.mu.Unlock()
	}
	if err := w.Run(context.Background(), nil); !errors.Is(err, ErrRunning) {
		t.Errorf("the second Run says %v", err)
	}
	must(t, w.Close(), <-done, w.Close())
	if err := w.Run(context.Background(), nil); err == nil {
		t.Error("Run after Close says nothing")
	}
	unused, err := New(Config{Dir: t.TempDir()})
	must(t, err, unused.Close(), unused.Close())
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
	if _, err := New(Config{Dir: t.TempDir() + "/none"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(fds)
}

func TestValidate(t *testing.T) {
	for _, c := range []Config{{}, {Dir: "/", File: "a/b"}, {Dir: "/", File: ".."}, {Dir: "/", Settle: -1}, {Dir: "/", Limits: Limits{MaxFiles: -1}}} {
		if c.Validate() == nil {
			t.Errorf("%+v is valid", c)
		}
	}
}

// TestDeep has directories that no path can say.
func TestDeep(t *testing.T) {
	dir := t.TempDir()
	r := follow(t, Config{Dir: dir}, newInotify, nil)
	name := strings.Repeat("d", 200)
	fd, err := unix.Open(dir, unix.O_PATH, 0)
	must(t, err)
	for range 40 {
		must(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_PATH, 0)
		must(t, err, unix.Close(fd))
		fd = next
	}
	must(t, unix.Close(fd))
	r.until("limit", func(evs []Event) bool {
		return slices.ContainsFunc(evs, func(ev Event) bool { return ev.Kind == Limit })
	})
	r.fence("fence")
	must(t, os.RemoveAll(dir+"/"+name))
	r.until("delete", func(evs []Event) bool { return texts(evs)[len(evs)-1] == "delete /"+name+" dir" })
}

// mirror is a reader that keeps what a tree has by the rules of the package's documentation.
type mirror struct {
	dir  string
	mu   sync.Mutex
	tree map[string]string // content by path; directories end in "/"
}

func (m *mirror) look(path string) {
	m.forget(path)
	_ = filepath.WalkDir(m.dir+path, func(p string, d fs.DirEntry, err error) error {
		if err == nil && p != m.dir && p != m.dir+"/" {
			m.tree[strings.TrimPrefix(p, m.dir)] = content(p)
		}
		return nil
	})
}

// content is what there is to compare; a Rescan may come before a file is complete, but a Modify comes after.
func content(p string) string {
	st, err := os.Lstat(p)
	if err != nil {
		return "gone"
	}
	switch {
	case st.IsDir():
		return "dir"
	case st.Mode()&fs.ModeSymlink != 0:
		to, _ := os.Readlink(p)
		return "link " + to
	}
	b, _ := os.ReadFile(p)
	return "file " + string(b)
}

func (m *mirror) forget(path string) {
	for p := range m.tree {
		if within(path, p) {
			delete(m.tree, p)
		}
	}
}

func (m *mirror) apply(ev Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch ev.Kind {
	case Create:
		m.forget(ev.Path)
		m.tree[ev.Path] = content(m.dir + ev.Path)
	case Modify:
		m.tree[ev.Path] = content(m.dir + ev.Path)
	case Delete:
		m.forget(ev.Path)
	case Rescan:
		m.look(ev.Path)
	case Rename:
		moved := make(map[string]string)
		for p, c := range m.tree {
			if p == ev.Path || ev.Dir && within(ev.Path, p) {
				moved[ev.To+strings.TrimPrefix(p, ev.Path)] = c
			}
		}
		m.forget(ev.Path)
		m.forget(ev.To)
		switch {
		case len(moved) == 0 && ev.Dir:
			m.look(ev.To)
			return
		case len(moved) == 0:
			moved[ev.To] = ""
		}
		// What was looked at before the rename was told may have been something else, or nothing.
		for p := range moved {
			m.tree[p] = content(m.dir + p)
		}
	}
}

// TestCloseCompletes has no other way to know that a content is complete than its close.
func TestCloseCompletes(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/old", "1")
	r := follow(t, Config{Dir: dir, Settle: time.Hour}, newInotify, nil)
	write(t, dir+"/new", "1")
	write(t, dir+"/old", "2")
	want := []string{"create /new", "modify /old"}
	if got := texts(r.until("modify", func(evs []Event) bool { return len(evs) == 2 })); !slices.Equal(got, want) {
		t.Errorf("told %q, expected %q", got, want)
	}
}
