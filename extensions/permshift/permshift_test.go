package permshift

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/extensions/casefold"
	"github.com/sluicefs/sluice/extensions/extensionstest"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/permshift"
)

func host() *extensionstest.Host {
	return &extensionstest.Host{Extensions: []extensions.Hosted{Extension{}, casefold.Extension{}}}
}

const root = fsbackendtest.Root

func value(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 100)
	n, err := unix.Lgetxattr(path, permshift.ContainersOverride.Xattr(), buf)
	if err != nil && err != unix.ENODATA {
		t.Fatal(err)
	}
	return string(buf[:max(n, 0)])
}

func TestServed(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	dir := t.TempDir()
	g := host().Open(t, extensions.Mount{Backend: "permshift", Source: dir, Options: []string{"format=user.containers.override_stat", "force-mask=private"}})
	if !g.Options.Stock {
		t.Errorf("options %+v, expected the directory's, which are stock", g.Options)
	}
	if _, errno := g.Client().As(7, 8).Mkdir(root, "d", 0o751); errno != fsbackend.OK {
		t.Fatal(errno)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(dir, "d"), &st); err != nil {
		t.Fatal(err)
	}
	if got := value(t, filepath.Join(dir, "d")); got != "7:8:0751:dir" || st.Mode&0o7777 != 0o700 {
		t.Errorf("on the host, the directory has the value %q, mode %#o", got, st.Mode)
	}
	// Found by the root's mark, below another layer, and read-only.
	for _, m := range []extensions.Mount{
		{Backend: "permshift", Source: dir, ReadOnly: true},
		{Backend: "casefold", Lowers: []extensions.Mount{{Backend: "permshift", Lowers: []extensions.Mount{{Backend: "passthrough", Source: dir}}}}},
	} {
		if e, errno := host().Open(t, m).Client().Lookup(root, "d"); errno != fsbackend.OK || e.Uid != 7 || e.Mode != unix.S_IFDIR|0o751 {
			t.Errorf("%s: LOOKUP: owner %d, mode %#o, %v", m.Backend, e.Uid, e.Mode, errno)
		}
	}
}

// TestReadOnly: what is not to be changed is not even marked.
func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	options := []string{"format=containers-override"}
	lower := []extensions.Mount{{Backend: "passthrough", Source: dir, ReadOnly: true}}
	for _, m := range []extensions.Mount{
		{Backend: "permshift", Source: dir, ReadOnly: true, Options: options},
		{Backend: "permshift", Lowers: lower, Options: options},
	} {
		host().Open(t, m)
		if got := value(t, dir); got != "" {
			t.Errorf("a read-only root was marked %q", got)
		}
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	below := extensions.Mount{Backend: "mem"}
	for name, row := range map[string]struct {
		m    extensions.Mount
		says []string
	}{
		"unknown option":  {extensions.Mount{Source: dir, Options: []string{"fromat=auto"}}, []string{"fromat", "force-mask, format"}},
		"unknown format":  {extensions.Mount{Source: dir, Options: []string{"format=best"}}, []string{"best", "original-permissions", "containers-override"}},
		"bad mask":        {extensions.Mount{Source: dir, Options: []string{"force-mask=rwx"}}, []string{"rwx", "shared"}},
		"mask of nothing": {extensions.Mount{Source: dir, Options: []string{"force-mask"}}, []string{"shared"}},
		"mask for others": {extensions.Mount{Source: dir, Options: []string{"force-mask=0055"}}, []string{"0700"}},
		"nothing below":   {extensions.Mount{}, []string{"source"}},
		"two below":       {extensions.Mount{Lowers: []extensions.Mount{below, below}}, []string{"2 trees"}},
		"both":            {extensions.Mount{Source: dir, Lowers: []extensions.Mount{below}}, []string{"not both"}},
		"no directory":    {extensions.Mount{Source: filepath.Join(dir, "none")}, []string{"none"}},
		"no mark":         {extensions.Mount{Source: dir}, []string{"user.containers.override_stat", "convert"}},
	} {
		t.Run(name, func(t *testing.T) {
			row.m.Backend = "permshift"
			err := host().OpenFails(t, row.m)
			for _, says := range row.says {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("error %q, expected it to say %q", err, says)
				}
			}
		})
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestRegistered(t *testing.T) {
	r, err := extensions.NewRegistry(Extension{}, casefold.Extension{})
	if err != nil {
		t.Fatal(err)
	}
	rules, err := r.Rules([]extensions.Extension{Extension{}, casefold.Extension{}})
	if err != nil || len(rules) == 0 || rules[0].Rules["getxattrat"] == nil {
		t.Errorf("rules %v, %v", rules, err)
	}
	for _, ext := range []extensions.Extension{Extension{}, casefold.Extension{}} {
		if b, _, err := ext.TryHandleMount(nil, nil, "", false); b != nil || err != nil {
			t.Errorf("%s claims what does not name it: %v", ext.Name(), err)
		}
	}
}
