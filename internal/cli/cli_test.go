package cli

import (
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// TestFlagError has pflag refuse what people type, and reads what they are told.
func TestFlagError(t *testing.T) {
	for args, want := range map[string]string{
		"--n x":                    `--n: "x" is not a whole number`,
		"--u -1":                   `--u: "-1" is not a whole number`,
		"--n 99999999999999999999": "--n: 99999999999999999999 is out of range",
		"--b=perhaps":              `--b: "perhaps" is not true or false; expected the option alone`,
		"--d soon":                 `--d: "soon" is not a time; expected one such as 500ms or 2s`,
		"--s":                      "--s needs an argument",
		"--other":                  "unknown option --other",
		"-x":                       "unknown option -x",
	} {
		var s string
		var n int
		var u uint64
		var b bool
		fs := pflag.NewFlagSet("", pflag.ContinueOnError)
		AddFlag(fs, "s", "", &s)
		AddFlag(fs, "n", "", &n)
		AddFlag(fs, "u", "", &u)
		AddFlag(fs, "b", "", &b)
		fs.Duration("d", time.Second, "")
		err := fs.Parse(strings.Fields(args))
		if err == nil {
			t.Errorf("%s is taken", args)
		} else if got := FlagError(err).Error(); got != want {
			t.Errorf("%s: %q; expected %q", args, got, want)
		}
	}
}

// TestManFlags shows that what is written is text to troff, whatever is in it.
func TestManFlags(t *testing.T) {
	value := "a-b"
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	AddFlag(fs, "z-name", "use `FILE`\n.so /etc/passwd\n'as \\fBtext", &value)
	AddFlag(fs, "a", "say so", new(bool))
	hidden := AddFlag(fs, "h", "not to be seen", new(int))
	hidden.Hidden = true
	var b strings.Builder
	ManFlags(&b, fs, func(f *pflag.Flag) bool { return f.Name == "z-name" })
	want := ".TP\n\\fB\\-\\-z\\-name\\fR \\fIFILE\\fR\nUse FILE\n\\&.so /etc/passwd\n\\&'as \\efBtext. The default is a\\-b.\n" +
		".TP\n\\fB\\-\\-a\\fR\nSay so.\n"
	if b.String() != want {
		t.Errorf("%q; expected %q", b.String(), want)
	}
	if got := Roff(".so x"); got != `\&.so x` {
		t.Errorf("%q", got)
	}
}

// TestCommands finds what a manual page has sections of.
func TestCommands(t *testing.T) {
	root := &cobra.Command{Use: "p"}
	group := &cobra.Command{Use: "group"}
	leaf := &cobra.Command{Use: "leaf ONE [TWO]"}
	group.AddCommand(leaf)
	root.AddCommand(group, &cobra.Command{Use: "hidden", Hidden: true})
	all := Commands(root)
	if len(all) != 1 || all[0] != leaf {
		t.Fatalf("the commands are %v", all)
	}
	if path, arguments := Spelled(leaf); path != "p group leaf" || arguments != "ONE [TWO]" {
		t.Errorf("it is spelled %q %q", path, arguments)
	}
}
