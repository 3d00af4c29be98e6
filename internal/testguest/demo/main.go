// Command demo shows a share at work: it serves a directory to a guest, passes files both ways, and compares their sums. `make demo` runs it.
package main

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/internal/testguest/tree"
)

func main() {
	kind := flag.String("kind", string(testguest.QEMU), "the guest: qemu or uml")
	daemon := flag.String("daemon", "bin/sluiced", "the virtio-fs server")
	flag.Parse()
	// What is started here ends by itself long before; a hung guest must not hang the demo.
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, testguest.Kind(*kind), *daemon); err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
}

// mib is the size in MiB of the file that goes each way.
const mib = 16

func run(ctx context.Context, kind testguest.Kind, daemon string) error {
	kit, err := testguest.FindKit()
	if err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "sluice-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	share, initrd := filepath.Join(scratch, "share"), filepath.Join(scratch, "initrd")
	var d *testguest.Daemon
	var g *testguest.Guest
	defer func() {
		if g != nil {
			g.Close()
		}
		if d != nil {
			d.Close()
		}
	}()
	inGuest := func(script string) error {
		_, err := g.Sh(ctx, script)
		return err
	}
	// sameSum compares a file as the guest sees it with one of the host.
	sameSum := func(guestFile, hostFile string) error {
		got, err := g.Sh(ctx, "sha256sum <"+guestFile)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(hostFile)
		if err != nil {
			return err
		}
		if want := fmt.Sprintf("%x", sha256.Sum256(content)); !strings.HasPrefix(got, want) {
			return fmt.Errorf("%s in the guest has the sum %.64s, %s on the host %s", guestFile, got, hostFile, want)
		}
		return nil
	}
	begin := time.Now()
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"make a share of a 16 MiB file and a small tree", func() error {
			if err := tree.WriteSample(filepath.Join(share, "tree"), 1); err != nil {
				return err
			}
			return tree.WriteRandom(filepath.Join(share, "from-host"), mib<<20, 2)
		}},
		{"start " + filepath.Base(daemon), func() (err error) {
			d, err = testguest.StartDaemon(ctx, testguest.DaemonConfig{Program: daemon, Scratch: scratch, Share: share})
			return err
		}},
		{"boot a Linux guest (" + string(kind) + ")", func() (err error) {
			if err := testguest.WriteInitramfs(initrd, kit, nil); err != nil {
				return err
			}
			g, err = testguest.Boot(ctx, testguest.Config{
				Kind: kind, Kit: kit, Initrd: initrd, Scratch: scratch, Devices: []testguest.Device{d.Device()},
			})
			return err
		}},
		{"mount the share in the guest", func() error { return inGuest("mount -t virtiofs " + testguest.Tag + " /mnt") }},
		{"host to guest: read the file", func() error {
			return sameSum("/mnt/from-host", filepath.Join(share, "from-host"))
		}},
		{"guest to host: write 16 MiB", func() error {
			if err := inGuest(fmt.Sprintf("dd if=/dev/urandom of=/tmp/x bs=1M count=%d 2>/dev/null; cp /tmp/x /mnt/from-guest", mib)); err != nil {
				return err
			}
			return sameSum("/tmp/x", filepath.Join(share, "from-guest"))
		}},
		{"guest: copy the tree", func() error { return inGuest("cp -a /mnt/tree /mnt/copy") }},
		{"host: compare the trees", func() error {
			want, n, err := tree.Digest(filepath.Join(share, "tree"))
			if err != nil {
				return err
			}
			got, m, err := tree.Digest(filepath.Join(share, "copy"))
			if err == nil && got != want {
				err = fmt.Errorf("the copy differs: %d entries with sum %s, want %d with %s", m, got, n, want)
			}
			return err
		}},
		{"unmount, switch the guest off", func() error {
			if err := inGuest("umount /mnt"); err != nil {
				return err
			}
			if err := g.PowerOff(ctx); err != nil {
				return err
			}
			return d.Wait(ctx)
		}},
	} {
		start := time.Now()
		if err := step.do(); err != nil {
			if d != nil {
				err = fmt.Errorf("%w\n%s says:\n%s", err, filepath.Base(daemon), d.Log())
			}
			return fmt.Errorf("%s: %w", step.what, err)
		}
		fmt.Printf("%-50s %6.2f s\n", step.what, time.Since(start).Seconds())
	}
	fmt.Printf("all sums agree on both sides; %.1f s in all, nothing is left running\n", time.Since(begin).Seconds())
	return nil
}
