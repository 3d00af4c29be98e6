package plugins

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/program"
	"github.com/sluicefs/sluice/plugin"
)

// TestMain makes the test binary a plug-in where it is started by a name that begins with one of these words.
func TestMain(m *testing.M) {
	program.MaybeConfine()
	kind, name, _ := strings.Cut(filepath.Base(os.Args[0]), "-")
	switch kind {
	case "good":
		if err := plugin.Main(good(name)); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	case "old":
		_, _ = os.NewFile(plugin.SocketFD, "").WriteString(`{"proto":0,"name":"old"}`)
		time.Sleep(time.Minute)
	case "rubbish":
		_, _ = os.NewFile(plugin.SocketFD, "").WriteString("rubbish")
		time.Sleep(time.Minute)
	case "silent":
		time.Sleep(time.Minute)
	case "ends":
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// good is a plug-in of that name.
type good string

func (g good) Name() string      { return string(g) }
func (good) Needs() plugin.Needs { return plugin.Needs{Network: true} }

// NumLayers has as many layers as data says, and one without.
func (good) NumLayers(_ context.Context, data, _ string) (int, error) {
	if data == "" {
		return 1, nil
	}
	return strconv.Atoi(data)
}

func (g good) Load(_ context.Context, _, path string, n int) (plugin.Layer, error) {
	if path == "broken" {
		return nil, fs.ErrPermission
	}
	return single(fmt.Sprintf("%s-%s-%d", g, path, n)), nil
}

// single is a layer with one empty directory of that name.
type single string

func (single) Info() plugin.Info { return plugin.Info{} }
func (single) Close() error      { return nil }

func (s single) Stat(_ context.Context, path string) (plugin.Attr, error) {
	if path != "." && path != string(s) {
		return plugin.Attr{}, fs.ErrNotExist
	}
	return plugin.Attr{Mode: unix.S_IFDIR | 0o755, Nlink: 2}, nil
}

func (s single) ReadDir(_ context.Context, path string) ([]plugin.DirEntry, error) {
	if path != "." {
		return nil, nil
	}
	return []plugin.DirEntry{{Name: string(s), Type: unix.DT_DIR}}, nil
}

func (single) Readlink(context.Context, string) (string, error) { return "", unix.EINVAL }

func (single) Open(context.Context, string) (*os.File, error) { return nil, unix.EISDIR }

// direct starts programs without anything around them.
type direct struct{ started []string }

func (d *direct) Start(_ context.Context, path string) (*os.File, func(), error) {
	d.started = append(d.started, filepath.Base(path))
	server, end, err := plugin.Pair()
	if err != nil {
		return nil, nil, err
	}
	defer end.Close()
	cmd := exec.Command(path)
	cmd.ExtraFiles = []*os.File{end}
	if err := cmd.Start(); err != nil {
		_ = server.Close()
		return nil, nil, err
	}
	return server, func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}, nil
}

// programs makes files of these names, which are this test's binary.
func programs(t *testing.T, names ...string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range names {
		if err := os.Symlink(self, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestDiscover is row B1: a list, or else a directory; what cannot be used is an error that says why.
func TestDiscover(t *testing.T) {
	dir := programs(t, "good-one", "good-two", "good-two-again", "old", "rubbish", "silent", "ends")
	if err := os.WriteFile(filepath.Join(dir, "text"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "open"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "open"), 0o757); err != nil {
		t.Fatal(err)
	}
	twin := programs(t, "good-two")
	plain := programs(t, "good-two", "good-one")
	if err := errors.Join(os.WriteFile(filepath.Join(plain, "README"), nil, 0o644), os.Mkdir(filepath.Join(plain, "sub"), 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		cfg   Config
		names []string
		want  string
	}{
		{name: "nothing"},
		{name: "no such directory", cfg: Config{Dir: dir + "/none"}},
		{name: "directory", cfg: Config{Dir: plain}, names: []string{"one", "two"}},
		{name: "list goes before", cfg: Config{Dir: plain, Lists: []string{dir + "/good-one"}}, names: []string{"one"}},
		{name: "empty list of lists", cfg: Config{Dir: plain, Lists: []string{}}},
		{name: "lists", cfg: Config{Lists: []string{dir + "/good-one:" + dir + "/good-two", dir + "/good-two-again"}}, names: []string{"one", "two", "two-again"}},
		{name: "compiled in", cfg: Config{Dir: plain, Compiled: []plugin.Plugin{good("three")}}, names: []string{"one", "three", "two"}},
		{name: "broken directory", cfg: Config{Dir: dir}, want: "open: everybody may change it"},
		{name: "directory that is none", cfg: Config{Dir: dir + "/text"}, want: "not a directory"},
		{name: "same name", cfg: Config{Lists: []string{dir + "/good-two:" + twin + "/good-two"}}, want: "two layer plug-ins are called two, " + dir + "/good-two and " + twin + "/good-two"},
		{name: "same name as compiled in", cfg: Config{Dir: plain, Compiled: []plugin.Plugin{good("two")}}, want: "two layer plug-ins are called two, the one that is compiled in and " + plain},
		{name: "bad name compiled in", cfg: Config{Compiled: []plugin.Plugin{good("a/b")}}, want: `"a/b": expected a name`},
		{name: "missing", cfg: Config{Lists: []string{dir + "/none"}}, want: "none: no such file"},
		{name: "not executable", cfg: Config{Lists: []string{dir + "/text"}}, want: "not executable"},
		{name: "directory as a program", cfg: Config{Lists: []string{dir}}, want: "no regular file"},
		{name: "empty path", cfg: Config{Lists: []string{"a::b"}}, want: "with ':' between them"},
		{name: "other version", cfg: Config{Lists: []string{dir + "/old"}}, want: "old: hello: it speaks version 0 of the protocol, expected 1"},
		{name: "rubbish", cfg: Config{Lists: []string{dir + "/rubbish"}}, want: "expected JSON like"},
		{name: "no hello", cfg: Config{Lists: []string{dir + "/ends"}}, want: "it ended without a hello"},
		{name: "silence", cfg: Config{Lists: []string{dir + "/silent"}, Timeout: 100 * time.Millisecond}, want: "no hello in time, expected one on descriptor 3"},
		{name: "cannot be started", cfg: Config{Lists: []string{"/dev/null/x"}}, want: "not a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.cfg.Starter = &direct{}
			before := openFiles(t)
			set, err := Discover(t.Context(), tt.cfg)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, expected %q", err, tt.want)
			}
			var names []string
			for name, p := range set {
				names = append(names, name)
				if p.Name != name || (p.Path == "") != (p.Compiled != nil) || p.Path != "" && !p.Needs.Network {
					t.Errorf("%s is %+v", name, p)
				}
			}
			slices.Sort(names)
			if !slices.Equal(names, tt.names) {
				t.Errorf("found %q, expected %q", names, tt.names)
			}
			if after := openFiles(t); after != before {
				t.Errorf("%d descriptors are open, %d were before", after, before)
			}
		})
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestFind(t *testing.T) {
	set := Set{"b": {Name: "b"}, "a": {Name: "a"}}
	if p, err := set.Find("a"); err != nil || p.Name != "a" {
		t.Errorf("a is %+v, %v", p, err)
	}
	if _, err := set.Find("c"); err == nil || !strings.Contains(err.Error(), `"c" is not known: expected one of a, b`) {
		t.Errorf("c: %v", err)
	}
	if _, err := (Set{}).Find("c"); err == nil || !strings.Contains(err.Error(), "there are none: name its program with --plugin") {
		t.Errorf("c of none: %v", err)
	}
}

func TestSplit(t *testing.T) {
	for list, want := range map[string][]string{
		"a":           {"a"},
		"a:b":         {"a", "b"},
		`a\:b:c`:      {"a:b", "c"},
		`a\\:b`:       {`a\`, "b"},
		`a\b`:         {`a\b`},
		`a\`:          {`a\`},
		"":            {""},
		":":           {"", ""},
		"//x//y:/z/a": {"//x//y", "/z/a"},
	} {
		if got := Split(list); !slices.Equal(got, want) {
			t.Errorf("%q is %q, expected %q", list, got, want)
		}
	}
}
