package guest_test

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest"
)

// TestSharedLocks has one directory at two places of a share: the guest's kernel knows of two files, and the host of one (A7).
func TestSharedLocks(t *testing.T) {
	t.Parallel()
	m := serves(t, twice, "--posix-lock", "--flock")
	m.sh("guestprog locks /mnt/a/file /mnt/b/file")
}

// TestLocksOfTwoGuests has two guests, with a daemon each, and the host lock a file of one directory (A7).
func TestLocksOfTwoGuests(t *testing.T) {
	t.Parallel()
	a := newMachine(t, "--posix-lock", "--flock")
	b := newScratch(t)
	b.share = a.share
	b.check(b.start(testguest.DaemonConfig{Program: program, Share: b.share, Args: []string{"--posix-lock", "--flock"}}))
	a.boot(testguest.Config{Kind: testguest.UML})
	b.boot(testguest.Config{Kind: testguest.UML})
	a.sh("touch /mnt/file; mkfifo /tmp/say /tmp/hear; guestprog holdlock /mnt/file /tmp/say /tmp/hear >/dev/null 2>&1 & cat /tmp/say")

	host, err := os.Open(a.path("file"))
	a.check(err)
	defer host.Close()
	if err := unix.Flock(int(host.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("the host locks what a guest has: %v", err)
	}
	if _, err := b.trySh("guestprog lock /mnt/file try"); err == nil {
		t.Error("a guest locks what another one has")
	}
	waited := make(chan error, 1)
	go func() {
		_, err := b.trySh("guestprog lock /mnt/file wait")
		waited <- err
	}()
	a.sh("echo >/tmp/hear")
	b.check(<-waited)
	b.sh("guestprog lock /mnt/file try")
	a.check(unix.Flock(int(host.Fd()), unix.LOCK_EX|unix.LOCK_NB))
}
