package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/fsbackend/permshift"
)

// permissions are the commands for trees that the backend permshift serves. They ask no daemon.
func (p *program) permissions() *cobra.Command {
	cmd := group("permissions", "Prepare directories for the backend permshift",
		"The backend permshift serves a directory whose owners and modes are in extended attributes, so that one rootless storage serves\n"+
			"many users. These commands work on the directory itself and need no daemon.", `
sluicectl permissions convert /srv/images/debian`)
	cmd.AddCommand(p.permissionsConvert())
	return cmd
}

// converted is what is printed of a conversion with --json.
type converted struct {
	Converted int `json:"converted"`
	Already   int `json:"already"`
	Left      int `json:"left"`
}

func (p *program) permissionsConvert() *cobra.Command {
	format, mask := permshift.ContainersOverride.String(), "shared"
	cmd := command("convert DIRECTORY", "Move owners and modes of a tree into extended attributes",
		"Give all files and directories below DIRECTORY, and it, an extended attribute that says whose they are and with which mode, and\n"+
			"one mode for all on the host. Files that have the attribute stay as they are, so that it can be done again. Owners stay: to have\n"+
			"all belong to one user, run chown after it. Nothing else may change the tree meanwhile.", `
sluicectl permissions convert /srv/images/debian
sluicectl permissions convert /srv/images/debian --format user-override --force-mask private`,
		func(cmd *cobra.Command, args []string) error {
			f, err := permshift.ParseFormat(format)
			if err == nil && f.Xattr() == "" {
				err = fmt.Errorf("format %q has no attribute: expected one of %s", format, strings.Join(convertFormats(), ", "))
			}
			if err != nil {
				return usage(cmd, "--format: %w", err)
			}
			mode, err := permshift.ParseForceMask(mask)
			if err != nil {
				return usage(cmd, "--force-mask: %w", err)
			}
			dir, err := os.OpenFile(args[0], unix.O_PATH|unix.O_DIRECTORY, 0)
			if err != nil {
				return fmt.Errorf("%w: expected the directory to convert", err)
			}
			defer dir.Close()
			done, err := permshift.Convert(cmd.Context(), int(dir.Fd()), f, mode)
			if err != nil {
				return p.halfConverted(done, err)
			}
			if p.json {
				return encode(p.out, converted{Converted: done.Files, Already: done.Already, Left: done.Left})
			}
			_, err = fmt.Fprintf(p.out, "%d files converted, %d were already, %d of other kinds left as they are\n", done.Files, done.Already, done.Left)
			return err
		})
	cmd.Flags().StringVar(&format, "format", format, "the attribute, by its `NAME` or one of "+strings.Join(convertFormats(), ", "))
	cmd.Flags().StringVar(&mask, "force-mask", mask, "`MODE` of all files on the host: octal, shared (0755) or private (0700)")
	must(cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(convertFormats(), cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("force-mask", cobra.FixedCompletions([]string{"shared", "private"}, cobra.ShellCompDirectiveNoFileComp)))
	cmd.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	return cmd
}

// convertFormats are the formats that have an attribute.
func convertFormats() []string {
	return slices.DeleteFunc(permshift.FormatNames(), func(name string) bool {
		f, err := permshift.ParseFormat(name)
		return err != nil || f.Xattr() == ""
	})
}

// halfConverted says how far it came, and what to do.
func (p *program) halfConverted(done permshift.Converted, err error) error {
	hint := "when that is put right, do it again: it goes on where it has ended"
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		hint = "do it again as the owner of the files, or as root; it goes on where it has ended"
	case errors.Is(err, unix.ENOTSUP):
		hint = "choose a file system with extended attributes of this kind, or another --format"
	}
	return &api.Error{Code: api.CodeInvalid, Message: fmt.Sprintf("%v; %d files were converted before", err, done.Files), Hint: hint}
}
