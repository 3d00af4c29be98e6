package seccomp

import (
	"bytes"
	"errors"
	"flag"
	"math"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files anew")

func mustNew(t *testing.T, sources ...Source) *Policy {
	t.Helper()
	p, err := New(sources...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func dump(t *testing.T, p *Policy) string {
	t.Helper()
	var b bytes.Buffer
	if err := p.Dump(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// one makes a policy of one rule for read and returns its clauses' conditions.
func one(t *testing.T, rule Rule) []string {
	t.Helper()
	var list []string
	for _, c := range mustNew(t, Source{"test", Rules{"read": rule}}).Allow() {
		list = append(list, describe(c.Conds))
	}
	return list
}

func TestRules(t *testing.T) {
	first := func(arg Arg) Rule { return PerArg{arg} }
	both := func(a, b Arg) Rule { return And{PerArg{a}, PerArg{b}} }
	for _, tt := range []struct {
		name string
		rule Rule
		want []string
	}{
		{"MatchAll", MatchAll{}, []string{"any arguments"}},
		{"nothing in PerArg", PerArg{}, []string{"any arguments"}},
		{"EqualTo", first(EqualTo(5)), []string{"arg0 == 0x5"}},
		{"NotEqual", first(NotEqual(5)), []string{"arg0 != 0x5"}},
		{"NotEqual to 0", first(NotEqual(0)), []string{"arg0 != 0x0"}},
		{"GreaterThan", first(GreaterThan(5)), []string{"arg0 >= 0x6"}},
		{"GreaterThan the largest", first(GreaterThan(math.MaxUint64)), nil},
		{"GreaterThan 0", first(GreaterThan(0)), []string{"arg0 != 0x0"}},
		{"GreaterOrEqual", first(GreaterOrEqual(5)), []string{"arg0 >= 0x5"}},
		{"GreaterOrEqual 0", first(GreaterOrEqual(0)), []string{"any arguments"}},
		{"LessThan", first(LessThan(5)), []string{"arg0 <= 0x4"}},
		{"LessThan the largest", first(LessThan(math.MaxUint64)), []string{"arg0 != 0xffffffffffffffff"}},
		{"LessThan 0", first(LessThan(0)), nil},
		{"LessThan 1", first(LessThan(1)), []string{"arg0 == 0x0"}},
		{"LessOrEqual", first(LessOrEqual(5)), []string{"arg0 <= 0x5"}},
		{"LessOrEqual the largest", first(LessOrEqual(math.MaxUint64)), []string{"any arguments"}},
		{"MaskedEqual", first(MaskedEqual{0xf0, 0x30}), []string{"arg0 & 0xf0 == 0x30"}},
		{"MaskedEqual of all bits", first(MaskedEqual{math.MaxUint64, 3}), []string{"arg0 == 0x3"}},
		{"MaskedEqual of none", first(MaskedEqual{}), []string{"any arguments"}},
		{"BitsAllowed", first(BitsAllowed(5)), []string{"arg0 & 0xfffffffffffffffa == 0x0"}},
		{"Int32", first(Int32(unix.AT_FDCWD)), []string{"arg0 & 0xffffffff == 0xffffff9c"}},
		{"NonNegativeFD", first(NonNegativeFD{}), []string{"arg0 & 0x80000000 == 0x0"}},
		{"last argument", PerArg{5: EqualTo(1)}, []string{"arg5 == 0x1"}},
		{"two arguments", PerArg{1: EqualTo(1), 4: LessThan(8)}, []string{"arg1 == 0x1 and arg4 <= 0x7"}},

		{"Or", Or{PerArg{EqualTo(2)}, PerArg{EqualTo(1)}}, []string{"arg0 == 0x1", "arg0 == 0x2"}},
		{"empty Or", Or{}, nil},
		{"MatchAll in Or", Or{PerArg{EqualTo(1)}, MatchAll{}}, []string{"any arguments"}},
		{"the same twice", Or{PerArg{EqualTo(1)}, PerArg{EqualTo(1)}}, []string{"arg0 == 0x1"}},
		{"one within another", Or{PerArg{EqualTo(1), EqualTo(1)}, PerArg{LessThan(4)}}, []string{"arg0 <= 0x3"}},
		{"empty And", And{}, []string{"any arguments"}},
		{"And of two arguments", And{PerArg{EqualTo(1)}, PerArg{1: EqualTo(2)}}, []string{"arg0 == 0x1 and arg1 == 0x2"}},
		{"And over Or", And{Or{PerArg{EqualTo(1)}, PerArg{EqualTo(2)}}, PerArg{NotEqual(2)}}, []string{"arg0 == 0x1"}},

		{"contradiction", both(EqualTo(1), EqualTo(2)), nil},
		{"contradiction of masks", both(MaskedEqual{3, 1}, MaskedEqual{6, 2}), nil},
		{"masks", both(MaskedEqual{3, 1}, MaskedEqual{6, 4}), []string{"arg0 & 0x7 == 0x5"}},
		{"range", both(GreaterOrEqual(3), LessOrEqual(9)), []string{"arg0 == 0x3", "arg0 & 0xfffffffffffffffc == 0x4", "arg0 & 0xfffffffffffffffe == 0x8"}},
		{"range of one", both(GreaterThan(3), LessThan(5)), []string{"arg0 == 0x4"}},
		{"range of none", both(GreaterThan(3), LessThan(4)), nil},
		{"range and mask", both(LessThan(6), MaskedEqual{1, 1}), []string{"arg0 & 0xfffffffffffffffd == 0x1", "arg0 == 0x5"}},
		{"range and mask within it", both(LessThan(7), MaskedEqual{^uint64(4), 1}), []string{"arg0 & 0xfffffffffffffffb == 0x1"}},
		{"range and its end", both(GreaterOrEqual(5), NotEqual(5)), []string{"arg0 >= 0x6"}},
		{"range and outside", both(GreaterOrEqual(5), NotEqual(4)), []string{"arg0 >= 0x5"}},
		{"mask and one of it", both(BitsAllowed(3), NotEqual(2)), []string{"arg0 <= 0x1", "arg0 == 0x3"}},
		{"all but two", both(NotEqual(0), NotEqual(2)), []string{"arg0 == 0x1", "arg0 >= 0x3"}},
		{"all but the ends", both(NotEqual(0), NotEqual(math.MaxUint64)), nil}, // checked below
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := one(t, tt.rule)
			if tt.name == "all but the ends" {
				if len(got) != 126 { // 63 powers of two from either end
					t.Errorf("%d clauses, expected 126", len(got))
				}
				return
			}
			want := slices.Clone(tt.want)
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("%q, expected %q", got, want)
			}
		})
	}
}

func TestBadRules(t *testing.T) {
	var cyclic Or
	cyclic = append(cyclic, nil)
	cyclic[0] = cyclic
	ranges := And{}
	for i := range 6 {
		var lo, hi PerArg
		lo[i], hi[i] = GreaterThan(0), LessThan(math.MaxUint64)
		ranges = append(ranges, lo, hi)
	}
	var values Or
	for i := range maxClauses + 1 {
		values = append(values, PerArg{EqualTo(2 * i)})
	}
	for _, tt := range []struct {
		name  string
		rules Rules
		want  string
	}{
		{"nil", Rules{"read": nil}, "seccomp rules of probe: read: a nil rule: expected MatchAll"},
		{"nil inside", Rules{"read": And{nil}}, "seccomp rules of probe: read: a nil rule"},
		{"nil in Deny", Rules{"read": Deny{}}, "seccomp rules of probe: read: a nil rule"},
		{"pointer", Rules{"read": &MatchAll{}}, "read: rule of type *seccomp.MatchAll: expected one of package seccomp, not a pointer"},
		{"pointer to a condition", Rules{"read": PerArg{3: new(EqualTo)}}, "read: argument 3: condition of type *seccomp.EqualTo"},
		{"Deny inside", Rules{"read": Or{Deny{MatchAll{}}}}, "read: Deny inside of another rule: expected it outermost"},
		{"value beyond the mask", Rules{"read": PerArg{MaskedEqual{1, 3}}}, "read: argument 0: MaskedEqual{0x1, 0x3} fits nothing"},
		{"cyclic", Rules{"read": cyclic}, "read: rules lie more than 100 deep"},
		{"too many clauses", Rules{"read": ranges}, "read: its conditions make more than 4096 clauses"},
		{"too many values", Rules{"read": values}, "read: its conditions make more than 4096 clauses"},
		{"too many values in And", Rules{"read": And{values[:70], PerArg{1: NotEqual(0)}, PerArg{1: NotEqual(math.MaxUint64)}}}, "read: its conditions make more than 4096 clauses"},
		{"unknown", Rules{"frobnicate": MatchAll{}}, `seccomp rules of probe: no system call is named "frobnicate"`},
		{"typing error", Rules{"opnat": MatchAll{}}, `no system call is named "opnat" (did you mean "openat"?)`},
		{"constant", Rules{"SYS_OPENAT": MatchAll{}}, `(did you mean "openat"?)`},
		{"unknown to deny", Rules{"sokcet": Deny{MatchAll{}}}, `(did you mean "socket"?)`},
		// Also where another architecture has it only.
		{"absent and wrong", Rules{"epoll_wait": nil, "sync_file_range": MatchAll{}}, "a nil rule"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, arch := range arches {
				_, err := newFor(arch, Source{"probe", tt.rules})
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%s: %v, expected %q in it", arch, err, tt.want)
				}
			}
		})
	}
	_, err := New(Source{"one", Rules{"read": values[:3000]}}, Source{"two", Rules{"read": values[2000:4000]}}, Source{"three", Rules{"read": values[3500:]}})
	if err == nil || !strings.Contains(err.Error(), "seccomp rules of three with those before it: read: its conditions make more than 4096 clauses") {
		t.Errorf("more clauses of all sources than there may be: %v", err)
	}
	if _, err := New(Source{Rules: Rules{"read": MatchAll{}}}); err == nil {
		t.Error("rules without an owner pass")
	}
	if _, err := newFor("pdp11"); err == nil || !strings.Contains(err.Error(), "pdp11") {
		t.Errorf("a policy for a machine without a table: %v", err)
	}
}

