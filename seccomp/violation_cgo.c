//go:build linux && cgo && (amd64 || arm64)

// What happens at a violation. All of this runs where Go cannot: in a signal handler, between any two instructions, or on
// a thread that must not wait for Go, because a thread of Go's may be waiting for it in the middle of a stop of the world.
#define _GNU_SOURCE
#include "violation_cgo.h"

#include <errno.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
#include <linux/seccomp.h>

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV // Linux 5.19
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif
#ifndef SYS_SECCOMP // si_code of a SIGSYS that a filter has sent
#define SYS_SECCOMP 1
#endif

static struct sluice_handlers handlers;
static struct sigaction previous; // the handler of SIGSYS before ours: Go's

// A line of the log, cut where it ends.
struct line {
	char text[1024];
	size_t len;
};

static void put(struct line *l, const char *s)
{
	while (*s && l->len < sizeof l->text - 1)
		l->text[l->len++] = *s++;
}

static void put_number(struct line *l, uint64_t v, unsigned base)
{
	char digits[24];
	char *d = digits + sizeof digits - 1;
	*d = 0;
	do
		*--d = "0123456789abcdef"[v % base];
	while (v /= base);
	if (base == 16)
		put(l, "0x");
	put(l, d);
}

// The owner whose call thread runs, 0 if none; which owners have calls in progress, as bits.
static unsigned owner_of(uint32_t thread, uint64_t *busy)
{
	unsigned owner = 0;
	*busy = 0;
	for (size_t i = 0; i < handlers.n_marks; i++) {
		uint64_t mark = __atomic_load_n(&handlers.marks[i], __ATOMIC_ACQUIRE);
		unsigned o = (uint32_t)mark;
		if (mark == 0 || o >= SLUICE_OWNERS)
			continue;
		*busy |= UINT64_C(1) << o;
		if (mark >> 32 == thread)
			owner = o;
	}
	return owner;
}

static void put_owner(struct line *l, unsigned owner, uint64_t busy)
{
	if (owner) {
		put(l, handlers.owners[owner]);
		return;
	}
	if (!busy) {
		put(l, "(none)");
		return;
	}
	put(l, "\"(in the background; calls in progress:");
	const char *before = " ";
	for (unsigned o = 1; o < SLUICE_OWNERS; o++) {
		if (busy & UINT64_C(1) << o) {
			put(l, before);
			put(l, handlers.owners[o]);
			before = ", ";
		}
	}
	put(l, ")\"");
}

// Write a line about a violation, and say whether it could be: a log that nobody reads does not stop the daemon, nor keep
// it from being killed.
static bool say(unsigned call, const uint64_t *args, uint32_t thread, unsigned owner, uint64_t busy, int patience_ms)
{
	static const char *const level[] = {[SLUICE_KILL] = "ERROR", [SLUICE_TRAP] = "ERROR", [SLUICE_LOG] = "WARN"};
	static const char *const action[] = {[SLUICE_KILL] = "kill", [SLUICE_TRAP] = "trap", [SLUICE_LOG] = "log"};

	struct line l = {.len = 0};
	put(&l, "level=");
	put(&l, level[handlers.action]);
	put(&l, " msg=\"system call is not in the filter\" call=");
	if (call < SLUICE_CALLS && handlers.calls[call][0])
		put(&l, handlers.calls[call]);
	else
		put_number(&l, call, 10);
	put(&l, " args=\"");
	for (int i = 0; i < 6; i++) {
		if (i)
			put(&l, " ");
		put_number(&l, args[i], 16);
	}
	put(&l, "\" thread=");
	put_number(&l, thread, 10);
	put(&l, " action=");
	put(&l, action[handlers.action]);
	put(&l, " extension="); // last, for it may be cut
	put_owner(&l, owner, busy);
	l.text[l.len++] = '\n';

	struct pollfd p = {.fd = handlers.fd, .events = POLLOUT};
	struct timespec patience = {.tv_nsec = patience_ms * 1000000L};
	if (syscall(SYS_ppoll, &p, 1, &patience, NULL, 0) != 1 || !(p.revents & POLLOUT))
		return false;
	return syscall(SYS_write, handlers.fd, l.text, l.len) == (long)l.len;
}

