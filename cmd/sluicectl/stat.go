package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
)

// minInterval keeps stat from being what it measures.
const minInterval = 100 * time.Millisecond

// statFlags are the options of stat.
type statFlags struct {
	interval time.Duration
	once     bool
	byOp     bool
	tags     []string
}

// statAnswer is a line of stat --json.
type statAnswer struct {
	Time time.Time `json:"time"`
	// Interval is what Rates are of, in seconds. With --once there are neither.
	Interval float64 `json:"interval,omitempty"`
	Rates    []rate  `json:"rates,omitempty"`
	// Stats are the counters, as GET /v1/stats has them.
	Stats api.Stats `json:"stats"`
}

func (p *program) stat() *cobra.Command {
	var f statFlags
	cmd := command("stat [TAG]...", "Show what shares do, live",
		"Show operations, latencies, bytes and errors per second of all shares, or those named, until it is interrupted. On a\n"+
			"terminal the table is written over, elsewhere one follows the other. P50 and P99 are the latencies that half and\n"+
			"99 % of the requests did not exceed. DEPTH is the number of requests in progress.", `
sluicectl stat
sluicectl stat data --ops --interval 5s
sluicectl stat --once
sluicectl stat --json | jq '.rates[] | select(.tag == "data") | .ops_per_second'`,
		func(cmd *cobra.Command, tags []string) error {
			for _, tag := range tags {
				if err := api.CheckTag(tag); err != nil {
					return usage(cmd, "%w", err)
				}
			}
			if f.interval < minInterval {
				return usage(cmd, "--interval: %v is too short; expected %v or more", f.interval, minInterval)
			}
			f.tags = tags
			if f.once {
				return p.ask(cmd, "tell its counters", func(ctx context.Context, c *client.Client) error {
					s, err := p.sample(ctx, c, f.tags)
					if err != nil {
						return err
					}
					return p.writeTotals(s, &f)
				})
			}
			c, err := p.dial()
			if err != nil {
				return err
			}
			defer c.Close()
			err = p.watch(cmd.Context(), c, &f)
			if errors.Is(err, context.Canceled) {
				return nil // which is how it ends
			}
			return err
		})
	cmd.ValidArgsFunction = p.completeTags
	fs := cmd.Flags()
	fs.DurationVar(&f.interval, "interval", time.Second, "a table each `TIME`, such as 500ms or 10s")
	fs.BoolVar(&f.once, "once", false, "print the totals since each share was added, once")
	fs.BoolVar(&f.byOp, "ops", false, "a line for each opcode")
	must(cmd.RegisterFlagCompletionFunc("interval", cobra.NoFileCompletions))
	return cmd
}

// sample asks for the counters of the shares tags, of all if there are none.
func (p *program) sample(ctx context.Context, c *client.Client, tags []string) (*sample, error) {
	stats, err := c.Stats(ctx)
	if err != nil {
		return nil, err
	}
	for _, tag := range tags {
		if !slices.ContainsFunc(stats.Shares, func(s api.ShareStats) bool { return s.Tag == tag }) {
			return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("no share %q", tag), Hint: hintShares}
		}
	}
	if len(tags) > 0 {
		stats.Shares = slices.DeleteFunc(stats.Shares, func(s api.ShareStats) bool { return !slices.Contains(tags, s.Tag) })
		stats.Events = slices.DeleteFunc(stats.Events, func(e api.EventStats) bool { return !slices.Contains(tags, e.Tag) })
		stats.Images = slices.DeleteFunc(stats.Images, func(i api.ImageStats) bool { return !slices.Contains(tags, i.Tag) })
	}
	slices.SortFunc(stats.Shares, func(a, b api.ShareStats) int { return cmp.Compare(a.Tag, b.Tag) })
	return &sample{at: p.now(), stats: stats}, nil
}

