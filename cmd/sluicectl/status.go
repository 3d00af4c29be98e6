package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
)

// statusAnswer is status in JSON.
type statusAnswer struct {
	Daemon api.Info    `json:"daemon"`
	Shares []api.Share `json:"shares"`
}

func (p *program) status() *cobra.Command {
	return command("status", "Show the daemon and its shares",
		"Show the daemon and its shares. The exit status is 0 if the daemon answers, 3 if none is running there.", `
sluicectl status
sluicectl status --json | jq '.shares[].state'`,
		func(cmd *cobra.Command, _ []string) error {
			var a statusAnswer
			if err := p.ask(cmd, "tell its state", func(ctx context.Context, c *client.Client) (err error) {
				if a.Daemon, err = c.Info(ctx); err == nil {
					a.Shares, err = c.Shares(ctx)
				}
				return err
			}); err != nil {
				return err
			}
			if p.json {
				return encode(p.out, a)
			}
			return p.writeStatus(&a)
		})
}

func (p *program) writeStatus(a *statusAnswer) error {
	d := &a.Daemon
	var backends []string
	for _, b := range d.Backends {
		backends = append(backends, name(b))
	}
	fmt.Fprintf(p.out, "sluiced %s, %s, pid %d, id %s\n", name(d.Version), d.State, d.PID, name(d.ID))
	fmt.Fprintf(p.out, "running for %s, since %s\n", agoText(p.now().Sub(d.Started)), d.Started.Local().Format("2006-01-02 15:04:05 MST"))
	fmt.Fprintf(p.out, "sandbox %s, backends %s\n", d.Sandbox, strings.Join(backends, ", "))
	if len(a.Shares) == 0 {
		_, err := fmt.Fprintln(p.out, "no shares: sluicectl share add makes one")
		return err
	}
	fmt.Fprintln(p.out)
	return p.writeShares(a.Shares)
}

func (p *program) writeShares(shares []api.Share) error {
	t := table{head: []string{"TAG", "STATE", "GUESTS", "GRAFTS", "SOCKET", "OPTIONS"}, numbers: map[int]bool{2: true, 3: true}}
	for i := range shares {
		s := &shares[i]
		t.add(name(s.Tag), s.State, strconv.FormatUint(s.Guests, 10), strconv.Itoa(len(s.Grafts)), name(s.Socket), shareText(&s.ShareSpec))
	}
	return t.write(p.out, p.width(), true)
}

// shareText is what is set of a share but its socket.
func shareText(s *api.ShareSpec) string {
	return orDash(oneLine(describe(shareOptions[1:], s)))
}

// width is how wide lines may be, 0 if they may be as wide as they are.
func (p *program) width() int {
	if p.screen == nil {
		return 0
	}
	return p.screen().width
}