func TestUnknownNamesHaveNoFarFetchedHint(t *testing.T) {
	if meant := similar("frobnicate"); meant != "" {
		t.Errorf("frobnicate is taken for %s", meant)
	}
}

func TestOtherArchitecturesCallsArePassedOver(t *testing.T) {
	p, err := newFor("arm64", Source{"probe", Rules{"epoll_wait": MatchAll{}, "epoll_pwait": MatchAll{}}})
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Calls(); !slices.Equal(got, []string{"epoll_pwait"}) {
		t.Errorf("%q, expected epoll_pwait alone", got)
	}
}

func TestUnion(t *testing.T) {
	p := mustNew(t,
		Source{"base", Rules{"socket": PerArg{EqualTo(unix.AF_UNIX)}, "read": MatchAll{}}},
		Source{"one", Rules{"socket": PerArg{EqualTo(unix.AF_INET)}, "read": PerArg{EqualTo(3)}}},
		Source{"two", Rules{"socket": PerArg{EqualTo(unix.AF_INET)}}},
	)
	for family, want := range map[uint64]bool{unix.AF_UNIX: true, unix.AF_INET: true, unix.AF_NETLINK: false} {
		if p.Allows("socket", [6]uint64{family}) != want {
			t.Errorf("socket of family %d: allowed is %v", family, !want)
		}
	}
	owners := map[string]string{}
	for _, c := range p.Allow() {
		owners[c.Syscall+" "+describe(c.Conds)] = strings.Join(c.Owners, ",")
	}
	for clause, want := range map[string]string{
		"socket arg0 == 0x1": "base", "socket arg0 == 0x2": "one,two", "read any arguments": "base,one",
	} {
		if owners[clause] != want {
			t.Errorf("%s is of %q, expected %q", clause, owners[clause], want)
		}
	}
	if len(owners) != 3 {
		t.Errorf("clauses and owners %q, expected three", owners)
	}
}