// watch writes what the shares do in each interval, until ctx ends or the daemon does.
func (p *program) watch(ctx context.Context, c *client.Client, f *statFlags) error {
	var prev *sample
	if err := p.waiting("tell its counters", func() (err error) {
		prev, err = p.sample(ctx, c, f.tags)
		return err
	}); err != nil {
		return err
	}
	v := view{program: p, flags: f}
	if p.screen != nil && !p.json {
		if err := v.write(prev, prev); err != nil {
			return err
		}
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.after(f.interval):
		}
		cur, err := p.sample(ctx, c, f.tags)
		if err != nil {
			return err
		}
		if err := v.write(prev, cur); err != nil {
			return err
		}
		prev = cur
	}
}

// view is the live table.
type view struct {
	*program
	flags *statFlags
	lines int  // of the table that is on the terminal
	begun bool // there was one before
}

// write shows what was done between prev and cur.
func (v *view) write(prev, cur *sample) error {
	all := rates(prev, cur, v.flags.byOp)
	if v.json {
		return encode(v.out, statAnswer{Time: cur.at.UTC(), Interval: cur.at.Sub(prev.at).Seconds(), Rates: all, Stats: cur.stats})
	}
	t := rateTable(all, v.flags.byOp)
	if v.screen == nil {
		t.least = 8
		t.prepend("TIME", cur.at.Local().Format("15:04:05"))
		head := !v.begun
		v.begun = true
		return t.write(v.out, 0, head)
	}
	t.least = 5 // what numbers have, so that columns stay where they are
	size := v.screen()
	if most := max(size.height-2, 1); len(t.lines) > most {
		rest := len(t.lines) - most + 1
		t.lines = append(t.lines[:most-1], []string{fmt.Sprintf("… %d more", rest)})
	}
	var b strings.Builder
	if v.lines > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", v.lines)
	}
	b.WriteString("\r\x1b[J")
	if err := t.write(&b, size.width, true); err != nil {
		return err
	}
	v.lines = 1 + len(t.lines)
	_, err := fmt.Fprint(v.out, b.String())
	return err
}

// writeTotals shows what was done since the shares were added.
func (p *program) writeTotals(s *sample, f *statFlags) error {
	if p.json {
		return encode(p.out, statAnswer{Time: s.at.UTC(), Stats: s.stats})
	}
	all := rates(nil, s, f.byOp)
	t := rateTable(all, f.byOp)
	for i, h := range t.head {
		t.head[i] = strings.TrimSuffix(h, "/S")
	}
	return t.write(p.out, p.width(), true)
}

// rateTable makes a table of rates, of which those by opcode have other columns.
func rateTable(all []rate, byOp bool) *table {
	t := &table{shrink: true, head: []string{"SHARE", "OPS/S", "P50", "P99", "READ/S", "WRITE/S", "ERR/S", "DEPTH", "INODES", "FAULTS"}}
	first, last := 1, 9
	if byOp {
		t.head = []string{"SHARE", "OP", "OPS/S", "P50", "P99", "READ/S", "WRITE/S", "ERR/S", "ERRORS"}
		first, last = 2, 7
	}
	t.numbers = make(map[int]bool)
	for i := first; i <= last; i++ {
		t.numbers[i] = true
	}
	for i := range all {
		r := &all[i]
		numbers := []string{countText(r.Ops), latencyText(r.P50), latencyText(r.P99), bytesText(r.BytesRead), bytesText(r.BytesWritten), countText(r.Errors)}
		line := []string{name(r.Tag)}
		if byOp {
			line = append(append(append(line, name(r.Op)), numbers...), errorsText(r.errors))
		} else {
			line = append(append(line, numbers...), strconv.FormatUint(r.depth, 10), countText(float64(r.inodes)), countText(float64(r.faults)))
		}
		t.add(line...)
	}
	return t
}

// errorsText are errors by name, the most frequent first.
func errorsText(errs map[string]uint64) string {
	names := slices.SortedFunc(maps.Keys(errs), func(a, b string) int {
		return cmp.Or(cmp.Compare(errs[b], errs[a]), cmp.Compare(a, b))
	})
	var all []string
	for _, n := range names {
		all = append(all, fmt.Sprintf("%s %s", oneLine(n), countText(float64(errs[n]))))
	}
	return orDash(strings.Join(all, ", "))
}
