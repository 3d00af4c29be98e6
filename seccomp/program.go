package seccomp

import (
	"fmt"
	"maps"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// programDenials are the clauses that a program beside the daemon is refused with EPERM, and the calls that there are not for it. It
// may execute and map code as any program does, and add filters of its own, which can only refuse more.
func programDenials(mayMount bool) (deny []Clause, missing []string, err error) {
	s := Source{Owner: "program", Rules: Rules{}}
	for _, rules := range []Rules{deniedProcesses, deniedNamespaces, deniedMachine} {
		for name, rule := range rules {
			s.Rules[name] = rule
		}
	}
	if mayMount {
		delete(s.Rules, "mount")
		delete(s.Rules, "umount2")
	}
	// Whether a call is refused says nothing of what a ring of them does.
	s.Rules["io_uring_setup"] = MatchAll{}
	s.Rules["open_by_handle_at"] = MatchAll{} // by which a file is reached from outside of what is mounted
	// A FUSE program's replies are messages of a socket, and come apart where they go by way of a pipe. libfuse does without pipes
	// where it cannot fill them from memory, go-fuse where they cannot grow.
	s.Rules["vmsplice"] = MatchAll{}
	s.Rules["fcntl"] = PerArg{1: Int32(unix.F_SETPIPE_SZ)}
	var b builder
	b.arch = runtime.GOARCH
	if err := b.add(s); err != nil {
		return nil, nil, err
	}
	clauses, err := b.allow.clauses()
	if err != nil {
		return nil, nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(clauses)) {
		deny = append(deny, clauses[name]...)
	}
	for _, name := range noSys() {
		if _, ok := number(b.arch, name); ok {
			missing = append(missing, name)
		}
	}
	return deny, missing, nil
}

func programError(err error) error {
	return fmt.Errorf("install the system call filter of a program: %w", err)
}