func TestConflicts(t *testing.T) {
	for _, tt := range []struct {
		name    string
		sources []Source
		want    string // "" is none
	}{
		{
			"with another",
			[]Source{{"base", Rules{"read": MatchAll{}}}, {"probe", Rules{"read": Deny{PerArg{EqualTo(3)}}}}},
			"seccomp rules conflict: probe denies read with arg0 == 0x3, and base allows it: take back one of the two",
		},
		{
			"in the other order",
			[]Source{{"probe", Rules{"read": Deny{PerArg{EqualTo(3)}}}}, {"base", Rules{"read": MatchAll{}}}},
			"probe denies read with arg0 == 0x3, and base allows it",
		},
		{
			"with itself",
			[]Source{{"probe", Rules{"read": Deny{MatchAll{}}}}, {"probe", Rules{"read": PerArg{1: LessThan(9)}}}},
			"probe denies read with arg1 <= 0x8, and probe allows it",
		},
		{
			"of ranges",
			[]Source{{"base", Rules{"read": PerArg{GreaterThan(2)}}}, {"probe", Rules{"read": Deny{PerArg{LessThan(6)}}}}},
			"probe denies read with arg0 == 0x3, and base allows it",
		},
		{
			"beside each other",
			[]Source{{"base", Rules{"read": PerArg{EqualTo(2)}}}, {"probe", Rules{"read": Deny{PerArg{NotEqual(2)}}}}},
			"",
		},
		{
			"in different arguments",
			[]Source{{"base", Rules{"read": PerArg{EqualTo(2)}}}, {"probe", Rules{"read": Deny{PerArg{1: EqualTo(2)}}}}},
			"probe denies read with arg0 == 0x2 and arg1 == 0x2, and base allows it",
		},
		{
			"where it is denied anyway",
			[]Source{Base(BaseOptions{}), {"probe", Rules{"mmap": Deny{PerArg{2: hasBit(unix.PROT_EXEC)}}, "clone3": Deny{MatchAll{}}}}},
			"",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := New(tt.sources...)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%v, expected %q", err, tt.want)
			}
		})
	}
}

