package plugins

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/extensions/extensionstest"
	"github.com/sluicefs/sluice/extensions/overlay"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/plugin"
	"github.com/sluicefs/sluice/seccomp"
)

// host knows plug-ins and overlays, and is given this --plugin; none is the default directory.
func host(lists ...string) *extensionstest.Host {
	return &extensionstest.Host{Extensions: []extensions.Hosted{&Extension{}, overlay.Extension{}}, Plugins: lists}
}

func names(t *testing.T, g *extensionstest.Graft) string {
	t.Helper()
	list := g.Client().List(t, fsbackendtest.Root, 4096)
	slices.Sort(list)
	return strings.Join(list, " ")
}

func lowerdir(options ...string) extensions.Mount {
	return extensions.Mount{Backend: "overlay", Options: options}
}

// TestServed has plug-ins serve layers: alone, and in overlays, in which one entry may be many.
func TestServed(t *testing.T) {
	dir := programs(t, "good-one", "good-two")
	h := host(dir+"/good-one", dir+"/good-two")
	for _, c := range []struct {
		m    extensions.Mount
		want string
	}{
		{extensions.Mount{Backend: Name, Options: []string{"name=one", "path=p"}}, "one-p-0"},
		{lowerdir("lowerdir=//one//a"), "one-a-0"},
		{lowerdir("lowerdir=//one/3/a://two//b"), "one-a-0 one-a-1 one-a-2 two-b-0"},
		{lowerdir("lowerdir=//one//a", "plugins="+dir+"/good-one"), "one-a-0"},
	} {
		g := h.Open(t, c.m)
		if got := names(t, g); got != c.want {
			t.Errorf("%v: it has %s, expected %s", c.m.Options, got, c.want)
		}
		if g.Options.Stock {
			t.Errorf("%v: options %+v: a program may be slow", c.m.Options, g.Options)
		}
	}
	for _, c := range []struct {
		m    extensions.Mount
		want string
	}{
		{extensions.Mount{Backend: Name}, "option name is missing"},
		{extensions.Mount{Backend: Name, Options: []string{"name=one", "layers=some"}}, "expected all"},
		{extensions.Mount{Backend: Name, Source: "/x", Options: []string{"name=one"}}, "has no source"},
		{extensions.Mount{Backend: Name, Options: []string{"name=one", "data=3"}}, "the plug-in has 3 layers: expected one, or an overlay of them: lowerdir=//one/3/"},
		{extensions.Mount{Backend: Name, Options: []string{"name=none"}}, "expected one of one, two"},
		{lowerdir("lowerdir=//one//a://none//b"), "expected one of one, two"},
		{lowerdir("lowerdir=//two//b", "plugins="+dir+"/good-one"), "expected one of one"},
		{lowerdir("lowerdir=//two//b", "plugins="), "there are none"},
		{lowerdir("lowerdir=//one//broken"), "layer plugin name=one"},
		{lowerdir("lowerdir=//one/0/a"), "layer plugin name=one"},
	} {
		if err := h.OpenFails(t, c.m); !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, expected %q", c.m.Options, err, c.want)
		}
	}
	if err := host(dir+"/good-one", dir+"/good-one").OpenFails(t, lowerdir("lowerdir=//one//")); !strings.Contains(err.Error(), "two layer plug-ins are called one") {
		t.Error(err)
	}
}

// TestDefaultDirectory finds plug-ins beside the daemon, where none are named.
func TestDefaultDirectory(t *testing.T) {
	dir := DefaultDir()
	if _, err := os.Lstat(dir); err == nil {
		t.Fatalf("%s is there already", dir)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Dir(filepath.Dir(dir))) })
	if err := os.Rename(filepath.Join(programs(t, "good-found"), "good-found"), filepath.Join(dir, "good-found")); err != nil {
		t.Fatal(err)
	}
	if got := names(t, host().Open(t, lowerdir("lowerdir=//found//x"))); got != "found-x-0" {
		t.Errorf("it has %s", got)
	}
	if err := host(filepath.Join(programs(t, "good-other"), "good-other")).OpenFails(t, lowerdir("lowerdir=//found//x")); !strings.Contains(err.Error(), "expected one of other") {
		t.Error(err)
	}
}

// TestCompiled serves layers of a plug-in that is part of the program, beside one that is not.
func TestCompiled(t *testing.T) {
	dir := programs(t, "good-one")
	h := &extensionstest.Host{
		Extensions: []extensions.Hosted{&Extension{Compiled: []plugin.Plugin{good("mine")}}, overlay.Extension{}}, Plugins: []string{dir + "/good-one"},
	}
	for _, c := range []struct {
		m    extensions.Mount
		want string
	}{
		{extensions.Mount{Backend: Name, Options: []string{"name=mine", "path=p"}}, "mine-p-0"},
		{lowerdir("lowerdir=//mine/2/a://one//b"), "mine-a-0 mine-a-1 one-b-0"},
	} {
		if got := names(t, h.Open(t, c.m)); got != c.want {
			t.Errorf("%v: it has %s, expected %s", c.m.Options, got, c.want)
		}
	}
	h.Extensions[0].(*Extension).Compiled = []plugin.Plugin{good("one")}
	h.Extensions[0].(*Extension).found = nil
	if err := h.OpenFails(t, lowerdir("lowerdir=//one//")); !strings.Contains(err.Error(), "two layer plug-ins are called one") {
		t.Error(err)
	}
	with, without := (&Extension{Compiled: []plugin.Plugin{good("x")}, Rules: seccomp.Rules{"memfd_create": seccomp.MatchAll{}}}).SeccompRules(), (&Extension{}).SeccompRules()
	for _, call := range []string{"socketpair", "memfd_create"} {
		if with[call] == nil || without[call] != nil {
			t.Errorf("%s is allowed with a plug-in that is compiled in: %v, without: %v", call, with[call] != nil, without[call] != nil)
		}
	}
}

// TestNeeds gives a plug-in no more than the network for the asking.
func TestNeeds(t *testing.T) {
	var log strings.Builder
	out := &extensions.Outside{Log: slog.New(slog.NewTextHandler(&log, nil))}
	c := config(out, "/p", plugin.Needs{Network: true, Caps: []string{"CAP_SYS_ADMIN"}, Syscalls: []string{"mount"}, Write: []string{"/"}})
	if !c.Confine.Network || c.Confine.Caps != 0 || !c.Confine.Seccomp || c.Confine.Mount || c.Confine.None {
		t.Errorf("a plug-in that asks for more is run with %+v", c.Confine)
	}
	if !strings.Contains(log.String(), "CAP_SYS_ADMIN") || !strings.Contains(log.String(), "plugin=/p") {
		t.Errorf("the log says %q", log.String())
	}
	log.Reset()
	if c := config(out, "/p", plugin.Needs{}); c.Confine.Network || log.Len() > 0 {
		t.Errorf("a plug-in that asks for nothing is run with %+v, and the log says %q", c.Confine, log.String())
	}
}
