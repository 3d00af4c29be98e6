package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/internal/cli"
)

// overlay are the commands for what a guest has written into an overlay.
func (p *program) overlay() *cobra.Command {
	cmd := group("overlay", "Review, keep or undo what a guest has written into an overlay",
		"The layers below an overlay stay as they are; what the guest changes is in the layer above them. That can be looked at, kept\n"+
			"under a name, gone back to, and made real in a directory of the host.", `
sluicectl overlay diff box
sluicectl overlay checkpoint box before-upgrade
sluicectl overlay restore box before-upgrade
sluicectl overlay apply box /srv/src`)
	cmd.AddCommand(p.overlayDiff(), p.overlayCheckpoint(), p.overlayList(), p.overlayRestore(), p.overlayForget(), p.overlayApply())
	return cmd
}

// overlayCommand is a command on an overlay. What run asks for goes to the graft at --graft.
func (p *program) overlayCommand(use, short, long, examples string, ask func(args []string) (action string, arg any, err error), show func(answer json.RawMessage) error) *cobra.Command {
	var at api.GraftSpec
	place := "/"
	cmd := command(use, short, long, examples, tagged(func(cmd *cobra.Command, tag string, args []string) error {
		if err := placeGraft(&at, place, ""); err != nil {
			return usage(cmd, "%w", err)
		}
		action, arg, err := ask(args)
		if err != nil {
			return usage(cmd, "%w", err)
		}
		text, err := json.Marshal(arg)
		if err != nil {
			return err
		}
		return p.ask(cmd, action+" of "+name(at.Path)+" in "+name(tag), func(ctx context.Context, c *client.Client) error {
			answer, err := c.ActGraft(ctx, tag, at.Path, action, text)
			switch {
			case err != nil:
				return advise(err, api.CodeNotFound, hintGrafts)
			case p.json:
				return encode(p.out, answer)
			}
			return show(answer)
		})
	}))
	cmd.Flags().StringVar(&place, "graft", "/", "`PATH` in the share that the overlay is at")
	cmd.ValidArgsFunction = p.completeTag
	return cmd
}

// named is what is asked where the second argument is the name of a checkpoint.
func named(action string) func(args []string) (string, any, error) {
	return func(args []string) (string, any, error) { return action, api.OverlayName{Name: args[0]}, nil }
}

// silent shows nothing of an answer.
func silent(json.RawMessage) error { return nil }

func (p *program) overlayDiff() *cobra.Command {
	var want api.OverlayDiff
	cmd := p.overlayCommand("diff TAG", "List what has been changed",
		"List the files that the guest has added, modified or deleted, as it has them now, or had them at a checkpoint.", `
sluicectl overlay diff box
sluicectl overlay diff box --tar work.tar`,
		func([]string) (string, any, error) {
			var err error
			if want.Tar != "" {
				want.Tar, err = filepath.Abs(want.Tar)
			}
			return api.ActDiff, want, err
		}, p.showChanges)
	cmd.Flags().StringVar(&want.Checkpoint, "checkpoint", "", "what there was at the checkpoint `NAME`")
	cmd.Flags().StringVar(&want.Tar, "tar", "", "also write the changes to the new `FILE`, as a layer of an OCI image")
	must(cmd.RegisterFlagCompletionFunc("tar", cli.Files))
	return cmd
}

func (p *program) overlayApply() *cobra.Command {
	var want api.OverlayApply
	cmd := p.overlayCommand("apply TAG DIRECTORY", "Make the changes in a directory of the host",
		"Make what the guest has changed real in DIRECTORY: the one that the overlay is on, or a copy of it. Files are exchanged one by one,\n"+
			"each in one step; an end in between can be made good by doing it again.", `
sluicectl overlay apply box /srv/src --dry-run
sluicectl overlay apply box /srv/src`,
		func(args []string) (string, any, error) {
			var err error
			want.Target, err = filepath.Abs(args[0])
			return api.ActApply, want, err
		}, p.showChanges)
	cmd.Flags().StringVar(&want.Checkpoint, "checkpoint", "", "what there was at the checkpoint `NAME`")
	cmd.Flags().BoolVar(&want.DryRun, "dry-run", false, "only say what would be changed")
	cmd.Flags().BoolVar(&want.Devices, "devices", false, "make device nodes that the guest has made, too")
	return cmd
}

func (p *program) showChanges(answer json.RawMessage) error {
	var changes []api.OverlayChange
	if err := json.Unmarshal(answer, &changes); err != nil {
		return err
	}
	t := table{head: []string{"CHANGE", "TYPE", "SIZE", "PATH"}, numbers: map[int]bool{2: true}}
	for _, c := range changes {
		size, path := "-", name(c.FullPath())
		if c.Type == "file" && c.Kind != api.ChangeDeleted {
			size = bytesText(float64(c.Size))
		}
		if c.From != "" {
			path += " (was " + name(c.FullFrom()) + ")"
		}
		if c.Was != "" {
			path += " (was a " + c.Was + ")"
		}
		t.add(c.Kind, c.Type, size, path)
	}
	return t.write(p.out, p.width(), true)
}

func (p *program) overlayCheckpoint() *cobra.Command {
	return p.overlayCommand("checkpoint TAG NAME", "Keep what has been changed under a name",
		"Keep what the guest has changed so far as NAME. The guest's changes wait meanwhile; where the host's file system can share\n"+
			"blocks (btrfs, XFS), nothing is copied. It stays until it is forgotten, also beyond the end of an overlay that is discarded.", `
sluicectl overlay checkpoint box before-upgrade`,
		named(api.ActCheckpoint), func(answer json.RawMessage) error {
			var c api.Checkpoint
			if err := json.Unmarshal(answer, &c); err != nil {
				return err
			}
			_, err := fmt.Fprintf(p.out, "%s has %d files of %s\n", name(c.Name), c.Files, bytesText(float64(c.Bytes)))
			return err
		})
}

func (p *program) overlayList() *cobra.Command {
	return p.overlayCommand("ls TAG", "List the checkpoints", "List the checkpoints there are, the oldest first.", `
sluicectl overlay ls box`,
		func([]string) (string, any, error) { return api.ActCheckpoints, struct{}{}, nil },
		func(answer json.RawMessage) error {
			var all []api.Checkpoint
			if err := json.Unmarshal(answer, &all); err != nil {
				return err
			}
			t := table{head: []string{"NAME", "TIME", "FILES", "BYTES"}, numbers: map[int]bool{2: true, 3: true}}
			for _, c := range all {
				t.add(name(c.Name), c.Time.Format(time.RFC3339), strconv.FormatUint(c.Files, 10), bytesText(float64(c.Bytes)))
			}
			return t.write(p.out, p.width(), true)
		})
}

func (p *program) overlayRestore() *cobra.Command {
	return p.overlayCommand("restore TAG NAME", "Go back to a checkpoint",
		"Have the overlay be as it was at the checkpoint NAME. What has been changed since is gone. No guest may be connected: what it\n"+
			"has in its memory would no longer be true.", `
sluicectl overlay restore box before-upgrade`,
		named(api.ActRestore), silent)
}

func (p *program) overlayForget() *cobra.Command {
	return p.overlayCommand("forget TAG NAME", "Remove a checkpoint", "Remove the checkpoint NAME. The overlay stays as it is.", `
sluicectl overlay forget box before-upgrade`,
		named(api.ActForget), silent)
}
