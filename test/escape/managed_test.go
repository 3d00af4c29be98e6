package escape_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
)

// api asks the daemon's control API, and wants this status.
func (d *daemon) api(t testing.TB, status int, method, path string, body any) []byte {
	t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, "http://daemon"+path, bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if body == nil {
		r.Body, r.ContentLength = http.NoBody, 0
	} else {
		r.Header.Set("Content-Type", "application/json")
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.control)
	}}
	defer transport.CloseIdleConnections()
	answer, err := (&http.Client{Transport: transport, Timeout: patience}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err = io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	if answer.StatusCode != status {
		t.Fatalf("%s %s: status %d, expected %d: %s", method, path, answer.StatusCode, status, text)
	}
	return text
}

type object map[string]any

// TestGrafts has shares and grafts of every kind come, change and go while guests use them, with the filter in force. What is not
// grafted stays out of reach, and a graft that has become read-only has to be left as it is by who has it open.
func TestGrafts(t *testing.T) {
	t.Parallel()
	for _, cfg := range configurations {
		if !cfg.managed {
			continue
		}
		t.Run(cfg.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, cfg)
			host := ownedDir(t, cfg.uid)
			for name, text := range map[string]string{"data/file": "content", "single": "one file", "sibling": secretMark} {
				path := filepath.Join(host, name)
				s.check(os.MkdirAll(filepath.Dir(path), 0o755))
				s.check(os.WriteFile(path, []byte(text), 0o644))
				s.check(os.Chown(filepath.Dir(path), int(cfg.uid), int(cfg.uid)))
				s.check(os.Chown(path, int(cfg.uid), int(cfg.uid)))
			}
			const grafts = "/v1/shares/share/grafts"
			add := func(status int, graft object) { s.daemon.api(t, status, "POST", grafts, graft) }
			add(201, object{"path": "/in/data", "source": filepath.Join(host, "data"), "watch": true})
			add(201, object{"path": "/single", "source": filepath.Join(host, "single"), "read_only": true})
			add(201, object{"path": "/mem", "backend": "mem", "max_bytes": 1 << 20})
			add(409, object{"path": "/mem", "backend": "mem"})
			add(400, object{"path": "/none", "source": filepath.Join(host, "none")})
			s.daemon.api(t, 200, "GET", "/v1/shares/share", nil)

			file := s.node("in", "data", "file")
			fh := s.mustOpen(file, unix.O_RDWR)
			if text, errno := s.read(file, fh); text != "content" || errno != 0 {
				t.Errorf("read %q, %v", text, errno)
			}
			s.wants(s.write(file, fh, "CONTENT"), 0, "write")
			single := s.node("single")
			_, errno := s.open(single, unix.O_RDWR)
			s.wants(errno, unix.EROFS, "open a file that is read-only")
			for _, name := range []string{"..", "sibling", "../sibling"} {
				if e, errno := s.lookup(s.node("in", "data"), name); errno == 0 {
					t.Errorf("LOOKUP of %q: node %#x", name, e.NodeId)
				}
			}
			created, errno := s.create(s.node("mem"), "new", unix.O_RDWR, 0o644)
			s.wants(errno, 0, "create")
			s.wants(s.write(created.NodeId, created.Fh, "text"), 0, "write in memory")

			s.daemon.api(t, 200, "PATCH", grafts+"?path=/in/data", object{"read_only": true})
			s.wants(s.write(file, fh, "x"), unix.EROFS, "write by a handle from before")
			for name, in := range setattrs() {
				s.wants(s.setattr(file, in), unix.EROFS, "set %s", name)
			}
			s.wants(s.unlink(s.node("in", "data"), "file"), unix.EROFS, "unlink")
			s.daemon.api(t, 204, "DELETE", grafts+"?path=/in/data", nil)
			if _, errno := s.lookup(root, "in"); errno != unix.ENOENT {
				t.Errorf("LOOKUP in what was removed: %v", errno)
			}
			if text, errno := s.read(file, fh); text != "CONTENT" || errno != 0 {
				t.Errorf("read by a handle from before: %q, %v", text, errno)
			}
			s.release(file, fh)
			s.daemon.api(t, 200, "PUT", grafts, object{"path": "/single", "source": filepath.Join(host, "data")})
			file = s.node("single", "file")
			fh = s.mustOpen(file, unix.O_RDONLY)
			if text, errno := s.read(file, fh); text != "CONTENT" || errno != 0 {
				t.Errorf("read of what took its place: %q, %v", text, errno)
			}
			s.release(file, fh)

			// Another share, which goes while its guest uses it, and this one knows nothing of it.
			socket := filepath.Join(filepath.Dir(s.daemon.control), "second.sock")
			s.daemon.api(t, 201, "POST", "/v1/shares", object{"tag": "second", "posix_lock": true, "flock": true, "xattr": true, "grafts": []object{
				{"path": "/", "source": filepath.Join(host, "data")},
			}})
			fe, err := vhosttest.Dial(socket)
			s.check(err)
			other := newGuest(t, fe, s.daemon.exited)
			other.init()
			second := other.node("file")
			if text, errno := other.read(second, other.mustOpen(second, unix.O_RDWR)); text != "CONTENT" || errno != 0 {
				t.Errorf("read in the second share: %q, %v", text, errno)
			}
			other.do(call{op: fuseproto.FUSE_FSYNC, node: second, args: args(fuseproto.FsyncIn{Fh: 1})})
			s.daemon.api(t, 409, "DELETE", "/v1/shares/second", nil)
			s.daemon.api(t, 204, "DELETE", "/v1/shares/second?force=true", nil)
			if _, err := fe.GetFeatures(); err == nil {
				t.Error("the share that was removed still answers")
			}
			if metrics := s.daemon.api(t, 200, "GET", "/metrics", nil); !strings.Contains(string(metrics), `share="share"`) {
				t.Errorf("metrics: %s", metrics)
			}
			s.daemon.api(t, 200, "GET", "/v1/stats", nil)
			if text, errno := s.read(created.NodeId, created.Fh); text != "text" || errno != 0 {
				t.Errorf("read at the end: %q, %v", text, errno)
			}
			s.release(created.NodeId, created.Fh)
			for _, path := range []string{"/mem", "/single"} {
				s.daemon.api(t, 204, "DELETE", grafts+"?path="+path, nil)
			}
		})
	}
}