static void arguments(const ucontext_t *c, uint64_t *args)
{
#if defined(__x86_64__)
	static const int regs[] = {REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9};
	for (int i = 0; i < 6; i++)
		args[i] = (uint64_t)c->uc_mcontext.gregs[regs[i]];
#elif defined(__aarch64__)
	for (int i = 0; i < 6; i++)
		args[i] = c->uc_mcontext.regs[i];
#endif
}

// End the process by SIGSYS. The signal is blocked here, so that a second violation has no handler to go to, and the kernel
// does what it does by default, for the whole process.
static void die(unsigned call, const uint64_t *args)
{
	syscall(call, args[0], args[1], args[2], args[3], args[4], args[5]);
	syscall(SYS_exit_group, 128 + SIGSYS);
}

// One thread writes; those that get here meanwhile die after it has. It must not take them long, nor a system call.
static void say_last(unsigned call, const uint64_t *args, uint32_t thread, unsigned owner, uint64_t busy)
{
	static int begun, done;
	if (__atomic_exchange_n(&begun, 1, __ATOMIC_ACQ_REL) == 0) {
		say(call, args, thread, owner, busy, 500);
		__atomic_store_n(&done, 1, __ATOMIC_RELEASE);
		return;
	}
	for (unsigned i = 0; i < 1U << 28 && !__atomic_load_n(&done, __ATOMIC_ACQUIRE); i++) {
#if defined(__x86_64__)
		__builtin_ia32_pause();
#else
		__asm__ volatile("yield");
#endif
	}
}

static void on_sigsys(int sig, siginfo_t *info, void *context)
{
	bool ours = info->si_code == SYS_SECCOMP;
	unsigned call = (unsigned)info->si_syscall;
	uint64_t args[6] = {0};
	if (ours) {
		uint64_t busy;
		uint32_t thread = (uint32_t)syscall(SYS_gettid);
		unsigned owner = owner_of(thread, &busy);
		arguments(context, args);
		if (handlers.action == SLUICE_KILL) {
			say_last(call, args, thread, owner, busy);
			die(call, args);
		}
		say(call, args, thread, owner, busy, 500);
	}
	if (previous.sa_flags & SA_SIGINFO)
		previous.sa_sigaction(sig, info, context); // Go's ends the process after a violation
	else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
		previous.sa_handler(sig);
	if (ours)
		die(call, args);
}

static long load(const struct sock_filter *filter, size_t n, unsigned long flags)
{
	struct sock_fprog program = {.len = (unsigned short)n, .filter = (struct sock_filter *)filter};
	long r = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
	return r < 0 ? -errno : r;
}

// What both kinds of filter need.
static long prepare(const struct sluice_handlers *h)
{
	handlers = *h;
#ifdef __GLIBC__
	// Otherwise malloc counts the processors when it meets its eighth thread or so, and reads a file for that; the thread
	// has only just begun, its signals are blocked, and the process would be killed without a line.
	mallopt(M_ARENA_MAX, 1);
#endif
	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ? -errno : 0;
}

