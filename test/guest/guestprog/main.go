// Command guestprog is what the tests of test/guest run inside a guest where no shell command will do.
//
//	guestprog posix DIR X,Y     one line for each case: "ok NAME" or "FAIL NAME: why"; cases X and Y are left out
//	guestprog readonly DIR      the same, for a share that must refuse every change
//	guestprog noxattr FILE      ask for extended attributes that there cannot be
//	guestprog open FILE N       open, read and check the self-checking FILE N times
//	guestprog mount TAG DIR N   mount and unmount N times
//	guestprog read FILE N HOW   read 4 KiB of FILE with O_DIRECT N times, "random" or not, and say how many ns each took
//	guestprog sum DIR           the tree's sum and number of entries
//	guestprog random FILE N S   write N bytes that depend on the seed S
//	guestprog locks FILE SAME   lock FILE, which SAME is too by way of another mount, against it
//	guestprog lock FILE HOW     lock FILE as flock(2) and fcntl(2) do; with HOW "wait" and not "try", when it can be had
//	guestprog holdlock FILE A B the same, say so on the FIFO A, and end when B says so
//	guestprog watch FILE X,Y    say what inotify says of X and Y, and what is in FILE then
//	guestprog model DIR FILE    keep a picture of DIR by inotify alone, and say what it is whenever FILE in it changes
//	guestprog vsock CID PORT TEXT  connect to a vsock port, write TEXT, print what comes back
//	guestprog vsockecho PORT    listen on a vsock port and send five bytes back
//	guestprog readwhile FILE X  read and check the self-checking FILE until X is there, and count how that ended
//	guestprog timestat N X Y    nanoseconds of a stat of X and of Y, of N in turn
//	guestprog frozen DIR A B    change what is open in DIR, which must be read-only after the first word by FIFOs, and not after the second
//	guestprog hold FILE A B     open FILE with O_DIRECT, say so on the FIFO A, close it when B says so
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest/tree"
	"github.com/sluicefs/sluice/test/guest/selfcheck"
)

func main() {
	// Every case sets the umask it needs, and says what it expects of it.
	unix.Umask(0)
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "guestprog: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	commands := map[string]struct {
		args int
		run  func(args []string) error
	}{
		"posix":    {2, func(a []string) error { return runCases(posixCases, a[0], true, strings.Split(a[1], ",")) }},
		"readonly": {1, func(a []string) error { return runCases(readonlyCases, a[0], false, nil) }},
		"noxattr":  {1, func(a []string) error { return noXattr(a[0]) }},
		"open":     {2, func(a []string) error { return withCount(a[1], func(n int64) error { return openMany(a[0], n) }) }},
		"mount": {3, func(a []string) error {
			return withCount(a[2], func(n int64) error { return mountMany(a[0], a[1], n) })
		}},
		"read": {3, func(a []string) error {
			return withCount(a[1], func(n int64) error { return readMany(a[0], n, a[2] == "random") })
		}},
		"sum": {1, func(a []string) error { return printSum(a[0]) }},
		"random": {3, func(a []string) error {
			return withCount(a[1], func(n int64) error {
				return withCount(a[2], func(seed int64) error { return tree.WriteRandom(a[0], n, byte(seed)) })
			})
		}},
		"locks":    {2, func(a []string) error { return sharedLocks(a[0], a[1]) }},
		"lock":     {2, func(a []string) error { return lockOnce(a[0], a[1] == "wait", func() error { return nil }) }},
		"holdlock": {3, func(a []string) error { return lockOnce(a[0], false, func() error { return talk(a[1], a[2]) }) }},
		"watch":    {2, func(a []string) error { return watch(a[0], strings.Split(a[1], ",")) }},
		"vsock": {3, func(a []string) error {
			return withCount(a[0], func(cid int64) error {
				return withCount(a[1], func(port int64) error { return vsock(cid, port, a[2]) })
			})
		}},
		"model":     {2, func(a []string) error { return keepModel(a[0], a[1]) }},
		"vsockecho": {1, func(a []string) error { return withCount(a[0], vsockEcho) }},
		"readwhile": {2, func(a []string) error { return readWhile(a[0], a[1]) }},
		"timestat":  {3, func(a []string) error { return withCount(a[0], func(n int64) error { return timeStat(n, a[1:]...) }) }},
		"frozen":    {3, func(a []string) error { return frozen(a[0], a[1], a[2]) }},
		"hold":      {3, func(a []string) error { return hold(a[0], a[1], a[2]) }},
	}
	if len(args) == 0 {
		return fmt.Errorf("no command")
	}
	c, ok := commands[args[0]]
	if !ok || len(args) != c.args+1 {
		return fmt.Errorf("do not understand %q", args)
	}
	return c.run(args[1:])
}

func withCount(arg string, f func(n int64) error) error {
	n, err := strconv.ParseInt(arg, 10, 64)
	if err != nil {
		return err
	}
	return f(n)
}

func printSum(dir string) error {
	sum, entries, err := tree.Digest(dir)
	if err != nil {
		return err
	}
	fmt.Println(sum, entries)
	return nil
}

// openMany counts how the opens of a file end that the host replaces all the while.
// noXattr asks for extended attributes of a file that cannot have any, more than once.
func noXattr(file string) error {
	for range 3 {
		for _, name := range []string{"user.a", "security.capability"} {
			if _, err := unix.Getxattr(file, name, nil); !errors.Is(err, unix.ENOTSUP) {
				return fmt.Errorf("getxattr %s: %v, want ENOTSUP", name, err)
			}
		}
		if _, err := unix.Listxattr(file, nil); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("listxattr: %w, want ENOTSUP or nothing", err)
		}
	}
	return nil
}

func openMany(file string, n int64) error {
	counts := map[string]int{}
	for range n {
		content, err := os.ReadFile(file)
		if err == nil {
			err = selfcheck.Verify(content)
		}
		if err != nil {
			counts[err.Error()]++
		}
	}
	for what, count := range counts {
		fmt.Printf("%d of %d: %s\n", count, n, what)
	}
	return nil
}

func mountMany(tag, dir string, n int64) error {
	for i := range n {
		if err := unix.Mount(tag, dir, "virtiofs", 0, ""); err != nil {
			return fmt.Errorf("mount %d: %w", i, err)
		}
		names, err := os.ReadDir(dir)
		if err == nil && len(names) > 0 {
			_, err = os.Stat(filepath.Join(dir, names[0].Name()))
		}
		if err != nil {
			return fmt.Errorf("use mount %d: %w", i, err)
		}
		if err := unix.Unmount(dir, 0); err != nil {
			return fmt.Errorf("unmount %d: %w", i, err)
		}
	}
	return nil
}

// hold works by FIFOs of the guest's own: opening and writing them waits for the other side.
func hold(file, say, hear string) error {
	f, err := os.OpenFile(file, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return talk(say, hear)
}

func talk(say, hear string) error {
	if err := os.WriteFile(say, []byte("held\n"), 0); err != nil {
		return err
	}
	_, err := os.ReadFile(hear)
	return err
}
