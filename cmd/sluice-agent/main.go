// Command sluice-agent runs in a guest and has its kernel notice what the host changes in a share, so that inotify fires there.
//
// It follows the share's events and makes, on the mount, the system call that each event's watchers are to hear of. The server
// answers those from what the host has done already: nothing is changed by them. See docs/inotify.md.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
)

const usage = `Usage: sluice-agent --mount DIR --connect ADDRESS [OPTION...]

Makes inotify in this guest fire for what the host changes in a share.

  --mount DIR        where the share is mounted, for reading and writing
  --connect ADDRESS  where its events come from:
                       vsock:2:PORT   a port of the host (1 instead of 2: of this machine)
                       unix:PATH      a socket in this guest
                       stdin          standard input, without a request: a line of JSON for each event
  --tag TAG          the share; without, what is mounted at DIR
  --close-write      have a change of a file fire IN_OPEN and IN_CLOSE_WRITE, too
  --state FILE       remember there which event was the last, for the agent that is started after this one; best where
                       nothing outlives the guest's boot, as /run
  --once             end with the stream, and do not connect again
  --version          say which version this is
  --help             say this

Exit status: 0 after --once, --help and --version, 1 if something failed, 2 if the command line is wrong.
`

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

type options struct {
	mount, connect, tag, state string
	closeWrite, once           bool
}

func main() {
	// The server knows a helper by the id of the thread that asks.
	runtime.LockOSThread()
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

func run(args []string, stdin, stdout *os.File, stderr io.Writer) int {
	var o options
	flags := flag.NewFlagSet("sluice-agent", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.mount, "mount", "", "")
	flags.StringVar(&o.connect, "connect", "", "")
	flags.StringVar(&o.tag, "tag", "", "")
	flags.StringVar(&o.state, "state", "", "")
	flags.BoolVar(&o.closeWrite, "close-write", false, "")
	flags.BoolVar(&o.once, "once", false, "")
	version := flags.Bool("version", false, "")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return exitOK
	case err == nil && *version:
		fmt.Fprintln(stdout, "sluice-agent", moduleVersion())
		return exitOK
	case err == nil:
		err = o.validate(flags.Args())
	}
	if err != nil {
		fmt.Fprintf(stderr, "sluice-agent: %v; see sluice-agent --help\n", err)
		return exitUsage
	}
	a := &agent{options: o, stdin: stdin, log: &limited{to: stderr, now: time.Now}}
	if err := a.run(); err != nil {
		fmt.Fprintf(stderr, "sluice-agent: %v\n", err)
		return exitFailed
	}
	return exitOK
}

func (o *options) validate(rest []string) error {
	switch {
	case len(rest) > 0:
		return fmt.Errorf("unexpected argument %q", rest[0])
	case o.mount == "":
		return errors.New("--mount is missing: expected the directory where the share is mounted")
	case o.connect == "":
		return errors.New("--connect is missing: expected vsock:CID:PORT, unix:PATH or stdin")
	}
	_, err := parseAddress(o.connect)
	return err
}

func moduleVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// agent follows a stream of events and replays them.
type agent struct {
	options
	stdin *os.File
	log   *limited

	r      *replayer
	saved  *state    // nil without --state
	last   uint64    // ID of the last event
	at     time.Time // its time, by the host's clock
	behind bool      // the server has forgotten some since
	counts struct{ replayed, skipped, failed uint64 }
}

const (
	minBackoff = 100 * time.Millisecond
	maxBackoff = 10 * time.Second
)

func (a *agent) run() error {
	root, err := openMount(a.mount)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	if a.tag == "" {
		if a.tag, err = mountedAt(root); err != nil {
			return err
		}
	}
	a.r = &replayer{root: root, closeWrite: a.closeWrite}
	if a.state != "" {
		if a.saved, err = openState(a.state); err != nil {
			return err
		}
		defer a.saved.close()
		a.last, a.at = a.saved.load()
	}
	address, err := parseAddress(a.connect)
	if err != nil {
		return err
	}
	for backoff := minBackoff; ; backoff = min(2*backoff, maxBackoff) {
		before := a.last
		err := a.follow(address)
		if a.once || address.stdin {
			fmt.Fprintf(a.log.to, "sluice-agent: %d events replayed, %d skipped, %d failed\n", a.counts.replayed, a.counts.skipped, a.counts.failed)
			return err
		}
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		a.log.printf("%v; connect again", err)
		if a.last != before {
			backoff = minBackoff
		}
		time.Sleep(backoff)
	}
}

