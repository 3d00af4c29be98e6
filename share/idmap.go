package share

import (
	"fmt"
	"math"
)

// OverflowID is what an id that no range of an IDMap covers reads as (the kernel's overflowuid and overflowgid).
const OverflowID = 65534

// IDRange says that the guest's ids from Guest on are the backend's from Host on, Count of them.
type IDRange struct{ Guest, Host, Count uint32 }

// IDMap translates user or group ids between a guest and a backend, as the kernel's idmapped mounts do. The zero value
// leaves every id as it is. Ids outside its ranges read as OverflowID; to create with one, or to set it, is EOVERFLOW.
type IDMap []IDRange

// Validate says which range is wrong: each has at least one id, none reaches 4294967295, which is no id, and on neither
// side do two overlap.
func (m IDMap) Validate() error {
	for i, r := range m {
		switch {
		case r.Count == 0:
			return fmt.Errorf("id range %d:%d:%d is empty: expected a count of at least 1", r.Guest, r.Host, r.Count)
		case r.Count > math.MaxUint32-r.Guest || r.Count > math.MaxUint32-r.Host:
			return fmt.Errorf("id range %d:%d:%d goes beyond the last id, %d", r.Guest, r.Host, r.Count, uint32(math.MaxUint32-1))
		}
		for _, o := range m[:i] {
			if overlap(r.Guest, r.Count, o.Guest, o.Count) || overlap(r.Host, r.Count, o.Host, o.Count) {
				return fmt.Errorf("id ranges %d:%d:%d and %d:%d:%d overlap", o.Guest, o.Host, o.Count, r.Guest, r.Host, r.Count)
			}
		}
	}
	return nil
}

func overlap(a, aCount, b, bCount uint32) bool {
	return a-b < bCount || b-a < aCount
}

// host returns the backend's id for the guest's.
func (m IDMap) host(id uint32) (uint32, bool) {
	for i := range m {
		if r := &m[i]; id-r.Guest < r.Count {
			return id - r.Guest + r.Host, true
		}
	}
	if len(m) == 0 {
		return id, true
	}
	return OverflowID, false
}

// guest returns the guest's id for the backend's.
func (m IDMap) guest(id uint32) uint32 {
	for i := range m {
		if r := &m[i]; id-r.Host < r.Count {
			return id - r.Host + r.Guest
		}
	}
	if len(m) == 0 {
		return id
	}
	return OverflowID
}
