package seccomp

import (
	"fmt"
	"math"
	"math/bits"
)

// set is a set of values of one argument. Equal sets are equal values; the empty one is none of them, where it could come
// out there is a slice without it. The zero value is the set of all numbers.
type set struct {
	kind setKind
	// span: from a to b, both in it. masked: those with v&a == b. except: all but a.
	a, b uint64
}

type setKind uint8

const (
	everything setKind = iota
	span
	masked
	except
)

// spanOf is the set from lo to hi, lo at most hi.
func spanOf(lo, hi uint64) set {
	switch {
	case lo == 0 && hi == math.MaxUint64:
		return set{}
	case lo == 1 && hi == math.MaxUint64:
		return set{kind: except, a: 0}
	case lo == 0 && hi == math.MaxUint64-1:
		return set{kind: except, a: math.MaxUint64}
	}
	return set{kind: span, a: lo, b: hi}
}

// maskedOf is the set of the numbers with v&mask == value; value has no bits beyond mask.
func maskedOf(mask, value uint64) set {
	if free := ^mask; free&(free+1) == 0 {
		return spanOf(value, value|free) // only high bits are compared
	}
	return set{kind: masked, a: mask, b: value}
}

// exceptOf is the set of all numbers but v.
func exceptOf(v uint64) set {
	return set{kind: except, a: v}
}

// argSets returns the set of the values that fit arg, as none or one.
func argSets(arg Arg) ([]set, error) {
	switch arg := arg.(type) {
	case nil:
		return []set{{}}, nil
	case EqualTo:
		return []set{spanOf(uint64(arg), uint64(arg))}, nil
	case NotEqual:
		return []set{exceptOf(uint64(arg))}, nil
	case GreaterThan:
		if arg == math.MaxUint64 {
			return nil, nil
		}
		return []set{spanOf(uint64(arg)+1, math.MaxUint64)}, nil
	case GreaterOrEqual:
		return []set{spanOf(uint64(arg), math.MaxUint64)}, nil
	case LessThan:
		if arg == 0 {
			return nil, nil
		}
		return []set{spanOf(0, uint64(arg)-1)}, nil
	case LessOrEqual:
		return []set{spanOf(0, uint64(arg))}, nil
	case MaskedEqual:
		if arg.Value&^arg.Mask != 0 {
			return nil, fmt.Errorf("MaskedEqual{%#x, %#x} fits nothing: expected a value within the mask", arg.Mask, arg.Value)
		}
		return []set{maskedOf(arg.Mask, arg.Value)}, nil
	case BitsAllowed:
		return []set{maskedOf(^uint64(arg), 0)}, nil
	case Int32:
		return []set{maskedOf(math.MaxUint32, uint64(uint32(arg)))}, nil
	case NonNegativeFD:
		return []set{maskedOf(1<<31, 0)}, nil
	default:
		return nil, fmt.Errorf("condition of type %T: expected one of package seccomp, not a pointer to it", arg)
	}
}

// has says whether v is in s.
func (s set) has(v uint64) bool {
	switch s.kind {
	case span:
		return s.a <= v && v <= s.b
	case masked:
		return v&s.a == s.b
	case except:
		return v != s.a
	default:
		return true
	}
}

// contains says whether all of t is in s.
func (s set) contains(t set) bool {
	switch {
	case s == t || s.kind == everything:
		return true
	case s.kind == except:
		return !t.has(s.a)
	case t.kind == everything || t.kind == except:
		return false
	case s.kind == span && t.kind == span:
		return s.a <= t.a && t.b <= s.b
	case s.kind == span:
		return s.a <= t.b && t.b|^t.a <= s.b
	case t.kind == masked:
		return s.a&^t.a == 0 && t.b&s.a == s.b
	default:
		// Below the first bit in which its ends differ, a span has every bit both ways.
		varying := uint64(1)<<bits.Len64(t.a^t.b) - 1
		return s.a&varying == 0 && t.a&s.a == s.b
	}
}

