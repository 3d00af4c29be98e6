package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
)

func (p *program) graftAdd() *cobra.Command {
	var (
		spec    api.GraftSpec
		replace bool
	)
	cmd := command("add TAG PATH [SOURCE]", "Put a directory or file of the host into a share",
		"Put SOURCE, a directory or a single file of the host, at PATH in the share TAG. It returns when the guest sees it.\n"+
			"Directories on the way to PATH need not exist. Backends without a source, such as mem, need no SOURCE.", `
sluicectl graft add data /models /srv/models --ro
sluicectl graft add data /etc/app.conf ./app.conf --watch
sluicectl graft add data /home /srv/home --uid-map 0:100000:65536 --gid-map 0:100000:65536 --nosuid --nodev
sluicectl graft add data /scratch --backend mem --max-bytes 64M
sluicectl graft add data /models /srv/models-2 --ro --replace`,
		tagged(func(cmd *cobra.Command, tag string, args []string) error {
			source := ""
			if len(args) > 1 {
				source = args[1]
			}
			if err := placeGraft(&spec, args[0], source); err != nil {
				return usage(cmd, "%w", err)
			}
			return p.ask(cmd, "add "+name(spec.Path)+" to "+name(tag), func(ctx context.Context, c *client.Client) error {
				g, err := c.AddGraft(ctx, tag, spec, replace)
				return p.writeGraft(tag, g, advise(err, api.CodeExists, "give --replace to exchange it"))
			})
		}))
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		switch len(args) {
		case 0:
			return p.completeTag(cmd, args, "")
		case 2:
			return nil, cobra.ShellCompDirectiveDefault
		}
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	p.addGraftFlags(cmd, &spec, false)
	cmd.Flags().BoolVar(&replace, "replace", false, "exchange it for what is at PATH, in one step; files that are open there go on")
	return cmd
}

func (p *program) graftSet() *cobra.Command {
	var spec api.GraftSpec
	cmd := command("set TAG PATH", "Change the rules of a graft",
		"Change the rules of the graft at PATH in the share TAG, for files that are open, too. What is not named stays as it is.", `
sluicectl graft set data /models --ro
sluicectl graft set data /models --ro=false --max-bytes 20G`,
		tagged(func(cmd *cobra.Command, tag string, args []string) error {
			if err := placeGraft(&spec, args[0], ""); err != nil {
				return usage(cmd, "%w", err)
			}
			var (
				change api.GraftChange
				names  []string
				some   bool
			)
			for _, o := range graftOptions {
				if o.change == nil {
					continue
				}
				names = append(names, "--"+o.name)
				if cmd.Flags().Changed(o.name) {
					o.change(&change, &spec)
					some = true
				}
			}
			if !some {
				return usage(cmd, "nothing to change: expected one or more of %s", strings.Join(names, ", "))
			}
			return p.ask(cmd, "change "+name(spec.Path)+" in "+name(tag), func(ctx context.Context, c *client.Client) error {
				g, err := c.ChangeGraft(ctx, tag, spec.Path, change)
				return p.writeGraft(tag, g, advise(err, api.CodeNotFound, hintGrafts))
			})
		}))
	cmd.ValidArgsFunction = p.completeGraft
	p.addGraftFlags(cmd, &spec, true)
	return cmd
}

func (p *program) graftRemove() *cobra.Command {
	cmd := command("rm TAG PATH", "Take a graft away",
		"Take the graft at PATH out of the share TAG. It returns when the guest no longer finds it; files that are open go on.", `
sluicectl graft rm data /models`,
		tagged(func(cmd *cobra.Command, tag string, args []string) error {
			var g api.GraftSpec
			if err := placeGraft(&g, args[0], ""); err != nil {
				return usage(cmd, "%w", err)
			}
			return p.ask(cmd, "remove "+name(g.Path)+" from "+name(tag), func(ctx context.Context, c *client.Client) error {
				return advise(c.RemoveGraft(ctx, tag, g.Path), api.CodeNotFound, hintGrafts)
			})
		}))
	cmd.ValidArgsFunction = p.completeGraft
	return cmd
}

