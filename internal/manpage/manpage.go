// Package manpage has what the manual pages of programs with commands are put together from, in troff's man macros.
package manpage

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Commands are the commands below cmd that do something, in order.
func Commands(cmd *cobra.Command) (all []*cobra.Command) {
	for _, c := range cmd.Commands() {
		switch {
		case c.Hidden:
		case c.HasSubCommands():
			all = append(all, Commands(c)...)
		default:
			all = append(all, c)
		}
	}
	return all
}

// Spelled is how cmd is typed: its path, and its arguments.
func Spelled(cmd *cobra.Command) (path, arguments string) {
	_, arguments, _ = strings.Cut(cmd.Use, " ")
	return cmd.CommandPath(), arguments
}

// Flags writes a paragraph for each flag that is not hidden.
func Flags(b *strings.Builder, fs *pflag.FlagSet) {
	fs.SortFlags = false
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		arg, usage := pflag.UnquoteUsage(f)
		b.WriteString(".TP\n")
		if f.Shorthand != "" {
			fmt.Fprintf(b, "\\fB\\-%s\\fR, ", f.Shorthand)
		}
		fmt.Fprintf(b, "\\fB\\-\\-%s\\fR", Escape(f.Name))
		if f.NoOptDefVal == "" {
			fmt.Fprintf(b, " \\fI%s\\fR", Escape(arg))
		}
		b.WriteString("\n" + Escape(strings.ToUpper(usage[:1])+usage[1:]+"."))
		if f.Value.Type() == "duration" {
			fmt.Fprintf(b, " The default is %s.", Escape(f.DefValue))
		}
		b.WriteString("\n")
	})
}

// Escape is s for lines of troff.
func Escape(s string) string {
	s = escapes.Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}

var escapes = strings.NewReplacer(`\`, `\e`, `-`, `\-`, "\n.", "\n\\&.", "\n'", "\n\\&'", "…", "...")
