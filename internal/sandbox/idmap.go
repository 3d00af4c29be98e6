package sandbox

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// IDMap is a range of user or group ids that a user namespace shows under other numbers (user_namespaces(7)).
type IDMap struct {
	Inside  uint32 // the first id inside
	Outside uint32 // the id that it is on the host
	Count   uint32 // how many ids follow each other on both sides, from 1
}

// maxIDMaps is how many entries the kernel takes (UID_GID_MAP_MAX_EXTENTS).
const maxIDMaps = 340

// ParseIDMap parses the value of --uid-map and --gid-map: ":inside:outside:count:". The first character, whichever it is,
// separates the fields and ends them.
func ParseIDMap(text string) (IDMap, error) {
	malformed := fmt.Errorf("map of ids %q: expected :INSIDE:OUTSIDE:COUNT:, three numbers with a separator around each", text)
	if text == "" || text[0] >= '0' && text[0] <= '9' || text[0] >= 0x80 {
		return IDMap{}, malformed
	}
	fields := strings.Split(text, text[:1])
	if len(fields) != 5 || fields[4] != "" {
		return IDMap{}, malformed
	}
	var numbers [3]uint32
	for i := range numbers {
		n, err := strconv.ParseUint(fields[i+1], 10, 32)
		if err != nil {
			return IDMap{}, fmt.Errorf("%w, each from 0 to %d", malformed, uint32(math.MaxUint32-1))
		}
		numbers[i] = uint32(n)
	}
	m := IDMap{Inside: numbers[0], Outside: numbers[1], Count: numbers[2]}
	if err := m.Validate(); err != nil {
		return IDMap{}, fmt.Errorf("map of ids %q: %w", text, err)
	}
	return m, nil
}

// Validate says what is wrong with the range.
func (m IDMap) Validate() error {
	if m.Count == 0 {
		return errors.New("a range of no ids: expected a count of at least 1")
	}
	// The id of all ones means "none" and belongs to no range.
	if uint64(max(m.Inside, m.Outside))+uint64(m.Count) > math.MaxUint32 {
		return fmt.Errorf("a range beyond the last id: expected it to end at %d", uint32(math.MaxUint32-1))
	}
	return nil
}

func (m IDMap) String() string {
	return fmt.Sprintf(":%d:%d:%d:", m.Inside, m.Outside, m.Count)
}

// checkIDMaps says what is wrong with the entries of one map, in which own is the id of who maps.
func checkIDMaps(maps []IDMap, own uint32) error {
	if len(maps) > maxIDMaps {
		return fmt.Errorf("%d ranges: expected at most %d", len(maps), maxIDMaps)
	}
	home := false
	for i, m := range maps {
		if err := m.Validate(); err != nil {
			return err
		}
		for _, other := range maps[:i] {
			if overlap(m.Inside, other.Inside, m.Count, other.Count) || overlap(m.Outside, other.Outside, m.Count, other.Count) {
				return fmt.Errorf("the ranges %s and %s overlap: expected every id once", other, m)
			}
		}
		home = home || m.Inside == 0 || own-m.Outside < m.Count
	}
	if !home {
		return fmt.Errorf("neither id 0 inside nor id %d of the host is in a range: expected one of them, for the daemon itself", own)
	}
	return nil
}

func overlap(a, b, countA, countB uint32) bool {
	return b-a < countA || a-b < countB
}

// mapsRoot says whether there is an id 0 inside.
func mapsRoot(maps []IDMap) bool {
	for _, m := range maps {
		if m.Inside == 0 {
			return true
		}
	}
	return false
}
