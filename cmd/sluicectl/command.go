package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/cli"
)

// newRoot builds the command line of p.
func newRoot(p *program) *cobra.Command {
	root := group("sluicectl", "Steer a running sluiced",
		"sluicectl steers a running sluiced through its control socket: it adds, changes and removes shares and grafts\n"+
			"while guests use them, and shows what they do.", `
sluicectl status
sluicectl graft add data /models /srv/models --ro
sluicectl stat`)
	root.Version = cli.Version()
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	root.SilenceErrors, root.SilenceUsage = true, true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommand(&cobra.Command{Hidden: true}) // --help is the one way
	root.SetFlagErrorFunc(explainFlagError)
	root.SetUsageTemplate(p.usageTemplate())
	root.SetHelpTemplate("{{with (or .Long .Short)}}{{.}}\n\n{{end}}{{.UsageString}}")
	cobra.EnableCommandSorting = false

	fs := root.PersistentFlags()
	fs.SortFlags = false
	fs.StringVar(&p.socket, "socket", "", "`PATH` of the daemon's control socket; by default $SLUICE_SOCKET, "+systemSocket+" or, for ordinary users, $XDG_RUNTIME_DIR/sluice/control.sock")
	fs.BoolVar(&p.json, "json", false, "print the control API's JSON, one line for each answer, also of errors")
	fs.BoolP("help", "h", false, "print this help and end")
	root.Flags().BoolP("version", "V", false, "print the version and end")
	must(root.RegisterFlagCompletionFunc("socket", cli.Files))

	share := group("share", "Add, remove and list shares",
		"A share is what one guest mounts by its tag. It has a socket of its own, to which the virtual machine monitor connects.", `
sluicectl share ls
sluicectl share add data --root /srv/data`)
	share.AddCommand(p.shareAdd(), p.shareRemove(), p.shareList())
	graft := group("graft", "Add, change, remove and list the grafts of a share",
		"A graft is a directory or a single file of the host at a path of a share, with rules of its own. It can be added,\n"+
			"changed and removed while the guest uses the share.", `
sluicectl graft ls data
sluicectl graft add data /models /srv/models --ro`)
	graft.AddCommand(p.graftAdd(), p.graftSet(), p.graftRemove(), p.graftList(), p.graftAct())
	root.AddCommand(p.status(), share, graft, p.overlay(), p.permissions(), p.stat(), p.events(), p.completion(root), p.man(root))
	return root
}

// group is a command that has others.
func group(name, short, long, examples string) *cobra.Command {
	cmd := command(name, short, long, examples, func(cmd *cobra.Command, args []string) error {
		var names []string
		for _, c := range cmd.Commands() {
			if !c.Hidden {
				names = append(names, c.Name())
			}
		}
		if len(args) == 0 {
			return usage(cmd, "expected a command: %s", strings.Join(names, ", "))
		}
		cmd.SuggestionsMinimumDistance = 2
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			return usage(cmd, "unknown command %q: did you mean %s?", args[0], near[0])
		}
		return usage(cmd, "unknown command %q: expected one of %s", args[0], strings.Join(names, ", "))
	})
	cmd.Use = name + " COMMAND"
	cmd.Args = cobra.ArbitraryArgs // RunE says what is wrong with them
	cmd.ValidArgsFunction = cobra.NoFileCompletions
	return cmd
}

// command is a command whose examples are one on a line. Its arguments are those that use names: in upper case, optional in
// brackets, and the last again and again if dots follow.
func command(use, short, long, examples string, run func(*cobra.Command, []string) error) *cobra.Command {
	name, arguments, _ := strings.Cut(use, " ")
	cmd := &cobra.Command{
		Use:                   strings.TrimSpace(name+" "+arguments) + " [OPTION]...",
		Short:                 short,
		Long:                  long,
		Example:               "  " + strings.ReplaceAll(strings.TrimSpace(examples), "\n", "\n  "),
		RunE:                  run,
		DisableFlagsInUseLine: true,
		Args: func(cmd *cobra.Command, args []string) error {
			all := strings.Fields(arguments)
			least := slices.IndexFunc(all, func(a string) bool { return strings.HasPrefix(a, "[") })
			if least < 0 {
				least = len(all)
			}
			switch {
			case len(args) < least:
				return usage(cmd, "%s is missing: expected %s %s", all[len(args)], cmd.CommandPath(), arguments)
			case len(args) > len(all) && !strings.HasSuffix(arguments, "..."):
				return usage(cmd, "unexpected argument %q: expected %s", args[len(all)], strings.TrimSpace(cmd.CommandPath()+" "+arguments))
			}
			return nil
		},
	}
	cmd.Flags().SortFlags = false
	return cmd
}

// tagged is what a command runs whose first argument is a tag.
func tagged(run func(cmd *cobra.Command, tag string, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := api.CheckTag(args[0]); err != nil {
			return usage(cmd, "%w", err)
		}
		return run(cmd, args[0], args[1:])
	}
}

// usage is an error of cmd's command line.
func usage(cmd *cobra.Command, format string, args ...any) error {
	return usageError{fmt.Errorf(format, args...), cmd.CommandPath()}
}

// usageTemplate is what --help shows below the description.
func (p *program) usageTemplate() string {
	width := p.width()
	if width == 0 {
		width = 100
	}
	return strings.ReplaceAll(usageTemplate, "FlagUsages", fmt.Sprintf("FlagUsagesWrapped %d", width))
}

const usageTemplate = `Usage:
  {{.UseLine}}
{{if .HasAvailableSubCommands}}
Commands:{{range .Commands}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}
{{end}}{{if .HasExample}}
Examples:
{{.Example}}
{{end}}{{if .HasAvailableLocalFlags}}
Options:
{{.LocalFlags.FlagUsages}}{{end}}{{if .HasAvailableInheritedFlags}}
Options of all commands:
{{.InheritedFlags.FlagUsages}}{{end}}`

// explainFlagError says in our words what pflag found wrong with the command line.
func explainFlagError(cmd *cobra.Command, err error) error {
	return usageError{cli.FlagError(err), cmd.CommandPath()}
}

// must is for what only a mistake in this package can make fail.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
