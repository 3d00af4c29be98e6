//go:build linux && cgo && (amd64 || arm64)

package seccomp

import (
	"math/rand/v2"
	"runtime"
	"testing"

	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"
)

// call is what a filter sees of a system call.
type call struct {
	nr   uint32
	arch uint32
	args [6]uint64
}

var nativeArch = map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]

// run does what the kernel does with a program.
func run(t *testing.T, program []unix.SockFilter, c call) uint32 {
	t.Helper()
	words := [16]uint32{0: c.nr, 1: c.arch} // little-endian
	for i, a := range c.args {
		words[4+2*i], words[5+2*i] = uint32(a), uint32(a>>32)
	}
	var a uint32
	for pc := 0; pc < len(program); pc++ {
		ins := program[pc]
		jump := func(yes bool) {
			if yes {
				pc += int(ins.Jt)
			} else {
				pc += int(ins.Jf)
			}
		}
		switch ins.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = words[ins.K/4]
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= ins.K
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(ins.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump(a == ins.K)
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			jump(a > ins.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			jump(a >= ins.K)
		case unix.BPF_RET | unix.BPF_K:
			return ins.K
		default:
			t.Fatalf("instruction %d is %+v, which nobody expected of libseccomp", pc, ins)
		}
	}
	t.Fatal("the program ends without an answer")
	return 0
}

// matches says what a clause means.
func (c *Clause) matches(args [6]uint64) bool {
	for _, cond := range c.Conds {
		a, ok := args[cond.Arg], false
		switch cond.Op {
		case OpEqual:
			ok = a == cond.Value
		case OpNotEqual:
			ok = a != cond.Value
		case OpLess:
			ok = a < cond.Value
		case OpLessOrEqual:
			ok = a <= cond.Value
		case OpGreater:
			ok = a > cond.Value
		case OpGreaterOrEqual:
			ok = a >= cond.Value
		case OpMaskedEqual:
			ok = a&cond.Mask == cond.Value
		}
		if !ok {
			return false
		}
	}
	return true
}

func matchAny(clauses []Clause, name string, args [6]uint64) bool {
	for _, c := range clauses {
		if c.Syscall == name && c.matches(args) {
			return true
		}
	}
	return false
}

var someCalls = []string{"read", "write", "mmap", "mprotect", "openat", "socket", "ioctl", "prctl", "futex", "fcntl"}

// someClauses are clauses as a policy may have them; the numbers are few, so that calls meet conditions.
func someClauses(r *rand.Rand) []Clause {
	var clauses []Clause
	for range 1 + r.IntN(12) {
		c := Clause{Syscall: someCalls[r.IntN(len(someCalls))]}
		for arg := range uint(6) {
			if r.IntN(5) != 0 {
				continue
			}
			cond := Cond{Arg: arg, Op: Op(r.IntN(int(OpMaskedEqual) + 1)), Value: someNumber(r)}
			if cond.Op == OpMaskedEqual {
				cond.Mask = someNumber(r)
				cond.Value &= cond.Mask
			}
			c.Conds = append(c.Conds, cond)
		}
		clauses = append(clauses, c)
	}
	return clauses
}

func someNumber(r *rand.Rand) uint64 {
	numbers := []uint64{0, 1, 2, 3, 4, 7, 0x80000000, 0xffffff9c, 0xffffffff, 1 << 32, 1<<32 | 2, 0xffffffffffffff9c, 1<<64 - 1}
	return numbers[r.IntN(len(numbers))]
}

// TestCompile compares what libseccomp makes of clauses, which it merges in ways of its own, with what they say.
func TestCompile(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 400 {
		deny, allow := someClauses(r), someClauses(r)
		denied, err := compile(libseccomp.ActAllow, libseccomp.ActTrap, deny, nil)
		if err != nil {
			t.Fatalf("round %d: compile %v: %v", round, deny, err)
		}
		allowed, err := compile(libseccomp.ActTrap, libseccomp.ActAllow, allow, []string{"clone3"})
		if err != nil {
			t.Fatalf("round %d: compile %v: %v", round, allow, err)
		}
		joined := join(unix.SECCOMP_RET_ALLOW, denied, allowed)
		for range 200 {
			name := someCalls[r.IntN(len(someCalls))]
			nr, err := callNumber(name)
			if err != nil {
				t.Fatal(err)
			}
			c := call{nr: uint32(nr), arch: nativeArch}
			for i := range c.args {
				c.args[i] = someNumber(r)
			}
			wantDenied, wantAllowed, want := uint32(unix.SECCOMP_RET_ALLOW), uint32(unix.SECCOMP_RET_TRAP), uint32(unix.SECCOMP_RET_ALLOW)
			if matchAny(deny, name, c.args) {
				wantDenied = unix.SECCOMP_RET_TRAP
			}
			if matchAny(allow, name, c.args) {
				wantAllowed = unix.SECCOMP_RET_ALLOW
			}
			if wantDenied == unix.SECCOMP_RET_TRAP || wantAllowed == unix.SECCOMP_RET_TRAP {
				want = unix.SECCOMP_RET_TRAP
			}
			if got := run(t, denied, c); got != wantDenied {
				t.Fatalf("round %d: %s %#x: deny filter says %#x, want %#x: %+v", round, name, c.args, got, wantDenied, deny)
			}
			if got := run(t, allowed, c); got != wantAllowed {
				t.Fatalf("round %d: %s %#x: allow filter says %#x, want %#x: %+v", round, name, c.args, got, wantAllowed, allow)
			}
			if got := run(t, joined, c); got != want {
				t.Fatalf("round %d: %s %#x: both filters joined say %#x, want %#x", round, name, c.args, got, want)
			}
		}
	}
}

func TestCompileOthers(t *testing.T) {
	clone3, err := callNumber("clone3")
	if err != nil {
		t.Fatal(err)
	}
	read, err := callNumber("read")
	if err != nil {
		t.Fatal(err)
	}
	program, err := compile(libseccomp.ActNotify, libseccomp.ActAllow, []Clause{{Syscall: "read"}}, []string{"clone3"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		call call
		want uint32
	}{
		{"allowed", call{nr: uint32(read), arch: nativeArch}, unix.SECCOMP_RET_ALLOW},
		{"another", call{nr: uint32(read) + 1, arch: nativeArch}, unix.SECCOMP_RET_USER_NOTIF},
		{"a number that there is not", call{nr: 100000, arch: nativeArch}, unix.SECCOMP_RET_USER_NOTIF},
		{"no system call", call{nr: uint32(clone3), arch: nativeArch}, unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		{"i386", call{nr: uint32(read), arch: unix.AUDIT_ARCH_I386}, unix.SECCOMP_RET_KILL_PROCESS},
		{"arm", call{nr: uint32(read), arch: unix.AUDIT_ARCH_ARM}, unix.SECCOMP_RET_KILL_PROCESS},
	} {
		if got := run(t, program, tt.call); got != tt.want {
			t.Errorf("%s: %#x, want %#x", tt.name, got, tt.want)
		}
	}
	if runtime.GOARCH == "amd64" {
		if got := run(t, program, call{nr: 0x40000000 | uint32(read), arch: nativeArch}); got != unix.SECCOMP_RET_KILL_PROCESS {
			t.Errorf("x32: %#x, want %#x", got, uint32(unix.SECCOMP_RET_KILL_PROCESS))
		}
	}
	for _, name := range []string{"", "READ", "read ", "socketcall", "no_such_call"} {
		if program, err := compile(libseccomp.ActTrap, libseccomp.ActAllow, []Clause{{Syscall: name}}, nil); err == nil {
			t.Errorf("system call %q compiles to %v", name, program)
		}
	}
}
