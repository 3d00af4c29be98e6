//go:build linux && cgo && (amd64 || arm64)

package seccomp

// #include <errno.h>
// #include <stdlib.h>
// #include <linux/ioctl.h>
// #include <linux/seccomp.h>
// #include "violation_cgo.h"
//
// enum { notif_recv = SECCOMP_IOCTL_NOTIF_RECV, notif_send = SECCOMP_IOCTL_NOTIF_SEND };
import "C"

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"unsafe"

	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"
)

// Levels of libseccomp's API, seccomp_api_get(3).
const (
	apiEnforce = 3 // threads at once, and killing processes: Linux 4.14, libseccomp 2.4
	apiLog     = 6 // listeners of all threads at once: Linux 5.7, libseccomp 2.5
)

// Supported returns nil if filters can be installed, and what is missing otherwise.
func Supported() error {
	return supported(Kill)
}

func supported(a Action) error {
	level, err := libseccomp.GetAPI()
	if err != nil {
		return fmt.Errorf("ask libseccomp for its API level: %w", err)
	}
	if level < apiEnforce {
		return fmt.Errorf("seccomp API level %d: expected %d or higher, which is Linux 4.14 with seccomp filters and libseccomp 2.4; run with --seccomp=none", level, apiEnforce)
	}
	if a == Log && level < apiLog {
		return fmt.Errorf("seccomp API level %d: expected %d or higher to log violations, which is Linux 5.7 and libseccomp 2.5; run with --seccomp=kill or none", level, apiLog)
	}
	return nil
}

// process is what this process has installed, which is for good.
var process struct {
	sync.Mutex
	installed bool
	marks     *Marks
	pin       runtime.Pinner // of marks
	traced    []Clause       // those that calls are counted for
}

var errInstalled = errors.New("install system call filter: this process has one already")

// Install confines all threads of the process, and those that they start, for good. It fails closed: an error means that
// they are not all confined, or none is, and the process should end.
//
// Kill and Trap install two filters. Each refuses calls by itself, Allow's those that nobody asked for, and Deny's those
// that nobody may have: no mistake in the one undoes the other. A refused call does not happen. A handler of SIGSYS writes
// the line and ends the process; Deny should have rt_sigaction for SIGSYS, and Install adds seccomp(2). A call that is
// refused while signals are blocked, as they are where Go and libc start a thread, kills without a line but the kernel's.
//
// Log installs one filter, with the denials before the rest, of which a thread in C is told. Its reply lets the call
// happen. Before Linux 5.19 a call that a signal interrupts may be counted twice.
//
// What the handlers call themselves is allowed besides; see own.
func Install(cfg InstallConfig) error {
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("install system call filter: %w", err)
	}
	if cfg.Action == None {
		return nil
	}
	if err := supported(cfg.Action); err != nil {
		return fmt.Errorf("install system call filter: %w", err)
	}
	process.Lock()
	defer process.Unlock()
	if process.installed {
		return errInstalled
	}
	if cfg.Output == nil {
		cfg.Output = os.Stderr
	}
	// A descriptor of our own, which nobody else closes.
	output, err := unix.FcntlInt(cfg.Output.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return fmt.Errorf("install system call filter: duplicate descriptor of %s: %w", cfg.Output.Name(), err)
	}
	if err := install(cfg, output); err != nil {
		if !process.installed {
			unix.Close(output)
		}
		return fmt.Errorf("install system call filter: %w", err)
	}
	return nil
}

func install(cfg InstallConfig, output int) error {
	load, err := prepare(cfg, output)
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	threads, err := openThreads(cfg.Tasks)
	if err != nil {
		return err
	}
	defer threads.close()

	process.marks = cfg.Marks
	if process.marks == nil {
		process.marks = new(Marks)
	}
	process.pin.Pin(process.marks)
	process.installed = true // in part, if it fails
	h := C.struct_sluice_handlers{
		fd:      C.int(output),
		action:  map[Action]C.enum_sluice_action{Kill: C.SLUICE_KILL, Trap: C.SLUICE_TRAP, Log: C.SLUICE_LOG}[cfg.Action],
		calls:   (*[C.SLUICE_CALL_NAME]C.char)(C.CBytes(callNames())),
		owners:  (*[C.SLUICE_OWNER_NAME]C.char)(unsafe.Pointer(&process.marks.names)),
		marks:   (*C.uint64_t)(unsafe.Pointer(&process.marks.slots)),
		n_marks: markBuckets * markSlots,
	}
	if cfg.Trace {
		if h.deny, h.n_deny, err = forListener(cfg.Filters.Deny); err != nil {
			return err
		}
		if h.allow, h.n_allow, err = forListener(cfg.Filters.Allow); err != nil {
			return err
		}
		process.traced = cfg.Filters.Allow
	}
	if err := load(&h); err != nil {
		return err
	}
	process.marks.active.Store(true)
	return threads.check()
}

// The sizes are the same on both sides.
var (
	_ [C.SLUICE_OWNERS]struct{}     = [maxOwners]struct{}{}
	_ [C.SLUICE_OWNER_NAME]struct{} = [ownerNameSize]struct{}{}
)

// Op is the same on both sides.
var _ [C.SLUICE_MASKED_EQUAL]struct{} = [OpMaskedEqual]struct{}{}

