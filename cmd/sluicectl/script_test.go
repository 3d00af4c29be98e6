package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sluicefs/sluice/control"
	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/controltest"
)

// forever is how long a script waits for what must come; it only ever passes when a test fails.
const forever = 30 * time.Second

// TestMain makes the test binary a sluicectl when a script runs it by that name.
func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"sluicectl": main}) }

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			s := &script{}
			env.Values[scriptKey{}] = s
			env.Defer(s.end)
			env.Setenv("TZ", "UTC")
			env.Setenv("GORACE", "atexit_sleep_ms=0") // with -race each process would end a second later
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"daemon": cmdDaemon,
			"stop":   cmdStop,
			"exits":  cmdExits,
			"guest":  cmdGuest,
			"emit":   cmdEmit,
			"fail":   cmdFail,
			"calls":  cmdCalls,
			"lines":  cmdLines,
		},
	})
}

// script is what one script has running: a daemon in memory behind a real socket.
type script struct {
	daemon *controltest.Daemon
	stop   func() error
}

type scriptKey struct{}

func of(ts *testscript.TestScript) *script { return ts.Value(scriptKey{}).(*script) }

// serve serves a new daemon at socket, until stop is called.
func serve(socket string) (d *controltest.Daemon, stop func() error, err error) {
	d = controltest.New()
	s, err := control.New(control.Config{Daemon: d, Unix: control.UnixListener{Path: socket}})
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx) }()
	return d, func() error { cancel(); return <-ended }, nil
}

func (s *script) end() {
	if s.stop != nil {
		_ = s.stop()
		s.stop = nil
	}
}

// daemon: starts a daemon whose control socket is $SLUICE_SOCKET, with Stats of a share "data".
func cmdDaemon(ts *testscript.TestScript, neg bool, args []string) {
	s := of(ts)
	if neg || len(args) != 0 || s.stop != nil {
		ts.Fatalf("usage: daemon, one at a time")
	}
	socket := ts.MkAbs("c.sock")
	var err error
	s.daemon, s.stop, err = serve(socket)
	ts.Check(err)
	info, err := s.daemon.Info(context.Background())
	ts.Check(err)
	info.Started = time.Now().Add(-(3*time.Hour + 2*time.Minute + 30*time.Second)).UTC()
	s.daemon.SetInfo(info)
	s.daemon.SetStats(at(0, shareStats("data", 1200, 30, 500), shareStats("other", 1, 0, 0)).stats)
	ts.Setenv("SLUICE_SOCKET", socket)
}

// stop: ends the daemon.
func cmdStop(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 || of(ts).stop == nil {
		ts.Fatalf("usage: stop")
	}
	of(ts).end()
}

// exits STATUS COMMAND...: runs a command that ends by itself with that status; stdout and stderr then look at its output.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS COMMAND...")
	}
	path, err := exec.LookPath(args[1]) // testscript.Main has put it into PATH
	ts.Check(err)
	var out, errOut bytes.Buffer
	cmd := exec.Command(path, args[2:]...)
	cmd.Dir = ts.MkAbs(".")
	for _, name := range []string{"PATH", "TZ", "GORACE", "SLUICE_SOCKET", "XDG_RUNTIME_DIR"} {
		if v := ts.Getenv(name); v != "" {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	cmd.Stdout, cmd.Stderr = &out, &errOut
	ts.Check(cmd.Start())
	timeout := time.AfterFunc(forever, func() { _ = cmd.Process.Kill() })
	err = cmd.Wait()
	timeout.Stop()
	_, _ = ts.Stdout().Write(out.Bytes())
	_, _ = ts.Stderr().Write(errOut.Bytes())
	if got := cmd.ProcessState.ExitCode(); strconv.Itoa(got) != args[0] {
		ts.Fatalf("exit status %d (%v), expected %s\n%s%s", got, err, args[0], out.String(), errOut.String())
	}
}

// guest TAG [PATH N]: a guest mounts the share, or has N files open in the graft at PATH.
func cmdGuest(ts *testscript.TestScript, neg bool, args []string) {
	switch {
	case neg || len(args) != 1 && len(args) != 3:
		ts.Fatalf("usage: guest TAG [PATH N]")
	case len(args) == 1:
		of(ts).daemon.Connect(args[0])
	default:
		n, err := strconv.ParseInt(args[2], 10, 64)
		ts.Check(err)
		of(ts).daemon.Open(args[0], args[1], n)
	}
}

// emit TAG KIND PATH [TO]: sends an event of 2026, of a directory if PATH ends in a slash. PATH may have Go's escapes.
func cmdEmit(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 || len(args) > 4 {
		ts.Fatalf("usage: emit TAG KIND PATH [TO]")
	}
	e := api.Event{Kind: args[1], Time: time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)}
	path, err := strconv.Unquote(`"` + args[2] + `"`)
	ts.Check(err)
	if e.Path, e.Dir = strings.CutSuffix(path, "/"); e.Path == "" {
		e.Path = "/"
	}
	if len(args) == 4 {
		e.To = args[3]
	}
	of(ts).daemon.Emit(args[0], e)
}

// fail METHOD CODE MESSAGE [HINT]: makes the next call of a method fail.
func cmdFail(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 || len(args) > 4 {
		ts.Fatalf("usage: fail METHOD CODE MESSAGE [HINT]")
	}
	e := &api.Error{Code: args[1], Message: args[2]}
	if len(args) == 4 {
		e.Hint = args[3]
	}
	of(ts).daemon.Fail(args[0], e)
}

// calls: what the daemon was asked to do, as standard output.
func cmdCalls(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: calls")
	}
	_, err := fmt.Fprintln(ts.Stdout(), strings.Join(of(ts).daemon.Calls(), "\n"))
	ts.Check(err)
}

// lines FILE N: waits until FILE, which a command in the background writes, has N lines.
func cmdLines(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: lines FILE N")
	}
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		text, err := os.ReadFile(ts.MkAbs(args[0]))
		if err == nil && bytes.Count(text, []byte("\n")) >= n {
			return
		}
		if time.Since(start) > forever {
			ts.Fatalf("%s has not got %d lines: %s", args[0], n, text)
		}
	}
}
