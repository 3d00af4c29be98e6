package seccomp

import (
	"fmt"
	"slices"
	"strings"
)

// Clause is a rule as a filter takes it: the call matches where all conditions hold, of which there is at most one for an
// argument.
type Clause struct {
	Syscall string
	Conds   []Cond
	Owners  []string // who asked for it, in order
}

// Matches says whether the clause holds for these arguments.
func (c *Clause) Matches(args [6]uint64) bool {
	return !slices.ContainsFunc(c.Conds, func(cond Cond) bool { return !cond.holds(args[cond.Arg]) })
}

// Cond is a condition on one argument, compared as an unsigned 64-bit number.
type Cond struct {
	Arg   uint // 0 to 5
	Op    Op
	Value uint64
	Mask  uint64 // of OpMaskedEqual
}

func (c Cond) String() string {
	if c.Op == OpMaskedEqual {
		return fmt.Sprintf("arg%d & %#x == %#x", c.Arg, c.Mask, c.Value)
	}
	return fmt.Sprintf("arg%d %v %#x", c.Arg, c.Op, c.Value)
}

func (c Cond) holds(v uint64) bool {
	switch c.Op {
	case OpEqual:
		return v == c.Value
	case OpNotEqual:
		return v != c.Value
	case OpLess:
		return v < c.Value
	case OpLessOrEqual:
		return v <= c.Value
	case OpGreater:
		return v > c.Value
	case OpGreaterOrEqual:
		return v >= c.Value
	case OpMaskedEqual:
		return v&c.Mask == c.Value
	}
	return false
}

// describe is conditions in words.
func describe(conds []Cond) string {
	if len(conds) == 0 {
		return "any arguments"
	}
	var b strings.Builder
	for i, c := range conds {
		if i > 0 {
			b.WriteString(" and ")
		}
		b.WriteString(c.String())
	}
	return b.String()
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
