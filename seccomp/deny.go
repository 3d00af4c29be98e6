package seccomp

import (
	"math"

	"golang.org/x/sys/unix"
)

// DenyOwner is the owner of the deny set in a Policy.
const DenyOwner = "sluice"

// uint32Is fits a C unsigned int of this value, as Int32 does a C int.
func uint32Is(v uint32) Arg { return MaskedEqual{math.MaxUint32, uint64(v)} }

// hasBit fits where the bit is set.
func hasBit(bit uint64) Arg { return MaskedEqual{bit, bit} }

// denied is the deny set: what neither our code nor an extension ever has to do, and what somebody who has taken the daemon
// over would do first. It is for whatever an extension may ask for without thinking; all else is merely not allowed.
func denied() Source {
	s := Source{Owner: DenyOwner, Rules: make(Rules)}
	for _, rules := range []Rules{deniedCode, deniedProcesses, deniedNamespaces, deniedMachine, deniedFilter} {
		for name, rule := range rules {
			s.Rules[name] = Deny{rule}
		}
	}
	return s
}

// noSys are calls whose arguments a filter cannot see. clone3 has its flags in memory: told that there is no such call,
// glibc's pthread_create, which cgo starts threads with, falls back on clone. Go's own runtime only knows clone.
func noSys() []string { return []string{"clone3"} }

// deniedCode is how code comes to be that was not in the program: mappings that can be executed, and programs.
var deniedCode = Rules{
	"execve":        MatchAll{},
	"execveat":      MatchAll{},
	"mmap":          PerArg{2: hasBit(unix.PROT_EXEC)},
	"mprotect":      PerArg{2: hasBit(unix.PROT_EXEC)},
	"personality":   MatchAll{}, // READ_IMPLIES_EXEC makes all of memory executable
	"pkey_mprotect": PerArg{2: hasBit(unix.PROT_EXEC)},
	"shmat":         PerArg{2: hasBit(0o100000)}, // SHM_EXEC, include/uapi/linux/shm.h
	"uselib":        MatchAll{},
}

// deniedProcesses is how to get into another process, or to make the kernel wait for us.
var deniedProcesses = Rules{
	"kcmp":              MatchAll{},
	"pidfd_getfd":       MatchAll{},
	"process_madvise":   MatchAll{},
	"process_vm_readv":  MatchAll{},
	"process_vm_writev": MatchAll{},
	"ptrace":            MatchAll{},
	"userfaultfd":       MatchAll{},
	// Input on a terminal that somebody else reads, where the daemon was started from one.
	"ioctl": Or{PerArg{1: uint32Is(unix.TIOCSTI)}, PerArg{1: uint32Is(tioclinux)}},
}

const tioclinux = 0x541c // TIOCLINUX, include/uapi/asm-generic/ioctls.h

// deniedNamespaces is the way out of the sandbox: other mounts, other namespaces, more privileges in one's own.
var deniedNamespaces = Rules{
	"chroot":         MatchAll{},
	"clone":          newNamespaces(),
	"fsconfig":       MatchAll{},
	"fsmount":        MatchAll{},
	"fsopen":         MatchAll{},
	"fspick":         MatchAll{},
	"mount":          MatchAll{},
	"mount_setattr":  MatchAll{},
	"move_mount":     MatchAll{},
	"open_tree":      MatchAll{},
	"open_tree_attr": MatchAll{},
	"pivot_root":     MatchAll{},
	"setns":          MatchAll{},
	"umount2":        MatchAll{},
	"unshare":        MatchAll{},
}

// newNamespaces fits clone with any of the flags for one. CLONE_NEWTIME is none of clone's, which has the signal there.
func newNamespaces() Rule {
	var any Or
	for _, flag := range []uint64{
		unix.CLONE_NEWNS, unix.CLONE_NEWCGROUP, unix.CLONE_NEWUTS, unix.CLONE_NEWIPC, unix.CLONE_NEWUSER, unix.CLONE_NEWPID, unix.CLONE_NEWNET,
	} {
		any = append(any, PerArg{0: hasBit(flag)})
	}
	return any
}

// deniedMachine changes the machine for all, or looks into the kernel.
var deniedMachine = Rules{
	"acct":            MatchAll{},
	"add_key":         MatchAll{},
	"adjtimex":        MatchAll{},
	"bpf":             MatchAll{},
	"clock_adjtime":   MatchAll{},
	"clock_settime":   MatchAll{},
	"delete_module":   MatchAll{},
	"finit_module":    MatchAll{},
	"init_module":     MatchAll{},
	"ioperm":          MatchAll{},
	"iopl":            MatchAll{},
	"kexec_file_load": MatchAll{},
	"kexec_load":      MatchAll{},
	"keyctl":          MatchAll{},
	"perf_event_open": MatchAll{},
	"quotactl":        MatchAll{},
	"quotactl_fd":     MatchAll{},
	"reboot":          MatchAll{},
	"request_key":     MatchAll{},
	"setdomainname":   MatchAll{},
	"sethostname":     MatchAll{},
	"settimeofday":    MatchAll{},
	"swapoff":         MatchAll{},
	"swapon":          MatchAll{},
	"syslog":          MatchAll{},
}

// deniedFilter is how a filter is got rid of: more of them, which answer in place of ours, and another handler for the signal
// that a violation makes. To ask for the handler is harmless.
var deniedFilter = Rules{
	"prctl":        PerArg{0: Int32(unix.PR_SET_SECCOMP)},
	"rt_sigaction": PerArg{0: Int32(unix.SIGSYS), 1: NotEqual(0)},
	"seccomp":      MatchAll{},
}
