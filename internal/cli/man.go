package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"
)

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

// Sentence makes a sentence of a usage text.
func Sentence(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:] + "."
}
