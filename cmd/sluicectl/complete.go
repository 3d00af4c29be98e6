package main

import (
	"context"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/internal/cli"
)

// impatience is how long a shell that completes a word waits for the daemon.
const impatience = 500 * time.Millisecond

// completing asks the daemon for words. Without one there are none, and no error in the middle of somebody's command line.
func (p *program) completing(cmd *cobra.Command, f func(context.Context, *client.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), impatience)
	defer cancel()
	c, err := p.dial()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.Close()
	words, _ := f(ctx, c)
	return slices.DeleteFunc(words, func(w string) bool {
		word, _, _ := strings.Cut(w, "\t")
		return strings.ContainsFunc(word, func(r rune) bool { return !unicode.IsPrint(r) })
	}), cobra.ShellCompDirectiveNoFileComp
}

// completeTags completes tags of shares that are not among args.
func (p *program) completeTags(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return p.completing(cmd, func(ctx context.Context, c *client.Client) (words []string, err error) {
		shares, err := c.Shares(ctx)
		for i := range shares {
			if !slices.Contains(args, shares[i].Tag) {
				words = append(words, shares[i].Tag+"\t"+shares[i].State)
			}
		}
		return words, err
	})
}

// completeTag completes the tag of a command that has one.
func (p *program) completeTag(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return p.completeTags(cmd, args, word)
}

// completeGraft completes a tag and then the path of one of its grafts.
func (p *program) completeGraft(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) != 1 {
		return p.completeTag(cmd, args, word)
	}
	return p.completing(cmd, func(ctx context.Context, c *client.Client) (words []string, err error) {
		grafts, err := c.Grafts(ctx, args[0])
		for i := range grafts {
			if g := &grafts[i]; !g.Leaving {
				words = append(words, g.Path+"\t"+name(g.Source))
			}
		}
		return words, err
	})
}

// completeBackend completes the name of a backend.
func (p *program) completeBackend(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return p.completing(cmd, func(ctx context.Context, c *client.Client) ([]string, error) {
		info, err := c.Info(ctx)
		return info.Backends, err
	})
}

// completion is the command that writes what shells need for all this.
func (p *program) completion(root *cobra.Command) *cobra.Command {
	cmd := command("completion SHELL", "Print a completion script for bash, zsh or fish",
		"Print a completion script for bash, zsh or fish. It completes tags and paths of grafts, too, by asking the daemon.", `
source <(sluicectl completion bash)
sluicectl completion fish >~/.config/fish/completions/sluicectl.fish`,
		func(cmd *cobra.Command, args []string) error {
			if err := cli.WriteCompletion(p.out, root, args[0]); err != nil {
				return usage(cmd, "%w", err)
			}
			return nil
		})
	cmd.ValidArgs = cli.Shells
	return cmd
}
