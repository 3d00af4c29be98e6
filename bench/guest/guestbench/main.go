// Command guestbench runs inside the guest: it times programs, and is those that Debian has none for.
//
//	guestbench run PROGRAM [ARG...]      run it, count the lines it writes, and print how long it took and how much of the guest's CPU
//	guestbench stat DIR DIRS FILES N     stat N of the tree's files, in an order that has nothing to do with theirs
//	guestbench create DIR FILES          create that many files, stat them, remove them
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/bench/guest/guestbench/timing"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "guestbench: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) >= 2 && args[0] == "run":
		return runProgram(args[1:])
	case len(args) == 5 && args[0] == "stat":
		var numbers [3]int
		for i := range numbers {
			var err error
			if numbers[i], err = strconv.Atoi(args[2+i]); err != nil {
				return err
			}
		}
		return stat(args[1], numbers[0], numbers[1], numbers[2])
	case len(args) == 3 && args[0] == "create":
		files, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return create(args[1], files)
	default:
		return fmt.Errorf("%q is none of run, stat and create with their arguments", args)
	}
}

func runProgram(args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	var lines lineCounter
	cmd.Stdout = &lines
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%q: %w", args, err)
	}
	t := timing.Timing{Elapsed: time.Since(start), User: cmd.ProcessState.UserTime(), System: cmd.ProcessState.SystemTime(), Lines: int(lines)}
	return json.NewEncoder(os.Stdout).Encode(t)
}

// lineCounter counts lines and forgets them.
type lineCounter int

func (c *lineCounter) Write(b []byte) (int, error) {
	*c += lineCounter(bytes.Count(b, []byte{'\n'}))
	return len(b), nil
}

func stat(root string, dirs, files, n int) error {
	paths := make([]string, 0, dirs*files)
	for d := range dirs {
		for f := range files {
			paths = append(paths, filepath.Join(root, timing.TreeFile(d, f)))
		}
	}
	order := rand.New(rand.NewPCG(1, 1))
	order.Shuffle(len(paths), func(i, j int) { paths[i], paths[j] = paths[j], paths[i] })
	for _, path := range paths[:min(n, len(paths))] {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: path, Err: err}
		}
		if st.Size != timing.TreeFileSize {
			return fmt.Errorf("%s has %d bytes, expected %d", path, st.Size, timing.TreeFileSize)
		}
	}
	return nil
}

func create(dir string, files int) error {
	each := func(do func(path string) error) error {
		for i := range files {
			if err := do(filepath.Join(dir, fmt.Sprintf("new%05d", i))); err != nil {
				return err
			}
		}
		return nil
	}
	err := each(func(path string) error {
		fd, err := unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return &os.PathError{Op: "create", Path: path, Err: err}
		}
		return unix.Close(fd)
	})
	if err != nil {
		return err
	}
	err = each(func(path string) error {
		var st unix.Stat_t
		return unix.Lstat(path, &st)
	})
	if err != nil {
		return err
	}
	return each(unix.Unlink)
}
