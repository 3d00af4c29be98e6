package cli

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

// timed has the default be told of options that are times.
func timed(f *pflag.Flag) bool { return f.Value.Type() == "duration" }

// Roff escapes s for lines of a manual page, in troff's man macros.
func Roff(s string) string {
	s = roffEscapes.Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}

var roffEscapes = strings.NewReplacer(`\`, `\e`, `-`, `\-`, "\n.", "\n\\&.", "\n'", "\n\\&'", "…", "...")

// ManFlags writes the paragraphs of a manual page on the options in fs, in the order in which they were added. hasDefault says of which
// the default is to be told.
func ManFlags(b *strings.Builder, fs *pflag.FlagSet, hasDefault func(*pflag.Flag) bool) {
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
		fmt.Fprintf(b, "\\fB\\-\\-%s\\fR", Roff(f.Name))
		if f.NoOptDefVal == "" {
			fmt.Fprintf(b, " \\fI%s\\fR", Roff(arg))
		}
		b.WriteString("\n" + Roff(Sentence(usage)))
		if hasDefault(f) {
			fmt.Fprintf(b, " The default is %s.", Roff(f.DefValue))
		}
		b.WriteString("\n")
	})
}

// ManCommands writes the sections of a manual page on the options that all of root's commands have, and on each of them.
func ManCommands(b *strings.Builder, root *cobra.Command) {
	b.WriteString(".SH OPTIONS OF ALL COMMANDS\n")
	ManFlags(b, root.PersistentFlags(), timed)
	b.WriteString(".SH COMMANDS\n")
	for _, cmd := range Commands(root) {
		path, arguments := Spelled(cmd)
		fmt.Fprintf(b, ".SS \"%s %s\"\n%s\n", Roff(strings.TrimPrefix(path, root.Name()+" ")), Roff(arguments), Roff(cmd.Long))
		ManFlags(b, cmd.LocalNonPersistentFlags(), timed)
		if cmd.Example != "" {
			fmt.Fprintf(b, ".PP\nExamples:\n.PP\n.nf\n%s\n.fi\n", Roff(cmd.Example))
		}
	}
}

// Sentence makes a sentence of a usage text.
func Sentence(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:] + "."
}
