package manpage

import (
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

func TestEscape(t *testing.T) {
	for s, want := range map[string]string{
		"a-b": `a\-b`, `a\b`: `a\eb`, ".x": `\&.x`, "'x": `\&'x`, "a\n.b\n'c": "a\n\\&.b\n\\&'c", "and so on…": "and so on...", "": "",
	} {
		if got := Escape(s); got != want {
			t.Errorf("%q becomes %q, expected %q", s, got, want)
		}
	}
}

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
	leaf.Flags().BoolP("all", "a", false, "all of it")
	leaf.Flags().Duration("time-limit", time.Minute, "how `long`")
	leaf.Flags().Bool("secret", false, "nothing")
	leaf.Flags().Lookup("secret").Hidden = true
	var b strings.Builder
	Flags(&b, leaf.Flags())
	const want = ".TP\n\\fB\\-a\\fR, \\fB\\-\\-all\\fR\nAll of it.\n.TP\n\\fB\\-\\-time\\-limit\\fR \\fIlong\\fR\nHow long. The default is 1m0s.\n"
	if b.String() != want {
		t.Errorf("the flags are\n%s\nexpected\n%s", b.String(), want)
	}
}