// TestNothingUndoesTheDenySet asks for everything.
func TestNothingUndoesTheDenySet(t *testing.T) {
	all := Rules{}
	for _, s := range syscalls {
		all[s.name] = MatchAll{}
	}
	const exec = unix.PROT_READ | unix.PROT_EXEC
	for _, arch := range arches {
		p, err := newFor(arch, Base(BaseOptions{}), Source{"probe", all})
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name string
			args [6]uint64
			want bool
		}{
			{"mmap", [6]uint64{2: unix.PROT_READ}, true},
			{"mmap", [6]uint64{2: exec}, false},
			{"mprotect", [6]uint64{2: exec}, false},
			{"pkey_mprotect", [6]uint64{2: exec}, false},
			{"shmat", [6]uint64{2: 0o100000}, false},
			{"shmat", [6]uint64{2: 0o10000}, true},
			{"execve", [6]uint64{}, false},
			{"execveat", [6]uint64{}, false},
			{"ptrace", [6]uint64{}, false},
			{"seccomp", [6]uint64{}, false},
			{"prctl", [6]uint64{unix.PR_SET_SECCOMP}, false},
			{"prctl", [6]uint64{unix.PR_SET_SECCOMP | 1<<32}, false},
			{"prctl", [6]uint64{unix.PR_SET_NAME}, true},
			{"rt_sigaction", [6]uint64{uint64(unix.SIGSYS), 4096}, false},
			{"rt_sigaction", [6]uint64{uint64(unix.SIGSYS) | 1<<40, 4096}, false},
			{"rt_sigaction", [6]uint64{uint64(unix.SIGSYS), 0}, true},
			{"rt_sigaction", [6]uint64{uint64(unix.SIGTERM), 4096}, true},
			{"clone", [6]uint64{threadFlags}, true},
			{"clone", [6]uint64{unix.CLONE_NEWUSER | uint64(unix.SIGCHLD)}, false},
			{"clone", [6]uint64{unix.CLONE_NEWNET}, false},
			{"clone3", [6]uint64{}, false},
			{"ioctl", [6]uint64{1: unix.TIOCSTI}, false},
			{"ioctl", [6]uint64{1: unix.TIOCSTI | 1<<32}, false},
			{"ioctl", [6]uint64{1: unix.TIOCINQ}, true},
			{"mount", [6]uint64{}, false},
			{"unshare", [6]uint64{}, false},
			{"io_uring_setup", [6]uint64{}, true},
		} {
			if got := p.Allows(tt.name, tt.args); got != tt.want {
				t.Errorf("%s: %s with %#x: allowed is %v", arch, tt.name, tt.args, got)
			}
		}
		// What is asked for in vain is said, and not in the filter.
		vain := p.Ineffective()
		if !slices.ContainsFunc(vain, func(c Clause) bool { return c.Syscall == "execve" && slices.Equal(c.Owners, []string{"probe"}) }) {
			t.Errorf("%s: nobody says that probe asks for execve in vain: %v", arch, vain)
		}
		if slices.Contains(p.Calls(), "execve") {
			t.Errorf("%s: execve is among the calls allowed", arch)
		}
		if !slices.Equal(p.NoSys(), []string{"clone3"}) {
			t.Errorf("%s: %q do not exist, expected clone3", arch, p.NoSys())
		}
	}
}

