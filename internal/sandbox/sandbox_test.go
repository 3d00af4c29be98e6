package sandbox

import (
	"os"
	"testing"
)

func TestTree(t *testing.T) {
	for _, w := range []who{root, user} {
		t.Run(w.String(), func(t *testing.T) {
			if w == root {
				needRoot(t)
			}
			dir := tree(t, w)
			found, r := enter[[]string](t, w, scenario{View: View{Sources: []Source{{Path: dir}, {}, {Path: dir + "/file", File: true, ReadOnly: true}}}, Probe: "tree"})
			t.Log(found, r.Paths, r.Missing)
			_ = os.Stdout
		})
	}
}
