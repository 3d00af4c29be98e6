package bundle

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// maxRanges is the kernel's limit on the ranges of one map, UID_GID_MAP_MAX_EXTENTS.
const maxRanges = 340

// IDRange says that Count ids from Guest on, in the guest, are those from Host on in the source. Ids in no range of
// a map have no counterpart.
type IDRange struct{ Guest, Host, Count uint32 }

// idMaps is a pair of maps; nil is the identity.
type idMaps struct{ uid, gid []IDRange }

// readMaps checks a pair of maps as a configuration has them. name says whose they are.
func readMaps(uid, gid []specs.LinuxIDMapping) (m idMaps, err error) {
	if (len(uid) == 0) != (len(gid) == 0) {
		return idMaps{}, errors.New("uidMappings and gidMappings: one is there without the other: give both")
	}
	if m.uid, err = readMap(uid); err != nil {
		return idMaps{}, fmt.Errorf("uidMappings: %w", err)
	}
	if m.gid, err = readMap(gid); err != nil {
		return idMaps{}, fmt.Errorf("gidMappings: %w", err)
	}
	return m, nil
}

func readMap(mappings []specs.LinuxIDMapping) ([]IDRange, error) {
	if len(mappings) > maxRanges {
		return nil, fmt.Errorf("%d ranges: the kernel takes %d at most", len(mappings), maxRanges)
	}
	var ranges []IDRange
	for _, m := range mappings {
		// The last id, -1, is no id: chown takes it for "leave it".
		if m.Size == 0 || m.Size > math.MaxUint32-max(m.ContainerID, m.HostID) {
			return nil, fmt.Errorf("range of %d ids from %d (containerID) and %d (hostID): expected at least one, and none above %d", m.Size, m.ContainerID, m.HostID, uint32(math.MaxUint32-1))
		}
		ranges = append(ranges, IDRange{Guest: m.ContainerID, Host: m.HostID, Count: m.Size})
	}
	for _, side := range []struct {
		name  string
		start func(IDRange) uint32
	}{{"hostID", host}, {"containerID", guest}} {
		sortBy(ranges, side.start)
		for i := 1; i < len(ranges); i++ {
			if a, b := ranges[i-1], side.start(ranges[i]); b < side.start(a)+a.Count {
				return nil, fmt.Errorf("two ranges have %s %d", side.name, b)
			}
		}
	}
	return ranges, nil
}

func guest(r IDRange) uint32 { return r.Guest }
func host(r IDRange) uint32  { return r.Host }

func sortBy(ranges []IDRange, start func(IDRange) uint32) {
	slices.SortFunc(ranges, func(a, b IDRange) int { return cmp.Compare(start(a), start(b)) })
}

// through returns the maps from the guest's ids to those of the source of a mount that has maps of its own: mount turns
// the source's ids (its Guest side) into the host's, and m, the container's, turns those into the guest's.
func (m idMaps) through(mount idMaps) (idMaps, error) {
	c := idMaps{compose(m.uid, mount.uid), compose(m.gid, mount.gid)}
	// Without ranges it would read as the identity.
	if len(c.uid) == 0 || len(c.gid) == 0 {
		return idMaps{}, errors.New("uidMappings, gidMappings: no id of the mount's ends up as one of the container's: compare its hostIDs with those of linux.uidMappings and linux.gidMappings")
	}
	return c, nil
}

// compose joins two maps on their Host sides.
func compose(container, mount []IDRange) []IDRange {
	if container == nil {
		container = []IDRange{{0, 0, math.MaxUint32}}
	}
	var out []IDRange
	for _, c := range container {
		for _, m := range mount {
			lo := max(c.Host, m.Host)
			hi := min(c.Host+c.Count, m.Host+m.Count)
			if lo < hi {
				out = append(out, IDRange{Guest: c.Guest + lo - c.Host, Host: m.Guest + lo - m.Host, Count: hi - lo})
			}
		}
	}
	sortBy(out, guest)
	return joinAdjacent(out)
}

// joinAdjacent makes one range of those that continue each other.
func joinAdjacent(ranges []IDRange) []IDRange {
	var out []IDRange
	for _, r := range ranges {
		if n := len(out) - 1; n >= 0 && out[n].Guest+out[n].Count == r.Guest && out[n].Host+out[n].Count == r.Host {
			out[n].Count += r.Count
			continue
		}
		out = append(out, r)
	}
	return out
}
