package escape_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
)

// controlSocket is in the scratch directory.
const controlSocket = "control.sock"

// daemon is a running sluiced. It ends with its only connection, which it has inherited, or, managed, when it is told to: so nothing
// outlives the tests.
type daemon struct {
	cmd    *exec.Cmd
	log    log
	exited chan struct{}
	err    error // how it ended, once exited is closed
}

// log keeps what the daemon says.
type log struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// startDaemon starts the daemon with dir as its working directory and returns the front-end of its connection. bait are
// descriptors that it inherits behind the connection's, which is 3.
func startDaemon(t testing.TB, cfg configuration, share, dir string, bait ...*os.File) (*daemon, *vhosttest.FrontEnd) {
	t.Helper()
	fe, back, err := vhosttest.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	conn, err := back.File()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	options := []string{"--shared-dir", share, "--fd", "3", "--xattr", "--num-request-queues", "1"}
	if cfg.managed {
		options = append(options, "--tag", "escape", "--control-socket", filepath.Join(filepath.Dir(dir), controlSocket))
	}
	more, err := testguest.TraceArgs(cfg.surroundings(), cfg.uid, cfg.options)
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{cmd: exec.Command(program, append(options, more...)...), exited: make(chan struct{})}
	d.cmd.Dir = dir
	d.cmd.ExtraFiles = append([]*os.File{conn}, bait...)
	d.cmd.Stdout, d.cmd.Stderr = &d.log, &d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: cfg.uid, Gid: cfg.uid}}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.exited)
	}()
	t.Cleanup(func() {
		_ = fe.Close()
		if cfg.managed {
			_ = d.cmd.Process.Signal(syscall.SIGTERM) // it could be told to serve something else
		}
		select {
		case <-d.exited:
			if d.err != nil {
				t.Errorf("the daemon ended with %v, expected status 0", d.err)
			}
		case <-time.After(patience):
			t.Error("the daemon has not ended with its front-end")
			_ = d.cmd.Process.Kill()
			<-d.exited
		}
		if t.Failed() {
			t.Logf("daemon:\n%s", &d.log)
		}
	})
	return d, fe
}

// alive says whether the daemon has not ended.
func (d *daemon) alive() bool {
	select {
	case <-d.exited:
		return false
	default:
		return true
	}
}

// openFile is a descriptor of the daemon's.
type openFile struct {
	path  string
	flags int // open(2)'s
}

// openFiles lists what the daemon and the processes that it has started have open.
func (d *daemon) openFiles(t testing.TB) []openFile {
	t.Helper()
	var files []openFile
	pids := []string{fmt.Sprint(d.cmd.Process.Pid)}
	for len(pids) > 0 {
		proc := filepath.Join("/proc", pids[0])
		entries, err := os.ReadDir(filepath.Join(proc, "fd"))
		if err != nil {
			t.Fatalf("the daemon has gone: %v\n%s", err, &d.log)
		}
		for _, e := range entries {
			// One that is closed meanwhile does not count.
			target, err := os.Readlink(filepath.Join(proc, "fd", e.Name()))
			info, infoErr := os.ReadFile(filepath.Join(proc, "fdinfo", e.Name()))
			if err != nil || infoErr != nil {
				continue
			}
			f := openFile{path: target}
			if _, err := fmt.Sscanf(string(info), "pos:\t%d\nflags:\t%o", new(int64), &f.flags); err != nil {
				t.Fatalf("parse fdinfo %q: %v", info, err)
			}
			files = append(files, f)
		}
		tasks, err := filepath.Glob(filepath.Join(proc, "task/*/children"))
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			// A thread may have ended since.
			children, _ := os.ReadFile(task)
			pids = append(pids, strings.Fields(string(children))...)
		}
		pids = pids[1:]
	}
	return files
}
