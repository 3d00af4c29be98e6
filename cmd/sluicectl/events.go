package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/control/api"
)

func (p *program) events() *cobra.Command {
	var since uint64
	cmd := command("events TAG", "Show what the host changes in watched grafts",
		"Show what the host changes in the grafts of the share TAG that were added with --watch, a line for each event: time,\n"+
			"number, kind and path. After a rescan anything below its path may have changed. It goes on until interrupted.", `
sluicectl events data
sluicectl events data --since 17
sluicectl events data --json | jq -r 'select(.kind == "create").path'`,
		tagged(func(cmd *cobra.Command, tag string, _ []string) error {
			c, err := p.dial()
			if err != nil {
				return err
			}
			defer c.Close()
			err = c.Events(cmd.Context(), tag, since, func(e api.Event) error {
				switch {
				case p.json:
					return encode(p.out, e)
				case e.Kind == api.EventHello:
					return nil
				}
				_, err := fmt.Fprintln(p.out, eventText(&e)) // whole: a path that is cut is none
				return err
			})
			switch {
			case errors.Is(err, context.Canceled):
				return nil // which is how it ends
			case err != nil:
				return advise(err, api.CodeNotFound, hintShares)
			}
			return api.Errorf(api.CodeNotFound, "the events of %s have ended: the share was removed, or sluiced is ending", name(tag))
		}))
	cmd.ValidArgsFunction = p.completeTag
	cmd.Flags().Uint64Var(&since, "since", 0, "begin behind the event with the number `N`, if the daemon still knows those that follow; by default with what happens from now on")
	must(cmd.RegisterFlagCompletionFunc("since", cobra.NoFileCompletions))
	return cmd
}

// eventText is the line of an event.
func eventText(e *api.Event) string {
	slash := ""
	if e.Dir {
		slash = "/"
	}
	paths := name(strings.TrimSuffix(e.Path, "/") + slash)
	if e.To != "" {
		paths += " -> " + name(e.To+slash)
	}
	return fmt.Sprintf("%s %d %s %s", e.Time.Local().Format("2006-01-02 15:04:05.000"), e.ID, e.Kind, paths)
}
