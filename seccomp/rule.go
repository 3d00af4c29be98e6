// Package seccomp says which system calls the daemon may make: rules as data, each with an owner, merged by union, beneath
// a set of denials that nobody can undo. libseccomp only ever sees what has been normalised here, for it merges rules of
// one system call silently and wrongly.
package seccomp

// Rules are system calls, by their names in syscalls(2), and when each is allowed.
type Rules map[string]Rule

// Add adds more to r, which must not be nil: a call that both have is allowed where either allows it.
func (r Rules) Add(more Rules) {
	for name, rule := range more {
		if had, ok := r[name]; ok {
			rule = Or{had, rule}
		}
		r[name] = rule
	}
}

// Rule says when a system call is allowed: MatchAll, PerArg, Or, And, or Deny around one of them.
type Rule interface {
	rule()
}

// MatchAll allows the call with any arguments.
type MatchAll struct{}

// PerArg allows the call where all its arguments fit; nil fits any value.
type PerArg [6]Arg

// Or allows the call where one of its rules does; without any, never.
type Or []Rule

// And allows the call where all of its rules do; without any, always.
type And []Rule

// Deny forbids the call where Rule matches. Where other rules allow what it forbids, the daemon does not start: the error
// names the owners of both.
type Deny struct{ Rule Rule }

func (MatchAll) rule() {}
func (PerArg) rule()   {}
func (Or) rule()       {}
func (And) rule()      {}
func (Deny) rule()     {}

// Arg is a condition on one argument, compared as an unsigned 64-bit number.
type Arg interface {
	arg()
}

// Conditions on an argument.
type (
	// EqualTo fits the one value.
	EqualTo uint64
	// NotEqual fits all others.
	NotEqual uint64
	// GreaterThan fits larger values.
	GreaterThan uint64
	// GreaterOrEqual fits the value and larger ones.
	GreaterOrEqual uint64
	// LessThan fits smaller values.
	LessThan uint64
	// LessOrEqual fits the value and smaller ones.
	LessOrEqual uint64
	// MaskedEqual fits where the bits of Mask are those of Value.
	MaskedEqual struct{ Mask, Value uint64 }
	// BitsAllowed fits where no other bits than these are set.
	BitsAllowed uint64
	// Int32 fits a C int of this value: the kernel looks at the low 32 bits only, and a caller may leave anything above.
	Int32 int32
	// NonNegativeFD fits a C int that is not negative: a descriptor, but not AT_FDCWD.
	NonNegativeFD struct{}
)

func (EqualTo) arg()        {}
func (NotEqual) arg()       {}
func (GreaterThan) arg()    {}
func (GreaterOrEqual) arg() {}
func (LessThan) arg()       {}
func (LessOrEqual) arg()    {}
func (MaskedEqual) arg()    {}
func (BitsAllowed) arg()    {}
func (Int32) arg()          {}
func (NonNegativeFD) arg()  {}
