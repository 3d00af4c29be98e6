package seccomp

import (
	"math"

	"golang.org/x/sys/unix"
)

// BaseOwner is the owner of what Base returns.
const BaseOwner = "base"

// BaseOptions are what the daemon does for some of its options only. The zero value is for a socket that was passed to it,
// and a log on standard error.
type BaseOptions struct {
	// PID is the daemon's own process id as getpid(2) has it, the only process that signals can then be sent to; any
	// process of the daemon's PID namespace if 0.
	PID int
	// OwnSocket is for a daemon that has created its socket and pid file and removes them at its end.
	OwnSocket bool
	// Link is for a daemon whose shares come and go while it runs, with descriptors that its keeper sends.
	Link bool
	// Syslog is for a log that goes to syslog(3): after an error of its socket it connects anew.
	Syslog bool
	// Profile is for a daemon that has Go's profiler measure what CPU time goes to.
	Profile bool
}

// Base returns the rules for what the daemon itself calls once it is set up, whatever backends it has: Go's runtime, the C
// library beneath it if built with cgo, vhost-user, the queues and guest memory. Files are the backends' business: nothing
// here opens one.
//
// glibc's malloc would, too, open /sys/devices/system/cpu/online, in some thread's first call, unless mallopt(3) has been
// told a number of arenas (M_ARENA_MAX). Whoever installs the filter in a program with cgo does that before.
func Base(o BaseOptions) Source {
	s := Source{Owner: BaseOwner, Rules: make(Rules)}
	s.addRules(baseMemory, baseThreads, baseTime, baseSignals(o.PID), baseDescriptors, baseVhostUser, baseQueues)
	if o.OwnSocket {
		s.addRules(baseOwnSocket)
	}
	if o.Link {
		s.addRules(baseLink)
	}
	if o.Syslog {
		s.addRules(baseSyslog)
	}
	if o.Profile {
		s.addRules(baseProfile)
	}
	return s
}

// addRules adds to the rules of s, beside those for the same call.
func (s *Source) addRules(tables ...Rules) {
	for _, rules := range tables {
		s.Rules.Add(rules)
	}
}

// where allows the call where the argument, counted from 0, fits one of args.
func where(argument int, args ...Arg) Rule {
	var rules Or
	for _, arg := range args {
		var rule PerArg
		rule[argument] = arg
		rules = append(rules, rule)
	}
	return rules
}

// bitsAllowed32 is BitsAllowed of a C int.
func bitsAllowed32(bits uint32) Arg { return MaskedEqual{Mask: uint64(^bits)} }

// baseMemory is memory of our own, and the guest's. Nothing can be mapped to be executed: see the deny set.
var baseMemory = Rules{
	"brk":      MatchAll{}, // glibc: malloc
	"madvise":  MatchAll{}, // Go: scavenger, huge pages; glibc: stacks of threads that ended; guestmem: MADV_DONTDUMP
	"mmap":     MatchAll{}, // Go: heap, vgetrandom's state; glibc: stacks, malloc; guestmem: regions
	"mprotect": MatchAll{}, // glibc: guard pages, malloc's heaps
	"munmap":   MatchAll{}, // Go, glibc, guestmem
}

const (
	// threadFlags are those with which both Go (newosproc) and glibc (pthread_create) start a thread; anything less is
	// a process.
	threadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM
	// threadOptions are the ones that one of them adds.
	threadOptions = unix.CLONE_SETTLS | unix.CLONE_PARENT_SETTID | unix.CLONE_CHILD_CLEARTID
)

// baseThreads is threads, and how they wait for each other.
var baseThreads = Rules{
	"clone":             PerArg{0: MaskedEqual{math.MaxUint32 &^ threadOptions, threadFlags}},     // Go, glibc; clone3: see noSys
	"exit":              MatchAll{},                                                               // Go, glibc: a thread's end
	"exit_group":        MatchAll{},                                                               // Go: os.Exit
	"futex":             MatchAll{},                                                               // Go: locks, parked threads; glibc: mutexes, pthread_join
	"getpid":            MatchAll{},                                                               // Go: raise
	"gettid":            MatchAll{},                                                               // Go: a new thread, raise
	"prctl":             PerArg{0: Int32(unix.PR_SET_VMA), 1: EqualTo(unix.PR_SET_VMA_ANON_NAME)}, // Go: names of its mappings, where the kernel keeps such
	"restart_syscall":   MatchAll{},                                                               // the kernel: a wait with a timeout that a signal has interrupted
	"rseq":              MatchAll{},                                                               // glibc 2.35: a new thread
	"sched_getaffinity": MatchAll{},                                                               // Go: GOMAXPROCS, which follows the machine; glibc: malloc's arenas
	"sched_yield":       MatchAll{},                                                               // Go: spinning
	"set_robust_list":   MatchAll{},                                                               // glibc: a new thread
}

