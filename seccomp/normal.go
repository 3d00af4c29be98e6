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

// normalize returns boxes, none within another, one of which matches wherever rule does.
func normalize(rule Rule) ([]box, error) {
	return normalizeBelow(rule, maxDepth)
}

func normalizeBelow(rule Rule, depth int) ([]box, error) {
	if depth == 0 {
		return nil, fmt.Errorf("rules lie more than %d deep in each other: expected a flat rule", maxDepth)
	}
	var all []box
	switch rule := rule.(type) {
	case nil:
		return nil, errors.New("a nil rule: expected MatchAll to allow the call with any arguments")
	case MatchAll:
		all = []box{{}}
	case PerArg:
		var sets [6][]set
		for i, arg := range rule {
			var err error
			if sets[i], err = argSets(arg); err != nil {
				return nil, fmt.Errorf("argument %d: %w", i, err)
			}
		}
		return product(sets)
	case Or:
		for _, r := range rule {
			boxes, err := normalizeBelow(r, depth-1)
			if err != nil {
				return nil, err
			}
			all = append(all, boxes...)
		}
		all = simplify(all)
	case And:
		all = []box{{}}
		for _, r := range rule {
			boxes, err := normalizeBelow(r, depth-1)
			if err != nil {
				return nil, err
			}
			if all, err = intersect(all, boxes); err != nil {
				return nil, err
			}
		}
	case Deny:
		return nil, errors.New("Deny inside of another rule: expected it outermost")
	default:
		return nil, fmt.Errorf("rule of type %T: expected one of package seccomp, not a pointer to it", rule)
	}
	if len(all) > maxClauses {
		return nil, errTooMany
	}
	return all, nil
}

// intersect returns boxes that together match what one of a and one of b do.
func intersect(a, b []box) ([]box, error) {
	var all []box
	for i := range a {
		for j := range b {
			both, err := a[i].intersect(&b[j])
			if err != nil {
				return nil, err
			}
			all = append(all, both...)
		}
		if len(all) > 2*maxClauses {
			if all = simplify(all); len(all) > maxClauses {
				return nil, errTooMany
			}
		}
	}
	return simplify(all), nil
}

// simplify returns boxes without those that lie within another, in an order that depends on nothing but what they are.
func simplify(boxes []box) []box {
	slices.SortFunc(boxes, compareBoxes)
	boxes = slices.Compact(boxes)
	var kept []box
	for i := range boxes {
		if !slices.ContainsFunc(boxes, func(b box) bool { return b != boxes[i] && b.contains(&boxes[i]) }) {
			kept = append(kept, boxes[i])
		}
	}
	return kept
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
