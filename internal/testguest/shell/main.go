// Command shell starts a virtio-fs server, with the arguments that it is given itself, and gives a shell in a guest that has the share
// mounted at /mnt. `make guest` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/sluicefs/sluice/internal/testguest"
)

func main() {
	kind := flag.String("kind", string(testguest.QEMU), "the guest: qemu or uml")
	daemon := flag.String("daemon", "bin/sluiced", "the virtio-fs server")
	share := flag.String("share", "", "the directory to serve; it may be left out where arguments for the server say what is served")
	flag.Parse()
	if err := run(testguest.Kind(*kind), *daemon, *share, flag.Args()); err != nil {
		fmt.Fprintf(os.Stderr, "guest: %v\n", err)
		os.Exit(1)
	}
}

func run(kind testguest.Kind, daemon, share string, args []string) error {
	// Ctrl-C belongs to the guest's shell once it runs; the terminal is raw then.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGHUP, os.Interrupt)
	defer stop()
	what := "what " + filepath.Base(daemon) + " serves"
	switch {
	case share != "":
		var err error
		if share, err = filepath.Abs(share); err != nil {
			return err
		}
		what = share
	case len(args) == 0:
		return errors.New("nothing to serve; say `make guest SHARE=DIR`, or options of the server as in `make guest ARGS=\"--bundle DIR\"`")
	}
	kit, err := testguest.FindKit()
	if err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "sluice-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	initrd := filepath.Join(scratch, "initrd")
	if err := testguest.WriteInitramfs(initrd, kit, nil); err != nil {
		return err
	}
	d, err := testguest.StartDaemon(ctx, testguest.DaemonConfig{Program: daemon, Scratch: scratch, Share: share, Args: args})
	if err != nil {
		return err
	}
	defer d.Close()
	fmt.Printf("guest: booting %s with %s at /mnt; leave with `exit`\n", kind, what)
	err = testguest.Shell(ctx, testguest.Config{
		Kind: kind, Kit: kit, Initrd: initrd, Scratch: scratch, Devices: []testguest.Device{d.Device()}, Shell: testguest.Tag,
	})
	if err != nil {
		return fmt.Errorf("%w\n%s says:\n%s", err, daemon, d.Log())
	}
	fmt.Println("guest: it has ended; nothing is left running")
	return nil
}