// follow replays the events of one stream, to its end.
func (a *agent) follow(address address) error {
	conn := a.stdin
	if !address.stdin {
		var err error
		if conn, err = address.dial(); err != nil {
			return err
		}
		defer conn.Close()
		if _, err := conn.WriteString(request(a.tag, a.last)); err != nil {
			return fmt.Errorf("ask for events: %w", err)
		}
	}
	s := newStream(conn)
	if !address.stdin {
		if err := s.head(); err != nil {
			return err
		}
	}
	for {
		e, err := s.next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		if err := a.event(&e); err != nil {
			return err
		}
		if s.idle() {
			a.catchUp()
		}
	}
}

// catchUp makes up for what the server has forgotten, once there is something that it remembers, or nothing more.
func (a *agent) catchUp() {
	if !a.behind {
		return
	}
	a.behind = false
	a.log.printf("too far behind: looking at everything again")
	if err := a.r.replay(&api.Event{Kind: api.EventRescan, Path: "/", Dir: true}); err != nil {
		a.log.printf("look at everything again: %v", err)
	}
	a.save()
}

// event replays one event. Only what makes the rest of the stream useless is an error.
func (a *agent) event(e *api.Event) error {
	switch e.Kind {
	case api.EventHello:
		if e.Token != "" && !isToken(e.Token) {
			return errors.New("read events: hello has a token that is not 32 hexadecimal digits")
		}
		// Without one nothing is watched yet; there will be another hello.
		a.r.token = e.Token
		if a.last == 0 {
			a.reached(e)
		}
		return nil
	case api.EventLimit:
		a.log.printf("%s is beyond a limit of its graft: its changes are not told", e.Path)
		return nil
	}
	if a.r.token == "" {
		return errors.New("read events: no hello with a token came before the first")
	}
	if !a.behind {
		a.r.since = a.at
	}
	err := a.r.replay(e)
	a.behind = a.behind || errors.Is(err, errUnknown)
	a.reached(e)
	switch {
	case errors.Is(err, errUnknown):
		a.counts.skipped++
	case err == nil:
		a.counts.replayed++
	case errors.Is(err, errSkip):
		a.counts.skipped++
	default:
		a.counts.failed++
		a.log.printf("replay %s of %s: %v", e.Kind, e.Path, err)
	}
	return nil
}

// reached notes that e is dealt with.
func (a *agent) reached(e *api.Event) {
	a.last, a.at = e.ID, e.Time
	a.save()
}

// save is for the next agent, which has to look at everything again if this one had to, and did not come to it.
func (a *agent) save() {
	if a.saved == nil || a.behind {
		return
	}
	if err := a.saved.store(a.last, a.at); err != nil {
		a.log.printf("%v", err)
	}
}

// limited is a log that nobody can fill: so many lines in so long.
type limited struct {
	to      io.Writer
	now     func() time.Time
	begun   time.Time
	lines   int
	leftOut int
}

const (
	linesPerSpell = 20
	spell         = time.Minute
)

func (l *limited) printf(format string, args ...any) {
	now := l.now()
	if now.Sub(l.begun) >= spell {
		if l.leftOut > 0 {
			fmt.Fprintf(l.to, "sluice-agent: %d lines left out\n", l.leftOut)
		}
		l.begun, l.lines, l.leftOut = now, 0, 0
	}
	if l.lines++; l.lines > linesPerSpell {
		l.leftOut++
		return
	}
	fmt.Fprintf(l.to, "sluice-agent: "+format+"\n", args...)
}
