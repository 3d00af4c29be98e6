package archtest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// house is the import table of the architecture. A room that is new gets a row here first.
var house = Rules{
	Module: "github.com/sluicefs/sluice",
	Imports: map[string][]string{
		"cmd/...": {"..."},
		"daemon":  {"..."},

		// The control API knows what can be asked and not who serves; its clients know the API alone.
		"control":             {"control/api", "docs", "internal/listen", "internal/ratelog"},
		"control/api":         {},
		"control/client":      {"control/api"},
		"cmd/sluicectl":       {"control/api", "control/client", "fsbackend/permshift", "internal/cli"},
		"cmd/sluice-agent":    {"control/api"},
		"share/sharer":        {"control/api", "control/client"},
		"internal/watch":      {"internal/ratelog"},
		"internal/link":       {"control/api"},
		"control/controltest": {"control/api"},

		"extensions":     {"control/api", "fsbackend", "seccomp"},
		"extensions/...": {"extensions", "extensions/...", "fsbackend", "fsbackend/...", "fuseproto", "seccomp", "control/api", "internal/program", "internal/sandbox", "internal/sys", "internal/upperdir", "plugin"},
		// What a layer plug-in speaks is for those who write one, too.
		"plugin":            {},
		"internal/program":  {"internal/ratelog", "internal/sandbox", "internal/sys", "seccomp"},
		"internal/upperdir": {"internal/sys"},
		// The program with the network: the daemon imports nothing of it.
		"imagefetch":     {"imagefetch/...", "fsbackend/lazyimage/...", "internal/ratelog", "internal/sys"},
		"imagefetch/...": {"imagefetch/...", "fsbackend/lazyimage/...", "internal/ratelog", "internal/sys"},
		"seccomp":        {},
		"seccomp/...":    {},
		"share":          {"fsbackend", "fuseproto", "internal/ratelog"},

		// The one room that knows the transport and the file system.
		"virtiofs": {"vhostuser", "virtqueue", "fuseserver", "fsbackend", "fuseproto", "guestmem", "internal/sys", "internal/ratelog"},

		"vhostuser":           {"guestmem", "internal/sys", "internal/ratelog"},
		"vhostuser/vhosttest": {"vhostuser", "guestmem", "internal/sys"},
		"virtqueue":           {"guestmem", "internal/sys"},
		"virtqueue/vqtest":    {"virtqueue", "guestmem", "internal/sys"},
		"guestmem":            {"internal/sys"},

		"fuseserver":                {"fuseproto", "fsbackend", "internal/sys", "internal/ratelog"},
		"docs":                      {},
		"fuseproto":                 {},
		"fsbackend":                 {"fuseproto", "internal/sys"},
		"fsbackend/...":             {"fsbackend", "fuseproto", "internal/sys"},
		"fsbackend/fusebridge":      {"fsbackend", "fuseproto", "internal/ratelog", "internal/sys"},
		"fsbackend/lazyimage":       {"fsbackend", "fsbackend/lazyimage/store", "fuseproto", "internal/ratelog", "internal/sys"},
		"fsbackend/lazyimage/store": {"internal/ratelog", "internal/sys"},
		"fsbackend/pluginlayer":     {"fsbackend", "fsbackend/ondemand", "fsbackend/passthrough", "fuseproto", "internal/ratelog", "internal/sys", "plugin"},
		// Side by side with others: nothing of the daemon's may import it.
		"bench":     {"bench/...", "internal/testguest/..."},
		"bench/...": {"bench/...", "fuseproto", "guestmem", "internal/sys", "internal/testguest/...", "vhostuser", "vhostuser/vhosttest", "virtqueue", "virtqueue/vqtest"},

		"internal/archtest":      {},
		"internal/bundle":        {},
		"internal/cli":           {},
		"internal/config":        {},
		"internal/configfile":    {"control/api", "internal/config"},
		"internal/listen":        {"internal/sys"},
		"internal/ratelog":       {},
		"internal/sandbox":       {"internal/sys"},
		"internal/sys":           {},
		"internal/testguest/...": {"internal/testguest/..."},
		"test/escape":            {},
		"test/guest/...":         {"internal/testguest/...", "test/guest/..."},
		"test/guest/extd":        {"daemon", "extensions", "fsbackend", "fsbackend/...", "seccomp"},
	},
	Libraries: map[string][]string{
		"github.com/containerd/stargz-snapshotter":  {"imagefetch/..."},
		"github.com/google/go-containerregistry":    {"imagefetch/..."},
		"github.com/opencontainers/go-digest":       {"imagefetch/..."},
		"github.com/fsnotify/fsnotify":              {"share/sharer"},
		"github.com/hanwen/go-fuse":                 {"fuseproto", "fsbackend/gofuse", "fsbackend/fsbackendtest"},
		"github.com/mdlayher/vsock":                 {"control", "cmd/sluice-agent"},
		"github.com/pelletier/go-toml":              {"internal/configfile"},
		"github.com/prometheus":                     {"control"},
		"github.com/opencontainers/runtime-spec":    {"daemon", "extensions/...", "internal/bundle", "test/guest/extd"},
		"github.com/seccomp":                        {"seccomp"},
		"golang.org/x/perf":                         {"bench/report"},
		"gonum.org/v1":                              {"bench/report"},
		"github.com/spf13":                          {"cmd/...", "daemon", "extensions/...", "internal/cli", "test/guest/extd"},
		"kernel.org/pub/linux/libs/security/libcap": {"internal/sandbox"},
	},
	Cgo: []string{"seccomp"},
}

