#ifndef SLUICE_SECCOMP_VIOLATION_H
#define SLUICE_SECCOMP_VIOLATION_H

#include <stddef.h>
#include <stdint.h>
#include <linux/filter.h>
#include <linux/seccomp.h>

enum sluice_action { SLUICE_KILL = 1, SLUICE_TRAP = 2, SLUICE_LOG = 3 };

enum {
	SLUICE_CALLS = 512,    // system calls have smaller numbers
	SLUICE_CALL_NAME = 32, // bytes of a name, with the NUL
	SLUICE_OWNERS = 64,
	SLUICE_OWNER_NAME = 64,
};

// A clause, as Clause.
struct sluice_clause {
	uint32_t call, n_conds;
	struct sluice_cond {
		uint32_t arg, op;
		uint64_t value, mask;
	} conds[6];
	uint64_t count; // of the calls that it has matched, written by the listener alone
};

// As Op.
enum sluice_op {
	SLUICE_EQUAL, SLUICE_NOT_EQUAL, SLUICE_LESS, SLUICE_LESS_OR_EQUAL, SLUICE_GREATER, SLUICE_GREATER_OR_EQUAL, SLUICE_MASKED_EQUAL
};

// What the handlers know. It is set before there is a filter, and all of it stays for good.
struct sluice_handlers {
	int fd; // takes the lines
	enum sluice_action action;
	const char (*calls)[SLUICE_CALL_NAME];   // by number, "" if there is none; SLUICE_CALLS of them
	const char (*owners)[SLUICE_OWNER_NAME]; // SLUICE_OWNERS of them, the first nobody's
	const uint64_t *marks;                   // thread<<32 | owner
	size_t n_marks;
	struct sluice_clause *deny, *allow; // if the listener is told of every call, and not of violations alone; or NULL
	size_t n_deny, n_allow;
};

// The flags of seccomp(2) to confine: all threads or none, and the kernel's log has what SIGSYS could not be handled for.
enum { SLUICE_CONFINE_FLAGS = SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_LOG };

// Confine all threads with two filters, the second of which may forbid seccomp(2), and handle SIGSYS.
// Returns 0, -errno, or the thread that would not be confined. After an error the process may be confined in part.
long sluice_confine(const struct sluice_handlers *, const struct sock_filter *first, size_t n_first,
                    const struct sock_filter *second, size_t n_second);

// Have all threads' violations told to a thread that counts them and lets the calls happen.
// Returns 0 or -errno; -ESRCH if there is a thread that would not be confined.
long sluice_listen(const struct sluice_handlers *, const struct sock_filter *, size_t n);

// How many violations there were: of one kind, if call is at most SLUICE_CALLS, which stands for all others, or of all.
uint64_t sluice_violations(void);
uint64_t sluice_seen(unsigned call, unsigned owner);

// How many calls a clause of allow has matched.
uint64_t sluice_used(size_t clause);

#endif
