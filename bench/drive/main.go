// Drive drives one vhost-user-fs server, any, with one workload and says what it took.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/sluicefs/sluice/bench/command"
	"github.com/sluicefs/sluice/bench/frontend"
	"github.com/sluicefs/sluice/bench/meter"
)

func main() { os.Exit(command.Run("drive", run)) }

// report is what is printed; per operation unless the name says otherwise.
type report struct {
	Workload      string   `json:"workload"`
	Depth         int      `json:"depth"`
	Queues        int      `json:"queues"`
	Layout        string   `json:"layout"`
	Wait          string   `json:"wait"`
	Ops           uint64   `json:"ops"`      // of the whole run
	Requests      uint64   `json:"requests"` // of the whole run
	Bytes         uint64   `json:"bytes"`    // of the whole run
	Seconds       float64  `json:"seconds"`  // of the whole run
	OpsPerSecond  float64  `json:"ops_per_second"`
	P50           float64  `json:"p50_us"`
	P99           float64  `json:"p99_us"`
	P999          float64  `json:"p999_us"`
	Kicks         float64  `json:"kicks_per_op"`
	Notifications float64  `json:"notifications_per_op"`
	Server        *cost    `json:"server,omitempty"`          // with -pid
	Syscalls      *float64 `json:"syscalls_per_op,omitempty"` // with -syscalls
}

