package sharer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/control/controltest"
)

// grafting is a prepared sandbox of a daemon.
func grafting(t *testing.T, c Config) (*Sandbox, *controltest.Daemon) {
	t.Helper()
	d := newDaemon(t)
	c.Backend = Grafts{Daemon: d, Tag: guestTag}
	s := newTestSandbox(t, c, linux{})
	prepare(t, s)
	return s, d
}

// mustShare is ShareFile, which has to work.
func mustShare(t *testing.T, s *Sandbox, container string, m *Mount) *SharedFile {
	t.Helper()
	f, err := s.ShareFile(t.Context(), &Container{ID: container}, m)
	if err != nil {
		t.Fatal(err)
	}
	if f == nil {
		t.Fatalf("%s is left out", m.Source)
	}
	return f
}

func mustUnshare(t *testing.T, s *Sandbox, container string, m *Mount) {
	t.Helper()
	if err := s.UnshareFile(t.Context(), &Container{ID: container}, m); err != nil {
		t.Fatal(err)
	}
}

// TestLifecycle calls Prepare and Cleanup again and again, in every back-end.
func TestLifecycle(t *testing.T) {
	for name, backend := range map[string]func(*testing.T) Backend{
		"grafts": func(t *testing.T) Backend { return Grafts{Daemon: newDaemon(t), Tag: guestTag} },
		"copy":   func(t *testing.T) Backend { return Copy{Agent: newGuest(t)} },
	} {
		t.Run(name, func(t *testing.T) { lifecycle(t, backend(t), t.TempDir()) })
	}
}

func TestLifecycleWithBindMounts(t *testing.T) {
	if !inPrivateMounts(t) {
		return
	}
	lifecycle(t, BindMounts{}, t.TempDir())
	// As on most hosts, where all mounts propagate.
	propagates := t.TempDir()
	mountAt(t, "none", propagates, "tmpfs", 0, "")
	if err := (linux{}).mount("none", propagates, unix.MS_SHARED); err != nil {
		t.Fatal(err)
	}
	lifecycle(t, BindMounts{}, filepath.Join(propagates, "sandboxes"))
	if left := mountsBelow(t, propagates); len(left) != 1 {
		t.Errorf("mounts %v", left)
	}
}

func lifecycle(t *testing.T, b Backend, host string) {
	dir := stage(t)
	if err := os.MkdirAll(host, 0o755); err != nil {
		t.Fatal(err)
	}
	s := newTestSandbox(t, Config{Backend: b, HostDir: host, SandboxBindMounts: []string{filepath.Join(dir, "certs")}}, linux{})
	ctx := t.Context()
	m := Mount{Source: filepath.Join(dir, "data"), Destination: "/data"}
	if _, err := s.ShareFile(ctx, &Container{ID: "c"}, &m); !errors.Is(err, errNotPrepared) {
		t.Errorf("ShareFile before Prepare: error %v", err)
	}
	if err := s.UnshareFile(ctx, &Container{ID: "c"}, &m); err != nil {
		t.Errorf("UnshareFile before Prepare: %v", err)
	}
	state := func() string { return strings.Join(mountsBelow(t, host), "\n") + "\n" + tree(t, host) }
	nothing := state()
	for range 2 {
		prepare(t, s)
		ready := state()
		for range 3 {
			prepare(t, s)
			if now := state(); now != ready {
				t.Errorf("Prepare again changes\n%s\nto\n%s", ready, now)
			}
		}
		if ready == nothing {
			t.Error("Prepare does nothing")
		}
		if _, ok := b.(BindMounts); ok {
			if got, err := os.ReadFile(filepath.Join(host, "pod1/shared/sandbox-mounts/certs/ca")); err != nil || string(got) != "ca" {
				t.Errorf("the daemon sees %q, %v", got, err)
			}
		}
		first := mustShare(t, s, "c", &m)
		shared := state()
		for range 3 {
			if again := mustShare(t, s, "c", &m); again.GuestPath != first.GuestPath {
				t.Errorf("shared at %s, and again at %s", first.GuestPath, again.GuestPath)
			}
		}
		if now := state(); now != shared {
			t.Errorf("sharing again changes\n%s\nto\n%s", shared, now)
		}
		for range 3 {
			mustUnshare(t, s, "c", &m)
			if now := state(); now != ready {
				t.Errorf("unshared is\n%s\nwant\n%s", now, ready)
			}
		}
		mustShare(t, s, "c", &m)
		for range 3 {
			if err := s.Cleanup(ctx); err != nil {
				t.Fatal(err)
			}
			if now := state(); now != nothing {
				t.Errorf("Cleanup leaves\n%s", now)
			}
		}
		mustUnshare(t, s, "c", &m)
	}
	// Another process's Cleanup finds nothing to do either.
	if err := newTestSandbox(t, Config{Backend: b, HostDir: host}, linux{}).Cleanup(ctx); err != nil {
		t.Error(err)
	}
}

