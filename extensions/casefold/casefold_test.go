package casefold

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/extensions/extensionstest"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

func TestServed(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Cafe\u0301"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	h := &extensionstest.Host{Extensions: []extensions.Hosted{Extension{}}}
	for option, found := range map[string]bool{"normalize=none": false, "normalize=nfc": true} {
		g := h.Open(t, extensions.Mount{Backend: "casefold", Source: dir, Options: []string{option}})
		if !g.Options.Stock {
			t.Errorf("options %+v, expected the directory's, which are stock", g.Options)
		}
		for name, found := range map[string]bool{"CAFE\u0301": true, "CAF\u00c9": found} {
			if e, errno := g.Client().Lookup(fsbackendtest.Root, name); errno != fsbackend.OK || (e.NodeId != 0) != found {
				t.Errorf("%s: LOOKUP of %q: node %d, %v, expected it is found: %v", option, name, e.NodeId, errno, found)
			}
		}
	}
	for option, says := range map[string]string{"normalise=nfc": "normalize", "normalize=nfkc": "none or nfc"} {
		if err := h.OpenFails(t, extensions.Mount{Backend: "casefold", Source: dir, Options: []string{option}}); !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %q, expected it to say %q", option, err, says)
		}
	}
}
