package frontend

import (
	"math/bits"
	"time"
)

// subBits says how fine a histogram is: 2^subBits buckets for each power of two, so that a value is known to within 1.6 %.
const subBits = 6

// histogram counts durations in ns in log-linear buckets, without allocating.
type histogram [(64 - subBits + 1) << subBits]uint64

func (h *histogram) add(d time.Duration) {
	h[bucket(uint64(max(d, 0)))]++
}

func bucket(v uint64) int {
	if v < 1<<subBits {
		return int(v)
	}
	shift := bits.Len64(v) - subBits - 1
	return shift<<subBits + int(v>>shift)
}

// upper returns the largest value of bucket i.
func upper(i int) time.Duration {
	if i < 2<<subBits {
		return time.Duration(i)
	}
	shift := i>>subBits - 1
	return time.Duration((uint64(i-shift<<subBits)+1)<<shift - 1)
}

func (h *histogram) merge(o *histogram) {
	for i, n := range o {
		h[i] += n
	}
}

// quantile returns the duration that the fraction p of all is not longer than.
func (h *histogram) quantile(p float64) time.Duration {
	total := uint64(0)
	for _, n := range h {
		total += n
	}
	rank, seen := uint64(p*float64(total)), uint64(0)
	for i, n := range h {
		if seen += n; n > 0 && seen > min(rank, total-1) {
			return upper(i)
		}
	}
	return 0
}
