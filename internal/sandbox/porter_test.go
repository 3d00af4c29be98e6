package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// firstThread is the scenario of TestPorterOnFirstThread.
const firstThread = "first thread"

// The main goroutine stays on the first thread if it is locked while packages are initialized.
var _ = func() struct{} {
	if os.Getenv(scenarioVar) == firstThread {
		runtime.LockOSThread()
	}
	return struct{}{}
}()

// porterOnFirstThread starts a porter on the one thread that cannot end, which TestMain calls it on.
func porterOnFirstThread() error {
	if unix.Gettid() != unix.Getpid() {
		return errors.New("this is not the first thread: the test shows nothing")
	}
	p := &porter{work: make(chan func() error), tried: make(chan error)}
	p.run()
	var tid int
	if err := p.do(func() error { tid = unix.Gettid(); return nil }); err != nil {
		return err
	}
	if tid == unix.Getpid() || tid != p.tid {
		return fmt.Errorf("it works on thread %d of process %d, and says %d", tid, unix.Getpid(), p.tid)
	}
	return p.end()
}

func TestPorterOnFirstThread(t *testing.T) {
	cmd := command(t, user, scenario{})
	cmd.Env = append(cmd.Env, scenarioVar+"="+firstThread)
	if _, status, said := run(t, cmd); status != 0 || said != "" {
		t.Errorf("exit status %d: %s", status, said)
	}
}

// TestClose enters without confining, as a daemon does whose start fails half way.
func TestClose(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir := tree(t, user)
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := count()
	box, err := New(None)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := box.Confine(0); err == nil {
		t.Error("confined before it was entered")
	}
	if fd := box.ProcSelfFD(); fd != -1 {
		t.Errorf("/proc/self/fd is %d before it was entered", fd)
	}
	if paths, err := box.Enter(View{Sources: []Source{{Path: dir}}}); err != nil || paths[0] != dir {
		t.Fatal(paths, err)
	}
	if _, err := box.Enter(View{}); err == nil {
		t.Error("entered twice")
	}
	for range 2 {
		if err := box.Close(); err != nil {
			t.Error(err)
		}
	}
	if after := count(); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
	if box.Orphaned() != nil {
		t.Error("it can be orphaned, and there is no launcher")
	}
}
