package guest_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/internal/testguest"
)

// spec makes a spec of a root, the share, and these mounts.
func (m *machine) spec(mounts ...specs.Mount) *specs.Spec {
	return &specs.Spec{Version: specs.Version, Root: &specs.Root{Path: "share"}, Mounts: mounts}
}

// serveSpec starts the daemon that has test extensions on spec.
func (m *machine) serveSpec(spec *specs.Spec, options ...string) error {
	m.t.Helper()
	return m.serveSpecBy(extd, spec, options...)
}

// serveSpecBy starts a daemon on spec.
func (m *machine) serveSpecBy(program string, spec *specs.Spec, options ...string) error {
	m.t.Helper()
	text, err := json.Marshal(spec)
	m.check(err)
	path := filepath.Join(m.scratch, "config.json")
	m.check(os.WriteFile(path, text, 0o644))
	return m.start(testguest.DaemonConfig{Program: program, Args: append([]string{"--spec", path}, options...)})
}

// serves is serveSpec and a guest that has mounted it.
func serves(t *testing.T, spec func(m *machine) *specs.Spec, options ...string) *machine {
	t.Helper()
	m := newScratch(t)
	s := spec(m)
	m.check(m.serveSpec(s, options...))
	m.boot(testguest.Config{Kind: testguest.UML})
	return m
}

// of makes a spec of mounts.
func of(mounts ...specs.Mount) func(*machine) *specs.Spec {
	return func(m *machine) *specs.Spec { return m.spec(mounts...) }
}

