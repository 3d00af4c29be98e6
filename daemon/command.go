package daemon

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/cli"
	"github.com/sluicefs/sluice/internal/config"
)

// capabilities are the features of --print-capabilities and of the vhost-user discovery file, in the words of QEMU's
// docs/interop/vhost-user.json. Only what is true belongs here: libvirt takes it as a promise.
var capabilities = []string{"read-only", "separate-options"}

// newCommand builds the command line, with the options of extensions in groups of their own. It parses into cfg, and into
// the extensions, and then calls serve with all options.
func newCommand(cfg *config.Config, groups []extensions.FlagGroup, serve func(*pflag.FlagSet) error) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "sluiced {--shared-dir DIR | --bundle DIR} {--socket-path PATH | --fd FD} [OPTION]...",
		Short: "Serve a directory to a virtual machine over vhost-user (virtio-fs)",
		Long: "sluiced serves a directory to a virtual machine: it is a vhost-user back-end of the virtio-fs device,\n" +
			"with the options of virtiofsd.\n\n" +
			"With --config, --share or --control-socket it serves any number of shares, which can be added, changed\n" +
			"and removed while it runs: see sluicectl --help.",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && !wantsVersion(cmd) {
				return usageError{fmt.Errorf("unexpected argument %q; expected options only", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if wantsVersion(cmd) {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), cmd.Name(), cli.Version())
				return err
			}
			return serve(cmd.Flags())
		},
		SilenceErrors:         true,
		SilenceUsage:          true,
		DisableFlagsInUseLine: true,
	}
	cmd.SetFlagErrorFunc(explainFlagError)
	cmd.CompletionOptions.DisableDefaultCmd = true
	cmd.SetHelpCommand(&cobra.Command{Hidden: true}) // --help is the one way
	addFlags(cmd, cfg)
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	own.SortFlags = false
	own.AddFlagSet(cmd.Flags())
	cmd.SetUsageFunc(func(asked *cobra.Command) error {
		_, err := io.WriteString(asked.OutOrStderr(), usage(asked, own, groups))
		return err
	})
	for _, g := range groups {
		cmd.Flags().AddFlagSet(g.Flags) // which passes over those that there are already: see checkNames
	}

	cmd.AddCommand(&cobra.Command{
		Use:       "completion {bash | zsh | fish}",
		Short:     "Print a completion script for a shell",
		ValidArgs: cli.Shells,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || !slices.Contains(cli.Shells, args[0]) {
				return usageError{fmt.Errorf("completion: expected one of bash, zsh, fish")}
			}
			return nil
		},
		RunE: func(sub *cobra.Command, args []string) error {
			return cli.WriteCompletion(sub.OutOrStdout(), cmd, args[0])
		},
	}, &cobra.Command{
		Use:   "man",
		Short: "Print the manual page, in troff",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("man: unexpected argument %q", args[0])}
			}
			return nil
		},
		RunE: func(sub *cobra.Command, _ []string) error {
			return writeMan(sub.OutOrStdout(), cmd)
		},
	})
	return cmd
}

// checkNames refuses an option of an extension that sluiced has itself.
func checkNames(groups []extensions.FlagGroup) (err error) {
	cfg := config.Default()
	own := newCommand(&cfg, nil, nil).Flags()
	for _, g := range groups {
		g.Flags.VisitAll(func(f *pflag.Flag) {
			if own.Lookup(f.Name) != nil {
				err = fmt.Errorf("extension %s has an option --%s, which is sluiced's own: expected another name", g.Extension, f.Name)
			}
		})
	}
	return err
}

// usage is what --help shows below the description: the options, those of each extension by themselves. It is a function and not
// one of cobra's templates, for with text/template the linker keeps every exported method of every type: half the program again.
func usage(asked *cobra.Command, own *pflag.FlagSet, groups []extensions.FlagGroup) string {
	var b strings.Builder
	b.WriteString("Usage:\n  " + asked.UseLine() + "\n")
	if asked.HasParent() {
		return b.String()
	}
	for _, sub := range asked.Commands() {
		if !sub.Hidden {
			b.WriteString("  " + sub.CommandPath() + "\n")
		}
	}
	b.WriteString("\nOptions:\n" + own.FlagUsages())
	for _, g := range groups {
		b.WriteString("\nOptions of the extension " + g.Extension + ":\n" + g.Flags.FlagUsages())
	}
	return b.String()
}

// wantsVersion says whether cmd, which has been parsed, is to print the version and nothing else.
func wantsVersion(cmd *cobra.Command) bool {
	wants, err := cmd.Flags().GetBool("version")
	return err == nil && wants
}

// wantsCapabilities says whether args hold --print-capabilities, which overrides everything else, even what is wrong
// (vhost-user specification, "Backend program conventions").
func wantsCapabilities(args []string) bool {
	for _, a := range args {
		switch a {
		case "--print-capabilities":
			return true
		case "--":
			return false
		}
	}
	return false
}

func printCapabilities(w io.Writer) error {
	return json.NewEncoder(w).Encode(struct {
		Type     string   `json:"type"`
		Features []string `json:"features"`
	}{"fs", capabilities})
}
