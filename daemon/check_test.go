package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/extensions/builtin"
	"github.com/sluicefs/sluice/internal/configfile"
)

// --check-config looks into what extensions are asked for, of grafts and of what they are made of, and says where it is wrong; it opens and
// starts nothing, so that what is not there is no error.
func TestCheckGrafts(t *testing.T) {
	registry, err := extensions.NewRegistry(builtin.All()...)
	if err != nil {
		t.Fatal(err)
	}
	started := filepath.Join(t.TempDir(), "started")
	check := func(graft string) error {
		t.Helper()
		f, err := configfile.Parse("sluiced.toml", []byte("[[share]]\ntag = \"a\"\nsocket = \"/nowhere/s\"\n[[share.graft]]\npath = \"/\"\n"+graft))
		if err != nil {
			t.Fatalf("%s: %v", graft, err)
		}
		return (&program{registry: registry}).checkGrafts(f)
	}
	const digest = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	for _, good := range []string{
		`source = "/no/such"`,
		`backend = "mem"`,
		`backend = "overlay"` + "\n" + `options = ["lowerdir=/no/such:/nor/this:\\/x", "upper=discard"]`,
		`type = "overlay"` + "\n" + `options = ["lowerdir=/no/such"]`,
		`backend = "overlay"` + "\n" + `options = ["lowerdir=//lazyimage/cmVnaXN0cnkuZXhhbXBsZS9h/://permshift//no/such://no-such-plugin/x/y"]`,
		`backend = "overlay"` + "\n" + `options = ["upper=discard"]` + "\n[[share.graft.lower]]\nbackend = \"lazyimage\"\noptions = [\"image=registry.example/a@" + digest + "\"]",
		`backend = "lazyimage"` + "\n" + `options = ["image=registry.example/a:b", "cache-dir=/no/such", "docker-config=/no/such"]`,
		`backend = "fuse"` + "\n" + `options = ["command=touch ` + started + ` {mnt}"]`,
		`backend = "plugin"` + "\n" + `options = ["name=x", "programs=/no/such"]`,
		`backend = "permshift"` + "\n" + `source = "/no/such"` + "\n" + `options = ["format=auto"]`,
		`backend = "casefold"` + "\n" + `source = "/no/such"`,
		`backend = "casefold"` + "\n[[share.graft.lower]]\nbackend = \"permshift\"\nsource = \"/no/such\"",
	} {
		if err := check(good); err != nil {
			t.Errorf("%s\n%v", good, err)
		}
	}
	for _, bad := range []struct{ graft, says string }{
		{`backend = "overlay"`, `sluiced.toml:4: share[0].graft[0]: overlay: lowerdir= is missing`},
		{`backend = "overlay"` + "\n" + `options = ["lowerdir=/a", "redirect_dir=perhaps"]`, "redirect_dir"},
		{`backend = "overlay"` + "\n" + `source = "/x"` + "\n" + `options = ["lowerdir=/a"]`, "source /x"},
		{`backend = "overlay"` + "\n" + `options = ["lowerdir=//lazyimage/!/"]`, "base64"},
		{`backend = "overlay"` + "\n" + `options = ["upper=discard"]` + "\n[[share.graft.lower]]\nbackend = \"lazyimage\"\noptions = [\"image=x\", \"cache-bytes=much\"]", "overlay: layer lazyimage image=x: lazyimage: option cache-bytes=much: expected a number of bytes"},
		{`backend = "overlay"` + "\n" + `options = ["upper=discard"]` + "\n[[share.graft.lower]]\nbackend = \"nosuch\"", `backend "nosuch" serves nothing`},
		{`backend = "lazyimage"`, "expected one of image="},
		{`backend = "lazyimage"` + "\n" + `options = ["image=x", "bandwith=5"]`, `"bandwith" is not known`},
		{`backend = "lazyimage"` + "\n" + `source = "/x"` + "\n" + `options = ["image=x"]`, `directory "/x"`},
		{`backend = "fuse"` + "\n" + `options = ["command=touch ` + started + `"]`, "{mnt}"},
		{`backend = "plugin"`, "option name is missing"},
		{`backend = "permshift"` + "\n" + `source = "/x"` + "\n" + `options = ["format=none"]`, "option format"},
		{`backend = "permshift"`, "expected a directory as the source"},
		{`backend = "casefold"` + "\n" + `source = "/x"` + "\n" + `options = ["normalize=x"]`, "none or nfc"},
		{`backend = "casefold"` + "\n[[share.graft.lower]]\nbackend = \"permshift\"\nsource = \"/x\"\noptions = [\"x\"]", "casefold: permshift: option"},
		{`backend = "nosuch"`, `share[0].graft[0].backend: there is no backend "nosuch"`},
	} {
		if err := check(bad.graft); err == nil || !strings.Contains(err.Error(), bad.says) || !strings.HasPrefix(err.Error(), "sluiced.toml:") {
			t.Errorf("%s\nis %v, expected %q", bad.graft, err, bad.says)
		}
	}
	// Each graft is heard.
	err = check("backend = \"plugin\"\n[[share.graft]]\npath = \"/b\"\nbackend = \"casefold\"")
	if err == nil || strings.Count(err.Error(), "\n") != 1 || !strings.Contains(err.Error(), "share[0].graft[1]: casefold") {
		t.Errorf("of two grafts: %v", err)
	}
	if _, err := os.Stat(started); err == nil {
		t.Error("a program was started")
	}
}
