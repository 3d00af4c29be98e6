package seccomp

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// maxClauses bounds the clauses of one system call: the kernel takes 4096 instructions in a filter (BPF_MAXINSNS), and a
// clause is one at least.
const maxClauses = 4096

// maxDepth bounds how deep rules lie in each other, for a slice can hold itself.
const maxDepth = 100

var errTooMany = fmt.Errorf("its conditions make more than %d clauses: expected fewer conditions in Or, or masks in place of ranges and NotEqual", maxClauses)

// box is a clause in the making: the call matches where each argument is in its set.
type box [6]set

// contains says whether all that other matches is matched by b.
func (b *box) contains(other *box) bool {
	for i := range b {
		if !b[i].contains(other[i]) {
			return false
		}
	}
	return true
}

// intersect returns boxes that together match what both b and other do.
func (b *box) intersect(other *box) ([]box, error) {
	var sets [6][]set
	for i := range b {
		sets[i] = b[i].intersect(other[i])
	}
	return product(sets)
}

// split returns boxes that together are b, each of whose sets one Cond tells.
func (b *box) split() ([]box, error) {
	var sets [6][]set
	for i := range b {
		sets[i] = b[i].split()
	}
	return product(sets)
}

// product returns a box for each choice of one set for each argument.
func product(sets [6][]set) ([]box, error) {
	n := 1
	for i := range sets {
		n *= len(sets[i]) // at most 126 each
		if n > maxClauses && !slices.ContainsFunc(sets[i:], func(s []set) bool { return len(s) == 0 }) {
			return nil, errTooMany
		}
	}
	boxes := make([]box, min(n, 1), n)
	for i := range sets {
		if n == 0 {
			break
		}
		had := len(boxes)
		for range len(sets[i]) - 1 {
			boxes = append(boxes, boxes[:had]...)
		}
		for j := range boxes {
			boxes[j][i] = sets[i][j/had]
		}
	}
	return boxes, nil
}

// request is a box that somebody asks for.
type request struct {
	box
	owners []string
}

// union is requests for one system call, none of which lies within another.
type union []request

// add puts b in, where it is not there yet, in place of what lies within it. The owners of what does not stay get to own
// what it lies within.
func (u *union) add(b *box, owners ...string) error {
	there := false
	for i := range *u {
		if had := &(*u)[i]; had.contains(b) {
			had.owners = appendNew(had.owners, owners...)
			there = true
		}
	}
	if there {
		return nil
	}
	var all []string
	*u = slices.DeleteFunc(*u, func(had request) bool {
		if !b.contains(&had.box) {
			return false
		}
		all = appendNew(all, had.owners...)
		return true
	})
	if len(*u) == maxClauses {
		return errTooMany
	}
	*u = append(*u, request{*b, appendNew(all, owners...)})
	return nil
}

// appendNew appends those names that are not in the list.
func appendNew(list []string, names ...string) []string {
	for _, name := range names {
		if !slices.Contains(list, name) {
			list = append(list, name)
		}
	}
	return list
}

// addAll adds boxes without owners.
func (u *union) addAll(boxes []box) error {
	for i := range boxes {
		if err := u.add(&boxes[i]); err != nil {
			return err
		}
	}
	return nil
}

// normalize returns what matches wherever rule does, without owners.
func normalize(rule Rule) (union, error) {
	return normalizeBelow(rule, maxDepth)
}

func normalizeBelow(rule Rule, depth int) (u union, err error) {
	if depth == 0 {
		return nil, fmt.Errorf("rules lie more than %d deep in each other: expected a flat rule", maxDepth)
	}
	switch rule := rule.(type) {
	case nil:
		return nil, errors.New("a nil rule: expected MatchAll to allow the call with any arguments")
	case MatchAll:
		return union{{}}, nil
	case PerArg:
		var sets [6][]set
		for i, arg := range rule {
			if sets[i], err = argSets(arg); err != nil {
				return nil, fmt.Errorf("argument %d: %w", i, err)
			}
		}
		boxes, err := product(sets)
		if err != nil {
			return nil, err
		}
		return u, u.addAll(boxes)
	case Or:
		for _, r := range rule {
			part, err := normalizeBelow(r, depth-1)
			if err != nil {
				return nil, err
			}
			for i := range part {
				if err := u.add(&part[i].box); err != nil {
					return nil, err
				}
			}
		}
		return u, nil
	case And:
		u = union{{}}
		for _, r := range rule {
			part, err := normalizeBelow(r, depth-1)
			if err != nil {
				return nil, err
			}
			if u, err = u.intersect(part); err != nil {
				return nil, err
			}
		}
		return u, nil
	case Deny:
		return nil, errors.New("Deny inside of another rule: expected it outermost")
	default:
		return nil, fmt.Errorf("rule of type %T: expected one of package seccomp, not a pointer to it", rule)
	}
}

// intersect returns what both u and other match, without owners.
func (u union) intersect(other union) (union, error) {
	var both union
	for i := range u {
		for j := range other {
			boxes, err := u[i].intersect(&other[j].box)
			if err != nil {
				return nil, err
			}
			if err := both.addAll(boxes); err != nil {
				return nil, err
			}
		}
	}
	return both, nil
}

func compareBoxes(a, b box) int {
	for i := range a {
		if c := cmp.Or(cmp.Compare(a[i].kind, b[i].kind), cmp.Compare(a[i].a, b[i].a), cmp.Compare(a[i].b, b[i].b)); c != 0 {
			return c
		}
	}
	return 0
}

// conds are the conditions of b, which split has returned.
func (b *box) conds() []Cond {
	var conds []Cond
	for i, s := range b {
		if s.kind != everything {
			conds = append(conds, s.cond(uint(i)))
		}
	}
	return conds
}
