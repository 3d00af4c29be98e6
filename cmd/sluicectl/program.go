package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
)

// Exit statuses.
const (
	exitOK          = 0
	exitFailed      = 1 // the daemon refused or failed
	exitUsage       = 2
	exitUnreachable = 3 // no daemon; what systemctl status says of a service that is not running
	exitInterrupted = 130
)

// codeUnreachable is the code of errors in JSON where no daemon said one.
const codeUnreachable = "unreachable"

// program is one run of sluicectl.
type program struct {
	out, err io.Writer
	getenv   func(string) string
	uid      int
	now      func() time.Time
	after    func(time.Duration) <-chan time.Time
	// screen says how large the terminal is that out is; nil if it is none.
	screen func() extent
	// patient says that err is a terminal, where it can be told what is being waited for.
	patient bool

	socket string // --socket
	json   bool   // --json
}

// extent is the size of a terminal, in columns and lines.
type extent struct{ width, height int }

// usageError is a command line that cannot be run, with the command to be asked for help.
type usageError struct {
	error
	command string
}

func (e usageError) Unwrap() error { return e.error }

// run runs the command line args and returns the exit status.
func (p *program) run(ctx context.Context, args []string) int {
	root := newRoot(p)
	root.SetArgs(args)
	root.SetOut(p.out)
	root.SetErr(p.err)
	err := root.ExecuteContext(ctx)
	var (
		usage       usageError
		unreachable *client.UnreachableError
		refused     *api.Error
	)
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		p.complain(fmt.Sprintf("%v (see %s --help)", usage.error, usage.command))
		return exitUsage
	case ctx.Err() != nil:
		p.complain("interrupted: what was asked for may have been done or not; sluicectl status shows what is there")
		return exitInterrupted
	case errors.As(err, &unreachable):
		p.fail(&api.Error{Code: codeUnreachable, Message: p.explain(unreachable)})
		return exitUnreachable
	case errors.As(err, &refused):
		p.fail(refused)
		return exitFailed
	default:
		p.fail(&api.Error{Code: api.CodeInternal, Message: err.Error()})
		return exitFailed
	}
}

// fail tells of an error, in the format that was asked for.
func (p *program) fail(e *api.Error) {
	if p.json {
		_ = encode(p.err, e)
		return
	}
	p.complain(e.Error())
}

// complain writes one line to standard error.
func (p *program) complain(text string) {
	fmt.Fprintln(p.err, "sluicectl: "+oneLine(text))
}

// encode writes v as one line of JSON.
func encode(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// explain says what to do about a daemon that is not there.
func (p *program) explain(e *client.UnreachableError) string {
	if e.Connected || errors.Is(e.Err, fs.ErrPermission) {
		return e.Error()
	}
	if p.socket == "" {
		e = &client.UnreachableError{Socket: strings.Join(p.sockets(), " or "), Err: e.Err}
	}
	return e.Error() + ", or give --socket"
}

// systemSocket is where the daemon of the system listens.
const systemSocket = "/run/sluice/control.sock"

// sockets are where the daemon may be if --socket does not say.
func (p *program) sockets() []string {
	if s := p.getenv("SLUICE_SOCKET"); s != "" {
		return []string{s}
	}
	all := []string{systemSocket}
	if dir := p.getenv("XDG_RUNTIME_DIR"); dir != "" && p.uid != 0 {
		all = append(all, filepath.Join(dir, "sluice/control.sock"))
	}
	return all
}

// dial makes a client of the daemon: the first that has a socket.
func (p *program) dial() (*client.Client, error) {
	socket := p.socket
	if socket == "" {
		all := p.sockets()
		socket = all[0]
		for _, s := range all {
			if _, err := os.Stat(s); err == nil {
				socket = s
				break
			}
		}
	}
	return client.New(client.Config{Socket: socket})
}

// ask has the daemon do something: what, after "waiting for the daemon to", is told if it takes long.
func (p *program) ask(cmd *cobra.Command, what string, f func(context.Context, *client.Client) error) error {
	c, err := p.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	return p.waiting(what, func() error { return f(cmd.Context(), c) })
}

// advise gives an answer with this code a hint in the words of our options.
func advise(err error, code, hint string) error {
	var e *api.Error
	if !errors.As(err, &e) || e.Code != code {
		return err
	}
	return &api.Error{Code: e.Code, Message: e.Message, Hint: hint}
}

// Hints at where to find what was not found.
const (
	hintShares = "sluicectl share ls lists those there are"
	hintGrafts = "sluicectl status lists the shares there are, and sluicectl graft ls the grafts of one"
)

// patience is how long a call takes before it is told of.
const patience = time.Second

// waiting calls f, and tells on a terminal what it is waiting for while that takes long.
func (p *program) waiting(what string, f func() error) error {
	if !p.patient {
		return f()
	}
	done, told := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(told)
		for n := 0; ; n++ {
			select {
			case <-done:
				if n > 0 {
					fmt.Fprint(p.err, "\r\x1b[K")
				}
				return
			case <-p.after(patience):
				fmt.Fprintf(p.err, "\r\x1b[Kwaiting for the daemon to %s … %ds", what, n+1)
			}
		}
	}()
	err := f()
	close(done)
	<-told
	return err
}