// TestUsers is row C8 of the issue: read-only and writable users of one source.
func TestUsers(t *testing.T) {
	dir := stage(t)
	s, d := grafting(t, Config{})
	source := filepath.Join(dir, "data")
	reader := Mount{Source: source, Destination: "/in", ReadOnly: true}
	writer := Mount{Source: source, Destination: "/out"}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(source, link); err != nil {
		t.Fatal(err)
	}
	linked := Mount{Source: link, Destination: "/linked", Options: []string{"rbind", "ro"}}

	at := mustShare(t, s, "a", &reader).GuestPath
	if g := only(t, d); !g.ReadOnly || g.Source != source {
		t.Errorf("for a reader: %+v", g.GraftSpec)
	}
	if reader.HostPath != "/"+filepath.Base(at) {
		t.Errorf("HostPath is %q for %s", reader.HostPath, at)
	}
	if got := mustShare(t, s, "b", &writer).GuestPath; got != at {
		t.Errorf("the same source is at %s and %s", at, got)
	}
	if only(t, d).ReadOnly {
		t.Error("it is read-only for a writer")
	}
	if got := mustShare(t, s, "a", &linked).GuestPath; got != at {
		t.Errorf("the same source through a link is at %s and %s", at, got)
	}
	stats, err := s.Stats(t.Context())
	if err != nil || stats.Shares != 1 || stats.Users != 3 {
		t.Errorf("stats %+v, %v: want 1 share with 3 users", stats, err)
	}
	mustUnshare(t, s, "b", &writer)
	if !only(t, d).ReadOnly {
		t.Error("it is writable after the writer has left")
	}
	// A container that may write now is another user than before, but not one more.
	mustShare(t, s, "a", &Mount{Source: source, Destination: "/in"})
	if only(t, d).ReadOnly {
		t.Error("it is read-only for a reader that has become a writer")
	}
	mustUnshare(t, s, "a", &reader)
	if !only(t, d).ReadOnly {
		t.Error("it is writable for the reader that is left")
	}
	mustUnshare(t, s, "a", &linked)
	if left := grafted(t, d); len(left) != 0 {
		t.Errorf("it is there without users: %v", left)
	}
}

// TestSpec is what a mount's options become.
func TestSpec(t *testing.T) {
	dir := stage(t)
	s, d := grafting(t, Config{})
	mustShare(t, s, "c", &Mount{Source: filepath.Join(dir, "data"), Destination: "/d", Options: []string{"rbind", "rslave", "nosuid", "nodev", "noexec", "nosymfollow", "exec"}})
	g := only(t, d)
	want := api.GraftSpec{Path: g.Path, Source: filepath.Join(dir, "data"), NoSUID: true, NoDev: true, NoSymfollow: true, FollowMounts: true}
	if !reflect.DeepEqual(g.GraftSpec, want) {
		t.Errorf("graft %+v\nwant %+v", g.GraftSpec, want)
	}
}

// TestCycles shares and unshares 500 times: nothing adds up (row C6, on the host's side).
func TestCycles(t *testing.T) {
	dir := stage(t)
	s, d := grafting(t, Config{})
	fds := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	m := Mount{Source: filepath.Join(dir, "data"), Destination: "/data"}
	before := fds()
	for range 500 {
		mustShare(t, s, "c", &m)
		mustUnshare(t, s, "c", &m)
	}
	if after := fds(); after > before {
		t.Errorf("%d descriptors have become %d", before, after)
	}
	if left := grafted(t, d); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if info, err := os.Stat(filepath.Join(s.dir, journalName)); err != nil || info.Size() > 200 {
		t.Errorf("the record has grown: %v, %v", info, err)
	}
}

