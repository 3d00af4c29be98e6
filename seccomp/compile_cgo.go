//go:build linux && cgo && (amd64 || arm64)

package seccomp

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"

	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"
)

var (
	actAllow = libseccomp.ActAllow
	actTrap  = libseccomp.ActTrap
	actNoSys = libseccomp.ActErrno.SetReturnCode(int16(unix.ENOSYS))
)

// retAllow ends a program: the call is allowed.
var retAllow = unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}

// compile makes a program that takes action for the calls that match a clause, ENOSYS for nosys, and def for all others.
// Calls of other architectures kill the process: i386 and x32 number them differently.
func compile(def, action libseccomp.ScmpAction, clauses []Clause, nosys []string) ([]unix.SockFilter, error) {
	f, err := libseccomp.NewFilter(def)
	if err != nil {
		return nil, fmt.Errorf("make filter: %w", err)
	}
	defer f.Release()
	if err := f.SetBadArchAction(libseccomp.ActKillProcess); err != nil {
		return nil, fmt.Errorf("set action for foreign architectures: %w", err)
	}
	// A binary tree over the numbers: the last of 150 calls takes 8 comparisons, not 150.
	if err := f.SetOptimize(2); err != nil {
		return nil, fmt.Errorf("order filter as a tree: %w", err)
	}
	for _, name := range nosys {
		if err := add(f, actNoSys, Clause{Syscall: name}); err != nil {
			return nil, err
		}
	}
	for _, c := range normal(clauses) {
		if err := add(f, action, c); err != nil {
			return nil, err
		}
	}
	return export(f)
}

// normal drops the conditional clauses of calls that another clause matches always. libseccomp would refuse some of them,
// depending on their order.
func normal(clauses []Clause) []Clause {
	always := map[string]bool{}
	for _, c := range clauses {
		always[c.Syscall] = always[c.Syscall] || len(c.Conds) == 0
	}
	var kept []Clause
	for _, c := range clauses {
		whole, seen := always[c.Syscall]
		switch {
		case !seen:
		case whole:
			kept = append(kept, Clause{Syscall: c.Syscall})
			delete(always, c.Syscall)
		default:
			kept = append(kept, c)
		}
	}
	return kept
}

var compareOps = [...]libseccomp.ScmpCompareOp{
	OpEqual:          libseccomp.CompareEqual,
	OpNotEqual:       libseccomp.CompareNotEqual,
	OpLess:           libseccomp.CompareLess,
	OpLessOrEqual:    libseccomp.CompareLessOrEqual,
	OpGreater:        libseccomp.CompareGreater,
	OpGreaterOrEqual: libseccomp.CompareGreaterEqual,
	OpMaskedEqual:    libseccomp.CompareMaskedEqual,
}

func add(f *libseccomp.ScmpFilter, action libseccomp.ScmpAction, c Clause) error {
	nr, err := number(c.Syscall)
	if err != nil {
		return err
	}
	var conds []libseccomp.ScmpCondition
	for _, cond := range c.Conds {
		values := []uint64{cond.Value}
		if cond.Op == OpMaskedEqual {
			values = []uint64{cond.Mask, cond.Value}
		}
		made, err := libseccomp.MakeCondition(cond.Arg, compareOps[cond.Op], values...)
		if err != nil {
			return fmt.Errorf("%s: argument %d %v %#x: %w", c.Syscall, cond.Arg, cond.Op, cond.Value, err)
		}
		conds = append(conds, made)
	}
	if len(conds) == 0 {
		err = f.AddRuleExact(nr, action)
	} else {
		err = f.AddRuleConditionalExact(nr, action, conds)
	}
	// EEXIST: the same clause again.
	if err != nil && err != unix.EEXIST {
		return fmt.Errorf("add rule for %s: %w", c.Syscall, err)
	}
	return nil
}

// export returns the program of f. It is loaded without libseccomp's help, which would load it for one thread alone where
// it finds the kernel too old for more.
func export(f *libseccomp.ScmpFilter) ([]unix.SockFilter, error) {
	fd, err := unix.MemfdCreate("seccomp", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make memory file for the filter: %w", err)
	}
	file := os.NewFile(uintptr(fd), "seccomp")
	defer file.Close()
	if err := f.ExportBPF(file); err != nil {
		return nil, fmt.Errorf("export filter: %w", err)
	}
	b, err := io.ReadAll(io.NewSectionReader(file, 0, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("read filter: %w", err)
	}
	program := make([]unix.SockFilter, len(b)/unix.SizeofSockFilter)
	if _, err := binary.Decode(b, binary.NativeEndian, program); err != nil {
		return nil, fmt.Errorf("read filter: %w", err)
	}
	if len(program) == 0 || len(program) > unix.BPF_MAXINSNS {
		return nil, fmt.Errorf("the filter has %d instructions: expected 1 to %d; allow more calls without conditions", len(program), unix.BPF_MAXINSNS)
	}
	return program, nil
}

// join makes one program of two: second decides on what first allows. Two filters would do the same, but the kernel lets
// only one of a process's filters have a listener.
func join(first, second []unix.SockFilter) []unix.SockFilter {
	joined := append([]unix.SockFilter(nil), first...)
	for i, ins := range joined {
		if ins == retAllow {
			joined[i] = unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(len(first) - i - 1)}
		}
	}
	return append(joined, second...)
}

// number returns the number of a system call.
func number(name string) (libseccomp.ScmpSyscall, error) {
	nr, err := libseccomp.GetSyscallFromName(name)
	if err != nil || nr < 0 { // libseccomp has negative ones for the calls of other architectures
		return 0, fmt.Errorf("system call %q: expected one that this architecture and libseccomp know", name)
	}
	return nr, nil
}

// callName returns the name of a system call, "" if it has none.
func callName(nr int) string {
	name, err := libseccomp.ScmpSyscall(nr).GetName()
	if err != nil {
		return ""
	}
	return name
}
