//go:build linux && cgo && (amd64 || arm64)

package seccomp

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"slices"

	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"
)

// compile makes a program that takes action for the calls that match a clause, ENOSYS for nosys, and def for all others.
// Calls of other architectures kill the process: i386 and x32 number them differently.
//
// It has libseccomp compile one clause of each call at a time. Given several, libseccomp 2.5.4 makes one decision tree of
// them from which there is no way back: a call that meets the first condition of a clause, but not the second, does not get
// to the other clauses.
func compile(def, action libseccomp.ScmpAction, clauses []Clause, nosys []string) ([]unix.SockFilter, error) {
	var programs [][]unix.SockFilter
	for _, layer := range layers(clauses) {
		program, err := compileLayer(def, action, layer, nosys)
		if err != nil {
			return nil, err
		}
		programs = append(programs, program)
		nosys = nil
	}
	return join(returns[def], programs...), nil
}

// returns are the values that a program returns for an action.
var returns = map[libseccomp.ScmpAction]uint32{
	libseccomp.ActAllow:  unix.SECCOMP_RET_ALLOW,
	libseccomp.ActTrap:   unix.SECCOMP_RET_TRAP,
	libseccomp.ActNotify: unix.SECCOMP_RET_USER_NOTIF,
}

func compileLayer(def, action libseccomp.ScmpAction, clauses []Clause, nosys []string) ([]unix.SockFilter, error) {
	f, err := libseccomp.NewFilter(def)
	if err != nil {
		return nil, fmt.Errorf("make filter: %w", err)
	}
	defer f.Release()
	if err := f.SetBadArchAction(libseccomp.ActKillProcess); err != nil {
		return nil, fmt.Errorf("set action for foreign architectures: %w", err)
	}
	if len(clauses) > 8 { // libseccomp before 2.5.4 spoils trees that are empty
		// A binary tree over the numbers: the last of 150 calls takes 8 comparisons, not 150.
		if err := f.SetOptimize(2); err != nil {
			return nil, fmt.Errorf("order filter as a tree: %w", err)
		}
	}
	for _, name := range nosys {
		if err := add(f, libseccomp.ActErrno.SetReturnCode(int16(unix.ENOSYS)), Clause{Syscall: name}); err != nil {
			return nil, err
		}
	}
	for _, c := range clauses {
		if err := add(f, action, c); err != nil {
			return nil, err
		}
	}
	return export(f)
}

// layers deals the clauses out so that no call has two in one layer. There is at least one layer. A call that a clause
// matches always has that one alone.
func layers(clauses []Clause) [][]Clause {
	always := map[string]bool{}
	for _, c := range clauses {
		always[c.Syscall] = always[c.Syscall] || len(c.Conds) == 0
	}
	dealt := [][]Clause{nil}
	next := map[string]int{}
	for _, c := range clauses {
		n := next[c.Syscall]
		if always[c.Syscall] && (n > 0 || len(c.Conds) > 0) {
			continue
		}
		if n == len(dealt) {
			dealt = append(dealt, nil)
		}
		dealt[n] = append(dealt[n], c)
		next[c.Syscall]++
	}
	return dealt
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
	nr, err := callNumber(c.Syscall)
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
	if err != nil {
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
	return program, nil
}

// join makes one program of several: where one would return open, the next one decides. With what they do by default that is
// their union. With ALLOW it is what stacked filters do, for log, where the kernel lets only one of them have a listener.
func join(open uint32, programs ...[]unix.SockFilter) []unix.SockFilter {
	joined := slices.Concat(programs...)
	end := 0
	for _, p := range programs[:len(programs)-1] {
		start := end
		end += len(p)
		for i := start; i < end; i++ {
			if joined[i] == (unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: open}) {
				joined[i] = unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(end - i - 1)}
			}
		}
	}
	return joined
}

// callNumber returns the number of a system call, in libseccomp's type. libseccomp need not know it: the table of this
// package may be newer.
func callNumber(name string) (libseccomp.ScmpSyscall, error) {
	nr, ok := Number(name)
	if !ok {
		return 0, fmt.Errorf("system call %q: expected one that this architecture has", name)
	}
	return libseccomp.ScmpSyscall(nr), nil
}
