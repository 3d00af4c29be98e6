package daemon

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// patience is how long a script waits for what must come; it only ever passes when a test fails.
const patience = 30 * time.Second

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			s := &script{conns: map[string]*net.UnixConn{}}
			env.Values[scriptKey{}] = s
			env.Defer(s.cleanUp)
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, errors.New("unknown condition " + cond)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":  cmdExits,
			"daemon": cmdDaemon,
			"line":   cmdLine,
			"signal": cmdSignal,
			"ended":  cmdEnded,
			"dial":   cmdDial,
			"send":   cmdSend,
			"hangup": cmdHangup,
			"closed": cmdClosed,
			"deaf":   cmdDeaf,
			"stale":  cmdStale,
			"mode":   cmdMode,
			"api":    cmdAPI,
			"strike": cmdStrike,
		},
	})
}

// script is what one script has running: at most one daemon at a time, and front-ends by name.
type script struct {
	daemon *exec.Cmd
	stderr io.ReadCloser
	lines  chan string // of the daemon's standard error; closed at its end
	seen   strings.Builder
	conns  map[string]*net.UnixConn
}

type scriptKey struct{}

func of(ts *testscript.TestScript) *script { return ts.Value(scriptKey{}).(*script) }

func (s *script) cleanUp() {
	for _, c := range s.conns {
		_ = c.Close()
	}
	if s.daemon != nil {
		_ = s.daemon.Process.Kill()
		for range s.lines {
		}
		_ = s.daemon.Wait()
	}
}

// next returns the daemon's next line; ok is false at its end.
func (s *script) next(ts *testscript.TestScript) (line string, ok bool) {
	select {
	case line, ok = <-s.lines:
		if ok {
			s.seen.WriteString(line + "\n")
		}
		return line, ok
	case <-time.After(patience):
		ts.Fatalf("nothing from the daemon; it said so far:\n%s", s.seen.String())
		return "", false
	}
}

// command makes the command args, run in the script's directory and environment.
func command(ts *testscript.TestScript, args []string) *exec.Cmd {
	path := ""
	for dir := range strings.SplitSeq(ts.Getenv("PATH"), ":") {
		if _, err := os.Stat(dir + "/" + args[0]); err == nil {
			path = dir + "/" + args[0]
			break
		}
	}
	cmd := exec.Command(path, args[1:]...)
	cmd.Dir = ts.Getenv("WORK")
	cmd.Env = []string{"GORACE=atexit_sleep_ms=0"} // with -race each process would end a second later
	for _, name := range []string{"PATH", "LISTEN_FDS", "LISTEN_PID", "STOP_TIMEOUT", "HALVES"} {
		if v := ts.Getenv(name); v != "" {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	return cmd
}

// exits STATUS COMMAND...: runs a command that ends by itself with that status; stdout and stderr then look at its output.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS COMMAND...")
	}
	var out, errOut bytes.Buffer
	cmd := command(ts, args[1:])
	cmd.Stdout, cmd.Stderr = &out, &errOut
	ts.Check(cmd.Start())
	timeout := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	err := cmd.Wait()
	timeout.Stop()
	_, _ = ts.Stdout().Write(out.Bytes())
	_, _ = ts.Stderr().Write(errOut.Bytes())
	if got := cmd.ProcessState.ExitCode(); strconv.Itoa(got) != args[0] {
		ts.Fatalf("exit status %d (%v), expected %s\n%s%s", got, err, args[0], out.String(), errOut.String())
	}
}

// daemon [-listening | -connected] COMMAND...: starts the daemon; with an option it inherits such a socket as fd 3. The
// other end of the connected one is the front-end "inherited"; the listening one is bound to inherited.sock.
func cmdDaemon(ts *testscript.TestScript, neg bool, args []string) {
	s := of(ts)
	if neg || len(args) == 0 || s.daemon != nil {
		ts.Fatalf("usage: daemon [-listening | -connected] COMMAND..., one at a time")
	}
	var inherited *os.File
	switch args[0] {
	case "-listening":
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: ts.MkAbs("inherited.sock")})
		ts.Check(err)
		ln.SetUnlinkOnClose(false)
		inherited, err = ln.File()
		ts.Check(err)
		ts.Check(ln.Close())
		args = args[1:]
	case "-connected":
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		ts.Check(err)
		inherited = os.NewFile(uintptr(fds[0]), "daemon's end")
		ours := os.NewFile(uintptr(fds[1]), "front-end's end")
		conn, err := net.FileConn(ours)
		ts.Check(err)
		ts.Check(ours.Close())
		s.conns["inherited"] = conn.(*net.UnixConn)
		args = args[1:]
	}
	cmd := command(ts, args)
	if inherited != nil {
		cmd.ExtraFiles = []*os.File{inherited}
	}
	pipe, err := cmd.StderrPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	if inherited != nil {
		ts.Check(inherited.Close())
	}
	s.daemon, s.stderr, s.lines = cmd, pipe, make(chan string)
	s.seen.Reset()
	go func(lines chan<- string) {
		defer close(lines)
		for sc := bufio.NewScanner(pipe); sc.Scan(); {
			lines <- sc.Text()
		}
	}(s.lines)
}

