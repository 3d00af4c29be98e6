// Package command is the frame of the benchmark's programs.
package command

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
)

// ErrUsage is an error that was said already, with what is right.
var ErrUsage = errors.New("usage")

// Parse is flags.Parse, which has said what is wrong with args.
func Parse(flags *flag.FlagSet, args []string) error {
	err := flags.Parse(args)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		return ErrUsage
	}
	return err
}

// CPUs takes a list of CPUs apart, as in 0,2; an empty one is none.
func CPUs(list string) ([]int, error) {
	if list == "" {
		return nil, nil
	}
	var cpus []int
	for field := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(field)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("CPUs %q, expected numbers as in 0,2", list)
		}
		cpus = append(cpus, n)
	}
	return cpus, nil
}

// Run runs a program until it ends or is told to by a signal, says what went wrong, and returns its exit status: 2 for a
// command line that is wrong.
func Run(name string, program func(ctx context.Context, args []string, stdout, stderr io.Writer) error) (status int) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	switch err := program(ctx, os.Args[1:], os.Stdout, os.Stderr); {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, ErrUsage):
		return 2
	default:
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		return 1
	}
}