func TestHouse(t *testing.T) {
	pkgs, err := List("../..")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(pkgs, func(p Package) bool { return p.ImportPath == house.Module+"/internal/archtest" }) {
		t.Fatalf("the packages listed do not even include this one: %v", pkgs)
	}
	found, err := house.Check(pkgs)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		t.Error(f)
	}
}

// TestCheck breaks each rule in a module of its own.
func TestCheck(t *testing.T) {
	rules := Rules{
		Module: "example.test/m",
		Imports: map[string][]string{
			"cmd/...":   {"..."},
			"top":       {"bottom", "tree/..."},
			"bottom":    {},
			"tree/...":  {"bottom"},
			"tree/leaf": {},
			"native":    {},
		},
		Libraries: map[string][]string{"example.test/lib": {"top"}},
		Cgo:       []string{"native"},
	}
	for _, tt := range []struct {
		name string
		file string
		text string
		want string // "" is no violation
	}{
		{"allowed import", "top/a.go", `import _ "example.test/m/bottom"`, ""},
		{"allowed tree", "top/a.go", `import _ "example.test/m/tree/leaf"`, ""},
		{"root of an allowed tree", "top/a.go", `import _ "example.test/m/tree"`, ""},
		{"allowed everything", "cmd/x/a.go", `import _ "example.test/m/top"`, ""},
		{"tests import what they like", "bottom/a_test.go", `import _ "example.test/m/top"`, ""},
		{"import upwards", "bottom/a.go", `import _ "example.test/m/top"`, "bottom/a.go:2: bottom may not import top: the import table does not say so"},
		{"name that only begins alike", "top/a.go", `import _ "example.test/m/bottomless"`, "top/a.go:2: top may not import bottomless: the import table does not say so"},
		{"row of the tree", "tree/twig/a.go", `import _ "example.test/m/top"`, "tree/twig/a.go:2: tree/twig may not import top: the import table does not say so"},
		{"longest row wins", "tree/leaf/a.go", `import _ "example.test/m/bottom"`, "tree/leaf/a.go:2: tree/leaf may not import bottom: the import table does not say so"},
		{"behind a build tag", "bottom/a_plan9.go", `import _ "example.test/m/top"`, "bottom/a_plan9.go:2: bottom may not import top: the import table does not say so"},
		{"no row", "attic/a.go", ``, "attic: is in no row of the import table"},

		{"library where it belongs", "top/a.go", `import _ "example.test/lib/v2"`, ""},
		{"library elsewhere", "bottom/a.go", `import _ "example.test/lib/v2"`, "bottom/a.go:2: import example.test/lib/v2: only top may"},

		{"unsafe", "bottom/a_unsafe.go", `import _ "unsafe"`, ""},
		{"unsafe in a test", "bottom/a_unsafe_test.go", `import _ "unsafe"`, ""},
		{"unsafe elsewhere", "bottom/a.go", `import _ "unsafe"`, "bottom/a.go:2: import unsafe: only in files named *_unsafe.go"},
		{"unsafe in another test", "bottom/a_test.go", `import _ "unsafe"`, "bottom/a_test.go:2: import unsafe: only in files named *_unsafe.go"},
		{"unsafe in a program", "cmd/x/a.go", `import _ "unsafe"`, "cmd/x/a.go:2: import unsafe: only in files named *_unsafe.go"},

		{"cgo", "native/a.go", `import "C"`, ""},
		{"cgo elsewhere", "bottom/a.go", `import "C"`, "bottom/a.go:2: import C: cgo is only for native"},

		{"exit of a program", "cmd/x/a.go", "import \"os\"\nfunc main() { os.Exit(1) }", ""},
		{"exit of a test", "bottom/a_test.go", "import \"os\"\nfunc TestMain() { os.Exit(1) }", ""},
		{"exit of a library", "bottom/a.go", "import \"os\"\nvar f = os.Exit", "bottom/a.go:3: os.Exit: only a program ends the process; return an error"},
		{"log of a library", "bottom/a.go", `import _ "log"`, "bottom/a.go:2: import log: a library logs to the *slog.Logger it is given and does not end the process"},
		{"slog of a library", "bottom/a.go", `import _ "log/slog"`, ""},
		{"init of a library", "bottom/a.go", "func init() {}", "bottom/a.go:2: func init: a library does nothing by being imported"},
		{"method called init", "bottom/a.go", "type t struct{}\nfunc (t) init() {}", ""},
		{"init of a program", "cmd/x/a.go", "func init() {}", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			room := filepath.Dir(tt.file)
			p := Package{ImportPath: rules.Module + "/" + room, Name: filepath.Base(room), Dir: filepath.Join(dir, room)}
			if strings.HasPrefix(room, "cmd/") {
				p.Name = "main"
			}
			if err := os.MkdirAll(p.Dir, 0o755); err != nil {
				t.Fatal(err)
			}
			text := "package " + p.Name + "\n" + tt.text + "\n"
			if err := os.WriteFile(filepath.Join(dir, tt.file), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			found, err := rules.Check([]Package{p})
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			if tt.want != "" {
				want = []string{tt.want}
			}
			if !slices.Equal(found, want) {
				t.Errorf("found %q, want %q", found, want)
			}
		})
	}
}

func TestCheckReportsBrokenFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.go"), []byte("not Go"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := house.Check([]Package{{ImportPath: house.Module + "/fuseproto", Name: "fuseproto", Dir: dir}}); err == nil {
		t.Error("a file that does not parse passes")
	}
}
