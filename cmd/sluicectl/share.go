package main

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/internal/cli"
)

func (p *program) shareAdd() *cobra.Command {
	var (
		spec   api.ShareSpec
		root   string
		grafts []string
	)
	cmd := command("add TAG", "Add a share",
		"Add a share. Without --root its root is an empty directory that cannot be changed, in which grafts appear.\n"+
			"It returns when the virtual machine monitor can connect to the share's socket.", `
sluicectl share add data --root /srv/data
sluicectl share add box --graft /models=/srv/models:ro --graft /out=/srv/out,max-bytes=10G,nosuid
sluicectl share add box --graft /tmp=,backend=mem,max-bytes=64M`,
		tagged(func(cmd *cobra.Command, tag string, _ []string) (err error) {
			spec.Tag = tag
			if spec.Socket != "" {
				if spec.Socket, err = filepath.Abs(spec.Socket); err != nil {
					return err
				}
			}
			if root != "" {
				g := api.GraftSpec{}
				if err := placeGraft(&g, "/", root); err != nil {
					return usage(cmd, "--root: %w", err)
				}
				spec.Grafts = append(spec.Grafts, g)
			}
			for _, text := range grafts {
				g, err := parseGraft(text)
				if err != nil {
					return usage(cmd, "--graft: %w", err)
				}
				spec.Grafts = append(spec.Grafts, g)
			}
			return p.ask(cmd, "add the share "+name(tag), func(ctx context.Context, c *client.Client) error {
				share, err := c.AddShare(ctx, spec)
				if err != nil {
					return err
				}
				if p.json {
					return encode(p.out, share)
				}
				_, err = fmt.Fprintf(p.out, "share %s listens on %s\n", name(share.Tag), name(share.Socket))
				return err
			})
		}))
	cmd.ValidArgsFunction = cobra.NoFileCompletions
	fs := cmd.Flags()
	fs.StringVar(&root, "root", "", "serve `DIR` as the root; the same as --graft /=DIR")
	must(cmd.MarkFlagDirname("root"))
	fs.StringArrayVar(&grafts, "graft", nil, "put a graft in it, `PATH=SOURCE[:ro][,OPTION]...` with the options of graft add; may be repeated; a \\ before , : = or \\ takes its meaning away")
	must(cmd.RegisterFlagCompletionFunc("graft", cobra.NoFileCompletions))
	for _, o := range shareOptions {
		o.addTo(fs, &spec)
		cli.CompleteFlag(cmd, o.name, o.files)
	}
	return cmd
}

func (p *program) shareRemove() *cobra.Command {
	var force bool
	cmd := command("rm TAG", "Remove a share",
		"Remove a share. While a virtual machine monitor is connected to it that takes --force, which disconnects it.", `
sluicectl share rm data
sluicectl share rm data --force`,
		tagged(func(cmd *cobra.Command, tag string, _ []string) error {
			return p.ask(cmd, "remove the share "+name(tag), func(ctx context.Context, c *client.Client) error {
				err := c.RemoveShare(ctx, tag, force)
				err = advise(err, api.CodeBusy, "disconnect it, or give --force")
				return advise(err, api.CodeNotFound, hintShares)
			})
		}))
	cmd.ValidArgsFunction = p.completeTag
	cmd.Flags().BoolVar(&force, "force", false, "even while a guest uses it; its requests in progress are finished")
	return cmd
}

func (p *program) shareList() *cobra.Command {
	return command("ls", "List the shares", "List the shares with their states and options.", `
sluicectl share ls
sluicectl share ls --json | jq -r '.[].tag'`,
		func(cmd *cobra.Command, _ []string) error {
			return p.ask(cmd, "list the shares", func(ctx context.Context, c *client.Client) error {
				shares, err := c.Shares(ctx)
				switch {
				case err != nil:
					return err
				case p.json:
					return encode(p.out, shares)
				}
				return p.writeShares(shares)
			})
		})
}
