package guest_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/internal/testguest"
)

// exampleOf builds an example when it is first asked for.
var exampleOf = func() func(name string) (string, error) {
	var mu sync.Mutex
	built := map[string]string{}
	return func(name string) (string, error) {
		mu.Lock()
		defer mu.Unlock()
		if built[name] == "" {
			program, remove, err := testguest.BuildExample(name)
			if err != nil {
				return "", err
			}
			built[name] = program
			cleanups = append(cleanups, remove)
		}
		return built[name], nil
	}
}()

// startExample starts an example with these options, for the share.
func (m *machine) startExample(name string, options ...string) error {
	m.t.Helper()
	program, err := exampleOf(name)
	m.check(err)
	return m.start(testguest.DaemonConfig{Program: program, Share: m.share, Args: options})
}

// example is a guest that an example serves.
func example(t *testing.T, name string, options ...string) *machine {
	t.Helper()
	m := newScratch(t)
	m.check(m.startExample(name, options...))
	m.boot(testguest.Config{Kind: testguest.UML})
	return m
}

// refuses checks that the guest cannot change anything.
func (m *machine) refuses(changes ...string) {
	m.t.Helper()
	for _, change := range changes {
		if _, err := m.trySh(change); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
			m.t.Errorf("%s: %v, want EROFS", change, err)
		}
	}
}

func TestExampleHellofs(t *testing.T) {
	t.Parallel()
	m := example(t, "hellofs")
	m.check(os.WriteFile(m.path("host"), nil, 0o644))
	if got := m.sh("cd /mnt; ls; cat hello.txt"); got != "hello.txt\nhello from my own backend" {
		t.Errorf("the guest has %q", got)
	}
	m.refuses("touch /mnt/new", "rm /mnt/hello.txt")
	m.check(m.guest.PowerOff(m.ctx))
	m.check(m.daemon.Wait(m.ctx))
}

// writeRandom makes a file of n bytes on the host and returns them.
func (m *machine) writeRandom(path string, n int) []byte {
	m.t.Helper()
	data := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(data)
	m.check(os.MkdirAll(filepath.Dir(path), 0o755))
	m.check(os.WriteFile(path, data, 0o644))
	return data
}

// eio is what busybox calls it.
const eio = "Input/output error"

func sum(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }

