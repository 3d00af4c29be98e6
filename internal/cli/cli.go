// Package cli is what the command lines of Sluice's programs have in common: how options are added, completed, explained and
// described.
package cli

import (
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// version is set by the linker: -ldflags "-X github.com/sluicefs/sluice/internal/cli.version=v1.2.3".
var version string

// Version is the version given by the linker, else that of the module (go install …@version), else "devel".
func Version() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "devel"
}

// AddFlag gives fs the option name, which sets *p, whose value is the default. It panics if options cannot be of p's type.
func AddFlag(fs *pflag.FlagSet, name, usage string, p any) *pflag.Flag {
	switch p := p.(type) {
	case *string:
		fs.StringVar(p, name, *p, usage)
	case *[]string:
		fs.StringArrayVar(p, name, *p, usage)
	case *bool:
		fs.BoolVar(p, name, *p, usage)
	case *int:
		fs.IntVar(p, name, *p, usage)
	case *int64:
		fs.Int64Var(p, name, *p, usage)
	case *uint64:
		fs.Uint64Var(p, name, *p, usage)
	case pflag.Value:
		fs.Var(p, name, usage)
	default:
		panic(fmt.Sprintf("option %s: no flag type for a %T", name, p))
	}
	return fs.Lookup(name)
}

// CompleteFlag tells the shells' completions what the argument of cmd's option name may be: the Choices() of its value, names of
// files, or nothing that is known.
func CompleteFlag(cmd *cobra.Command, name string, files bool) {
	values := cobra.NoFileCompletions
	if c, ok := cmd.Flag(name).Value.(interface{ Choices() []string }); ok {
		values = cobra.FixedCompletions(c.Choices(), cobra.ShellCompDirectiveNoFileComp)
	} else if files {
		values = Files
	}
	if err := cmd.RegisterFlagCompletionFunc(name, values); err != nil {
		panic(err) // the flag is there, and has no other function
	}
}

// Files completes names of files.
func Files(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// Shells are those that there is a completion script for.
var Shells = []string{"bash", "zsh", "fish"}

// WriteCompletion writes root's completion script for one of Shells.
func WriteCompletion(w io.Writer, root *cobra.Command, shell string) error {
	switch shell {
	case "bash":
		return root.GenBashCompletionV2(w, true)
	case "zsh":
		return root.GenZshCompletion(w)
	case "fish":
		return root.GenFishCompletion(w, true)
	}
	return fmt.Errorf("%q is not a shell known here: expected one of %s", shell, strings.Join(Shells, ", "))
}

// FlagError says in our words what pflag found wrong with the command line.
func FlagError(err error) error {
	var (
		invalid  *pflag.InvalidValueError
		missing  *pflag.ValueRequiredError
		notExist *pflag.NotExistError
	)
	switch {
	case errors.As(err, &invalid):
		return InvalidValue("--"+invalid.GetFlag().Name, invalid.GetFlag(), invalid.GetValue(), invalid.Unwrap())
	case errors.As(err, &missing):
		return fmt.Errorf("--%s needs an argument", missing.GetFlag().Name)
	case errors.As(err, &notExist) && notExist.GetSpecifiedShortnames() != "":
		return fmt.Errorf("unknown option -%s", notExist.GetSpecifiedName())
	case errors.As(err, &notExist):
		return fmt.Errorf("unknown option --%s", notExist.GetSpecifiedName())
	}
	return err
}

// InvalidValue says why value cannot be that of the option f, which is called name here.
func InvalidValue(name string, f *pflag.Flag, value string, cause error) error {
	switch kind := f.Value.Type(); {
	case errors.Is(cause, strconv.ErrRange):
		return fmt.Errorf("%s: %s is out of range", name, value)
	case kind == "bool":
		return fmt.Errorf("%s: %q is not true or false; expected the option alone", name, value)
	case strings.HasPrefix(kind, "int"), strings.HasPrefix(kind, "uint"):
		return fmt.Errorf("%s: %q is not a whole number", name, value)
	case kind == "duration":
		return fmt.Errorf("%s: %q is not a time; expected one such as 500ms or 2s", name, value)
	}
	return fmt.Errorf("%s: %w", name, cause)
}
