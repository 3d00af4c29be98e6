package seccomp

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// allows is what a rule means, as its documentation says, without any rewriting.
func allows(rule Rule, args [6]uint64) bool {
	fits := func(r Rule) bool { return allows(r, args) }
	misses := func(r Rule) bool { return !allows(r, args) }
	switch rule := rule.(type) {
	case MatchAll:
		return true
	case PerArg:
		for i, arg := range rule {
			if !fitsArg(arg, args[i]) {
				return false
			}
		}
		return true
	case Or:
		return slices.ContainsFunc(rule, fits)
	case And:
		return !slices.ContainsFunc(rule, misses)
	}
	panic("no such rule")
}

func fitsArg(arg Arg, v uint64) bool {
	switch arg := arg.(type) {
	case nil:
		return true
	case EqualTo:
		return v == uint64(arg)
	case NotEqual:
		return v != uint64(arg)
	case GreaterThan:
		return v > uint64(arg)
	case GreaterOrEqual:
		return v >= uint64(arg)
	case LessThan:
		return v < uint64(arg)
	case LessOrEqual:
		return v <= uint64(arg)
	case MaskedEqual:
		return v&arg.Mask == arg.Value
	case BitsAllowed:
		return v&^uint64(arg) == 0
	case Int32:
		return int32(v) == int32(arg)
	case NonNegativeFD:
		return int32(v) >= 0
	}
	panic("no such condition")
}

// edges are the values at which conditions change their mind most often.
var edges = []uint64{0, 1, 2, 3, 4, 7, 8, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<63 - 1, 1 << 63, math.MaxUint64 - 1, math.MaxUint64, 0xffffff9c, 0xffffffffffffff9c}

// chooser makes rules and arguments of bytes.
type chooser struct{ bytes []byte }

func (c *chooser) pick(n int) int {
	if len(c.bytes) == 0 {
		return 0
	}
	v := int(c.bytes[0]) % n
	c.bytes = c.bytes[1:]
	return v
}

func (c *chooser) value() uint64 {
	v := edges[c.pick(len(edges))]
	switch c.pick(4) {
	case 0:
		return v + uint64(c.pick(5)) - 2
	case 1:
		return v ^ 1<<c.pick(64)
	case 2:
		return uint64(c.pick(16))
	}
	return v
}

func (c *chooser) arg() Arg {
	switch v := c.value(); c.pick(12) {
	case 0:
		return EqualTo(v)
	case 1:
		return NotEqual(v)
	case 2:
		return GreaterThan(v)
	case 3:
		return GreaterOrEqual(v)
	case 4:
		return LessThan(v)
	case 5:
		return LessOrEqual(v)
	case 6:
		return MaskedEqual{v, v & c.value()}
	case 7:
		return BitsAllowed(v)
	case 8:
		return Int32(v)
	case 9:
		return NonNegativeFD{}
	}
	return nil
}

func (c *chooser) rule(depth int) Rule {
	var list []Rule
	kind := c.pick(8)
	if depth > 0 && kind < 5 {
		for range c.pick(4) {
			list = append(list, c.rule(depth-1))
		}
	}
	switch {
	case depth > 0 && kind < 2:
		return Or(list)
	case depth > 0 && kind < 5:
		return And(list)
	case kind == 7:
		return MatchAll{}
	}
	var rule PerArg
	for range 1 + c.pick(2) {
		rule[c.pick(3)] = c.arg()
	}
	return rule
}

// checkNormal compares a rule with what becomes of it, for arguments of its own choice.
func checkNormal(t *testing.T, c *chooser, rng *rand.Rand) {
	rule := c.rule(3)
	p, err := New(Source{"test", Rules{"read": rule}})
	if err != nil {
		if !strings.Contains(err.Error(), errTooMany.Error()) {
			t.Fatalf("%#v: %v", rule, err)
		}
		return
	}
	for _, clause := range p.Allow() {
		for i, cond := range clause.Conds {
			if i > 0 && cond.Arg <= clause.Conds[i-1].Arg {
				t.Fatalf("%#v: two conditions on an argument: %v", rule, clause)
			}
		}
	}
	for range 100 {
		var args [6]uint64
		noise := make([]byte, 32)
		binary.NativeEndian.PutUint64(noise, rng.Uint64())
		binary.NativeEndian.PutUint64(noise[8:], rng.Uint64())
		binary.NativeEndian.PutUint64(noise[16:], rng.Uint64())
		values := chooser{noise}
		for i := range 3 {
			args[i] = values.value()
		}
		if got, want := p.Allows("read", args), allows(rule, args); got != want {
			t.Fatalf("%#v with %#x: %v, expected %v, of %v", rule, args, got, want, p.Allow())
		}
	}
}

func TestNormalizeIsEquivalent(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		bytes := make([]byte, 100)
		for i := range bytes {
			bytes[i] = byte(rng.Uint32())
		}
		checkNormal(t, &chooser{bytes}, rng)
	}
}

func FuzzNormalize(f *testing.F) {
	f.Add([]byte("two ranges on one argument"))
	f.Add([]byte{2, 2, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20})
	f.Add([]byte{3, 3, 5, 0, 0, 4, 3, 6, 5, 1, 0, 7, 3, 1, 5, 0, 0, 8, 3, 2})
	f.Fuzz(func(t *testing.T, bytes []byte) {
		checkNormal(t, &chooser{bytes}, rand.New(rand.NewPCG(1, uint64(len(bytes)))))
	})
}