// forListener returns clauses for the listener, in C's memory, for good.
func forListener(clauses []Clause) (*C.struct_sluice_clause, C.size_t, error) {
	p := (*C.struct_sluice_clause)(C.malloc(C.size_t(len(clauses)+1) * C.sizeof_struct_sluice_clause)) // never nil
	list := unsafe.Slice(p, len(clauses))
	for i := range list {
		to := &list[i]
		*to = C.struct_sluice_clause{}
		nr, err := callNumber(clauses[i].Syscall)
		if err != nil {
			return nil, 0, err
		}
		to.call, to.n_conds = C.uint32_t(nr), C.uint32_t(len(clauses[i].Conds))
		for j, c := range clauses[i].Conds {
			to.conds[j] = C.struct_sluice_cond{
				arg: C.uint32_t(c.Arg), op: C.uint32_t(c.Op), value: C.uint64_t(c.Value), mask: C.uint64_t(c.Mask),
			}
		}
	}
	return p, C.size_t(len(clauses)), nil
}

// prepare makes the programs, and returns what loads them.
func prepare(cfg InstallConfig, output int) (func(*C.struct_sluice_handlers) error, error) {
	refuse := libseccomp.ActTrap
	deny, allow := cfg.Filters.Deny, slices.Concat(cfg.Filters.Allow, own(cfg.Action, output))
	switch {
	case cfg.Trace:
		deny, allow = nil, listening()
		fallthrough
	case cfg.Action == Log:
		refuse = libseccomp.ActNotify
	default:
		deny = append(slices.Clip(deny), Clause{Syscall: "seccomp"})
	}
	denied, err := compile(libseccomp.ActAllow, refuse, deny, nil)
	if err != nil {
		return nil, fmt.Errorf("compile denials: %w", err)
	}
	allowed, err := compile(refuse, libseccomp.ActAllow, allow, cfg.Filters.NoSys)
	if err != nil {
		return nil, fmt.Errorf("compile filter: %w", err)
	}
	programs := [][]unix.SockFilter{allowed, denied}
	if cfg.Action == Log {
		programs = [][]unix.SockFilter{join(unix.SECCOMP_RET_ALLOW, denied, allowed)}
	}
	for _, p := range programs {
		if len(p) > unix.BPF_MAXINSNS {
			return nil, fmt.Errorf("compile filter: it has %d instructions, and the kernel takes %d: allow calls with fewer conditions", len(p), unix.BPF_MAXINSNS)
		}
	}
	return func(h *C.struct_sluice_handlers) error {
		p, n := instructions(programs[0])
		if cfg.Action == Log {
			return loadError(C.sluice_listen(h, p, n))
		}
		// Denials last, for they forbid seccomp(2).
		q, m := instructions(programs[1])
		return loadError(C.sluice_confine(h, p, n, q, m))
	}, nil
}

// own are the calls of the handlers and of Install itself.
func own(a Action, output int) []Clause {
	clauses := []Clause{
		ownClause("write", is32(0, uint32(output))),
		ownClause("ppoll", is32(1, 1)),
		ownClause("gettid"),
	}
	if a == Log {
		return append(clauses, listening()...)
	}
	// The filter that comes second forbids seccomp(2) again.
	return append(clauses, ownClause("exit_group"), ownClause("seccomp", is32(0, C.SECCOMP_SET_MODE_FILTER), is32(1, C.SLUICE_CONFINE_FLAGS)))
}

// listening are the calls that the listener cannot tell itself of.
func listening() []Clause {
	return []Clause{ownClause("ioctl", is32(1, C.notif_recv)), ownClause("ioctl", is32(1, C.notif_send))}
}

func ownClause(name string, conds ...Cond) Clause {
	return Clause{Syscall: name, Conds: conds, Owners: []string{"seccomp"}}
}

func is32(arg uint, value uint32) Cond {
	return Cond{Arg: arg, Op: OpMaskedEqual, Mask: 0xffffffff, Value: uint64(value)}
}

// instructions is where program is, for as long as the call that it is given to.
func instructions(program []unix.SockFilter) (*C.struct_sock_filter, C.size_t) {
	return (*C.struct_sock_filter)(unsafe.Pointer(&program[0])), C.size_t(len(program))
}

func loadError(result C.long) error {
	switch {
	case result > 0:
		return fmt.Errorf("load filter: thread %d already has another than this thread: expected Install before any other filter", result)
	case result == -C.EBUSY:
		return fmt.Errorf("load filter: %w: another program already listens to a filter of this process; run with --seccomp=kill or none", unix.EBUSY)
	case result < 0:
		return fmt.Errorf("load filter: %w", unix.Errno(-result))
	}
	return nil
}

// callNames is the table of names for the handlers.
func callNames() []byte {
	b := make([]byte, C.SLUICE_CALLS*C.SLUICE_CALL_NAME)
	for nr := range C.SLUICE_CALLS {
		at := nr * C.SLUICE_CALL_NAME
		copy(b[at:at+C.SLUICE_CALL_NAME-1], nameOf(nr))
	}
	return b
}

// Used returns the clauses of Allow with how often each was needed, with Trace, in their order.
func Used() []Use {
	process.Lock()
	defer process.Unlock()
	uses := make([]Use, len(process.traced))
	for i, c := range process.traced {
		uses[i] = Use{c, uint64(C.sluice_used(C.size_t(i)))}
	}
	return uses
}

// Violations is how many calls there were that the filter would not have allowed, with Log.
func Violations() uint64 {
	return uint64(C.sluice_violations())
}

// Seen returns what these calls were, the most frequent first.
func Seen() []Violation {
	process.Lock()
	defer process.Unlock()
	var all []Violation
	if process.marks == nil {
		return nil
	}
	for call := range C.SLUICE_CALLS + 1 {
		for owner := range maxOwners {
			if n := uint64(C.sluice_seen(C.uint(call), C.uint(owner))); n > 0 {
				name := cmp.Or(nameOf(call), "unknown")
				all = append(all, Violation{Syscall: name, Extension: process.marks.name(Owner(owner)), Count: n})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b Violation) int { return cmp.Compare(b.Count, a.Count) })
	return all
}