// seen waits until the daemon has logged each of texts.
func (m *machine) seen(texts ...string) {
	m.t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		log := m.daemon.Log()
		missing := ""
		for _, text := range texts {
			if !strings.Contains(log, text) {
				missing = text
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("the daemon does not say %q", missing)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestClaims has two extensions of which both want /a, and the second /b; nobody wants /c (A1, A2).
func TestClaims(t *testing.T) {
	t.Parallel()
	m := serves(t, func(m *machine) *specs.Spec {
		m.check(os.MkdirAll(filepath.Join(m.scratch, "host"), 0o755))
		m.check(os.WriteFile(filepath.Join(m.scratch, "host", ".who"), []byte("host\n"), 0o644))
		return m.spec(
			specs.Mount{Destination: "/a", Type: "who"},
			specs.Mount{Destination: "/b", Type: "who"},
			specs.Mount{Destination: "/c", Type: "bind", Source: "host"},
		)
	}, "--recorder-on")
	if got := m.sh("cat /mnt/a/.who /mnt/b/.who /mnt/c/.who"); got != "first\nsecond\nhost" {
		t.Errorf("the guest reads %q", got)
	}
	if got := m.sh("ls /mnt"); got != "a\nb\nc" {
		t.Errorf("the root lists %q", got)
	}
	if devices := strings.Fields(m.sh("stat -c %%d /mnt /mnt/a /mnt/b /mnt/c")); len(devices) != 4 ||
		devices[0] == devices[1] || devices[1] == devices[2] || devices[2] == devices[3] {
		t.Errorf("st_dev of root and mounts are %v, want four different ones", devices)
	}
}

// TestOffers looks at what extensions are offered: the root without a mount, and nothing that is the guest's own (A4).
func TestOffers(t *testing.T) {
	t.Parallel()
	m := newScratch(t)
	m.check(m.serveSpec(m.spec(
		specs.Mount{Destination: "/proc", Type: "proc", Source: "proc"},
		specs.Mount{Destination: "/dev", Type: "tmpfs", Source: "tmpfs"},
		specs.Mount{Destination: "/dev/pts", Type: "devpts", Source: "devpts"},
		specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup"},
		specs.Mount{Destination: "/scratch", Type: "tmpfs", Options: []string{"size=1m", "ro"}},
		specs.Mount{Destination: "/dev/shared", Type: "bind", Source: "share"},
	), "--recorder-on"))
	m.seen("/dev/shared", "is left out: /dev is the guest's own")
	m.seen("recorder: offered root readonly=false source=true", "recorder: offered /scratch readonly=true source=false")
	if log := m.daemon.Log(); strings.Count(log, "recorder: offered") != 2 {
		t.Errorf("more is offered than the root and /scratch")
	}
}

// TestRefusedMount has an extension fail to serve what it claims: nothing is served and nothing left behind (A3).
func TestRefusedMount(t *testing.T) {
	t.Parallel()
	m := newScratch(t)
	err := m.serveSpec(m.spec(specs.Mount{Destination: "/a", Type: "refuser"}))
	if err == nil {
		t.Fatal("the daemon has started")
	}
	for _, want := range []string{"refuser", "/a", "the storage is not there"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not name %s", err, want)
		}
	}
	for _, name := range []string{"fs.sock", "fs.sock.pid"} {
		if _, err := os.Lstat(filepath.Join(m.scratch, name)); !os.IsNotExist(err) {
			t.Errorf("%s is left behind: %v", name, err)
		}
	}
}

// TestAnnotation switches the backend of one mount, and an option of the share (A5).
func TestAnnotation(t *testing.T) {
	t.Parallel()
	m := serves(t, func(m *machine) *specs.Spec {
		spec := twice(m)
		m.check(os.WriteFile(filepath.Join(m.scratch, "host", "file"), nil, 0o644))
		spec.Annotations = map[string]string{"io.sluice.mount./b.backend": "mem", "io.sluice.option.xattr": "true"}
		return spec
	})
	if got := m.sh("ls /mnt/a; ls /mnt/b; echo memory >/mnt/b/new; ls /mnt/b"); got != "file\nnew" {
		t.Errorf("the guest lists %q, want the host's file in /a and only the new one in /b", got)
	}
	if _, err := os.Stat(filepath.Join(m.scratch, "host", "new")); !os.IsNotExist(err) {
		t.Errorf("a file of the mount in memory is on the host: %v", err)
	}
}

// twice has one directory of the host at two places of the share.
func twice(m *machine) *specs.Spec {
	m.check(os.MkdirAll(filepath.Join(m.scratch, "host"), 0o755))
	m.own(filepath.Join(m.scratch, "host"))
	return m.spec(
		specs.Mount{Destination: "/a", Type: "bind", Source: "host"},
		specs.Mount{Destination: "/b", Type: "bind", Source: "host"},
	)
}

// TestOneObjectTwice serves one directory at two places: what happens at the one is seen at the other (A7).
func TestOneObjectTwice(t *testing.T) {
	t.Parallel()
	m := serves(t, twice, "--cache", "never")
	got := m.sh(`cd /mnt
		echo one >a/old; cat b/old; mv a/old a/new; cat b/new; ! cat b/old 2>/dev/null; ls b; mv b/new b/last; cat a/last; rm a/last; ls b`)
	if got != "one\none\nnew\none" {
		t.Errorf("the guest has %q", got)
	}
}

// TestPrepared reads a file that only root may read, opened before the daemon gave up its privileges (A8, A9).
func TestPrepared(t *testing.T) {
	t.Parallel()
	secret := ""
	m := newScratch(t)
	secret = filepath.Join(m.scratch, "secret")
	m.check(os.WriteFile(secret, []byte("kept\n"), 0o600))
	if around.uid != 0 {
		m.check(os.Chown(secret, int(around.uid), int(around.uid))) // an ordinary user has no more than its own
	}
	m.check(m.serveSpec(m.spec(specs.Mount{Destination: "/k", Type: "keeper"}), "--keeper-file", secret))
	m.boot(testguest.Config{Kind: testguest.UML})
	if got := m.sh("cat /mnt/k/kept"); got != "kept" {
		t.Errorf("the guest reads %q", got)
	}
	// By its path the sandbox has put it out of reach, and the filter lets nobody open anything by path.
	if got, err := m.trySh("cat /mnt/k/reopened"); err == nil {
		t.Errorf("opened anew it reads %q", got)
	}
}

// TestReadonlyExtension has an extension that serves a writable tree at a read-only mount (A12).
func TestReadonlyExtension(t *testing.T) {
	t.Parallel()
	m := serves(t, of(
		specs.Mount{Destination: "/ro", Type: "careless", Options: []string{"ro"}},
		specs.Mount{Destination: "/rw", Type: "careless"},
	))
	m.sh("touch /mnt/rw/file; mkdir /mnt/rw/dir; mv /mnt/rw/file /mnt/rw/dir/file")
	for _, change := range []string{"touch /mnt/ro/file", "mkdir /mnt/ro/dir", "mount -o remount,rw /mnt && touch /mnt/ro/file", "ln -s x /mnt/ro/link", "chmod 700 /mnt/ro"} {
		if _, err := m.trySh(change); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
			t.Errorf("%s: %v, want EROFS", change, err)
		}
	}
}

// TestUnlinkedFile changes a file after its name is gone (A13): passthrough can, so no option is needed to say so.
func TestUnlinkedFile(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.boot(testguest.Config{Kind: testguest.UML})
	m.sh(`cd /mnt; exec 3<>file; echo content >&3; rm file
		chmod 640 /proc/self/fd/3; [ "$(stat -L -c %%a /proc/self/fd/3)" = 640 ]
		fallocate -l 8192 /proc/self/fd/3; [ "$(stat -L -c %%s /proc/self/fd/3)" = 8192 ]
		[ "$(head -n 1 /proc/self/fd/3)" = content ]; [ -z "$(ls)" ]`)
}

// TestFaultyBackend has a backend panic, hang and fail beside one that works (A11).
func TestFaultyBackend(t *testing.T) {
	t.Parallel()
	m := serves(t, of(specs.Mount{Destination: "/f", Type: "faulty"}, specs.Mount{Destination: "/w", Type: "careless"}))
	m.sh("cat /mnt/f/fine; echo works >/mnt/w/file")
	for _, name := range []string{"boom", "storm"} {
		if _, err := m.trySh("cat /mnt/f/" + name); err == nil || !strings.Contains(err.Error(), eio) {
			t.Errorf("%s: %v, want EIO", name, err)
		}
	}
	// Ten hang, which leaves threads for the part itself; then more than there are threads, and the others go on.
	for _, hangs := range []int{10, 40} {
		out := m.sh(`for i in $(seq %d); do cat /mnt/f/hang 2>>/tmp/errors & done
			for i in $(seq 100); do cat /mnt/w/file >/dev/null; echo $i >/mnt/w/other; cat /mnt/w/other; done | tail -n 1
			echo host >/mnt/host; cat /mnt/host
			wait; grep -c "`+eio+`" /tmp/errors; rm /tmp/errors; [ %d -gt 16 ] || cat /mnt/f/fine`, hangs, hangs)
		want := fmt.Sprintf("100\nhost\n%d", hangs)
		if hangs <= 16 {
			want += "\nfine"
		}
		if out != want {
			t.Errorf("with %d hanging calls the guest says %q, want %q", hangs, out, want)
		}
	}
	// All its threads hang: what else is asked of it fails at once.
	if _, err := m.trySh("cat /mnt/f/fine"); err == nil || !strings.Contains(err.Error(), eio) {
		t.Errorf("a request after that: %v, want EIO", err)
	}
	m.seen("extension=faulty", "panic=boom", "takes too long")
	m.check(m.guest.PowerOff(m.ctx))
}

// TestMissingXattr asks a backend for what it does not do (A14).
func TestMissingXattr(t *testing.T) {
	t.Parallel()
	m := serves(t, of(specs.Mount{Destination: "/a", Type: "who"}), "--xattr")
	m.sh("guestprog noxattr /mnt/a/.who")
}

// TestDumpFilter prints the filter that a daemon would be under, twice (A15).
func TestDumpFilter(t *testing.T) {
	t.Parallel()
	m := newScratch(t)
	text, err := json.Marshal(m.spec(specs.Mount{Destination: "/p", Type: "probe"}))
	m.check(err)
	path := filepath.Join(m.scratch, "config.json")
	m.check(os.WriteFile(path, text, 0o644))
	dump := func(options ...string) string {
		out, err := exec.CommandContext(m.ctx, extd, append([]string{"--spec", path, "--seccomp", "dump"}, options...)...).Output()
		m.check(err)
		return string(out)
	}
	declared := dump("--probe-declare", "inet,mmap")
	if again := dump("--probe-declare", "inet,mmap"); again != declared {
		t.Errorf("the filter is\n%s\nand then\n%s", declared, again)
	}
	for _, want := range []string{
		`(?m)^deny +mmap +arg2 & 0x4 == 0x4 +sluice$`, `(?m)^allow +mmap +any arguments +base,probe$`,
		`(?m)^allow +socket +arg0 & 0xffffffff == 0x2 +probe$`, `(?m)^allow +openat2 .* passthrough$`, `(?m)^nosys +clone3 `,
	} {
		if !regexp.MustCompile(want).MatchString(declared) {
			t.Errorf("the filter has no line %s:\n%s", want, declared)
		}
	}
	if plain := dump(); strings.Contains(plain, "probe") || strings.Contains(plain, "socket ") {
		t.Errorf("the filter without declarations has some:\n%s", plain)
	}
}

// TestProbe makes system calls that a filter forbids, unless their extension has declared them (A10, A16, A17, A18, A20).
func TestProbe(t *testing.T) {
	if testguest.TraceDir() != "" {
		t.Skip("a daemon that is traced is refused nothing")
	}
	t.Parallel()
	probe := of(specs.Mount{Destination: "/p", Type: "probe"})
	killed := func(t *testing.T, m *machine, file string, says ...string) {
		t.Helper()
		go func() { _, _ = m.trySh("cat /mnt/p/" + file) }() // it has no answer
		m.check(m.daemon.Ended(m.ctx))
		m.seen(says...)
	}
	t.Run("kill", func(t *testing.T) {
		t.Parallel()
		m := serves(t, probe)
		killed(t, m, "socket-inet", "call=socket", "extension=probe")
	})
	t.Run("trap", func(t *testing.T) {
		t.Parallel()
		m := serves(t, probe, "--seccomp", "trap")
		killed(t, m, "socket-inet", "call=socket", "extension=probe", "goroutine ")
	})
	t.Run("log", func(t *testing.T) {
		t.Parallel()
		m := serves(t, probe, "--seccomp", "log")
		if got := m.sh("cat /mnt/p/socket-inet /mnt/p/socket-netlink"); got != "made\nmade" {
			t.Errorf("the guest reads %q", got)
		}
		m.seen("call=socket", "extension=probe")
	})
	t.Run("none", func(t *testing.T) {
		t.Parallel()
		m := serves(t, probe, "--seccomp", "none")
		if got := m.sh("cat /mnt/p/socket-netlink /mnt/p/mmap-exec"); got != "made\nmapped" {
			t.Errorf("the guest reads %q", got)
		}
	})
	t.Run("declared", func(t *testing.T) {
		t.Parallel()
		m := serves(t, probe, "--probe-declare", "inet,mmap")
		if got := m.sh("cat /mnt/p/socket-inet"); got != "made" {
			t.Errorf("the guest reads %q", got)
		}
		killed(t, m, "socket-netlink", "call=socket", "extension=probe")
	})
	t.Run("executable mapping", func(t *testing.T) {
		t.Parallel()
		m := serves(t, probe, "--probe-declare", "mmap")
		killed(t, m, "mmap-exec", "call=mmap", "extension=probe")
	})
	t.Run("in the background", func(t *testing.T) {
		t.Parallel()
		m := serves(t, probe)
		killed(t, m, "in-background", "call=socket", "probe")
	})
	t.Run("conflict", func(t *testing.T) {
		t.Parallel()
		m := newScratch(t)
		err := m.serveSpec(probe(m), "--probe-declare", "deny-read")
		if err == nil || !strings.Contains(err.Error(), "probe") || !strings.Contains(err.Error(), "preadv2") || !strings.Contains(err.Error(), "base") {
			t.Errorf("%v, want an error that names preadv2, probe and base", err)
		}
	})
}

// TestNetworkNamespace looks at the daemon's namespaces from outside.
func TestNetworkNamespace(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	ns := func(pid int, kind string) string {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		m.check(err)
		return link
	}
	own := strings.HasSuffix(around.name, "+namespace")
	for _, kind := range []string{"net", "pid", "mnt"} {
		if apart := ns(m.daemon.Server(), kind) != ns(os.Getpid(), kind); apart != own {
			t.Errorf("%s namespace of its own: %v, want %v", kind, apart, own)
		}
	}
}