// intersect returns sets that do not overlap and together are what is in both s and t.
func (s set) intersect(t set) []set {
	if s.kind > t.kind {
		s, t = t, s
	}
	switch {
	case s.kind == everything:
		return []set{t}
	case t.kind == except:
		return s.without(t.a)
	case t.kind == span:
		if lo, hi := max(s.a, t.a), min(s.b, t.b); lo <= hi {
			return []set{spanOf(lo, hi)}
		}
		return nil
	case s.kind == masked:
		if (s.b^t.b)&s.a&t.a != 0 {
			return nil
		}
		return []set{maskedOf(s.a|t.a, s.b|t.b)}
	}
	// A span and a mask.
	if s.contains(t) {
		return []set{t}
	}
	var both []set
	for _, block := range s.blocks() {
		both = append(both, set{kind: masked, a: ^(block.b - block.a), b: block.a}.intersect(t)...)
	}
	return both
}

// without returns sets that do not overlap and together are s without v.
func (s set) without(v uint64) []set {
	if !s.has(v) {
		return []set{s}
	}
	var rest []set
	switch s.kind {
	case everything:
		return []set{exceptOf(v)}
	case except:
		lo, hi := min(s.a, v), max(s.a, v)
		if lo > 0 {
			rest = append(rest, spanOf(0, lo-1))
		}
		if hi-lo > 1 {
			rest = append(rest, spanOf(lo+1, hi-1))
		}
		if hi < math.MaxUint64 {
			rest = append(rest, spanOf(hi+1, math.MaxUint64))
		}
	case span:
		if s.a < v {
			rest = append(rest, spanOf(s.a, v-1))
		}
		if v < s.b {
			rest = append(rest, spanOf(v+1, s.b))
		}
	case masked:
		// One set for each free bit: those numbers that are as v above it, and not in it.
		mask, value := s.a, s.b
		for bit := uint64(1) << 63; bit != 0; bit >>= 1 {
			if mask&bit != 0 {
				continue
			}
			mask |= bit
			rest = append(rest, maskedOf(mask, value|^v&bit))
			value |= v & bit
		}
	}
	return rest
}

// blocks splits a span into as few as possible of a power of two in size, each of which starts at a multiple of its size, so
// that one masked comparison tells it.
func (s set) blocks() []set {
	var list []set
	for lo := s.a; ; {
		// The largest block that may start here, and does not pass the end.
		size := 64
		if lo != 0 {
			size = bits.TrailingZeros64(lo)
		}
		if left := s.b - lo; left != math.MaxUint64 {
			size = min(size, bits.Len64(left+1)-1)
		}
		hi := lo + (uint64(1)<<size - 1)
		list = append(list, set{kind: span, a: lo, b: hi})
		if hi >= s.b {
			return list
		}
		lo = hi + 1
	}
}

// split returns sets that together are s, each of which one Cond tells.
func (s set) split() []set {
	if s.kind != span || s.a == 0 || s.b == math.MaxUint64 {
		return []set{s}
	}
	return s.blocks()
}

// cond is s, of those that split returns and not everything, as a condition on an argument.
func (s set) cond(arg uint) Cond {
	switch {
	case s.kind == masked:
		return Cond{Arg: arg, Op: OpMaskedEqual, Mask: s.a, Value: s.b}
	case s.kind == except:
		return Cond{Arg: arg, Op: OpNotEqual, Value: s.a}
	case s.a == s.b:
		return Cond{Arg: arg, Op: OpEqual, Value: s.a}
	case s.a == 0:
		return Cond{Arg: arg, Op: OpLessOrEqual, Value: s.b}
	case s.b == math.MaxUint64:
		return Cond{Arg: arg, Op: OpGreaterOrEqual, Value: s.a}
	default:
		return Cond{Arg: arg, Op: OpMaskedEqual, Mask: ^(s.b - s.a), Value: s.a}
	}
}