long sluice_confine(const struct sluice_handlers *h, const struct sock_filter *first, size_t n_first,
                    const struct sock_filter *second, size_t n_second)
{
	long r = prepare(h);
	if (r)
		return r;
	struct sigaction ours = {.sa_sigaction = on_sigsys, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	sigfillset(&ours.sa_mask);
	if (sigaction(SIGSYS, &ours, &previous) < 0)
		return -errno;
	r = load(first, n_first, SLUICE_CONFINE_FLAGS);
	return r ? r : load(second, n_second, SLUICE_CONFINE_FLAGS);
}

static uint64_t violations;
static uint64_t seen[SLUICE_CALLS + 1][SLUICE_OWNERS]; // written by the listener alone

uint64_t sluice_violations(void)
{
	return __atomic_load_n(&violations, __ATOMIC_RELAXED);
}

uint64_t sluice_seen(unsigned call, unsigned owner)
{
	return __atomic_load_n(&seen[call][owner], __ATOMIC_RELAXED);
}

uint64_t sluice_used(size_t clause)
{
	return __atomic_load_n(&handlers.allow[clause].count, __ATOMIC_RELAXED);
}

static bool holds(const struct sluice_cond *c, uint64_t v)
{
	switch ((enum sluice_op)c->op) {
	case SLUICE_EQUAL: return v == c->value;
	case SLUICE_NOT_EQUAL: return v != c->value;
	case SLUICE_LESS: return v < c->value;
	case SLUICE_LESS_OR_EQUAL: return v <= c->value;
	case SLUICE_GREATER: return v > c->value;
	case SLUICE_GREATER_OR_EQUAL: return v >= c->value;
	case SLUICE_MASKED_EQUAL: return (v & c->mask) == c->value;
	}
	return false;
}

// Count the call for each clause that it matches, and say whether there is one.
static bool count(struct sluice_clause *clauses, size_t n, const struct seccomp_data *call)
{
	bool any = false;
	for (struct sluice_clause *c = clauses; c < clauses + n; c++) {
		bool match = c->call == (uint32_t)call->nr;
		for (uint32_t i = 0; match && i < c->n_conds; i++)
			match = holds(&c->conds[i], call->args[c->conds[i].arg]);
		if (match)
			__atomic_add_fetch(&c->count, 1, __ATOMIC_RELAXED);
		any |= match;
	}
	return any;
}

// Count a violation, and write a line if it is the first of its kind. Whoever committed it waits. When all calls are traced
// there are no lines: those that it takes to write them could not be traced.
static void note(const struct seccomp_notif *n)
{
	static bool said[SLUICE_CALLS + 1][SLUICE_OWNERS];
	bool traced = handlers.allow != NULL;
	if (traced && !count(handlers.deny, handlers.n_deny, &n->data) && count(handlers.allow, handlers.n_allow, &n->data))
		return;
	uint64_t busy;
	unsigned owner = owner_of(n->pid, &busy);
	unsigned call = (unsigned)n->data.nr < SLUICE_CALLS ? (unsigned)n->data.nr : SLUICE_CALLS;
	if (!traced && !said[call][owner]) {
		uint64_t args[6];
		memcpy(args, n->data.args, sizeof args);
		said[call][owner] = say((unsigned)n->data.nr, args, n->pid, owner, busy, 0);
	}
	__atomic_add_fetch(&seen[call][owner], 1, __ATOMIC_RELAXED);
	__atomic_add_fetch(&violations, 1, __ATOMIC_RELAXED);
}

struct listener {
	const struct sock_filter *filter;
	size_t n;
	long result;
	int ready;
};

// The thread that loads the filter is the one that listens: no other could be sure to get as far as starting it.
static void *listener(void *arg)
{
	struct listener *l = arg;
	unsigned long flags = SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_TSYNC_ESRCH | SECCOMP_FILTER_FLAG_NEW_LISTENER;
	// Go's signals for preemption would otherwise begin calls again, and have them counted again.
	long fd = load(l->filter, l->n, flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV);
	if (fd == -EINVAL)
		fd = load(l->filter, l->n, flags);
	l->result = fd < 0 ? fd : 0;
	__atomic_store_n(&l->ready, 1, __ATOMIC_RELEASE); // l is gone from here on
	if (fd < 0)
		return NULL;
	static union { // a later kernel's may be larger
		struct seccomp_notif notif;
		struct seccomp_notif_resp resp;
		char room[1024];
	} in, out;
	for (;;) {
		memset(&in, 0, sizeof in); // the kernel demands it
		if (ioctl((int)fd, SECCOMP_IOCTL_NOTIF_RECV, &in.notif) < 0)
			continue; // the call was given up meanwhile
		note(&in.notif);
		out.resp = (struct seccomp_notif_resp){.id = in.notif.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
		ioctl((int)fd, SECCOMP_IOCTL_NOTIF_SEND, &out.resp);
	}
}

long sluice_listen(const struct sluice_handlers *h, const struct sock_filter *filter, size_t n)
{
	long r = prepare(h);
	if (r)
		return r;
	struct listener l = {.filter = filter, .n = n};
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before); // the thread inherits it: it handles no signals
	pthread_t thread;
	int err = pthread_create(&thread, NULL, listener, &l);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (err)
		return -err;
	pthread_detach(thread);
	while (!__atomic_load_n(&l.ready, __ATOMIC_ACQUIRE)) {
		struct timespec a_while = {.tv_nsec = 100 * 1000};
		syscall(SYS_nanosleep, &a_while, NULL); // the filter may forbid it: then the listener is there to answer
	}
	return l.result;
}
