package guest_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/internal/testguest/tree"
	"github.com/sluicefs/sluice/test/guest/selfcheck"
)

// sameUsage compares two moments at which a daemon holds the same: the guest has mounted the share and looked at little.
// Descriptors must be as many; memory that a garbage collector has not given back yet is no leak.
func sameUsage(t *testing.T, before, after testguest.Usage) {
	t.Helper()
	const slack = 6 << 20
	t.Logf("before %+v, after %+v", before, after)
	if after.FDs > before.FDs {
		t.Errorf("the daemon has %d descriptors, had %d before", after.FDs, before.FDs)
	}
	if after.RSS > before.RSS+slack {
		t.Errorf("the daemon has %d KiB of memory, had %d before", after.RSS>>10, before.RSS>>10)
	}
}

// TestMounts mounts and unmounts the share many times in one guest.
func TestMounts(t *testing.T) {
	warmUp, mounts := size{200, 500}, size{300, 1000}
	eachKind(t, func(t *testing.T, kind testguest.Kind) {
		m := newMachine(t)
		m.check(tree.WriteSample(m.path("tree"), 1))
		m.boot(testguest.Config{Kind: kind})
		// By then Go's heap has its least size.
		m.sh("umount /mnt; guestprog mount %s /mnt %d", testguest.Tag, warmUp.n())
		before := m.usage()
		m.sh("guestprog mount %s /mnt %d", testguest.Tag, mounts.n())
		sameUsage(t, before, m.usage())
	})
}

// TestReboots reboots a guest whose virtual machine keeps the daemon's connection.
func TestReboots(t *testing.T) {
	t.Parallel()
	reboots := size{3, 20}
	m := newMachine(t)
	m.check(tree.WriteSample(m.path("tree"), 1))
	want := digest(t, m.path("tree"))
	m.boot(testguest.Config{Kind: testguest.QEMU})
	var before testguest.Usage
	for i := range reboots.n() + 1 {
		if got := m.sh("guestprog sum /mnt/tree"); got != want {
			t.Errorf("after %d reboots the guest has %s, want %s", i, got, want)
		}
		// The second boot, too, may find something for the first time.
		if i == 1 {
			before = m.usage()
		}
		if i < reboots.n() {
			begin := time.Now()
			m.check(m.guest.Reboot(m.serving))
			t.Logf("rebooted in %v", time.Since(begin))
			m.mount()
		}
	}
	sameUsage(t, before, m.usage())
}

// TestEnd looks at what the daemon does when the virtual machine goes away.
func TestEnd(t *testing.T) {
	eachKind(t, func(t *testing.T, kind testguest.Kind) {
		t.Run("persist", func(t *testing.T) {
			m := newMachine(t, "--persist")
			for i, leave := range []func() error{
				func() error { m.guest.Close(); return nil },
				func() error { return m.guest.PowerOff(m.ctx) },
			} {
				m.boot(testguest.Config{Kind: kind})
				m.sh("echo %d >/mnt/%d", i, i)
				m.check(leave())
			}
			if entries, err := os.ReadDir(m.share); err != nil || len(entries) != 2 {
				t.Errorf("the share has %v, %v, want 2 files", entries, err)
			}
		})
		if kind == testguest.QEMU && !full() {
			return // the daemon that persists has seen both ends of the machine
		}
		t.Run("daemon ends", func(t *testing.T) {
			m := newMachine(t)
			m.boot(testguest.Config{Kind: kind})
			m.check(m.guest.PowerOff(m.ctx))
			m.check(m.daemon.Wait(m.ctx))
		})
		t.Run("killed guest", func(t *testing.T) {
			m := newMachine(t)
			m.boot(testguest.Config{Kind: kind})
			m.guest.Close()
			m.check(m.daemon.Wait(m.ctx))
		})
	})
}

