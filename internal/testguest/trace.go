package testguest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// TraceDir is the directory for what the daemons of this run have called, "" if they are not to be traced:
// $SLUICE_SECCOMP_TRACE, see `make seccomp-seen`.
func TraceDir() string { return os.Getenv("SLUICE_SECCOMP_TRACE") }

// TraceArgs returns the arguments of a daemon with those that have it traced as well, if this run is: unless they have a filter
// of their own. In order for the report to be written it must then end by SIGTERM, or with its front-end. Reports are told
// apart by surroundings, the user and the sandbox of the daemon.
func TraceArgs(surroundings string, uid uint32, args []string) ([]string, error) {
	dir := TraceDir()
	if dir == "" || slices.Contains(args, "--seccomp") {
		return args, nil
	}
	f, err := os.CreateTemp(dir, surroundings+".*.txt")
	if err != nil {
		return nil, fmt.Errorf("create a file for the trace: %w", err)
	}
	defer f.Close()
	if err := f.Chown(int(uid), int(uid)); err != nil {
		return nil, fmt.Errorf("give %s to the daemon: %w", f.Name(), err)
	}
	path, err := filepath.Abs(f.Name())
	if err != nil {
		return nil, err
	}
	return append([]string{"--seccomp", "trace", "--seccomp-report", path}, args...), nil
}
