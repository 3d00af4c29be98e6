package seccomp

import "fmt"

// Clause is a rule as a filter takes it: the call matches where all conditions hold, of which there is at most one for an
// argument.
type Clause struct {
	Syscall string
	Conds   []Cond
	Owners  []string // who asked for it, in order
}

// Cond is a condition on one argument, compared as an unsigned 64-bit number.
type Cond struct {
	Arg   uint // 0 to 5
	Op    Op
	Value uint64
	Mask  uint64 // of OpMaskedEqual
}

// Op is how a Cond compares.
type Op uint8

// The comparisons that a filter has.
const (
	OpEqual Op = iota
	OpNotEqual
	OpLess
	OpLessOrEqual
	OpGreater
	OpGreaterOrEqual
	OpMaskedEqual // argument & Mask == Value
)

func (o Op) String() string {
	names := [...]string{"==", "!=", "<", "<=", ">", ">=", "&=="}
	if int(o) < len(names) {
		return names[o]
	}
	return fmt.Sprintf("Op(%d)", uint8(o))
}
