package guest_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/internal/testguest/tree"
)

// digest is a tree's sum as `guestprog sum` prints it.
func digest(t *testing.T, dir string) string {
	t.Helper()
	sum, entries, err := tree.Digest(dir)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(sum, " ", entries)
}

// TestBigFile writes a big file on each side and reads it on the other, and in the guest again after a new mount.
func TestBigFile(t *testing.T) {
	mib := map[testguest.Kind]size{testguest.UML: {256, 1024}, testguest.QEMU: {64, 1024}}
	eachKind(t, func(t *testing.T, kind testguest.Kind) {
		m := newMachine(t)
		n := int64(mib[kind].n()) << 20
		for _, dir := range []string{"host", "guest"} {
			m.check(os.Mkdir(m.path(dir), 0o755))
		}
		m.check(tree.WriteRandom(m.path("host/file"), n, 1))
		m.boot(testguest.Config{Kind: kind})
		begin := time.Now()
		if got, want := m.sh("guestprog sum /mnt/host"), digest(t, m.path("host")); got != want {
			t.Errorf("the guest reads %s, want %s", got, want)
		}
		t.Logf("read %d MiB in %v", n>>20, time.Since(begin))
		begin = time.Now()
		m.sh("guestprog random /mnt/guest/file %d 2; sync", n)
		t.Logf("wrote %d MiB in %v", n>>20, time.Since(begin))
		m.sh("umount /mnt")
		m.mount()
		if got, want := m.sh("guestprog sum /mnt/guest"), digest(t, m.path("guest")); got != want {
			t.Errorf("the guest reads back %s, the host has %s", got, want)
		}
		// What the host has must be what the guest was told to write.
		m.check(tree.WriteRandom(filepath.Join(m.scratch, "want"), n, 2))
		m.check(exec.Command("cmp", filepath.Join(m.scratch, "want"), m.path("guest/file")).Run())
	})
}

// TestSourceTree unpacks Go's source tree onto the share, and removes it.
func TestSourceTree(t *testing.T) {
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	src, err := filepath.EvalSymlinks(filepath.Join(strings.TrimSpace(string(goroot)), "src"))
	if err != nil {
		t.Fatal(err)
	}
	eachKind(t, func(t *testing.T, kind testguest.Kind) {
		src := src
		if !full() {
			// 1,500 and 440 entries of 12,800.
			src = filepath.Join(src, map[testguest.Kind]string{testguest.UML: "internal", testguest.QEMU: "net"}[kind])
		}
		m := newMachine(t)
		m.check(exec.Command("tar", "-cf", m.path("src.tar"), "-C", src, ".").Run())
		m.boot(testguest.Config{Kind: kind})
		begin := time.Now()
		m.sh("mkdir /mnt/src; tar -xf /mnt/src.tar -C /mnt/src")
		t.Logf("unpacked in %v", time.Since(begin))
		want := digest(t, src)
		if got := digest(t, m.path("src")); got != want {
			t.Errorf("the host has %s, want %s", got, want)
		}
		begin = time.Now()
		if got := m.sh("guestprog sum /mnt/src"); got != want {
			t.Errorf("the guest has %s, want %s", got, want)
		}
		t.Logf("read in %v", time.Since(begin))
		begin = time.Now()
		m.sh("rm -rf /mnt/src")
		t.Logf("removed in %v", time.Since(begin))
		if _, err := os.Lstat(m.path("src")); !os.IsNotExist(err) {
			t.Errorf("after rm -rf: %v, want that it does not exist", err)
		}
	})
}

// TestQueues has several processes at work at once on as many request queues.
func TestQueues(t *testing.T) {
	t.Parallel()
	const queues = 2
	files := size{50, 200}.n()
	m := newMachine(t, "--num-request-queues", fmt.Sprint(queues))
	m.boot(testguest.Config{Kind: testguest.QEMU, CPUs: queues})
	m.sh(`for i in 1 2 3 4; do
		(mkdir /mnt/$i; guestprog random /mnt/$i/file %d $i; for j in $(seq %d); do echo $j >/mnt/$i/$j; done) &
	done; wait`, size{2, 8}.n()<<20, files)
	for i := range 4 {
		dir := fmt.Sprint(i + 1)
		if got, want := m.sh("guestprog sum /mnt/%s", dir), digest(t, m.path(dir)); got != want || !strings.HasSuffix(want, fmt.Sprint(" ", files+2)) {
			t.Errorf("the guest has %s, the host %s, want both the same with %d entries", got, want, files+2)
		}
	}
}