// TestIdleShares adds a hundred shares that nobody uses. Each may cost 1 MiB of memory, and no time.
func TestIdleShares(t *testing.T) {
	const n, bound = 100, 1 << 20
	dir := ownedDir(t, 0)
	d, fe := startDaemon(t, configuration{name: "namespace", options: []string{"--sandbox", "namespace"}, managed: true}, dir, dir)
	if _, err := fe.GetFeatures(); err != nil { // it serves
		t.Fatal(err)
	}
	pids := []int{d.cmd.Process.Pid, d.server(t)}
	var before, after [2]usage
	for i, pid := range pids {
		before[i] = use(t, pid)
	}
	add := func(tag string) {
		d.api(t, 201, "POST", "/v1/shares", object{"tag": tag, "grafts": []object{{"path": "/", "source": dir}}})
	}
	for i := range n {
		add(fmt.Sprint(i))
	}
	for i, pid := range pids {
		after[i] = use(t, pid)
		t.Logf("%s: %d KiB, %d descriptors, %d threads for each share", [...]string{"keeper", "server"}[i],
			(after[i].private-before[i].private)/n/1024, (after[i].fds-before[i].fds)/n, (after[i].threads-before[i].threads)/n)
	}
	if each := (after[0].private + after[1].private - before[0].private - before[1].private) / n; each > bound {
		t.Errorf("%d bytes for each share, expected at most %d", each, bound)
	}
	// Nobody runs while nothing is asked of the shares. What was begun before may end meanwhile.
	runs := func() (runs int64) {
		for _, pid := range pids {
			runs += use(t, pid).switches
		}
		return runs
	}
	for deadline := time.Now().Add(patience); ; {
		first := runs()
		time.Sleep(500 * time.Millisecond)
		if more := runs() - first; more < n/2 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("threads were woken %d times in half a second: expected them to sleep", more)
		}
	}
	for i := range n {
		d.api(t, 204, "DELETE", "/v1/shares/"+fmt.Sprint(i), nil)
	}
	// Connections and what the collector closes go a little later. +1: a connection of this moment.
	for i, pid := range pids {
		for deadline := time.Now().Add(patience); use(t, pid).fds > before[i].fds+1; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d descriptors are left, and %d there were: %s", use(t, pid).fds, before[i].fds, openFiles(pid))
			}
		}
	}
}

// openFiles says what a process has open.
func openFiles(pid int) (files []string) {
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, link := range links {
		if file, err := os.Readlink(link); err == nil {
			files = append(files, file)
		}
	}
	return files
}

// server is the process that serves, the child of the one that was started.
func (d *daemon) server(t testing.TB) int {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range tasks {
		var pid int
		if text, err := os.ReadFile(path); err == nil {
			if _, err := fmt.Sscan(string(text), &pid); err == nil {
				return pid
			}
		}
	}
	t.Fatal("there is no serving process")
	return 0
}

// usage is what a process has.
type usage struct {
	private, switches int64 // bytes; voluntary context switches of all threads
	fds, threads      int
}

func use(t testing.TB, pid int) (u usage) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", pid)
	numbers := func(path string, keys ...string) (sum int64) {
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return 0 // a thread that has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(line, ":")
			var n int64
			if slices.Contains(keys, key) {
				if _, err := fmt.Sscan(value, &n); err != nil {
					t.Fatal(err)
				}
				sum += n
			}
		}
		return sum
	}
	u.private = numbers(proc+"smaps_rollup", "Private_Clean", "Private_Dirty") * 1024
	tasks, err := filepath.Glob(proc + "task/*/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		u.switches += numbers(task, "voluntary_ctxt_switches")
	}
	u.threads = len(tasks)
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		t.Fatal(err)
	}
	u.fds = len(fds)
	return u
}
