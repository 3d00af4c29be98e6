package guest_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/internal/testguest"
)

// makeBundle makes an image with umoci, of busybox alone, and unpacks it as a runtime would: a root file system and a
// config.json whose mounts are those of any container.
func (m *machine) makeBundle() (dir string) {
	m.t.Helper()
	image := filepath.Join(m.scratch, "image")
	umoci := func(args ...string) {
		m.t.Helper()
		out, err := exec.Command("umoci", args...).CombinedOutput()
		if err != nil {
			m.t.Fatalf("umoci %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	rootfs := filepath.Join(m.scratch, "layer")
	for _, d := range []string{"bin", "etc", "srv/app", "run", "var"} {
		m.check(os.MkdirAll(filepath.Join(rootfs, d), 0o755))
	}
	busybox, err := os.ReadFile(kit.Busybox())
	m.check(err)
	m.check(os.WriteFile(filepath.Join(rootfs, "bin/busybox"), busybox, 0o755))
	for _, applet := range []string{"sh", "cat", "id", "ls", "touch", "stat", "pwd"} {
		m.check(os.Symlink("busybox", filepath.Join(rootfs, "bin", applet)))
	}
	m.check(os.WriteFile(filepath.Join(rootfs, "etc/hostname"), []byte("image\n"), 0o644))
	// An image's link that leads out of it must lead nowhere but into it.
	m.check(os.Symlink("/run", filepath.Join(rootfs, "var/run")))
	m.check(os.Symlink("../../../../../../../../etc", filepath.Join(rootfs, "srv/etc")))
	umoci("init", "--layout", image)
	umoci("new", "--image", image+":latest")
	umoci("insert", "--image", image+":latest", rootfs, "/")
	umoci("config", "--image", image+":latest", "--config.cmd", "/bin/sh", "--config.workingdir", "/srv/app", "--config.env", "GREETING=hello")
	dir = filepath.Join(m.scratch, "bundle")
	umoci("unpack", "--image", image+":latest", dir)
	return dir
}

// process runs a script as the bundle's process: in the guest, in a root directory made of what the daemon serves.
func (m *machine) process(spec *specs.Spec, script string) string {
	m.t.Helper()
	return m.sh("mount -t proc proc /mnt/proc 2>/dev/null || true; cd /mnt; env -i %s chroot /mnt %s -euc 'cd %s; %s'",
		strings.Join(spec.Process.Env, " "), spec.Process.Args[0], spec.Process.Cwd, script)
}

// TestBundle boots a guest from an OCI bundle: it changes its root directory to what is served and runs the process there.
func TestBundle(t *testing.T) {
	eachKindInFull(t, func(t *testing.T, kind testguest.Kind) {
		m := newScratch(t)
		dir := m.makeBundle()
		text, err := os.ReadFile(filepath.Join(dir, "config.json"))
		m.check(err)
		var spec specs.Spec
		m.check(json.Unmarshal(text, &spec))
		for _, d := range []string{"data", "fixed"} {
			m.check(os.Mkdir(filepath.Join(m.scratch, d), 0o755))
			m.check(os.WriteFile(filepath.Join(m.scratch, d, "file"), []byte(d+"\n"), 0o644))
		}
		m.check(os.WriteFile(filepath.Join(m.scratch, "hostname"), []byte("bundle\n"), 0o644))
		m.check(os.WriteFile(filepath.Join(m.scratch, "beside"), []byte("not shared\n"), 0o644))
		spec.Mounts = append(spec.Mounts,
			specs.Mount{Destination: "/srv/data", Type: "bind", Source: "../data", Options: []string{"rbind", "rw"}},
			specs.Mount{Destination: "/srv/fixed", Type: "bind", Source: "../fixed", Options: []string{"bind", "ro"}},
			specs.Mount{Destination: "/etc/hostname", Type: "bind", Source: "../hostname", Options: []string{"bind", "ro"}},
			specs.Mount{Destination: "/var/run/secrets", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=1m", "mode=0700"}},
			specs.Mount{Destination: "/srv/etc/new", Type: "tmpfs", Source: "tmpfs"},
		)
		if spec.Linux != nil {
			spec.Linux.UIDMappings, spec.Linux.GIDMappings = nil, nil
		}
		spec.Annotations = map[string]string{"io.sluice.option.cache": "always"}
		text, err = json.Marshal(spec)
		m.check(err)
		m.check(os.WriteFile(filepath.Join(dir, "config.json"), text, 0o644))
		if around.uid != 0 {
			m.check(filepath.WalkDir(m.scratch, func(path string, _ fs.DirEntry, err error) error {
				if err == nil && path != m.scratch {
					m.own(path)
				}
				return err
			}))
			m.check(os.Chmod(dir, 0o755))
		}
		m.check(m.start(testguest.DaemonConfig{Program: program, Args: []string{"--bundle", dir}}))
		m.boot(testguest.Config{Kind: kind})

		if got := m.process(&spec, "pwd; echo $GREETING; cat /etc/hostname /srv/data/file /srv/fixed/file"); got != "/srv/app\nhello\nbundle\ndata\nfixed" {
			t.Errorf("the process says %q", got)
		}
		m.process(&spec, "echo new >/srv/data/new; echo new >/srv/app/new; echo token >/run/secrets/token; cat /var/run/secrets/token; echo x >/etc/new/x; ls /srv/etc/new")
		for path, want := range map[string]bool{"data/new": true, "bundle/rootfs/srv/app/new": true, "bundle/rootfs/run/secrets/token": false, "bundle/rootfs/etc/new/x": false} {
			if _, err := os.Lstat(filepath.Join(m.scratch, path)); (err == nil) != want {
				t.Errorf("%s: %v, want it there: %v", path, err, want)
			}
		}
		for _, change := range []string{"echo x >/srv/fixed/new", "echo x >/srv/fixed/file", "echo x >/etc/hostname", "rm /srv/fixed/file"} {
			if out, err := m.trySh(fmt.Sprintf("chroot /mnt /bin/sh -c '%s'", change)); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
				t.Errorf("%s: %s, %v, want EROFS", change, out, err)
			}
		}
		for _, change := range []string{"rmdir /mnt/srv/data", "mv /mnt/srv/data /mnt/srv/moved", "mv /mnt/srv /mnt/other", "rm /mnt/etc/hostname"} {
			if _, err := m.trySh(change); err == nil {
				t.Errorf("%s: done, want that a mount keeps its place", change)
			}
		}
		if got := m.process(&spec, "cat /srv/data/file /etc/hostname; stat -c %a /run/secrets"); got != "data\nbundle\n700" {
			t.Errorf("after that the process says %q", got)
		}
	})
}