// TestGuestPaths is row C4.
func TestGuestPaths(t *testing.T) {
	dir := stage(t)
	s, _ := grafting(t, Config{})
	long := write(t, filepath.Join(dir, "long"), "")
	for _, tt := range []struct{ destination, base string }{
		{"/etc/resolv.conf", `resolv\.conf`},
		{"/var/data/", `data`},
		{"relative/path", `path`},
		{"/with blank", `with blank`},
		{"/not\xffutf8", `not_utf8`},
		{"/" + strings.Repeat("n", 255), `n+`},
	} {
		got := mustShare(t, s, "c-1.x", &Mount{Source: long, Destination: tt.destination, Options: []string{"size=" + tt.base}})
		name, ok := strings.CutPrefix(got.GuestPath, "/run/kata-containers/shared/containers/")
		if want := regexp.MustCompile(`^c-1\.x-[0-9a-f]{16}-` + tt.base + `$`); !ok || !want.MatchString(name) || len(name) > 255 {
			t.Errorf("%q is shared at %q, want %v", tt.destination, got.GuestPath, want)
		}
		mustUnshare(t, s, "c-1.x", &Mount{Source: long, Destination: tt.destination})
	}
	for _, destination := range []string{"/", "", "/..", "."} {
		if f, err := s.ShareFile(t.Context(), &Container{ID: "c"}, &Mount{Source: long, Destination: destination}); err == nil {
			t.Errorf("destination %q is shared at %s", destination, f.GuestPath)
		}
	}
	name, err := fileName(sandboxScope, "/var/lib/kubelet/pods/x/volumes/kubernetes.io~empty-dir/cache")
	if err != nil || !regexp.MustCompile(`^sandbox-[0-9a-f]{16}-cache$`).MatchString(name) {
		t.Errorf("a volume of the sandbox is %q, %v", name, err)
	}
}

func TestIDs(t *testing.T) {
	s, _ := grafting(t, Config{})
	for _, id := range []string{"", ".", "..", "a/b", "../x", "a..b", "-a", "a b", "a\n", "sandbox-mounts", "watchable", strings.Repeat("a", 129)} {
		c := &Container{ID: id}
		_, err := s.ShareFile(t.Context(), c, &Mount{Source: "/etc", Destination: "/x"})
		_, rootErr := s.ShareRootFilesystem(t.Context(), c)
		for what, err := range map[string]error{
			"ShareFile": err, "ShareRootFilesystem": rootErr,
			"UnshareFile":           s.UnshareFile(t.Context(), c, &Mount{}),
			"UnshareRootFilesystem": s.UnshareRootFilesystem(t.Context(), c),
		} {
			if err == nil || !strings.Contains(err.Error(), "container ID") {
				t.Errorf("%s of container %q: error %v", what, id, err)
			}
		}
		if _, err := New(Config{ID: id, Backend: BindMounts{}}); err == nil {
			t.Errorf("sandbox %q passes", id)
		}
	}
	for _, id := range []string{"a", "0123abc", "A_b-c.d", strings.Repeat("f", 64)} {
		if err := validateID("container", id); err != nil {
			t.Error(err)
		}
	}
}

func TestSources(t *testing.T) {
	s, d := grafting(t, Config{})
	for _, source := range []string{"", "relative", filepath.Join(t.TempDir(), "missing")} {
		if _, err := s.ShareFile(t.Context(), &Container{ID: "c"}, &Mount{Source: source, Destination: "/x"}); err == nil {
			t.Errorf("source %q passes", source)
		}
	}
	f, err := s.ShareFile(t.Context(), &Container{ID: "c"}, &Mount{Source: "/dev/sda", Destination: "/x", BlockDeviceID: "drive-1"})
	if f != nil || err != nil || len(grafted(t, d)) != 0 {
		t.Errorf("a block device is shared: %v, %v", f, err)
	}
}

