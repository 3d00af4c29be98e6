package bundle

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// makeHost makes a small host: a bundle b with a root filesystem, and pod, from which there is something to mount.
func makeHost(t testing.TB) string {
	t.Helper()
	host := t.TempDir()
	for name, content := range map[string]string{
		"b/rootfs/dev/":               "",
		"b/rootfs/proc/":              "",
		"b/rootfs/sys":                "-> /data",
		"b/rootfs/tmp/":               "",
		"b/rootfs/run/":               "",
		"b/rootfs/data/covered/x":     "to be seen only without a mount on /data",
		"b/rootfs/etc/hosts":          "127.0.0.1 localhost",
		"b/rootfs/var/run":            "-> /run",
		"b/rootfs/etc/resolv.conf":    "-> ../run/systemd/resolve/stub-resolv.conf",
		"b/rootfs/escape":             "-> ../../../../../../etc",
		"b/rootfs/abs":                "-> /data",
		"b/rootfs/up":                 "-> ..",
		"b/rootfs/slashed":            "-> /data/covered/",
		"b/rootfs/loop":               "-> loop",
		"b/rootfs/root":               "-> /",
		"b/rootfs/devlink":            "-> /dev",
		"b/rootfs/data/link":          "-> /tmp",
		"b/rootfs/data/covered/outer": "-> ../../run",
		"b/spare/":                    "",
		"pod/hosts":                   "10.0.0.1 web",
		"pod/hostname":                "web",
		"pod/resolv.conf":             "nameserver 10.0.0.2",
		"pod/volume/sub/token":        "secret",
		"pod/volume/link":             "-> /var/run",
	} {
		name = host + "/" + name
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			err = os.Symlink(target, name)
		} else if !strings.HasSuffix(name, "/") {
			err = os.WriteFile(name, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return host
}

// write writes a configuration into the bundle of the host, with the host's path for @HOST@.
func write(t testing.TB, host string, config []byte) {
	t.Helper()
	text := strings.ReplaceAll(string(config), "@HOST@", host)
	if err := os.WriteFile(filepath.Join(host, "b", ConfigFile), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// bundleOf returns a bundle of the host with these mounts.
func bundleOf(host string, mounts ...specs.Mount) *Bundle {
	return &Bundle{Dir: filepath.Join(host, "b"), Spec: &specs.Spec{Root: &specs.Root{Path: "rootfs"}, Mounts: mounts}}
}

func bind(destination, source string, options ...string) specs.Mount {
	return specs.Mount{Destination: destination, Type: "bind", Source: source, Options: options}
}

func tmpfs(destination string, options ...string) specs.Mount {
	return specs.Mount{Destination: destination, Type: "tmpfs", Source: "tmpfs", Options: options}
}

// wantError checks that err is one line with all of parts, and that there is none without parts.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if (err != nil) != (len(parts) > 0) {
		t.Fatalf("error %v, want one with %q", err, parts)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not say %q", err, part)
		}
	}
	if err != nil && strings.Contains(err.Error(), "\n") {
		t.Errorf("error %q has more than one line", err)
	}
}