// cost is what the server has used, per operation.
type cost struct {
	CPU         float64 `json:"cpu_us_per_op"`
	User        float64 `json:"user_us_per_op"`
	System      float64 `json:"system_us_per_op"`
	Voluntary   float64 `json:"voluntary_switches_per_op"`
	Involuntary float64 `json:"involuntary_switches_per_op"`
	RSS         uint64  `json:"rss_bytes"`
	Private     uint64  `json:"private_bytes"`
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("drive", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var c frontend.Config
	flags.StringVar(&c.Socket, "socket", "", "`path` of the server's vhost-user socket")
	flags.StringVar(&c.Dir, "dir", "", "the `directory` that the server shares: what the workloads need is made there first, and what was written is verified there")
	name := flags.String("workload", "getattr", "`name` of the workload; list says which there are")
	flags.IntVar(&c.Depth, "depth", 1, "`number` of operations under way on each queue")
	flags.IntVar(&c.Queues, "queues", 1, "`number` of request queues to drive")
	flags.IntVar(&c.RingSize, "ring", 0, "`descriptors` of each ring, a power of 2 (default 512)")
	layout := flags.String("layout", "pages", "how buffers lie: `pages` of 4 KiB, as Linux has them, or contiguous")
	wait := flags.String("wait", "poll", "what to do while there is nothing to reap: `poll` or sleep")
	limit := flags.Duration("time", 2*time.Second, "`duration` of the run")
	ops := flags.Uint64("ops", 0, "end after this `number` of operations, if the time is not up before")
	warm := flags.Duration("warm", 200*time.Millisecond, "`duration` of a run before that does not count")
	cpus := flags.String("cpus", "", "CPUs to run on, a `list` as in 0,2; any by default")
	flags.DurationVar(&c.Stall, "stall", 0, "`duration` without an answer after which to give up (default 10s)")
	pid := flags.Int("pid", 0, "process `id` of the server, to say what it and its children use")
	syscalls := flags.Bool("syscalls", false, "count the system calls of -pid too, in a second run; takes root")
	asJSON := flags.Bool("json", false, "print JSON")
	if err := command.Parse(flags, args); err != nil {
		return err
	}
	if err := choose(&c, *layout, *wait, *cpus); err != nil {
		return err
	}
	if *name == "list" {
		for _, w := range frontend.Workloads() {
			fmt.Fprintf(stdout, "%-12s %s\n", w.Name, w.Doc)
		}
		return nil
	}
	w, ok := frontend.Find(*name)
	switch {
	case !ok:
		return fmt.Errorf("no workload is called %q, see -workload list", *name)
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q, all are options: see -help", flags.Arg(0))
	case c.Socket == "":
		return errors.New("no socket: give the server's with -socket")
	case *syscalls && *pid == 0:
		return errors.New("-syscalls needs the server's -pid")
	}
	if c.Dir != "" {
		if err := frontend.MakeTree(c.Dir); err != nil {
			return err
		}
	}
	r, err := drive(ctx, c, w, frontend.Limit{Ops: *ops, Time: *limit}, *warm, *pid, *syscalls)
	if err != nil {
		return err
	}
	r.Layout, r.Wait = *layout, *wait
	if *asJSON {
		return json.NewEncoder(stdout).Encode(r)
	}
	r.print(stdout)
	return nil
}

// choose sets what options say in words.
func choose(c *frontend.Config, layout, wait, cpus string) error {
	switch layout {
	case "pages":
		c.Layout = frontend.Pages
	case "contiguous":
		c.Layout = frontend.Contiguous
	default:
		return fmt.Errorf("-layout %q, expected pages or contiguous", layout)
	}
	switch wait {
	case "poll":
		c.Wait = frontend.Poll
	case "sleep":
		c.Wait = frontend.Sleep
	default:
		return fmt.Errorf("-wait %q, expected poll or sleep", wait)
	}
	var err error
	if c.CPUs, err = command.CPUs(cpus); err != nil {
		return fmt.Errorf("-cpus: %w", err)
	}
	return nil
}

// drive runs w and meters the server meanwhile.
func drive(ctx context.Context, c frontend.Config, w frontend.Workload, l frontend.Limit, warm time.Duration, pid int, syscalls bool) (report, error) {
	f, err := frontend.Connect(ctx, c)
	if err != nil {
		return report{}, err
	}
	r, err := measure(ctx, f, w, l, warm, pid, syscalls)
	if err != nil {
		_ = f.Close()
		return r, err
	}
	r.Workload, r.Depth, r.Queues = w.Name, c.Depth, c.Queues
	return r, f.Close()
}

func measure(ctx context.Context, f *frontend.FrontEnd, w frontend.Workload, l frontend.Limit, warm time.Duration, pid int, syscalls bool) (report, error) {
	if warm > 0 {
		if _, err := f.Run(ctx, w, frontend.Limit{Time: warm}); err != nil {
			return report{}, err
		}
	}
	var before, after meter.Sample
	var beforeErr, afterErr error
	if pid != 0 {
		l.Begin = func() { before, beforeErr = meter.Read(pid) }
		l.End = func() { after, afterErr = meter.Read(pid) }
	}
	res, err := f.Run(ctx, w, l)
	if err = errors.Join(err, beforeErr, afterErr); err != nil {
		return report{}, err
	}
	r := newReport(res)
	if pid != 0 {
		used := after.Sub(before)
		ops := float64(res.Ops)
		r.Server = &cost{
			CPU: us(used.CPU) / ops, User: us(used.User) / ops, System: us(used.System) / ops,
			Voluntary: float64(used.Voluntary) / ops, Involuntary: float64(used.Involuntary) / ops,
			RSS: used.RSS, Private: used.Private,
		}
	}
	if !syscalls {
		return r, nil
	}
	n, err := countSyscalls(ctx, f, w, l, pid)
	r.Syscalls = &n
	return r, err
}

func us(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

func newReport(res frontend.Result) report {
	ops := float64(res.Ops)
	return report{
		Ops: res.Ops, Requests: res.Requests, Bytes: res.Bytes,
		Seconds: res.Elapsed.Seconds(), OpsPerSecond: ops / res.Elapsed.Seconds(),
		P50: us(res.P50), P99: us(res.P99), P999: us(res.P999),
		Kicks: float64(res.Kicks) / ops, Notifications: float64(res.Notifications) / ops,
	}
}

func (r report) print(w io.Writer) {
	fmt.Fprintf(w, "%s depth=%d queues=%d layout=%s wait=%s: %.0f ops/s", r.Workload, r.Depth, r.Queues, r.Layout, r.Wait, r.OpsPerSecond)
	if r.Bytes > 0 {
		fmt.Fprintf(w, " (%.1f MiB/s)", float64(r.Bytes)/r.Seconds/(1<<20))
	}
	fmt.Fprintf(w, ", p50 %.2f us, p99 %.2f us, p99.9 %.2f us; per op: %.3f kicks, %.3f notifications", r.P50, r.P99, r.P999, r.Kicks, r.Notifications)
	if r.Server != nil {
		fmt.Fprintf(w, ", server CPU %.3f us, %.3f voluntary and %.3f involuntary switches", r.Server.CPU, r.Server.Voluntary, r.Server.Involuntary)
	}
	if r.Syscalls != nil {
		fmt.Fprintf(w, ", %.3f system calls", *r.Syscalls)
	}
	fmt.Fprintln(w)
}

// countSyscalls runs w once more, since counting costs time.
func countSyscalls(ctx context.Context, f *frontend.FrontEnd, w frontend.Workload, l frontend.Limit, pid int) (float64, error) {
	counter, err := meter.CountSyscalls(pid)
	if err != nil {
		return 0, err
	}
	defer counter.Close()
	var before, after uint64
	var beforeErr, afterErr error
	l.Begin = func() { before, beforeErr = counter.Read() }
	l.End = func() { after, afterErr = counter.Read() }
	res, err := f.Run(ctx, w, l)
	return float64(after-before) / float64(res.Ops), errors.Join(err, beforeErr, afterErr)
}
