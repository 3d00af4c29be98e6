package configfile

import (
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/sluicefs/sluice/control/api"
)

// schema is the keys of every table, by the heading in docs/config.md.
func schema() map[string][]string {
	return map[string][]string{
		"The beginning of the file": slices.DeleteFunc(keys(reflect.TypeFor[File]()), func(key string) bool {
			return key == "vsock" || key == "hybrid-vsock" || key == "share" // these are headings
		}),
		"`[[vsock]]`":                       keys(reflect.TypeFor[VSock]()),
		"`[[hybrid-vsock]]`":                keys(reflect.TypeFor[HybridVSock]()),
		"`[[share]]`":                       keys(reflect.TypeFor[api.ShareSpec]()),
		"`[[share.graft]]`":                 keys(reflect.TypeFor[api.GraftSpec]()),
		"`[[share.graft.lower]]`":           keys(reflect.TypeFor[api.LowerSpec]()),
		"Ranges of `uid-map` and `gid-map`": keys(reflect.TypeFor[api.IDRange]()),
		"One share on the command line":     append(slices.Clone(rootKeys), keyRO),
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestDocs(t *testing.T) {
	var (
		documented = make(map[string][]string)
		heading    string
		row        = regexp.MustCompile("^\\| `([a-z-]+)` \\|")
	)
	for line := range strings.Lines(string(read(t, "../../docs/config.md"))) {
		if strings.HasPrefix(line, "#") {
			heading = strings.TrimSpace(strings.TrimLeft(line, "#"))
		}
		if m := row.FindStringSubmatch(line); m != nil {
			documented[heading] = append(documented[heading], m[1])
		}
	}
	want := schema()
	for _, heading := range slices.Sorted(maps.Keys(want)) {
		if !slices.Equal(slices.Sorted(slices.Values(documented[heading])), slices.Sorted(slices.Values(want[heading]))) {
			t.Errorf("%s: documented are %v, there are %v", heading, documented[heading], want[heading])
		}
		delete(documented, heading)
	}
	if len(documented) > 0 {
		t.Errorf("documented, but not there: %v", documented)
	}
}

// TestExample reads contrib/sluiced.toml as it is, and with all that is commented out.
func TestExample(t *testing.T) {
	const path = "../../contrib/sluiced.toml"
	f, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Shares) != 1 || len(f.Shares[0].Grafts) != 2 {
		t.Errorf("shares %+v", f.Shares)
	}
	all := regexp.MustCompile(`(?m)^#([^# \n])`).ReplaceAll(read(t, path), []byte("$1"))
	if f, err = Parse(path, all); err != nil {
		t.Fatal(err)
	}
	given := make(map[string]bool)
	gather(&f.tree.root, "", given)
	for at, typ := range map[string]reflect.Type{
		"":              reflect.TypeFor[File](),
		"vsock.":        reflect.TypeFor[VSock](),
		"hybrid-vsock.": reflect.TypeFor[HybridVSock](),
		"share.":        reflect.TypeFor[api.ShareSpec](),
		"share.graft.":  reflect.TypeFor[api.GraftSpec](),
	} {
		for _, key := range keys(typ) {
			if !given[at+key] {
				t.Errorf("%s%s is missing", at, key)
			}
		}
	}
}

// gather adds the keys in n, without indices.
func gather(n *node, key string, into map[string]bool) {
	into[key] = true
	for name, e := range n.entries {
		gather(e, join(key, name), into)
	}
	if n.kind == unstable.Array {
		for _, item := range n.items {
			gather(item, key, into)
		}
	}
}

// TestUnit holds the systemd unit's directories against the example's.
func TestUnit(t *testing.T) {
	unit := string(read(t, "../../contrib/systemd/sluiced.service"))
	f, err := Load("../../contrib/sluiced.toml")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^RuntimeDirectory=(.+)$`).FindStringSubmatch(unit)
	if m == nil {
		t.Fatal("the unit has no RuntimeDirectory")
	}
	for _, socket := range []string{f.ControlSocket, f.Shares[0].Socket} {
		if !strings.HasPrefix(socket, "/run/"+m[1]+"/") {
			t.Errorf("%s is not in the unit's /run/%s", socket, m[1])
		}
	}
}