// TestExampleHttpfs reads the files of a web server of the host, by its name, over connections that are made before the filter
// and under it.
func TestExampleHttpfs(t *testing.T) {
	t.Parallel()
	m := newScratch(t)
	web := filepath.Join(m.scratch, "web")
	big := m.writeRandom(filepath.Join(web, "dir", "big file"), size{48, 512}.n()<<20)
	small := m.writeRandom(filepath.Join(web, "dir", "sub", "small"), 5000)
	m.writeRandom(filepath.Join(web, "empty"), 0)
	m.check(os.WriteFile(filepath.Join(web, "index.txt"), []byte("# what there is\ndir/big%20file\ndir/sub/small\n\nempty\n"), 0o644))
	server := httptest.NewServer(http.FileServer(http.Dir(web)))
	t.Cleanup(server.Close)
	url := strings.Replace(server.URL, "127.0.0.1", "localhost", 1)

	err := m.startExample("httpfs", "--httpfs-url", url)
	if strings.HasSuffix(around.name, "+chroot") {
		// There is no room for the resolver's files.
		if err == nil || !strings.Contains(err.Error(), "expected --sandbox namespace") {
			t.Errorf("%v, want an error that names the sandbox that can", err)
		}
		return
	}
	m.check(err)
	m.boot(testguest.Config{Kind: testguest.UML})
	if got := m.sh("cd /mnt; find . -type f | sort; wc -c <empty"); got != "./dir/big file\n./dir/sub/small\n./empty\n0" {
		t.Errorf("the guest has %q", got)
	}
	for name, data := range map[string][]byte{"dir/big file": big, "dir/sub/small": small} {
		if got := m.sh("sha256sum <'/mnt/%s'", name); !strings.HasPrefix(got, sum(data)) {
			t.Errorf("%s has the sum %.64s in the guest, want %s", name, got, sum(data))
		}
	}
	// Connections that are gone are made anew, under the filter: resolver, socket and connect. What the resolver has read is good
	// for 5 s to it; then it looks at its files again.
	for i := range (size{2, 3}).n() {
		if i > 0 {
			time.Sleep(5100 * time.Millisecond)
		}
		server.CloseClientConnections()
		at := (i*7919*4096 + 123) % (len(big) - 20000)
		got := m.sh("echo 3 >/proc/sys/vm/drop_caches; tail -c +%d '/mnt/dir/big file' | head -c 20000 | sha256sum", at+1)
		if want := sum(big[at : at+20000]); !strings.HasPrefix(got, want) {
			t.Errorf("20000 bytes at %d have the sum %.64s in the guest, want %s", at, got, want)
		}
	}
	got := m.sh(`echo 3 >/proc/sys/vm/drop_caches
		for i in 1 2 3 4 5 6; do dd if='/mnt/dir/big file' bs=1M skip=$i count=8 2>/dev/null | sha256sum >/tmp/$i & done; wait; cat /tmp/[1-6]`)
	for i, line := range strings.Split(got, "\n") {
		if want := sum(big[(i+1)<<20:][:8<<20]); !strings.HasPrefix(line, want) {
			t.Errorf("8 MiB at %d MiB have the sum %.64s, want %s", i+1, line, want)
		}
	}
	m.refuses("touch /mnt/new", "echo x >/mnt/empty")
	// A file that has changed, and a server that is gone, are errors of their files, and of nothing else.
	m.check(os.Truncate(filepath.Join(web, "dir", "sub", "small"), 100))
	for _, gone := range []string{"dir/sub/small", "dir/big file"} {
		if out, err := m.trySh("echo 3 >/proc/sys/vm/drop_caches; cat '/mnt/" + gone + "' >/dev/null"); err == nil || !strings.Contains(err.Error(), eio) {
			t.Errorf("%s: %q, %v, want EIO", gone, out, err)
		}
		server.Close()
	}
	if got := m.sh("ls /mnt/dir"); got != "big file\nsub" {
		t.Errorf("without a server the guest has %q", got)
	}
	m.check(m.guest.PowerOff(m.ctx))
	m.check(m.daemon.Wait(m.ctx))
}

// writeKey makes a key that only the daemon's user may read.
func (m *machine) writeKey() string {
	m.t.Helper()
	key := filepath.Join(m.scratch, "key")
	m.writeRandom(key, 32)
	m.check(os.Chmod(key, 0o600))
	m.check(os.Chown(key, int(around.uid), int(around.uid)))
	return key
}