// TestRoot is row C7, as far as the sharer goes.
func TestRoot(t *testing.T) {
	dir := stage(t)
	s, d := grafting(t, Config{})
	ctx, root := t.Context(), filepath.Join(dir, "root")
	c := &Container{ID: "c", RootFs: RootFs{Target: root, Mounted: true}}
	m := Mount{Source: root, Destination: "/root-again"}
	mustShare(t, s, "other", &m)
	for range 2 {
		f, err := s.ShareRootFilesystem(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		if want := "/run/kata-containers/shared/containers/c/rootfs"; f.GuestPath != want || f.ContainerStorages != nil {
			t.Errorf("shared %+v, want %s", f, want)
		}
	}
	if g, ok := grafted(t, d)["/c/rootfs"]; !ok || g.Source != root || g.ReadOnly {
		t.Errorf("graft of the root: %+v", g)
	}
	for range 2 {
		if err := s.UnshareRootFilesystem(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	if g := only(t, d); g.Path != m.HostPath {
		t.Errorf("what is left is %s, want %s", g.Path, m.HostPath)
	}

	image := &Container{ID: "image", RootFs: RootFs{Source: "registry/busybox", Backend: "estargz", Type: "image", Options: []string{"a=b", "c"}, ReadOnly: true}}
	if _, err := s.ShareRootFilesystem(ctx, image); err != nil {
		t.Fatal(err)
	}
	want := api.GraftSpec{Path: "/image/rootfs", Source: "registry/busybox", Backend: "estargz", Type: "image", Options: []string{"a=b", "c"}, ReadOnly: true}
	if got := grafted(t, d)["/image/rootfs"].GraftSpec; !reflect.DeepEqual(got, want) {
		t.Errorf("root of another backend: %+v\nwant %+v", got, want)
	}

	guest := &Container{ID: "guest", RootFs: RootFs{Storages: []*Storage{{Driver: "blk", Source: "0001"}}}}
	if f, err := s.ShareRootFilesystem(ctx, guest); err != nil || !reflect.DeepEqual(f.ContainerStorages, guest.RootFs.Storages) {
		t.Errorf("root that the guest makes: %+v, %v", f, err)
	}
	layers := &Container{ID: "layers", RootFs: RootFs{Type: "fuse3.kata-overlay", Options: []string{layerOption + "x"}}}
	f, err := s.ShareRootFilesystem(ctx, layers)
	if err != nil || len(f.ContainerStorages) != 1 || f.GuestPath != "/run/kata-containers/layers/rootfs" || f.ContainerStorages[0].MountPoint != f.GuestPath {
		t.Errorf("root of layers: %+v, %v", f, err)
	}
	if len(grafted(t, d)) != 2 {
		t.Errorf("a root that the guest makes is grafted: %v", grafted(t, d))
	}
	if _, err := s.ShareRootFilesystem(ctx, &Container{ID: "none"}); err == nil {
		t.Error("a root without a source passes")
	}
}

// TestSandboxBindMounts is row C9.
func TestSandboxBindMounts(t *testing.T) {
	for _, tt := range []struct {
		specs []string
		want  []bindMount
		err   string
	}{
		{[]string{"/a/x", "/a/y:ro", "/b/z:rw", "/c/w/:rw"}, []bindMount{{"/a/x", true}, {"/a/y", true}, {"/b/z", false}, {"/c/w", false}}, ""},
		{[]string{"/a/x:ro", "/b/x:rw"}, nil, `"/a/x:ro" and "/b/x:rw" have the same name "x"`},
		{[]string{"a"}, nil, `"a": expected an absolute path`},
		{[]string{"/"}, nil, `"/": expected an absolute path`},
		{[]string{"/..:rw"}, nil, `"/..:rw": expected an absolute path`},
		{[]string{""}, nil, `"": expected an absolute path`},
		{[]string{":rw"}, nil, `":rw": expected an absolute path`},
	} {
		got, err := parseSandboxBindMounts(tt.specs)
		if tt.err == "" && (err != nil || !slices.Equal(got, tt.want)) {
			t.Errorf("%q are %v, %v: want %v", tt.specs, got, err, tt.want)
		}
		if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%q: error %v, want one with %q", tt.specs, err, tt.err)
		}
		if err := (&Config{ID: "pod", Backend: BindMounts{}, SandboxBindMounts: tt.specs}).Validate(); (err != nil) != (tt.err != "") {
			t.Errorf("configuration with %q: %v", tt.specs, err)
		}
	}
	dir := stage(t)
	_, d := grafting(t, Config{SandboxBindMounts: []string{filepath.Join(dir, "certs"), filepath.Join(dir, "data") + ":rw"}})
	grafts := grafted(t, d)
	if certs, data := grafts["/sandbox-mounts/certs"], grafts["/sandbox-mounts/data"]; len(grafts) != 2 || !certs.ReadOnly || data.ReadOnly || data.Source != filepath.Join(dir, "data") {
		t.Errorf("grafts %v", grafts)
	}
}

func TestConfig(t *testing.T) {
	d := controltest.New()
	for name, c := range map[string]Config{
		"no backend":      {ID: "pod"},
		"no daemon":       {ID: "pod", Backend: Grafts{Tag: "x"}},
		"no tag":          {ID: "pod", Backend: Grafts{Daemon: d}},
		"prefix":          {ID: "pod", Backend: Grafts{Daemon: d, Tag: "x", Prefix: "/a/../b"}},
		"no agent":        {ID: "pod", Backend: Copy{}},
		"relative":        {ID: "pod", Backend: BindMounts{}, HostDir: "x"},
		"memory of mount": {ID: "pod", Backend: BindMounts{}, MemoryGrafts: true},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s passes", name)
		}
	}
}

// TestPrefix has two sandboxes in one share, and somebody else's grafts: none removes another's.
func TestPrefix(t *testing.T) {
	dir, d := stage(t), newDaemon(t)
	for _, path := range []string{"/a", "/b", "/elsewhere", "/a/plain"} {
		if _, err := d.AddGraft(t.Context(), guestTag, api.GraftSpec{Path: path, Source: "/x"}, false); err != nil {
			t.Fatal(err)
		}
	}
	open := func(id string) *Sandbox {
		s := newTestSandbox(t, Config{ID: id, Backend: Grafts{Daemon: d, Tag: guestTag, Prefix: "/" + id}}, linux{})
		prepare(t, s)
		mustShare(t, s, "c", &Mount{Source: filepath.Join(dir, "data"), Destination: "/data"})
		return s
	}
	a, b := open("a"), open("b")
	if err := a.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := grafted(t, d); len(left) != 5 {
		t.Errorf("left after one of two: %v", left)
	}
	if err := b.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := grafted(t, d); len(left) != 4 {
		t.Errorf("left of others: %v", left)
	}
}

// TestRecordLost cleans up with nothing but the daemon's grafts to go by.
func TestRecordLost(t *testing.T) {
	for name, lose := range map[string]func(string) error{
		"gone":    os.Remove,
		"garbled": func(name string) error { return os.WriteFile(name, []byte(`{"version":1,`), 0o600) },
		"other": func(name string) error {
			return os.WriteFile(name, []byte(`{"version":1,"sandbox":"x","shared":[null]}`), 0o600)
		},
		"null": func(name string) error {
			return os.WriteFile(name, []byte(`{"version":1,"sandbox":"pod1","shared":[null,{}]}`), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir, host := stage(t), t.TempDir()
			s, d := grafting(t, Config{HostDir: host, SandboxBindMounts: []string{filepath.Join(dir, "certs")}})
			mustShare(t, s, "c", &Mount{Source: filepath.Join(dir, "data"), Destination: "/data"})
			if _, err := s.ShareRootFilesystem(t.Context(), &Container{ID: "c", RootFs: RootFs{Target: filepath.Join(dir, "root")}}); err != nil {
				t.Fatal(err)
			}
			if n := len(grafted(t, d)); n != 3 {
				t.Fatalf("%d grafts", n)
			}
			if err := lose(filepath.Join(host, "pod1", journalName)); err != nil {
				t.Fatal(err)
			}
			next := newTestSandbox(t, Config{HostDir: host, Backend: Grafts{Daemon: d, Tag: guestTag}}, linux{})
			if err := next.Cleanup(t.Context()); err != nil {
				t.Fatal(err)
			}
			if left := grafted(t, d); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
			if left := tree(t, host); strings.Contains(left, "pod1") {
				t.Errorf("left: %s", left)
			}
		})
	}
}

// TestTakenUp goes on in another process: users are still counted.
func TestTakenUp(t *testing.T) {
	dir, host := stage(t), t.TempDir()
	s, d := grafting(t, Config{HostDir: host})
	source := filepath.Join(dir, "data")
	a, b := Mount{Source: source, Destination: "/a", ReadOnly: true}, Mount{Source: source, Destination: "/b"}
	at := mustShare(t, s, "c", &a).GuestPath
	mustShare(t, s, "c", &b)

	s = newTestSandbox(t, Config{HostDir: host, Backend: Grafts{Daemon: d, Tag: guestTag}}, linux{})
	prepare(t, s)
	mustUnshare(t, s, "c", &b)
	if g := only(t, d); !g.ReadOnly {
		t.Error("it is writable after the writer has left")
	}
	again := Mount{Source: source, Destination: "/a", ReadOnly: true}
	if got := mustShare(t, s, "c", &again).GuestPath; got != at {
		t.Errorf("it is at %s now, not %s", got, at)
	}
	// A daemon that was started anew has nothing, and is told again.
	if err := d.RemoveGraft(t.Context(), guestTag, a.HostPath); err != nil {
		t.Fatal(err)
	}
	s = newTestSandbox(t, Config{HostDir: host, Backend: Grafts{Daemon: d, Tag: guestTag}}, linux{})
	prepare(t, s)
	mustShare(t, s, "c", &again)
	only(t, d)
	mustUnshare(t, s, "c", &again)
	if left := grafted(t, d); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// TestSomebodyElsesGraft is not taken for ours, nor removed.
func TestSomebodyElsesGraft(t *testing.T) {
	dir := stage(t)
	s, d := grafting(t, Config{})
	if _, err := d.AddGraft(t.Context(), guestTag, api.GraftSpec{Path: "/c/rootfs", Source: "/somewhere"}, false); err != nil {
		t.Fatal(err)
	}
	c := &Container{ID: "c", RootFs: RootFs{Target: filepath.Join(dir, "root")}}
	if _, err := s.ShareRootFilesystem(t.Context(), c); code(err) != api.CodeExists {
		t.Errorf("share a root where there is a graft: %v", err)
	}
	d.Fail("AddGraft", api.Errorf(api.CodeInternal, "something"))
	if _, err := s.ShareRootFilesystem(t.Context(), c); code(err) != api.CodeInternal {
		t.Errorf("error %v", err)
	}
	if g := only(t, d); g.Source != "/somewhere" {
		t.Errorf("it has become %+v", g)
	}
}

// TestDaemonGone cleans up when the daemon has ended first, as it does when the VM is stopped.
func TestDaemonGone(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "control.sock")
	dead := filepath.Join(dir, "dead.sock")
	l, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	for name, path := range map[string]string{"no socket": socket, "nobody listens": dead} {
		host := t.TempDir()
		s, d := grafting(t, Config{HostDir: host})
		mustShare(t, s, "c", &Mount{Source: stage(t), Destination: "/data"})
		daemon, err := client.New(client.Config{Socket: path})
		if err != nil {
			t.Fatal(err)
		}
		s = newTestSandbox(t, Config{HostDir: host, Backend: Grafts{Daemon: daemon, Tag: guestTag}}, linux{})
		if err := s.Cleanup(t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if left := tree(t, host); strings.Contains(left, "pod1") {
			t.Errorf("%s: left %s", name, left)
		}
		_ = d
	}
	if gone(&net.OpError{Op: "read", Err: syscall.ECONNREFUSED}) || gone(os.ErrNotExist) || gone(nil) {
		t.Error("what may still be there is taken for gone")
	}
}

// TestContext ends waiting, for the daemon and for others.
func TestContext(t *testing.T) {
	s, d := grafting(t, Config{})
	release := d.Hang("AddGraft")
	ctx, cancel := context.WithCancel(t.Context())
	source := stage(t)
	first := make(chan error, 1)
	go func() {
		_, err := s.ShareFile(ctx, &Container{ID: "c"}, &Mount{Source: source, Destination: "/x"})
		first <- err
	}()
	for len(s.lock) == 0 {
		time.Sleep(time.Millisecond)
	}
	short, done := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer done()
	if err := s.Prepare(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("who waits for another gets %v", err)
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("who waits for the daemon gets %v", err)
	}
	release()
	if left := grafted(t, d); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := s.ShareFile(ctx, &Container{ID: "c"}, &Mount{Source: source, Destination: "/x"}); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: %v", err)
	}
}

// TestConcurrent is for the race detector.
func TestConcurrent(t *testing.T) {
	s, d := grafting(t, Config{})
	dir := stage(t)
	done := make(chan error)
	const n = 8
	for i := range n {
		go func() {
			c := &Container{ID: fmt.Sprint("c", i)}
			var err error
			for range 20 {
				m := &Mount{Source: filepath.Join(dir, "data"), Destination: "/data", ReadOnly: i%2 == 0}
				_, shareErr := s.ShareFile(t.Context(), c, m)
				err = errors.Join(err, shareErr, s.UnshareFile(t.Context(), c, m))
			}
			done <- err
		}()
	}
	for range n {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if left := grafted(t, d); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
