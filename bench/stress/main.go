// Stress drives one vhost-user-fs server, any, in every way in which a wake-up can get lost, and says what the longest waits were
// due to. It fails when one is lost.
//
//	sluiced --socket-path s --shared-dir DIR --num-request-queues 4 & stress -socket s -pid $! -queues 4 -n 1e9
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"github.com/sluicefs/sluice/bench/command"
	"github.com/sluicefs/sluice/bench/frontend"
)

func main() { os.Exit(command.Run("stress", run)) }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("stress", flag.ContinueOnError)
	flags.SetOutput(stderr)
	c := frontend.Config{}
	s := frontend.StressConfig{}
	flags.StringVar(&c.Socket, "socket", "", "`path` of the server's vhost-user socket")
	flags.IntVar(&s.PID, "pid", 0, "process `id` of the server, without which a lost wake-up is only seen as a stall")
	requests := flags.Float64("n", 1e7, "`number` of requests, 1e9 for the real thing")
	flags.IntVar(&c.Queues, "queues", 1, "`number` of request queues to drive")
	flags.IntVar(&c.Depth, "depth", 32, "the most requests under way on each queue, a `number`")
	flags.IntVar(&c.RingSize, "ring", 128, "`descriptors` of each ring, a power of 2")
	flags.DurationVar(&s.Window, "window", 50*time.Microsecond, "`duration` for which the server looks at its rings before it sleeps")
	flags.DurationVar(&s.Patience, "patience", 5*time.Millisecond, "`duration` of a wait that is looked into")
	flags.DurationVar(&c.Stall, "stall", 10*time.Second, "`duration` without an answer after which to give up")
	flags.Uint64Var(&s.Seed, "seed", uint64(time.Now().UnixNano()), "`number` that chance begins with")
	if err := command.Parse(flags, args); err != nil {
		return err
	}
	if flags.NArg() > 0 || *requests < 1 {
		return fmt.Errorf("unexpected %q, or no requests: see -help", flags.Args())
	}
	s.Requests = uint64(*requests)
	// Threads of the driver's that wait for each other would look like delays of the server's.
	runtime.GOMAXPROCS(runtime.NumCPU() + c.Queues + 2)
	f, err := frontend.Connect(ctx, c)
	if err != nil {
		return err
	}
	r, err := f.Stress(ctx, s)
	fmt.Fprintf(stdout, "seed %d: %d requests on %d queues in %v, %d kicks, %d notifications; %d waits beyond %v\n",
		s.Seed, r.Requests, c.Queues, r.Elapsed.Round(time.Millisecond), r.Kicks, r.Notifications, r.Delays, s.Patience)
	for _, d := range r.Longest {
		fmt.Fprintf(stdout, "  %v on queue %d: %s\n", d.Took.Round(time.Microsecond), d.Queue, d.Cause)
	}
	return errors.Join(err, f.Close())
}