// TestExampleCryptfs writes and reads in the guest, with a key that only root has, and looks at what is on the host.
func TestExampleCryptfs(t *testing.T) {
	t.Parallel()
	m := newScratch(t)
	key := m.writeKey()
	m.check(os.Chmod(m.share, 0o1777))
	m.check(m.startExample("cryptfs", "--cryptfs-key", key, "--xattr"))
	m.boot(testguest.Config{Kind: testguest.UML})
	sums := m.sh(`cd /mnt; umask 022; mkdir -p dir/sub
		yes "the guest's secret" | head -c %d >dir/text
		dd if=/dev/urandom of=/tmp/random bs=1M count=8 2>/dev/null; cp /tmp/random dir/sub/random; cmp /tmp/random dir/sub/random
		cp dir/text moved; mv moved dir/moved; ln dir/moved dir/hard; ln -s moved dir/link
		dd if=/dev/urandom of=dir/moved bs=777 seek=5 count=9 conv=notrunc 2>/dev/null; echo more >>dir/hard; truncate -s 9000 dir/text; fallocate -l 20000 dir/text || true
		cp dir/text gone; rm gone; mkdir none; rmdir none; mkfifo fifo
		chmod 640 dir/moved; touch -d @1000000000 dir/text; sync; df /mnt >/dev/null
		echo 3 >/proc/sys/vm/drop_caches; sha256sum dir/text dir/sub/random dir/moved dir/link /tmp/random`, 300_000)
	// Nothing of it is on the host in clear.
	files := 0
	m.check(filepath.WalkDir(m.share, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		files++
		sealed, err := os.ReadFile(path)
		if err == nil && bytes.Contains(sealed, []byte("secret")) {
			t.Errorf("%s is in clear on the host", path)
		}
		return err
	}))
	if files < 4 {
		t.Errorf("%d files on the host, want 4 at least", files)
	}
	lines := strings.Split(sums, "\n")
	if len(lines) != 5 || lines[1][:64] != lines[4][:64] || lines[2][:64] != lines[3][:64] {
		t.Errorf("the guest has the sums\n%s", sums)
	}
	m.check(m.guest.PowerOff(m.ctx))
	m.check(m.daemon.Wait(m.ctx))

	// Another daemon and guest read the same with the key, and nothing with another.
	m.check(m.startExample("cryptfs", "--cryptfs-key", key))
	m.boot(testguest.Config{Kind: testguest.UML})
	if got := m.sh("cd /mnt; sha256sum dir/text dir/sub/random dir/moved dir/link"); got != strings.Join(lines[:4], "\n") {
		t.Errorf("later the guest has the sums\n%s\nwant\n%s", got, sums)
	}
	m.check(m.guest.PowerOff(m.ctx))
	m.check(m.daemon.Wait(m.ctx))
	m.check(os.WriteFile(key, bytes.Repeat([]byte("k"), 32), 0o600))
	m.check(m.startExample("cryptfs", "--cryptfs-key", key))
	m.boot(testguest.Config{Kind: testguest.UML})
	if out, err := m.trySh("cat /mnt/dir/text"); err == nil || !strings.Contains(err.Error(), eio) {
		t.Errorf("with another key: %.100q, %v, want EIO", out, err)
	}
}

// TestExampleCryptfsPosixtest runs go-fuse's POSIX tests on cryptfs: its filter has room for all that a guest may do (A19).
func TestExampleCryptfsPosixtest(t *testing.T) {
	t.Parallel()
	m := newScratch(t)
	key := m.writeKey()
	m.check(m.startExample("cryptfs", "--cryptfs-key", key, "--xattr"))
	m.boot(testguest.Config{Kind: testguest.UML})
	// go-fuse says that a deleted file has one link, and this file system has no fallocate.
	m.posixtest("Fallocate", "FallocateKeepSize", "FstatDeleted", "NlinkZero", "Tmpfile")
}

// TestExampleGofusefs reads live files of the host, at the root and at the mount that an annotation names.
func TestExampleGofusefs(t *testing.T) {
	t.Parallel()
	t.Run("root", func(t *testing.T) {
		t.Parallel()
		m := example(t, "gofusefs")
		if got := m.sh("ls /mnt"); got != "loadavg\nuptime" {
			t.Errorf("the guest has %q", got)
		}
		seconds := func(text string) float64 {
			s, err := strconv.ParseFloat(strings.Fields(text)[0], 64)
			m.check(err)
			return s
		}
		host := func() float64 {
			text, err := os.ReadFile("/proc/uptime")
			m.check(err)
			return seconds(string(text))
		}
		for range 3 {
			before := host()
			if got := seconds(m.sh("cat /mnt/uptime")); got < before || got > host() {
				t.Errorf("the guest reads %v seconds, want the host's: %v to %v", got, before, host())
			}
		}
		m.refuses("touch /mnt/new", "echo x >/mnt/uptime")
		m.check(m.guest.PowerOff(m.ctx))
		m.check(m.daemon.Wait(m.ctx))
	})
	t.Run("mount", func(t *testing.T) {
		t.Parallel()
		m := newScratch(t)
		m.check(os.WriteFile(m.path("file"), []byte("host\n"), 0o644))
		live := filepath.Join(m.scratch, "live")
		m.check(os.WriteFile(live, []byte("one\n"), 0o644))
		spec := m.spec(specs.Mount{Destination: "/live", Type: "hostfiles"})
		spec.Annotations = map[string]string{"io.sluice.x.gofusefs.at": "/live"}
		daemon, err := exampleOf("gofusefs")
		m.check(err)
		m.check(m.serveSpecBy(daemon, spec, "--gofusefs-file", live))
		m.boot(testguest.Config{Kind: testguest.UML})
		m.sh("cat /mnt/file /mnt/live/live")
		m.check(os.WriteFile(live, []byte("two\n"), 0o644))
		if got := m.sh("cat /mnt/file /mnt/live/live"); got != "host\ntwo" {
			t.Errorf("the guest reads %q", got)
		}
	})
}

