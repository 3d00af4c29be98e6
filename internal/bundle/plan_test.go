package bundle

import (
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// summary is a mount without its Spec, and Source relative to the test's host.
func summary(host string, m Mount) Mount {
	m.Spec = nil
	if rel, err := filepath.Rel(host, m.Source); m.Source != "" && err == nil {
		m.Source = rel
	}
	return m
}

func wantMounts(t *testing.T, host string, plan *Plan, want []Mount) {
	t.Helper()
	var got []Mount
	for _, m := range plan.Mounts {
		got = append(got, summary(host, m))
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("mounts\n%+v, want\n%+v", got, want)
	}
}

// TestPlanOfRuntimes plans shares from what container engines write.
func TestPlanOfRuntimes(t *testing.T) {
	pods, single := []IDRange{{0, 65536, 65536}}, []IDRange{{0, 1000, 1}}
	for _, tt := range []struct {
		config string
		root   Mount
		want   []Mount
		notes  []string // parts of each
	}{
		{"runc", Mount{Path: "/", Source: "b/rootfs", ReadOnly: true}, nil, nil},
		{
			"containerd",
			Mount{Path: "/", Source: "b/rootfs", UIDMap: pods, GIDMap: pods},
			[]Mount{
				{Path: "/etc/hosts", Source: "pod/hosts", Kind: File, UIDMap: pods, GIDMap: pods},
				{Path: "/etc/hostname", Source: "pod/hostname", Kind: File, UIDMap: pods, GIDMap: pods},
				{Path: "/run/systemd/resolve/stub-resolv.conf", Source: "pod/resolv.conf", Kind: File, UIDMap: pods, GIDMap: pods},
				{Path: "/run/secrets/kubernetes.io/serviceaccount", Source: "pod/volume", ReadOnly: true, UIDMap: pods, GIDMap: pods},
			},
			[]string{"/dev/termination-log", "/dev/shm"},
		},
		{
			"podman",
			Mount{Path: "/", Source: "b/rootfs"},
			[]Mount{
				{Path: "/run/systemd/resolve/stub-resolv.conf", Source: "pod/resolv.conf", Kind: File},
				{Path: "/etc/hosts", Source: "pod/hosts", Kind: File},
				{Path: "/run/.containerenv", Source: "pod/hostname", Kind: File},
				{Path: "/tmp", Kind: Tmpfs, Size: 64 << 20, Mode: 0o1777},
				{Path: "/data", Source: "pod/volume"},
			},
			[]string{"/dev/shm"},
		},
		{
			"umoci",
			Mount{Path: "/", Source: "b/rootfs", UIDMap: single, GIDMap: single},
			[]Mount{{Path: "/run/systemd/resolve/stub-resolv.conf", Source: "pod/resolv.conf", Kind: File, ReadOnly: true, UIDMap: single, GIDMap: single}},
			[]string{`"/sys" is left out`},
		},
	} {
		t.Run(tt.config, func(t *testing.T) {
			host := makeHost(t)
			config, err := os.ReadFile(filepath.Join("testdata", tt.config+".json"))
			if err != nil {
				t.Fatal(err)
			}
			write(t, host, config)
			b, err := Load(filepath.Join(host, "b"), "")
			if err != nil {
				t.Fatal(err)
			}
			plan, err := b.Plan()
			if err != nil {
				t.Fatal(err)
			}
			if got := summary(host, plan.Root); !reflect.DeepEqual(got, tt.root) {
				t.Errorf("root %+v, want %+v", got, tt.root)
			}
			wantMounts(t, host, plan, tt.want)
			wantNotes(t, plan, tt.notes...)
		})
	}
}

func wantNotes(t *testing.T, plan *Plan, parts ...string) {
	t.Helper()
	if len(plan.Notes) != len(parts) {
		t.Fatalf("notes %q, want %d", plan.Notes, len(parts))
	}
	for i, note := range plan.Notes {
		if !strings.Contains(note, parts[i]) {
			t.Errorf("note %q does not say %q", note, parts[i])
		}
	}
}

// TestDestinations mounts on each destination in turn, after the mounts that are given.
func TestDestinations(t *testing.T) {
	host := makeHost(t)
	volume := filepath.Join(host, "pod/volume")
	long := strings.Repeat("n", unix.NAME_MAX)
	for _, tt := range []struct {
		name        string
		before      []specs.Mount
		destination string
		want        string   // "" is left out, or an error
		err         []string // parts of it
	}{
		{"plain", nil, "/data", "/data", nil},
		{"not clean", nil, "//data/./covered/", "/data/covered", nil},
		{"does not exist", nil, "/a/b/c", "/a/b/c", nil},
		{"dots where nothing exists", nil, "/a/b/../c", "/a/c", nil},
		{"dots above the root", nil, "/../../data", "/data", nil},
		{"absolute link", nil, "/abs/new", "/data/new", nil},
		{"absolute link at the end", nil, "/abs", "/data", nil},
		{"link with a slash at the end", nil, "/slashed", "/data/covered", nil},
		{"link that would escape", nil, "/escape/hostname", "/etc/hostname", nil},
		{"link above the root", nil, "/up/up/tmp", "/tmp", nil},
		{"link to a link", nil, "/abs/covered/outer/x", "/run/x", nil},
		{"parent of a link's target", nil, "/slashed/../sibling", "/data/sibling", nil},
		{"dangling link", nil, "/var/run/lock/x", "/run/lock/x", nil},
		{"longest name", nil, "/a/" + long, "/a/" + long, nil},
		{"name too long", nil, "/a/" + long + "n", "", []string{"too long"}},
		{"path too long", nil, "/a" + strings.Repeat("/"+long, 16), "", []string{"too long"}},
		{"path too long in a tmpfs", []specs.Mount{tmpfs("/a")}, "/a" + strings.Repeat("/"+long, 16), "", []string{"too long"}},
		{"loop", nil, "/loop/x", "", []string{"symbolic links"}},
		{"below a file", nil, "/etc/hosts/x", "", []string{`"/etc/hosts" is not a directory`}},
		{"above a file", nil, "/etc/hosts/../x", "", []string{`"/etc/hosts" is not a directory`}},
		{"on a file", nil, "/etc/hosts", "", []string{"/etc/hosts", "is a file"}},
		{"root", nil, "/", "", []string{"root itself"}},
		{"root by dots", nil, "/data/..", "", []string{"root itself"}},
		{"root by a link", nil, "/root", "", []string{"root itself"}},
		{"relative", nil, "data", "", []string{"absolute"}},
		{"nothing", nil, "", "", []string{"absolute"}},
		{"NUL", nil, "/a\x00b", "", []string{"absolute"}},

		{"dev", nil, "/dev", "", nil},
		{"below proc", nil, "/proc/x", "", nil},
		{"below sys, not clean", nil, "//x/../sys/y", "", nil},
		{"dev by a link", nil, "/devlink/kvm", "", nil},
		{"begins like dev", nil, "/devices", "/devices", nil},

		{"below a bind mount", []specs.Mount{bind("/data", volume)}, "/data/sub/new", "/data/sub/new", nil},
		{"link in a bind mount", []specs.Mount{bind("/data", volume)}, "/data/link/x", "/run/x", nil},
		{"link covered by a bind mount", []specs.Mount{bind("/data", filepath.Join(volume, "sub"))}, "/data/link/x", "/data/link/x", nil},
		{"file in a bind mount", []specs.Mount{bind("/data", volume)}, "/data/sub/token/x", "", []string{"/data/sub/token"}},
		{"link covered by a tmpfs", []specs.Mount{tmpfs("/data")}, "/data/link/x", "/data/link/x", nil},
		{"link below another type", []specs.Mount{{Destination: "/data", Type: "nfs"}}, "/data/link/x", "/data/link/x", nil},
		{"link in another type's source", []specs.Mount{{Destination: "/data", Type: "nfs", Source: volume}}, "/data/link/x", "/data/link/x", nil},
		{"link in a hidden mount", []specs.Mount{bind("/data/covered", volume), tmpfs("/data")}, "/data/covered/link/x", "/data/covered/link/x", nil},
		{"on another type", []specs.Mount{{Destination: "/data", Type: "nfs"}}, "/data", "/data", nil},
		{"link covered by a mount on it", []specs.Mount{bind("/abs", volume), bind("/data/link", volume)}, "/data/link/x", "/run/x", nil},
		{"below a file mount", []specs.Mount{bind("/motd", filepath.Join(host, "pod/hosts"))}, "/motd/x", "", []string{`"/motd" is not a directory`}},
		{"directory on a file mount", []specs.Mount{bind("/motd", filepath.Join(host, "pod/hosts"))}, "/motd", "", []string{"is a file"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := bundleOf(host, append(tt.before, bind(tt.destination, "spare"))...).Plan()
			wantError(t, err, tt.err...)
			if err != nil {
				return
			}
			got := ""
			if n := len(plan.Mounts); n > 0 && plan.Mounts[n-1].Spec.Source == "spare" {
				got = plan.Mounts[n-1].Path
			}
			if got != tt.want {
				t.Errorf("mounted at %q, want %q", got, tt.want)
			}
		})
	}
}

func TestOrder(t *testing.T) {
	host := makeHost(t)
	for _, tt := range []struct {
		name   string
		mounts []specs.Mount
		want   string // path and source, or path and kind
		notes  []string
	}{
		{"nested", []specs.Mount{tmpfs("/a"), tmpfs("/a/b"), tmpfs("/a/b/c")}, "/a /a/b /a/b/c", nil},
		{"same twice", []specs.Mount{tmpfs("/a", "size=1"), tmpfs("/b"), tmpfs("/a", "size=2")}, "/b /a:2", []string{`"/a" is hidden`}},
		{"parent last", []specs.Mount{tmpfs("/a/b"), tmpfs("/a/b/c"), tmpfs("/ab"), tmpfs("/a")}, "/ab /a", []string{`"/a/b" is hidden by a later one on "/a"`, `"/a/b/c" is hidden`}},
		{"same by a link", []specs.Mount{tmpfs("/data"), tmpfs("/abs", "size=1")}, "/data:1", []string{`"/data" is hidden by a later one on "/abs"`}},
		{"child of the hidden", []specs.Mount{tmpfs("/a/b"), tmpfs("/a"), tmpfs("/a/b", "size=1")}, "/a /a/b:1", []string{`"/a/b" is hidden`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := bundleOf(host, tt.mounts...)
			plan, err := b.Plan()
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, m := range plan.Mounts {
				s := m.Path
				if m.Size > 0 {
					s += ":" + string(rune('0'+m.Size))
				}
				got = append(got, s)
			}
			if strings.Join(got, " ") != tt.want {
				t.Errorf("mounts %q, want %q", got, tt.want)
			}
			wantNotes(t, plan, tt.notes...)
			last := plan.Mounts[len(plan.Mounts)-1].Spec
			if last != &b.Spec.Mounts[len(b.Spec.Mounts)-1] {
				t.Error("the Spec of the last mount is not the bundle's")
			}
		})
	}
}

func TestSources(t *testing.T) {
	host := makeHost(t)
	for _, tt := range []struct {
		name  string
		mount specs.Mount
		want  Mount // of Path /new
		err   []string
	}{
		{"directory", bind("/new", host+"/pod/volume"), Mount{Source: "pod/volume"}, nil},
		{"relative", bind("/new", "../pod/./volume/"), Mount{Source: "pod/volume"}, nil},
		{"file", bind("/new", "../pod/hosts"), Mount{Source: "pod/hosts", Kind: File}, nil},
		{"option bind", specs.Mount{Destination: "/new", Type: "none", Source: "spare", Options: []string{"bind"}}, Mount{Source: "b/spare"}, nil},
		{"option rbind and a type of the guest", specs.Mount{Destination: "/new", Type: "cgroup", Source: "spare", Options: []string{"ro", "rbind"}}, Mount{Source: "b/spare", ReadOnly: true}, nil},
		{"tmpfs", tmpfs("/new"), Mount{Kind: Tmpfs, Mode: 0o1777}, nil},
		{"other", specs.Mount{Destination: "/new", Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b", "ro"}}, Mount{Kind: Other, ReadOnly: true}, nil},
		{"other with a source", specs.Mount{Destination: "/new", Type: "squashfs", Source: host + "/pod/../pod/hosts"}, Mount{Source: "pod/hosts", Kind: Other}, nil},
		{"other with an absent source", specs.Mount{Destination: "/new", Type: "zip", Source: host + "/absent"}, Mount{Kind: Other}, nil},
		{"no type", specs.Mount{Destination: "/new"}, Mount{Kind: Other}, nil},

		{"no source", bind("/new", ""), Mount{}, []string{"mounts[0]", `"/new"`, "needs a source"}},
		{"absent", bind("/new", "absent"), Mount{}, []string{`"/new"`, host + "/b/absent", "no such file"}},
		{"NUL", bind("/new", "a\x00b"), Mount{}, []string{`a\x00b`, "invalid"}},
		{"file on a directory", bind("/data", "../pod/hosts"), Mount{}, []string{`"/data"`, "is a directory"}},
		{"file on a tmpfs", bind("/tmp", "../pod/hosts"), Mount{}, []string{`"/tmp"`, "is a directory"}},
		{"tmpfs on a file", tmpfs("/etc/hosts"), Mount{}, []string{`"/etc/hosts"`, "is a file"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := bundleOf(host, tt.mount).Plan()
			wantError(t, err, tt.err...)
			if err == nil {
				tt.want.Path = "/new"
				wantMounts(t, host, plan, []Mount{tt.want})
			}
		})
	}
}

func TestRoot(t *testing.T) {
	host := makeHost(t)
	for _, tt := range []struct {
		name string
		spec *specs.Spec
		err  []string
	}{
		{"relative", &specs.Spec{Root: &specs.Root{Path: "rootfs"}}, nil},
		{"beside the bundle", &specs.Spec{Root: &specs.Root{Path: "../b/rootfs/"}}, nil},
		{"absolute", &specs.Spec{Root: &specs.Root{Path: host + "/b/rootfs"}}, nil},
		{"no spec", nil, []string{"root.path is missing"}},
		{"no root", &specs.Spec{}, []string{"root.path is missing"}},
		{"no path", &specs.Spec{Root: &specs.Root{}}, []string{"root.path is missing"}},
		{"absent", &specs.Spec{Root: &specs.Root{Path: "absent"}}, []string{`root.path "absent"`, host + "/b/absent", "no such file"}},
		{"file", &specs.Spec{Root: &specs.Root{Path: "rootfs/etc/hosts"}}, []string{"root.path", "not a directory"}},
		{"too many mounts", &specs.Spec{Root: &specs.Root{Path: "rootfs"}, Mounts: make([]specs.Mount, MaxMounts+1)}, []string{"4097 mounts", "4096"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := (&Bundle{Dir: host + "/b", Spec: tt.spec}).Plan()
			wantError(t, err, tt.err...)
			if err == nil && plan.Root.Source != host+"/b/rootfs" {
				t.Errorf("source %q", plan.Root.Source)
			}
		})
	}
}

func TestOptions(t *testing.T) {
	host := makeHost(t)
	other := func(options ...string) specs.Mount {
		return specs.Mount{Destination: "/new", Type: "fuse.zip", Options: options}
	}
	tmp := func(m Mount) Mount {
		m.Kind = Tmpfs
		if m.Mode == 0 {
			m.Mode = 0o1777
		}
		return m
	}
	dir := func(readonly bool) Mount { return Mount{Source: "b/spare", ReadOnly: readonly} }
	for _, tt := range []struct {
		name  string
		mount specs.Mount
		want  Mount // of Path /new
		err   []string
	}{
		{"all for the guest", bind("/new", "spare", guestOptions...), dir(false), nil},
		{"last of ro and rw", bind("/new", "spare", "ro", "rw"), dir(false), nil},
		{"last of rw and ro", bind("/new", "spare", "rw", "ro"), dir(true), nil},
		{"recursive", bind("/new", "spare", "rrw", "rro"), dir(true), nil},
		{"last of rro and rrw", bind("/new", "spare", "rro", "rrw"), dir(false), nil},
		{"for an extension", bind("/new", "spare", "x-zip.level=3"), dir(false), nil},
		{"unknown", bind("/new", "spare", "ro", "nosuid=1"), Mount{}, []string{`"/new"`, `"nosuid=1"`, "directory"}},
		{"unknown of a file", bind("/new", "../pod/hosts", "size=1"), Mount{}, []string{`"size=1"`, "file"}},
		{"two in one", bind("/new", "spare", "ro,nosuid"), Mount{}, []string{`"ro,nosuid"`}},
		{"empty", bind("/new", "spare", ""), Mount{}, []string{`""`}},
		{"remount", bind("/new", "spare", "remount"), Mount{}, []string{`"remount"`}},
		{"remount of another type", other("remount"), Mount{}, []string{`"remount"`}},
		{"anything of another type", other("a=b", "ro", "size=50%"), Mount{Kind: Other, ReadOnly: true}, nil},

		{"tmpfs", tmpfs("/new", "nosuid", "mode=0750", "uid=5", "gid=4294967294", "size=65536k", "ro"), tmp(Mount{Mode: 0o750, UID: 5, GID: math.MaxUint32 - 1, Size: 64 << 20, ReadOnly: true}), nil},
		{"size in bytes", tmpfs("/new", "size=4097"), tmp(Mount{Size: 4097}), nil},
		{"size in M", tmpfs("/new", "size=3M"), tmp(Mount{Size: 3 << 20}), nil},
		{"size in g", tmpfs("/new", "size=8g"), tmp(Mount{Size: 8 << 30}), nil},
		{"size in e", tmpfs("/new", "size=7e"), tmp(Mount{Size: 7 << 60}), nil},
		{"last size", tmpfs("/new", "size=1", "size=2"), tmp(Mount{Size: 2}), nil},
		{"size too large", tmpfs("/new", "size=8e"), Mount{}, []string{`"size=8e"`}},
		{"size far too large", tmpfs("/new", "size=99999999999999999999"), Mount{}, []string{"size="}},
		{"size 0", tmpfs("/new", "size=0"), Mount{}, []string{`"size=0"`, "not 0"}},
		{"octal size", tmpfs("/new", "size=010k"), Mount{}, []string{`"size=010k"`}},
		{"no size", tmpfs("/new", "size="), Mount{}, []string{`"size="`}},
		{"bare size", tmpfs("/new", "size"), Mount{}, []string{`"size"`}},
		{"only a unit", tmpfs("/new", "size=k"), Mount{}, []string{`"size=k"`}},
		{"two units", tmpfs("/new", "size=1kb"), Mount{}, []string{`"size=1kb"`}},
		{"negative size", tmpfs("/new", "size=-1"), Mount{}, []string{`"size=-1"`}},
		{"percent", tmpfs("/new", "size=50%"), Mount{}, []string{`"size=50%"`, "host's or the guest's"}},
		{"mode 0", tmpfs("/new", "mode=0"), Mount{Kind: Tmpfs}, nil},
		{"mode not octal", tmpfs("/new", "mode=888"), Mount{}, []string{`"mode=888"`, "octal"}},
		{"mode too large", tmpfs("/new", "mode=10000"), Mount{}, []string{`"mode=10000"`}},
		{"uid -1", tmpfs("/new", "uid=4294967295"), Mount{}, []string{`"uid=4294967295"`, "4294967294"}},
		{"gid by name", tmpfs("/new", "gid=tty"), Mount{}, []string{`"gid=tty"`}},
		{"unknown of a tmpfs", tmpfs("/new", "nr_inodes=5"), Mount{}, []string{`"nr_inodes=5"`, "tmpfs"}},
		{"copy of nothing", tmpfs("/new", "tmpcopyup"), tmp(Mount{}), nil},
		{"copy of a bind mount", bind("/new", "spare", "tmpcopyup"), Mount{}, []string{`"tmpcopyup"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := bundleOf(host, tt.mount).Plan()
			wantError(t, err, tt.err...)
			if err == nil {
				tt.want.Path = "/new"
				wantMounts(t, host, plan, []Mount{tt.want})
			}
		})
	}
	t.Run("copy", func(t *testing.T) {
		_, err := bundleOf(host, tmpfs("/tmp", "tmpcopyup")).Plan()
		wantError(t, err)
		_, err = bundleOf(host, tmpfs("/data", "tmpcopyup")).Plan()
		wantError(t, err, "tmpcopyup", `files at "/data"`)
		_, err = bundleOf(host, bind("/new", "../pod/volume"), tmpfs("/new", "tmpcopyup")).Plan()
		wantError(t, err, "tmpcopyup", `files at "/new"`)
	})
}

func TestAnnotations(t *testing.T) {
	host := makeHost(t)
	for _, tt := range []struct {
		name  string
		key   string
		value string
		err   []string
	}{
		{"somebody else's", "io.sluicer.backend", "", nil},
		{"an extension's", "io.sluice.x.http.retries", "", nil},
		{"an extension's with more dots", "io.sluice.x.http.mount./a.backend", "x", nil},
		{"no extension", "io.sluice.x..retries", "3", []string{`"io.sluice.x..retries"`}},
		{"no extension's name", "io.sluice.x.http", "3", []string{`"io.sluice.x.http"`}},
		{"misspelled backend", "io.sluice.bakend", "mem", []string{`"io.sluice.bakend"`, "expected backend"}},
		{"misspelled backend of a mount", "io.sluice.mount./abs.bakend", "mem", []string{`"io.sluice.mount./abs.bakend"`}},
		{"misspelled mount", "io.sluice.mounts./abs.backend", "mem", []string{`"io.sluice.mounts./abs.backend"`}},
		{"no destination", "io.sluice.mount..backend", "mem", []string{`"io.sluice.mount..backend"`}},
		{"less than no destination", "io.sluice.mount.backend", "mem", []string{`"io.sluice.mount.backend"`}},
		{"no option", "io.sluice.option.", "x", []string{`"io.sluice.option."`}},
		{"nothing", "io.sluice.", "x", []string{`"io.sluice."`}},
		{"empty backend", "io.sluice.backend", "", []string{`"io.sluice.backend"`, "empty"}},
		{"empty backend of a mount", "io.sluice.mount./abs.backend", "", []string{"empty"}},
		{"no such mount", "io.sluice.mount./b.backend", "mem", []string{`"/b"`, "no mount"}},
		{"mount by its path", "io.sluice.mount./data.backend", "mem", []string{`"/data"`, "as the mount does"}},
		{"guest's mount", "io.sluice.mount./dev/shm.backend", "mem", []string{`"/dev/shm"`, `"mem"`, "guest's own"}},
		{"guest's mount by a link", "io.sluice.mount./devlink/x.backend", "mem", []string{`"/devlink/x"`, `"mem"`, "guest's own"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := bundleOf(host, tmpfs("/abs"), tmpfs("/dev/shm"), tmpfs("/devlink/x"))
			b.Spec.Annotations = map[string]string{tt.key: tt.value}
			_, err := b.Plan()
			wantError(t, err, tt.err...)
		})
	}
	t.Run("all", func(t *testing.T) {
		b := bundleOf(host, tmpfs("/abs"), tmpfs("/a.b"), tmpfs("/c"))
		b.Spec.Annotations = map[string]string{
			"io.sluice.backend":             "lazy",
			"io.sluice.mount./abs.backend":  "http",
			"io.sluice.mount./a.b.backend":  "zip",
			"io.sluice.option.cache":        "never",
			"io.sluice.option.a.b":          "",
			"io.sluice.x.http.option.cache": "always",
		}
		plan, err := b.Plan()
		if err != nil {
			t.Fatal(err)
		}
		if got := []string{plan.Root.Backend, plan.Mounts[0].Backend, plan.Mounts[1].Backend, plan.Mounts[2].Backend}; !reflect.DeepEqual(got, []string{"lazy", "http", "zip", ""}) {
			t.Errorf("backends %q", got)
		}
		if want := map[string]string{"cache": "never", "a.b": ""}; !reflect.DeepEqual(plan.Options, want) {
			t.Errorf("options %q, want %q", plan.Options, want)
		}
	})
}
