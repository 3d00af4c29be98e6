package program

import (
	"context"
	"os"
	"time"
)

// A Supervisor keeps a program running.
type Supervisor struct {
	line *os.File // the server's end
}

// Start starts the program and returns when it runs, has failed to, or ctx has ended. Afterwards it is kept running until Stop,
// whatever becomes of ctx.
func Start(ctx context.Context, c Config) (*Supervisor, error) { panic("skeleton") }

// Line returns the server's end of the line, for NewLine there. It is the caller's to close; there is one only. It is nil
// with Config.OnStart.
func (s *Supervisor) Line() *os.File { return s.line }

// Restart ends the program and starts it again, at once.
func (s *Supervisor) Restart() {}

// Stop ends the program for good: SIGTERM, and SIGKILL when ctx ends or after 5 s, and returns when nothing of it is left.
func (s *Supervisor) Stop(ctx context.Context) error { return nil }

// Status is how a program is doing.
type Status struct {
	PID      int           // 0 while it does not run
	Uptime   time.Duration // since it was started, 0 while it does not run
	Restarts uint64        // starts after the first
	Last     string        // how it ended the last time, "" if never
}

// Status returns how the program is doing.
func (s *Supervisor) Status() Status { return Status{} }
