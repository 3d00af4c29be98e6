package seccomp

import (
	"cmp"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestNumbers(t *testing.T) {
	for name, want := range map[string]int{"read": unix.SYS_READ, "openat2": unix.SYS_OPENAT2, "getxattrat": unix.SYS_GETXATTRAT, "clone3": unix.SYS_CLONE3} {
		if nr, ok := Number(name); !ok || nr != want {
			t.Errorf("Number(%q) = %d, %v, expected %d", name, nr, ok, want)
		}
		if got := nameOf(want); got != name {
			t.Errorf("nameOf(%d) = %q, expected %q", want, got, name)
		}
	}
	for _, name := range []string{"", "READ", "frobnicate", "arch_specific_syscall"} {
		if nr, ok := Number(name); ok {
			t.Errorf("Number(%q) = %d, expected none", name, nr)
		}
	}
	for _, nr := range []int{999, -1, 1 << 20} {
		if got := nameOf(nr); got != "" {
			t.Errorf("nameOf(%d) = %q, expected none", nr, got)
		}
	}
	if _, ok := number("arm64", "epoll_wait"); ok {
		t.Error("arm64 has epoll_wait")
	}
	if nr, ok := number("arm64", "read"); !ok || nr != 63 {
		t.Errorf("arm64's read is %d, %v, expected 63", nr, ok)
	}
}

func TestTableIsSorted(t *testing.T) {
	if !slices.IsSortedFunc(syscalls, func(a, b syscallNumbers) int { return cmp.Compare(a.name, b.name) }) {
		t.Error("the table of names is not sorted")
	}
}

// TestOwnRulesAreForSomeMachine has New look at all tables there are: an unknown name, or a rule that is wrong, is an error.
func TestOwnRulesAreForSomeMachine(t *testing.T) {
	for _, arch := range arches {
		p, err := newFor(arch, Base(BaseOptions{PID: 1, OwnSocket: true, Syslog: true}),
			Passthrough(PassthroughOptions{Writable: true, Xattr: true, FileHandles: true, SwitchIDs: true, Locks: true}))
		if err != nil {
			t.Fatal(err)
		}
		if vain := p.Ineffective(); len(vain) > 0 {
			t.Errorf("%s: we ask for what we deny: %v", arch, vain)
		}
		for _, list := range [][]Clause{p.Allow(), p.Deny()} {
			for _, c := range list {
				if _, ok := number(arch, c.Syscall); !ok {
					t.Errorf("%s: %s has no number", arch, c.Syscall)
				}
			}
		}
	}
}