func (p *program) graftList() *cobra.Command {
	cmd := command("ls TAG", "List the grafts of a share",
		"List the grafts of the share TAG. One that is leaving was removed, and goes with the last file that is open in it.\n"+
			"USED is what counts against --max-bytes; TROUBLE what went wrong in its backend so far.", `
sluicectl graft ls data
sluicectl graft ls data --json`,
		tagged(func(cmd *cobra.Command, tag string, _ []string) error {
			return p.ask(cmd, "list the grafts of "+name(tag), func(ctx context.Context, c *client.Client) error {
				grafts, err := c.Grafts(ctx, tag)
				switch {
				case err != nil:
					return advise(err, api.CodeNotFound, hintShares)
				case p.json:
					return encode(p.out, grafts)
				}
				return p.writeGrafts(grafts)
			})
		}))
	cmd.ValidArgsFunction = p.completeTag
	return cmd
}

func (p *program) graftAct() *cobra.Command {
	cmd := command("act TAG PATH ACTION [JSON]", "Have a graft do what is its backend's own",
		"Have the graft at PATH in the share TAG do ACTION, with an argument in JSON, and print the answer, in JSON too. What there is depends on\n"+
			"the backend: check of lazyimage says how much of an image is here, program and restart of fuse are about the program. The\n"+
			"actions of an overlay have commands of their own (sluicectl overlay).", `
sluicectl graft act root / check
sluicectl graft act box /secret restart`,
		tagged(func(cmd *cobra.Command, tag string, args []string) error {
			var g api.GraftSpec
			if err := placeGraft(&g, args[0], ""); err != nil {
				return usage(cmd, "%w", err)
			}
			arg := json.RawMessage("{}")
			if len(args) > 2 {
				if arg = json.RawMessage(args[2]); !json.Valid(arg) {
					return usage(cmd, "%q is not JSON: expected an argument such as {\"name\": \"x\"}", args[2])
				}
			}
			return p.ask(cmd, args[1]+" of "+name(g.Path)+" in "+name(tag), func(ctx context.Context, c *client.Client) error {
				answer, err := c.ActGraft(ctx, tag, g.Path, args[1], arg)
				if err != nil {
					return advise(err, api.CodeNotFound, hintGrafts)
				}
				return encode(p.out, answer)
			})
		}))
	cmd.ValidArgsFunction = p.completeGraft
	return cmd
}

// writeGraft says what a graft has become, unless err.
func (p *program) writeGraft(tag string, g api.Graft, err error) error {
	switch {
	case err != nil:
		return err
	case p.json:
		return encode(p.out, g)
	}
	source := ""
	if g.Source != "" {
		source = " is " + name(g.Source)
	}
	_, err = fmt.Fprintf(p.out, "%s in %s%s (%s)\n", name(g.Path), name(tag), source, graftText(&g.GraftSpec))
	return err
}

func (p *program) writeGrafts(grafts []api.Graft) error {
	t := table{head: []string{"PATH", "STATE", "OPEN", "USED", "TROUBLE", "SOURCE", "OPTIONS"}, numbers: map[int]bool{2: true, 3: true}}
	for i := range grafts {
		g := &grafts[i]
		state, used := "grafted", "-"
		if g.Leaving {
			state = "leaving"
		}
		if g.MaxBytes > 0 {
			used = bytesText(float64(g.UsedBytes))
		}
		t.add(name(g.Path), state, strconv.FormatInt(g.OpenFiles, 10), used, trouble(g), name(g.Source), graftText(&g.GraftSpec))
	}
	return t.write(p.out, p.width(), true)
}

// trouble is what went wrong in a graft.
func trouble(g *api.Graft) string {
	var all []string
	for _, c := range []struct {
		n    uint64
		what string
	}{{g.Panics, "panics"}, {g.Timeouts, "timeouts"}, {g.Refused, "refused"}, {g.Errors, "errors"}} {
		if c.n > 0 {
			all = append(all, fmt.Sprintf("%d %s", c.n, c.what))
		}
	}
	return orDash(strings.Join(all, ", "))
}

// graftText is what is set of a graft.
func graftText(g *api.GraftSpec) string {
	var rows []option[api.GraftSpec]
	for _, o := range graftOptions {
		rows = append(rows, o.option)
	}
	if text := describe(rows, g); text != "" {
		return oneLine(text)
	}
	return "rw"
}
