// Command sluicectl steers a running sluiced: shares and grafts, what they do, and what changes in them.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

//go:generate sh -c "go run . man >../../docs/man/sluicectl.1"
//go:generate sh -c "go run . completion bash >../../contrib/completions/sluicectl.bash"
//go:generate sh -c "go run . completion zsh >../../contrib/completions/_sluicectl"
//go:generate sh -c "go run . completion fish >../../contrib/completions/sluicectl.fish"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program whatever it does
	p := program{
		out:    os.Stdout,
		err:    os.Stderr,
		getenv: os.Getenv,
		uid:    os.Getuid(),
		now:    time.Now,
		after:  time.After,
		screen: screenOf(os.Stdout),
	}
	p.patient = screenOf(os.Stderr) != nil
	os.Exit(p.run(ctx, os.Args[1:]))
}

// screenOf is how to ask for the size of the terminal that f is, nil if it is none that can move its cursor.
func screenOf(f *os.File) func() extent {
	if _, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err != nil || os.Getenv("TERM") == "dumb" {
		return nil
	}
	return func() extent {
		ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
		if err != nil || ws.Col == 0 || ws.Row == 0 {
			return extent{80, 24} // a serial line says nothing
		}
		return extent{int(ws.Col), int(ws.Row)}
	}
}