// TestExampleErrors makes the mistakes of a newcomer: each is told in one line, the exit status is 1, and nothing is left behind.
func TestExampleErrors(t *testing.T) {
	t.Parallel()
	m := newScratch(t)
	key := m.writeKey()
	m.check(os.Chmod(key, 0o644))
	server := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(server.Close)
	left := func() string {
		files, err := os.ReadDir(m.scratch)
		m.check(err)
		return fmt.Sprint(files)
	}
	before := left()
	for _, test := range []struct {
		example string
		options []string
		says    []string
	}{
		{"httpfs", []string{"--httpfs-url", "localhost:8000"}, []string{"extension httpfs", "localhost:8000", "expected a URL"}},
		{"httpfs", []string{"--httpfs-url", "http://localhost:1"}, []string{"extension httpfs", "http://localhost:1/index.txt", "connection refused"}},
		{"httpfs", []string{"--httpfs-url", server.URL}, []string{"extension httpfs", server.URL + "/index.txt", "404"}},
		{"httpfs", []string{"--backend", "httpfs"}, []string{"extension httpfs does not serve /, for which it is named"}},
		{"cryptfs", []string{"--cryptfs-key", m.path("absent")}, []string{"extension cryptfs", m.path("absent"), "no such file"}},
		{"cryptfs", []string{"--cryptfs-key", key}, []string{"extension cryptfs", "chmod 600 " + key}},
		{"cryptfs", []string{"--backend", "cryptfs"}, []string{"extension cryptfs does not serve /, for which it is named"}},
		{"gofusefs", []string{"--gofusefs-file", m.share}, []string{"extension gofusefs", m.share + " is not a regular file"}},
		{"hellofs", []string{"--backend", "hello"}, []string{`none named "hello"`, "passthrough, mem, hellofs"}},
	} {
		program, err := exampleOf(test.example)
		m.check(err)
		cmd := exec.CommandContext(m.ctx, program, append([]string{"--socket-path", filepath.Join(m.scratch, "fs.sock"), "--shared-dir", m.share}, test.options...)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: around.uid, Gid: around.uid}}
		out, err := cmd.CombinedOutput()
		exit, _ := errors.AsType[*exec.ExitError](err)
		said := ""
		for line := range strings.Lines(string(out)) {
			if strings.HasPrefix(line, "sluiced: ") {
				said += line
			}
		}
		if exit == nil || exit.ExitCode() != 1 || strings.Count(said, "\n") != 1 {
			t.Errorf("%s %v: %v, want one line and exit status 1\n%s", test.example, test.options, err, out)
		}
		for _, want := range test.says {
			if !strings.Contains(said, want) {
				t.Errorf("%s %v: %q does not say %q", test.example, test.options, said, want)
			}
		}
		if after := left(); after != before {
			t.Errorf("%s %v leaves %s, before there was %s", test.example, test.options, after, before)
		}
	}
}