// baseTime is clocks, which mostly cost no system call, and random numbers, likewise.
var baseTime = Rules{
	"clock_gettime":   MatchAll{}, // Go: where the vDSO cannot tell
	"clock_nanosleep": MatchAll{}, // glibc: nanosleep, with which cgo waits before it tries again to start a thread
	"getrandom":       MatchAll{}, // Go: where the vDSO has no vgetrandom; glibc: malloc
	"nanosleep":       MatchAll{}, // Go: usleep
}

// baseSignals is signals: Go preempts goroutines with them.
func baseSignals(pid int) Rules {
	self := Arg(nil)
	if pid > 0 {
		self = Int32(pid)
	}
	return Rules{
		"kill":           PerArg{0: self}, // Go: raiseproc, a crash with GOTRACEBACK=crash
		"rt_sigaction":   MatchAll{},      // Go: os/signal, the end by a signal
		"rt_sigprocmask": MatchAll{},      // Go, glibc: around clone
		"rt_sigreturn":   MatchAll{},      // the end of every handler
		"sigaltstack":    MatchAll{},      // Go: a new thread, and its end
		"tgkill":         PerArg{0: self}, // Go: preemption, raise; glibc: pthread_kill
	}
}

// baseDescriptors is what is done with descriptors of any kind.
var baseDescriptors = Rules{
	"close":    MatchAll{}, // everyone
	"fstat":    MatchAll{}, // virtiofs: kick and call fds; guestmem: a region's file; passthrough: GETATTR
	"pread64":  MatchAll{}, // Go: the cgroup's CPU limit, for GOMAXPROCS; as preadv2
	"preadv2":  MatchAll{}, // fsbackend.Sink: files to guest memory
	"pwrite64": MatchAll{}, // as pwritev2, from one piece of memory
	"pwritev2": MatchAll{}, // fsbackend.Source: guest memory to files
	"read":     MatchAll{}, // Go: net, os; virtiofs: kick pipes
	"write":    MatchAll{}, // Go: net, os, the log, tracebacks; virtiofs: call fds
}

// baseVhostUser is the front-end's socket: those that come are accepted, none is made.
var baseVhostUser = Rules{
	"accept4":     MatchAll{}, // listen: Go's net
	"getsockname": MatchAll{}, // Go's net, after accept
	"recvmsg":     MatchAll{}, // vhostuser: messages with descriptors
}

// baseQueues is the threads' sleep between requests, and Go's network poller. A worker makes what it sleeps on when a
// front-end starts the first of its queues.
var baseQueues = Rules{
	"epoll_create1": PerArg{0: Int32(unix.EPOLL_CLOEXEC)},                   // virtiofs: a worker
	"eventfd2":      PerArg{1: Int32(unix.EFD_CLOEXEC | unix.EFD_NONBLOCK)}, // virtiofs: a worker
	"epoll_ctl":     MatchAll{},                                             // Go, virtiofs
	"epoll_pwait":   MatchAll{},                                             // Go, virtiofs
	"ppoll":         PerArg{1: EqualTo(1)},                                  // virtiofs: call pipes
}

// baseOwnSocket is how listen removes the socket and the pid file, if they are still its own: by their open directory.
var baseOwnSocket = Rules{
	"newfstatat": PerArg{0: NonNegativeFD{}, 3: Int32(unix.AT_SYMLINK_NOFOLLOW)}, // unix.Fstatat
	"unlinkat":   PerArg{0: NonNegativeFD{}, 2: Int32(0)},                        // unix.Unlinkat
}

// baseLink is how sockets and devices come to be at run time. None is created here, but by descriptors.
var baseLink = Rules{
	"fcntl":       where(1, Int32(unix.F_DUPFD_CLOEXEC), Int32(unix.F_GETFL), Int32(unix.F_SETFL)), // Go's net, os: a descriptor of its own, and who waits for it
	"getpeername": MatchAll{},                                                                      // listen: is it connected?
	"getsockopt":  where(1, Int32(unix.SOL_SOCKET)),                                                // listen, Go's net: what kind of socket it is
}

// baseSyslog is how log/syslog connects anew: Go's net with Unix sockets.
var baseSyslog = Rules{
	"connect":     MatchAll{},
	"getpeername": MatchAll{},
	"socket":      PerArg{0: Int32(unix.AF_UNIX), 2: Int32(0)},
}

// baseProfile is the clocks of Go's CPU profiler: one of the process, and one of each thread.
var baseProfile = Rules{
	"setitimer":     MatchAll{},
	"timer_create":  MatchAll{},
	"timer_delete":  MatchAll{},
	"timer_settime": MatchAll{},
}