// TestThreadsCanStart uses the flags that Go 1.26 and glibc 2.36 were seen to use.
func TestThreadsCanStart(t *testing.T) {
	p := mustNew(t, Base(BaseOptions{PID: 7}))
	for name, flags := range map[string]uint64{
		"Go":        0x50f00,
		"Go, amd64": 0x50f00 | unix.CLONE_SETTLS,
		"glibc":     0x3d0f00,
	} {
		if !p.Allows("clone", [6]uint64{flags}) {
			t.Errorf("%s cannot start a thread", name)
		}
	}
	if p.Allows("clone", [6]uint64{uint64(unix.SIGCHLD)}) || p.Allows("clone", [6]uint64{unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)}) {
		t.Error("the daemon can fork")
	}
	if !p.Allows("tgkill", [6]uint64{7}) || p.Allows("tgkill", [6]uint64{8}) {
		t.Error("signals are not for the daemon's own threads alone")
	}
}

func TestOptionsAddCalls(t *testing.T) {
	for _, tt := range []struct {
		name    string
		without Source
		with    Source
		calls   []string
	}{
		{"own socket", Base(BaseOptions{}), Base(BaseOptions{OwnSocket: true}), []string{"newfstatat", "unlinkat"}},
		{"syslog", Base(BaseOptions{}), Base(BaseOptions{Syslog: true}), []string{"connect", "getpeername", "socket"}},
		{"file handles", Passthrough(PassthroughOptions{}), Passthrough(PassthroughOptions{FileHandles: true}), []string{"name_to_handle_at", "open_by_handle_at"}},
		{"attributes", Passthrough(PassthroughOptions{}), Passthrough(PassthroughOptions{Xattr: true}), []string{"getxattr", "getxattrat", "listxattr", "listxattrat"}},
		{
			"attributes that change", Passthrough(PassthroughOptions{Writable: true}), Passthrough(PassthroughOptions{Writable: true, Xattr: true}),
			[]string{"getxattr", "getxattrat", "listxattr", "listxattrat", "removexattr", "removexattrat", "setxattr", "setxattrat"},
		},
		{
			"ids", Passthrough(PassthroughOptions{Writable: true}), Passthrough(PassthroughOptions{Writable: true, SwitchIDs: true}),
			[]string{"setgroups", "setresgid", "setresuid"},
		},
		{"locks", Passthrough(PassthroughOptions{}), Passthrough(PassthroughOptions{Locks: true}), []string{"flock"}},
		{"ids of a read-only share", Passthrough(PassthroughOptions{}), Passthrough(PassthroughOptions{SwitchIDs: true}), nil},
	} {
		without := mustNew(t, tt.without).Calls()
		got := slices.DeleteFunc(mustNew(t, tt.with).Calls(), func(name string) bool { return slices.Contains(without, name) })
		if !slices.Equal(got, tt.calls) {
			t.Errorf("%s: adds %q, expected %q", tt.name, got, tt.calls)
		}
	}
	readOnly := mustNew(t, Base(BaseOptions{OwnSocket: true}), Passthrough(PassthroughOptions{}))
	for _, name := range []string{"mkdirat", "renameat2", "ftruncate", "fchownat", "socket", "open_by_handle_at"} {
		if slices.Contains(readOnly.Calls(), name) {
			t.Errorf("a read-only share is allowed %s", name)
		}
	}
	const getFlags, setFlags = unix.FS_IOC_GETFLAGS, unix.FS_IOC_SETFLAGS
	if !readOnly.Allows("ioctl", [6]uint64{3, getFlags}) || readOnly.Allows("ioctl", [6]uint64{3, setFlags}) {
		t.Error("of a read-only share's flags expected that they can be read and not be set")
	}
}

