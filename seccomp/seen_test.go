package seccomp

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A row is a clause of the daemon's own, as seccomp/internal/seen writes it.
type row struct{ owner, call, conds string }

// ownRows are the clauses of Base and Passthrough with all options.
func ownRows(t *testing.T) map[row]bool {
	t.Helper()
	const pid = 0x7fff1234
	var sources []Source
	for i := range 1 << 3 {
		sources = append(sources, Base(BaseOptions{PID: pid, OwnSocket: i&1 != 0, Syslog: i&2 != 0, Link: i&4 != 0}))
	}
	for i := range 1 << 6 {
		sources = append(sources, Passthrough(PassthroughOptions{
			Writable: i&1 != 0, Xattr: i&2 != 0, FileHandles: i&4 != 0, SwitchIDs: i&8 != 0, Locks: i&16 != 0, Opens: i&32 != 0,
		}))
	}
	rows := make(map[row]bool)
	for _, s := range sources {
		p, err := newFor("amd64", s)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range p.Allow() {
			rows[row{s.Owner, c.Syscall, strings.ReplaceAll(describe(c.Conds), "0x7fff1234", "PID")}] = true
		}
	}
	return rows
}

// seenRows reads what the guest and escape tests have needed.
func seenRows(t *testing.T) map[row]bool {
	t.Helper()
	text, err := os.ReadFile("testdata/seen-amd64.txt")
	if err != nil {
		t.Fatal(err)
	}
	rows := make(map[row]bool)
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		f := regexp.MustCompile(` {2,}`).Split(strings.TrimSpace(line), -1)
		if len(f) != 4 {
			t.Fatalf("line %q has %d columns, expected owner, call, conditions and surroundings", line, len(f))
		}
		rows[row{f[0], f[1], f[2]}] = true
	}
	return rows
}

// TestBaseIsWhatWasSeen holds the rules of the daemon's own against what the guest and escape tests have needed. A rule that is
// taken away, or made narrower, was seen and is not there; one that is added was not seen, unless the tests make it necessary
// (`make seccomp-seen`), or it is of those that they cannot.
func TestBaseIsWhatWasSeen(t *testing.T) {
	own, seen := ownRows(t), seenRows(t)
	for _, r := range slices.SortedFunc(maps.Keys(seen), compareRows) {
		switch {
		case r.owner == "refused":
			t.Errorf("%s was called, and no rule allows it", r.call)
		case !own[r]:
			t.Errorf("the rules of %s lack %s with %s, which was needed", r.owner, r.call, r.conds)
		}
	}
	for _, r := range slices.SortedFunc(maps.Keys(own), compareRows) {
		_, excused := unseen[r]
		switch {
		case !seen[r] && !excused:
			t.Errorf("the rules of %s have %s with %s, which nothing has needed", r.owner, r.call, r.conds)
		case seen[r] && excused:
			t.Errorf("the rules of %s have %s with %s, which was seen, and the test excuses it as if it were not", r.owner, r.call, r.conds)
		}
	}
	for r := range unseen {
		if !own[r] {
			t.Errorf("the rules of %s lack %s with %s, which the test has a reason for", r.owner, r.call, r.conds)
		}
	}
}

func compareRows(a, b row) int {
	return slices.Compare([]string{a.owner, a.call, a.conds}, []string{b.owner, b.call, b.conds})
}

const (
	anything = "any arguments"

	afterReport = "comes after the report is written"
	elsewhere   = "for other kernels than the one of the trace"
	rare        = "cannot be brought about at will"
)

// unseen are the clauses that stay in the rules although no test makes them, and why.
var unseen = map[row]string{
	{BaseOwner, "brk", anything}:                                            rare, // the heap of malloc has grown: only threads take from it
	{BaseOwner, "clock_gettime", anything}:                                  elsewhere,
	{BaseOwner, "clock_nanosleep", anything}:                                rare, // there can be no more threads for now
	{BaseOwner, "exit_group", anything}:                                     afterReport,
	{BaseOwner, "kill", "arg0 & 0xffffffff == PID"}:                         afterReport,
	{BaseOwner, "ppoll", "arg1 == 0x1"}:                                     "neither kind of guest has pipes for call fds",
	{BaseOwner, "prctl", "arg0 & 0xffffffff == 0x53564d41 and arg1 == 0x0"}: elsewhere, // with CONFIG_ANON_VMA_NAME
	{BaseOwner, "restart_syscall", anything}:                                rare,
	{BaseOwner, "rt_sigaction", anything}:                                   afterReport,

	{PassthroughOwner, "getxattr", anything}:                   elsewhere, // before 6.13
	{PassthroughOwner, "listxattr", anything}:                  elsewhere,
	{PassthroughOwner, "removexattr", anything}:                elsewhere,
	{PassthroughOwner, "setxattr", "arg4 & 0xfffffffc == 0x0"}: elsewhere,
}
