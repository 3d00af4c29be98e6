package seccomp

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// Source is rules and who asks for them.
type Source struct {
	// Owner names the source in errors, in the dump and in the log of violations: "base", or an extension's name.
	Owner string
	Rules Rules
}

// Policy is what the rules of all sources come to, beneath the denials that stand first. It does not change.
type Policy struct {
	allow, deny, ineffective map[string][]Clause
	noSys                    []string // sorted
}

// New merges the rules of sources: a call is allowed where one of them allows it, unless the deny set forbids it, which is
// part of every policy. An error says which owner's rule is wrong: a system call that no architecture has, a rule that
// cannot be put into a filter, or a Deny of what another rule allows. Calls that only another architecture has are passed over.
func New(sources ...Source) (*Policy, error) {
	return newFor(runtime.GOARCH, sources...)
}

// ruling collects requests by system call.
type ruling map[string][]request

func newFor(arch string, sources ...Source) (*Policy, error) {
	if !slices.Contains(arches, arch) {
		return nil, fmt.Errorf("no system call table for %s: expected one of %s", arch, strings.Join(arches, ", "))
	}
	var b builder
	b.arch = arch
	if err := b.add(denied()); err != nil {
		return nil, err
	}
	b.always, b.deny = b.deny, nil
	p := new(Policy)
	for _, name := range noSys() {
		if _, ok := number(arch, name); ok {
			p.noSys = append(p.noSys, name)
			b.always.add(name, DenyOwner, union{{}})
		}
	}
	for _, s := range sources {
		if err := b.add(s); err != nil {
			return nil, err
		}
	}
	if err := b.conflict(); err != nil {
		return nil, err
	}
	allow, ineffective := b.effective()
	for name, requests := range b.deny {
		b.always[name] = append(b.always[name], requests...)
	}
	for _, name := range p.noSys {
		delete(b.always, name)
	}
	var err error
	if p.allow, err = allow.clauses(); err != nil {
		return nil, err
	}
	if p.ineffective, err = ineffective.clauses(); err != nil {
		return nil, err
	}
	if p.deny, err = b.always.clauses(); err != nil {
		return nil, err
	}
	return p, nil
}

// builder takes the sources up one after the other.
type builder struct {
	arch        string
	allow, deny ruling // of the sources
	always      ruling // what stands before them
}

// add sorts the rules of s by what they say.
func (b *builder) add(s Source) error {
	if s.Owner == "" {
		return errors.New("seccomp rules without an owner: expected a name to blame")
	}
	for _, name := range slices.Sorted(maps.Keys(s.Rules)) {
		if _, known := lookup(name); !known {
			hint := ""
			if meant := similar(name); meant != "" {
				hint = fmt.Sprintf(" (did you mean %q?)", meant)
			}
			return fmt.Errorf("seccomp rules of %s: no system call is named %q%s", s.Owner, name, hint)
		}
		rule, to := s.Rules[name], &b.allow
		if deny, ok := rule.(Deny); ok {
			rule, to = deny.Rule, &b.deny
		}
		u, err := normalize(rule)
		if err != nil {
			return fmt.Errorf("seccomp rules of %s: %s: %w", s.Owner, name, err)
		}
		if _, ok := number(b.arch, name); ok {
			to.add(name, s.Owner, u)
		}
	}
	return nil
}

func (r *ruling) add(name, owner string, u union) {
	if *r == nil {
		*r = make(ruling)
	}
	for _, q := range u {
		(*r)[name] = append((*r)[name], request{q.box, []string{owner}})
	}
}

// conflict returns an error if one source denies what a source allows, but for what is denied anyway.
func (b *builder) conflict() error {
	for _, name := range slices.Sorted(maps.Keys(b.deny)) {
		for _, deny := range b.deny[name] {
			for _, allow := range b.allow[name] {
				overlap, err := deny.intersect(&allow.box)
				if err != nil {
					return fmt.Errorf("seccomp rules of %s against those of %s: %s: %w", deny.owners[0], allow.owners[0], name, err)
				}
				for _, o := range overlap {
					if b.always.covers(name, &o) {
						continue
					}
					first, err := o.split()
					if err != nil {
						return fmt.Errorf("seccomp rules of %s against those of %s: %s: %w", deny.owners[0], allow.owners[0], name, err)
					}
					return fmt.Errorf("seccomp rules conflict: %s denies %s with %s, and %s allows it: take back one of the two",
						deny.owners[0], name, describe(first[0].conds()), allow.owners[0])
				}
			}
		}
	}
	return nil
}