// TestReplacedFile opens a file that the host replaces by rename as fast as it can. Whatever the cache policy, an open finds one
// of the files, whole.
func TestReplacedFile(t *testing.T) {
	opens := map[testguest.Kind]size{testguest.UML: {2500, 10000}, testguest.QEMU: {500, 10000}}
	eachKind(t, func(t *testing.T, kind testguest.Kind) {
		policies := []string{"never", "metadata", "auto", "always"}
		if kind == testguest.QEMU && !full() {
			policies = []string{"auto"}
		}
		for _, cache := range policies {
			t.Run(cache, func(t *testing.T) {
				m := newMachine(t, "--cache", cache)
				replace := func(n uint64) error {
					if err := os.WriteFile(m.path("new"), selfcheck.Content(n), 0o644); err != nil {
						return err
					}
					return os.Rename(m.path("new"), m.path("file"))
				}
				m.check(replace(0))
				m.boot(testguest.Config{Kind: kind})

				stop, stopped := make(chan struct{}), make(chan error, 1)
				end := sync.OnceFunc(func() { close(stop) })
				t.Cleanup(end)
				var replaced atomic.Uint64
				go func() {
					for {
						select {
						case <-stop:
							stopped <- nil
							return
						default:
						}
						if err := replace(replaced.Add(1)); err != nil {
							stopped <- err
							return
						}
					}
				}()
				begin := time.Now()
				// On a busy machine the guest may be done before much has been replaced.
				bad, rounds := "", 0
				for bad == "" && (rounds == 0 || replaced.Load() < 100) {
					bad = m.sh("guestprog open /mnt/file %d", opens[kind].n())
					rounds++
				}
				took := time.Since(begin)
				end()
				m.check(<-stopped)
				t.Logf("%d opens in %v, %d replacements", rounds*opens[kind].n(), took, replaced.Load())
				if bad != "" {
					t.Error(bad)
				}
			})
		}
	})
}

// TestManyFiles walks over more files than the daemon may have descriptors.
func TestManyFiles(t *testing.T) {
	const maxFDs = 256
	files := map[testguest.Kind]size{testguest.UML: {25_000, 1_000_000}, testguest.QEMU: {5_000, 200_000}}
	eachKind(t, func(t *testing.T, kind testguest.Kind) {
		m := newMachine(t, "--max-fds", fmt.Sprint(maxFDs))
		n := files[kind].n()
		for i := range n {
			dir := m.path(fmt.Sprint("dir", i/1000))
			if i%1000 == 0 {
				m.check(os.Mkdir(dir, 0o755))
			}
			m.check(os.WriteFile(fmt.Sprint(dir, "/file", i), nil, 0o644))
		}
		m.boot(testguest.Config{Kind: kind, MemMiB: 2048})
		before := m.usage()

		// The walk is watched from outside; the peaks are what counts.
		stop, peak := make(chan struct{}), make(chan testguest.Usage, 1)
		go func() {
			tick := time.NewTicker(50 * time.Millisecond)
			defer tick.Stop()
			var top testguest.Usage
			for {
				if u, err := m.daemon.Usage(); err == nil {
					top = testguest.Usage{FDs: max(top.FDs, u.FDs), RSS: max(top.RSS, u.RSS)}
				}
				select {
				case <-tick.C:
				case <-stop:
					peak <- top
					return
				}
			}
		}()
		begin := time.Now()
		r, err := m.run(testguest.Command{Args: []string{"sh", "-c", "find /mnt -type f -size 0 -links 1 | wc -l"}})
		close(stop)
		top := <-peak
		m.check(err)
		t.Logf("walked over %d files in %v; before %+v, peak %+v", n, time.Since(begin), before, top)
		if got := strings.TrimSpace(r.Stdout); got != fmt.Sprint(n) || r.Stderr != "" {
			t.Errorf("find has found %s files, want %d:\n%.2000s", got, n, r.Stderr)
		}
		// Beside those of inodes a daemon has descriptors for its queues, its guest's memory and the like.
		if top.FDs > maxFDs+64 {
			t.Errorf("the daemon had %d descriptors with --max-fds %d", top.FDs, maxFDs)
		}
		const perInode, slack = 300, 12 << 20
		if limit := before.RSS + slack + int64(n)*perInode; top.RSS > limit {
			t.Errorf("the daemon had %d KiB of memory, more than %d", top.RSS>>10, limit>>10)
		}
		m.sh("sync; echo 3 >/proc/sys/vm/drop_caches")
		// The last FORGETs are on their way, and memory goes back to the host from a thread of its own.
		after := m.usage()
		for end := time.Now().Add(time.Minute); after.RSS > before.RSS+slack && time.Now().Before(end); after = m.usage() {
			m.sh("echo 3 >/proc/sys/vm/drop_caches; sleep 1")
		}
		t.Logf("after the guest has dropped its caches: %+v", after)
		if after.RSS > before.RSS+slack {
			t.Errorf("the daemon has %d KiB of memory after the guest has dropped its caches, had %d before the walk", after.RSS>>10, before.RSS>>10)
		}
		// Removed by a process: it is quicker than the clean-up of the test's directory, and than the guest.
		m.check(exec.Command("rm", "-rf", m.share).Run())
	})
}