func TestDump(t *testing.T) {
	p, err := newFor("amd64", Base(BaseOptions{PID: 7, OwnSocket: true, Syslog: true}),
		Passthrough(PassthroughOptions{Writable: true, Xattr: true, FileHandles: true, SwitchIDs: true}),
		Source{"http", Rules{
			"connect":     MatchAll{},
			"getsockname": PerArg{NonNegativeFD{}},
			"mmap":        MatchAll{},
			"openat":      MatchAll{},
			"socket":      Or{PerArg{Int32(unix.AF_INET)}, PerArg{Int32(unix.AF_INET6)}},
		}},
		Source{"probe", Rules{
			"execve":  MatchAll{},
			"getppid": Deny{MatchAll{}},
			"mmap":    PerArg{2: EqualTo(unix.PROT_READ | unix.PROT_EXEC)},
			"recvfrom": And{
				PerArg{2: GreaterOrEqual(16)}, PerArg{2: LessThan(48), 3: BitsAllowed(unix.MSG_DONTWAIT)},
			},
			"socket": PerArg{Int32(unix.AF_INET)},
		}},
	)
	if err != nil {
		t.Fatal(err)
	}
	got := dump(t, p)
	const golden = "testdata/dump.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the dump is not that of %s (go test -update writes it anew):\n%s", golden, got)
	}
	for range 5 {
		if again := dump(t, p); again != got {
			t.Fatal("the dump is another each time")
		}
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, unix.ENOSPC }

func TestDumpReportsWriteErrors(t *testing.T) {
	if err := mustNew(t).Dump(brokenWriter{}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v, expected ENOSPC", err)
	}
}

// TestCallersCannotChangeThePolicy writes to what a Policy hands out.
func TestCallersCannotChangeThePolicy(t *testing.T) {
	p := mustNew(t, Base(BaseOptions{}))
	before := dump(t, p)
	for _, list := range [][]Clause{p.Allow(), p.Deny()} {
		for i := range list {
			list[i].Owners[0] = "nobody"
			for j := range list[i].Conds {
				list[i].Conds[j].Value++
			}
		}
	}
	p.NoSys()[0] = "read"
	if dump(t, p) != before {
		t.Error("the policy has changed")
	}
}