// covers says whether one request of r for name has all of b.
func (r ruling) covers(name string, b *box) bool {
	return slices.ContainsFunc(r[name], func(q request) bool { return q.contains(b) })
}

// effective parts what is allowed from what would be if it were not denied whole by what stands first.
func (b *builder) effective() (allow, ineffective ruling) {
	allow, ineffective = make(ruling), make(ruling)
	for name, requests := range b.allow {
		for _, q := range requests {
			if b.always.covers(name, &q.box) {
				ineffective[name] = append(ineffective[name], q)
			} else {
				allow[name] = append(allow[name], q)
			}
		}
	}
	return allow, ineffective
}

// clauses merges the requests of each system call.
func (r ruling) clauses() (map[string][]Clause, error) {
	all := make(map[string][]Clause, len(r))
	for name, requests := range r {
		var u union
		for _, q := range requests {
			boxes, err := q.split()
			for i := 0; i < len(boxes) && err == nil; i++ {
				err = u.add(&boxes[i], q.owners...)
			}
			if err != nil {
				return nil, fmt.Errorf("seccomp rules of %s with those before it: %s: %w", q.owners[0], name, err)
			}
		}
		slices.SortFunc(u, func(a, b request) int { return compareBoxes(a.box, b.box) })
		for _, q := range u {
			all[name] = append(all[name], Clause{Syscall: name, Conds: q.conds(), Owners: q.owners})
		}
	}
	return all, nil
}

// Allow returns what is allowed, sorted by system call. Deny stands before it.
func (p *Policy) Allow() []Clause { return flatten(p.allow) }

// Deny returns what is forbidden whatever Allow says, sorted by system call: the deny set, and what sources deny. Install it
// after Allow's filter and not before, for it forbids to install filters.
func (p *Policy) Deny() []Clause { return flatten(p.deny) }

// NoSys returns the system calls that are to fail with ENOSYS in every mode, sorted: those whose caller, glibc, then does
// with another call that a filter can judge. They are in neither Allow nor Deny.
func (p *Policy) NoSys() []string { return slices.Clone(p.noSys) }

// Ineffective returns what sources ask for in vain, because the deny set forbids all of it.
func (p *Policy) Ineffective() []Clause { return flatten(p.ineffective) }

// Allows says whether the filter lets a call pass.
func (p *Policy) Allows(name string, args [6]uint64) bool {
	matches := func(c Clause) bool { return c.Matches(args) }
	return !slices.Contains(p.noSys, name) && !slices.ContainsFunc(p.deny[name], matches) && slices.ContainsFunc(p.allow[name], matches)
}

// Calls returns the system calls that are allowed with some arguments, sorted.
func (p *Policy) Calls() []string { return slices.Sorted(maps.Keys(p.allow)) }

// flatten lists clauses by system call; the caller may change them.
func flatten(byCall map[string][]Clause) []Clause {
	var list []Clause
	for _, name := range slices.Sorted(maps.Keys(byCall)) {
		for _, c := range byCall[name] {
			c.Conds, c.Owners = slices.Clone(c.Conds), slices.Clone(c.Owners)
			list = append(list, c)
		}
	}
	return list
}

// Dump writes the policy as text, a line for each clause: what is done (deny, nosys, allow, or vain for what is asked for but
// denied), the system call, when, and the owners.
func (p *Policy) Dump(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(what string, c Clause) {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", what, c.Syscall, describe(c.Conds), strings.Join(c.Owners, ","))
	}
	for _, c := range p.Deny() {
		line("deny", c)
	}
	for _, name := range p.noSys {
		line("nosys", Clause{Syscall: name, Owners: []string{DenyOwner}})
	}
	for _, c := range p.Allow() {
		line("allow", c)
	}
	for _, c := range p.Ineffective() {
		line("vain", c)
	}
	if err := t.Flush(); err != nil { // it keeps the first error of all
		return fmt.Errorf("write the rules: %w", err)
	}
	return nil
}