// line TEXT: waits for the next line of the daemon's standard error that contains TEXT.
func cmdLine(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: line TEXT")
	}
	s := of(ts)
	for {
		line, ok := s.next(ts)
		if !ok {
			ts.Fatalf("the daemon ended without saying %q:\n%s", args[0], s.seen.String())
		}
		if strings.Contains(line, args[0]) {
			return
		}
	}
}

// signal NAME: sends a signal to the daemon.
func cmdSignal(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 || unix.SignalNum(args[0]) == 0 {
		ts.Fatalf("usage: signal SIGNAME")
	}
	ts.Check(of(ts).daemon.Process.Signal(unix.SignalNum(args[0])))
}

// ended STATUS: waits for the daemon's end and looks at its status; stderr then looks at all that it said.
func cmdEnded(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: ended STATUS")
	}
	s := of(ts)
	for {
		if _, ok := s.next(ts); !ok {
			break
		}
	}
	_ = s.daemon.Wait()
	_, _ = ts.Stderr().Write([]byte(s.seen.String()))
	got := s.daemon.ProcessState.ExitCode()
	s.daemon = nil
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("exit status %d, expected %s\n%s", got, args[0], s.seen.String())
	}
}

// [!] dial NAME PATH: connects a front-end; negated, the connection must be refused.
func cmdDial(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: dial NAME PATH")
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: ts.MkAbs(args[1])})
	if neg {
		if !errors.Is(err, unix.ECONNREFUSED) {
			ts.Fatalf("expected a refusal, got %v", err)
		}
		return
	}
	ts.Check(err)
	of(ts).conns[args[0]] = conn
}

// send NAME TEXT: has a front-end send TEXT.
func cmdSend(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 || of(ts).conns[args[0]] == nil {
		ts.Fatalf("usage: send NAME TEXT")
	}
	_, err := of(ts).conns[args[0]].Write([]byte(args[1]))
	ts.Check(err)
}

// hangup NAME: closes a front-end's connection.
func cmdHangup(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 || of(ts).conns[args[0]] == nil {
		ts.Fatalf("usage: hangup NAME")
	}
	ts.Check(of(ts).conns[args[0]].Close())
	delete(of(ts).conns, args[0])
}

// closed NAME: waits for the daemon to close a front-end's connection.
func cmdClosed(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 || of(ts).conns[args[0]] == nil {
		ts.Fatalf("usage: closed NAME")
	}
	conn := of(ts).conns[args[0]]
	ts.Check(conn.SetReadDeadline(time.Now().Add(patience)))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		ts.Fatalf("read %d bytes (%v), expected the end", n, err)
	}
}

// api STATUS METHOD PATH [BODY]: asks the control API at the socket c, as Kata's NydusClient does; stdout then looks at the answer.
// WORK in the body is the script's directory.
func cmdAPI(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 || len(args) > 4 {
		ts.Fatalf("usage: api STATUS METHOD PATH [BODY]")
	}
	var body io.Reader
	if len(args) == 4 {
		body = strings.NewReader(strings.ReplaceAll(args[3], "WORK", ts.Getenv("WORK")))
	}
	r, err := http.NewRequest(args[1], "http://unix"+args[2], body)
	ts.Check(err)
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", ts.MkAbs("c"))
	}}
	defer transport.CloseIdleConnections()
	answer, err := (&http.Client{Transport: transport, Timeout: patience}).Do(r)
	ts.Check(err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	ts.Check(err)
	_, _ = ts.Stdout().Write(text)
	if strconv.Itoa(answer.StatusCode) != args[0] {
		ts.Fatalf("status %d, expected %s: %s", answer.StatusCode, args[0], text)
	}
}

// strike SIGNAL: sends a signal to the serving process, the daemon's child.
func cmdStrike(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 || unix.SignalNum(args[0]) == 0 {
		ts.Fatalf("usage: strike SIGNAME")
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", of(ts).daemon.Process.Pid))
	ts.Check(err)
	for _, path := range tasks {
		text, err := os.ReadFile(path)
		ts.Check(err)
		if child, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
			ts.Check(unix.Kill(child, unix.SignalNum(args[0])))
			return
		}
	}
	ts.Fatalf("the daemon has no child")
}

// deaf: closes the pipe that is the daemon's standard error.
func cmdDeaf(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: deaf")
	}
	ts.Check(of(ts).stderr.Close())
}

// stale PATH: leaves a socket behind that nobody listens on.
func cmdStale(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: stale PATH")
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: ts.MkAbs(args[0])})
	ts.Check(err)
	ln.SetUnlinkOnClose(false)
	ts.Check(ln.Close())
}

// mode PATH MODE: compares type and permissions, as ls writes them.
func cmdMode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: mode PATH MODE")
	}
	info, err := os.Lstat(ts.MkAbs(args[0]))
	ts.Check(err)
	if got := info.Mode().String(); got != args[1] {
		ts.Fatalf("%s has mode %s, expected %s", args[0], got, args[1])
	}
}
