package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// posixCase is one behaviour; run gets a fresh directory that is the caller's own.
type posixCase struct {
	name string
	who  who
	run  func(dir string) error
}

// who says which users a case is for.
type who int

const (
	anyone who = iota
	rootOnly
	userOnly // uid 1000 with the supplementary group 2000
)

// runCases runs all cases that are for the user it runs as, but those named in without, each in a new directory below dir that
// it removes, or in dir itself.
func runCases(cases []posixCase, dir string, fresh bool, without []string) error {
	root := os.Getuid() == 0
	failed := 0
	for _, c := range cases {
		if c.who == rootOnly && !root || c.who == userOnly && root || slices.Contains(without, c.name) {
			continue
		}
		run := c.run
		if fresh {
			run = inFreshDir(c)
		}
		if err := run(dir); err != nil {
			failed++
			fmt.Printf("FAIL %s: %v\n", c.name, err)
			continue
		}
		fmt.Printf("ok %s\n", c.name)
	}
	if failed > 0 {
		return fmt.Errorf("%d cases failed", failed)
	}
	return nil
}

// inFreshDir runs a case in a directory of its own. That everything in it can be removed is a part of the case.
func inFreshDir(c posixCase) func(string) error {
	return func(dir string) error {
		sub := filepath.Join(dir, fmt.Sprintf("%s-%d", strings.ReplaceAll(c.name, " ", "-"), os.Getuid()))
		if err := os.Mkdir(sub, 0o755); err != nil {
			return err
		}
		if err := c.run(sub); err != nil {
			return err
		}
		return os.RemoveAll(sub)
	}
}

// fixture names what the host has prepared beside the cases' directories.
func fixture(dir, name string) string { return filepath.Join(filepath.Dir(dir), "fixtures", name) }

// first returns the first error of a case's steps, which it numbers, because many steps have the same error.
func first(steps ...error) error {
	for i, err := range steps {
		if err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	return nil
}

// want says that an operation must fail with errno.
func want(errno syscall.Errno, err error) error {
	if errors.Is(err, errno) {
		return nil
	}
	return fmt.Errorf("got error %v, want %v", err, errno)
}

// equal says that two values must be the same.
func equal[T comparable](what string, got, want T) error {
	if got != want {
		return fmt.Errorf("%s is %v, want %v", what, got, want)
	}
	return nil
}

// holds says what a file must contain.
func holds(file string, want []byte) error {
	got, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%s holds %d bytes %.40q, want %d bytes %.40q", filepath.Base(file), len(got), got, len(want), want)
	}
	return nil
}

// put writes a file with exactly these permission bits.
func put(file, content string, perm uint32) error {
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		return err
	}
	return unix.Chmod(file, perm)
}

func lstat(file string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Lstat(file, &st)
	return st, err
}

// mode says what the type and permission bits of a file must be.
func mode(file string, want uint32) error {
	st, err := lstat(file)
	if err != nil {
		return err
	}
	if st.Mode != want {
		return fmt.Errorf("%s has mode %#o, want %#o", filepath.Base(file), st.Mode, want)
	}
	return nil
}
