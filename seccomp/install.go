package seccomp

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
)

// Filters are the clauses to install. A call that a clause of Deny matches is forbidden, whatever Allow says of it; of the
// others those that a clause of Allow matches are allowed.
type Filters struct {
	Deny, Allow []Clause
	// NoSys are calls that fail with ENOSYS and are no violation: clone3, whose flags are in memory, where a filter cannot
	// see them, and for which libc has clone instead.
	NoSys []string
}

// InstallConfig says what Install does.
type InstallConfig struct {
	Filters Filters
	Action  Action

	// Marks tell the extension that made a call; nil knows of none.
	Marks *Marks
	// Output takes the lines about violations; nil is standard error. Install duplicates its descriptor.
	Output *os.File
	// Tasks is the directory /proc/self/task, to be opened before the file system is left; nil opens it. The threads
	// found there are asked afterwards whether they are confined.
	Tasks *os.File
	// Trace, with Log, counts for each clause of Allow what calls it lets happen, for Used. Every call then takes a detour,
	// and there are no lines. Not seen are calls of ioctl(2) with SECCOMP_IOCTL_NOTIF_*, with which it is done.
	Trace bool
}

// Validate checks what needs no kernel.
func (c *InstallConfig) Validate() error {
	if c.Action > Log {
		return fmt.Errorf("action %v: expected one of %v, %v, %v, %v", c.Action, None, Kill, Trap, Log)
	}
	if c.Trace && c.Action != Log {
		return fmt.Errorf("trace with action %v: expected %v", c.Action, Log)
	}
	// libseccomp would take one of the two and drop the other without a word.
	for _, name := range c.Filters.NoSys {
		for _, clause := range c.Filters.Allow {
			if clause.Syscall == name {
				return fmt.Errorf("%s is to be allowed and to fail with ENOSYS: expected one of them", name)
			}
		}
	}
	for _, clauses := range [][]Clause{c.Filters.Deny, c.Filters.Allow} {
		for _, clause := range clauses {
			if err := clause.validate(); err != nil {
				return fmt.Errorf("clause for %s: %w", clause.Syscall, err)
			}
		}
	}
	return nil
}

func (c *Clause) validate() error {
	var seen [6]bool
	for _, cond := range c.Conds {
		switch {
		case cond.Arg >= uint(len(seen)):
			return fmt.Errorf("condition on argument %d: expected 0 to 5", cond.Arg)
		case seen[cond.Arg]:
			return fmt.Errorf("two conditions on argument %d: expected a clause for each", cond.Arg)
		case cond.Op > OpMaskedEqual:
			return fmt.Errorf("comparison %v: expected one that a filter has", cond.Op)
		case cond.Op == OpMaskedEqual && cond.Value&^cond.Mask != 0:
			return fmt.Errorf("value %#x has bits outside the mask %#x: expected one that can match", cond.Value, cond.Mask)
		}
		seen[cond.Arg] = true
	}
	return nil
}

// Violation is a system call that the filter would not have allowed, as Log has seen it.
type Violation struct {
	Syscall   string // its name, or "unknown"
	Extension string // whose mark the thread had, "" if it had none
	Count     uint64 // of calls
}

// Use is how many calls a clause has let happen.
type Use struct {
	Clause
	Count uint64
}

// WriteReport writes what Seen and Used know as text, a line for each: "refuse", the system call, the extension and how often;
// "allow", the system call, the conditions, the owners and how often. Columns are two spaces apart at least.
func WriteReport(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, v := range Seen() {
		fmt.Fprintf(t, "refuse\t%s\t%s\t%d\n", v.Syscall, cmp.Or(v.Extension, "(none)"), v.Count)
	}
	for _, u := range Used() {
		fmt.Fprintf(t, "allow\t%s\t%s\t%s\t%d\n", u.Syscall, describe(u.Conds), strings.Join(u.Owners, ","), u.Count)
	}
	if err := t.Flush(); err != nil { // it keeps the first error of all
		return fmt.Errorf("write what was called: %w", err)
	}
	return nil
}