// TestDirectIO looks at the flags of the descriptor that the daemon opens for a guest's O_DIRECT.
func TestDirectIO(t *testing.T) {
	t.Parallel()
	const direct = 0o40000
	if runtime.GOARCH != "amd64" {
		t.Fatalf("O_DIRECT is another bit on %s", runtime.GOARCH)
	}
	for _, test := range []struct {
		options []string
		want    bool
	}{{nil, false}, {[]string{"--allow-direct-io"}, true}} {
		t.Run(strings.Join(append([]string{"options"}, test.options...), " "), func(t *testing.T) {
			m := newMachine(t, test.options...)
			m.check(tree.WriteRandom(m.path("file"), 1<<20, 1))
			m.boot(testguest.Config{Kind: testguest.UML})
			m.sh("mkfifo /tmp/say /tmp/hear")
			ended := make(chan error, 1)
			go func() {
				_, err := m.trySh("guestprog hold /mnt/file /tmp/say /tmp/hear")
				ended <- err
			}()
			m.sh("cat /tmp/say")
			flags := m.flagsOf(m.path("file"))
			m.sh("echo >/tmp/hear")
			m.check(<-ended)
			if got := flags&direct != 0; got != test.want {
				t.Errorf("the daemon has the file open with flags %#o: O_DIRECT %v, want %v", flags, got, test.want)
			}
			m.sh("dd if=/mnt/file of=/mnt/copy bs=64k iflag=direct oflag=direct 2>/dev/null; cmp /mnt/file /mnt/copy")
		})
	}
}

// flagsOf returns the flags with which the daemon has a file open for reading and writing.
func (m *machine) flagsOf(file string) uint {
	m.t.Helper()
	for _, flags := range m.openFlags(file) {
		if flags&3 == uint(os.O_RDWR) {
			return flags
		}
	}
	m.t.Fatalf("the daemon does not have %s open", file)
	return 0
}

// openFlags returns the flags of all descriptors that the daemon has of a file.
func (m *machine) openFlags(file string) (all []uint) {
	m.t.Helper()
	proc := fmt.Sprintf("/proc/%d/", m.daemon.Server())
	want, err := os.Stat(file)
	m.check(err)
	fds, err := os.ReadDir(proc + "fd")
	m.check(err)
	for _, fd := range fds {
		if info, err := os.Stat(proc + "fd/" + fd.Name()); err != nil || !os.SameFile(info, want) {
			continue
		}
		info, err := os.ReadFile(proc + "fdinfo/" + fd.Name())
		m.check(err)
		for line := range strings.Lines(string(info)) {
			if value, ok := strings.CutPrefix(line, "flags:"); ok {
				var flags uint
				_, err := fmt.Sscanf(strings.TrimSpace(value), "%o", &flags)
				m.check(err)
				all = append(all, flags)
			}
		}
	}
	return all
}

// TestNoOpen has a guest read what it need not open, on a mount that it may write to as far as its own kernel goes.
func TestNoOpen(t *testing.T) {
	eachKindInFull(t, func(t *testing.T, kind testguest.Kind) {
		m := newMachine(t, "--readonly", "--cache", "always", "--no-open", "--max-fds", "64")
		m.check(os.Mkdir(m.path("dir"), 0o755))
		for i := range 100 {
			m.check(tree.WriteRandom(m.path(fmt.Sprint("dir/", i)), int64(i)<<10, byte(i)))
		}
		m.check(os.WriteFile(m.path("file"), []byte("first"), 0o666))
		m.boot(testguest.Config{Kind: kind})
		want := digest(t, m.path("dir"))
		for range 2 {
			if got := m.sh("guestprog sum /mnt/dir"); got != want {
				t.Errorf("the guest reads %s, want %s", got, want)
			}
			m.sh("echo 3 > /proc/sys/vm/drop_caches")
		}
		for _, write := range []string{"echo x > /mnt/file", "echo x >> /mnt/file", "touch /mnt/file", "touch /mnt/new"} {
			if out, err := m.trySh(write); err == nil {
				t.Errorf("%s: it worked: %q", write, out)
			}
		}
		m.check(os.WriteFile(m.path("new"), []byte("second"), 0o666))
		if got := m.sh("exec 3< /mnt/file; cat <&3"); got != "first" {
			t.Errorf("the guest reads %q after it was refused to write, want what was there", got)
		}
		// Nobody has said that it is not read any more.
		if !slices.ContainsFunc(m.openFlags(m.path("file")), func(flags uint) bool { return flags&unix.O_PATH == 0 }) {
			t.Error("the daemon has closed the file: the guest opens what it reads")
		}
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", m.daemon.Server()))
		if m.check(err); len(fds) > 64+64/4+64 {
			t.Errorf("the daemon has %d descriptors, 64 of them for what the guest knows and 16 for what it reads", len(fds))
		}
	})
}
