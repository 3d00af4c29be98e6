package api

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

const (
	// MaxRequestQueues bounds ShareSpec.RequestQueues: vhost-user has 8 bits for the index of a queue, and hiprio is one of them.
	MaxRequestQueues = 255
	// MaxIDRanges bounds a map of ids, as the kernel does (UID_GID_MAP_MAX_EXTENTS): it is gone through for each id.
	MaxIDRanges = 340
	// MaxPollUS bounds ShareSpec.PollUS.
	MaxPollUS = 1000
)

// Backends that every daemon has.
const (
	BackendPassthrough = "passthrough"
	BackendMem         = "mem"
)

// CachePolicies are what Cache can be in ShareSpec and GraftSpec, besides "".
func CachePolicies() []string { return []string{"never", "metadata", "auto", "always"} }

// FieldError is what is wrong with one field of a request.
type FieldError struct {
	// Field is its name in JSON, from the value that was validated on: "tag", "grafts[2].uid_map[0]".
	Field string
	// Problem says what is wrong and what was expected. It names no field of more than one word, as files spell those otherwise.
	Problem string
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Problem }

// API is e as the answer to a request.
func (e *FieldError) API() *Error { return &Error{Code: CodeInvalid, Message: e.Error()} }

// TOML is Field as the configuration file spells it: "graft[2].uid-map[0]".
func (e *FieldError) TOML() string {
	return strings.NewReplacer("_", "-", "grafts", "graft", "lowers", "lower").Replace(e.Field)
}

// Validate reports the first of Problems as *FieldError.
func (s *ShareSpec) Validate() error { return first(s.Problems()) }

// Validate reports the first of Problems as *FieldError.
func (g *GraftSpec) Validate() error { return first(g.Problems()) }

// Validate reports the first thing that cannot work as *FieldError.
func (c *GraftChange) Validate() error {
	var all problems
	if c.Cache != nil {
		all.cache(*c.Cache)
	}
	return first(all)
}

func first(all []*FieldError) error {
	if len(all) == 0 {
		return nil
	}
	return all[0]
}

// Problems are all that cannot work whatever the host is like.
func (s *ShareSpec) Problems() []*FieldError {
	var all problems
	all.check("tag", checkTag(s.Tag))
	if s.Socket != "" {
		all.check("socket", checkSocket(s.Socket))
	}
	if hasControl(s.SocketGroup) {
		all.add("socket_group", "%s has a control character: expected the name of a group", quote(s.SocketGroup))
	}
	all.cache(s.Cache)
	if s.RequestQueues < 0 || s.RequestQueues > MaxRequestQueues {
		all.add("num_request_queues", "%d is out of range: expected 1 to %d, or 0 for the default", s.RequestQueues, MaxRequestQueues)
	}
	if s.MaxFDs < 0 {
		all.add("max_fds", "%d is out of range: expected a number of descriptors, or 0 for the default", s.MaxFDs)
	}
	if s.MaxInodes < 0 {
		all.add("max_inodes", "%d is out of range: expected a number of inodes, or 0 for the default", s.MaxInodes)
	}
	if n, err := strconv.ParseUint(s.PollUS, 10, 32); s.PollUS != "" && s.PollUS != "auto" && (err != nil || n > MaxPollUS) {
		all.add("poll_us", "%s is no time to poll for: expected auto, or 0 to %d microseconds", quote(s.PollUS), MaxPollUS)
	}
	at := make(map[string]int, len(s.Grafts))
	for i := range s.Grafts {
		g := &s.Grafts[i]
		for _, e := range g.Problems() {
			all = append(all, &FieldError{fmt.Sprintf("grafts[%d].%s", i, e.Field), e.Problem})
		}
		if before, taken := at[g.Path]; !taken {
			at[g.Path] = i
		} else {
			all.add(fmt.Sprintf("grafts[%d].path", i), "%s is where graft %d is, counted from 0: expected one graft at each path", quote(g.Path), before)
		}
	}
	return all
}

// Problems are all that cannot work whatever the host is like.
func (g *GraftSpec) Problems() []*FieldError {
	var all problems
	all.check("path", checkPath(g.Path))
	all.cache(g.Cache)
	all.backend(g)
	if g.Source != "" {
		all.check("source", checkSource(g.Source))
	} else {
		if g.Watch {
			all.add("watch", "there is nothing of the host to watch: expected a source, or to be left out")
		}
		if g.FollowMounts {
			all.add("follow_mounts", "there is nothing of the host to follow: expected a source, or to be left out")
		}
	}
	if g.WatchMaxFiles < 0 {
		all.add("watch_max_files", "%d is out of range: expected a number of files, or 0 for the default", g.WatchMaxFiles)
	}
	if g.WatchMaxBytes > math.MaxInt64 {
		all.add("watch_max_bytes", "%d is out of range: expected at most %d bytes", g.WatchMaxBytes, int64(math.MaxInt64))
	}
	if !g.Watch && (g.WatchMaxFiles != 0 || g.WatchMaxBytes != 0) {
		all.add("watch", "watch_max_files and watch_max_bytes are limits of it: expected it to be true")
	}
	all.idMap("uid_map", g.UIDMap)
	all.idMap("gid_map", g.GIDMap)
	all.lowers("lowers", g.Lowers, 1)
	return all
}

// problems gathers what is wrong.
type problems []*FieldError

func (all *problems) add(field, format string, args ...any) {
	*all = append(*all, &FieldError{field, fmt.Sprintf(format, args...)})
}

// check adds problem if there is one.
func (all *problems) check(field, problem string) {
	if problem != "" {
		all.add(field, "%s", problem)
	}
}

func (all *problems) cache(policy string) {
	if policy != "" && !slices.Contains(CachePolicies(), policy) {
		all.add("cache", "%s is not a cache policy: expected one of %s", quote(policy), strings.Join(CachePolicies(), ", "))
	}
}

// maxLowers bounds the trees that one is made of, and maxNested how deep they are made of others.
const (
	maxLowers = 500
	maxNested = 4
)

// lowers checks what a tree at depth is made of.
func (all *problems) lowers(field string, lowers []LowerSpec, depth int) {
	switch {
	case len(lowers) > maxLowers:
		all.add(field, "there are %d: expected at most %d", len(lowers), maxLowers)
		return
	case len(lowers) > 0 && depth > maxNested:
		all.add(field, "they are made of others, and those again, %d deep: expected at most %d", depth, maxNested)
		return
	}
	for i := range lowers {
		l := &lowers[i]
		at := fmt.Sprintf("%s[%d]", field, i)
		if strings.Contains(l.Backend, "/") || hasControl(l.Backend) {
			all.add(at+".backend", "%s cannot be a name: expected %s, %s or an extension's", quote(l.Backend), BackendPassthrough, BackendMem)
		}
		switch {
		case l.Source != "":
			all.check(at+".source", checkSource(l.Source))
		case l.Backend == "" || l.Backend == BackendPassthrough:
			all.add(at+".source", "there is nothing to serve: expected a directory of the host, or another backend")
		}
		all.lowers(at+".lowers", l.Lowers, depth+1)
	}
}

// backend holds g's backend against what only some backends take.
func (all *problems) backend(g *GraftSpec) {
	if strings.Contains(g.Backend, "/") || hasControl(g.Backend) {
		all.add("backend", "%s cannot be a name: expected %s, %s or an extension's", quote(g.Backend), BackendPassthrough, BackendMem)
	}
	switch {
	case g.Backend == BackendMem && g.Source != "":
		all.add("source", "backend %s begins empty and has none: expected it to be left out, or another backend", BackendMem)
	case g.Backend == BackendPassthrough && g.Source == "":
		all.add("source", "backend %s has nothing to serve: expected a directory or a file of the host", BackendPassthrough)
	}
	if g.Backend != BackendMem && g.Backend != BackendPassthrough {
		return
	}
	if len(g.Lowers) > 0 {
		all.add("lowers", "backend %s is made of no others: expected them to be left out, or another backend", g.Backend)
	}
	if g.Type != "" {
		all.add("type", "it is for extensions: expected it to be left out with backend %s", g.Backend)
	}
	if len(g.Options) > 0 {
		all.add("options", "they are for extensions: expected them to be left out with backend %s", g.Backend)
	}
}

// idMap wants of a map what share.IDMap wants.
func (all *problems) idMap(field string, m []IDRange) {
	if len(m) > MaxIDRanges {
		all.add(field, "it has %d ranges: expected at most %d", len(m), MaxIDRanges)
		return
	}
	whole := true
	for i, r := range m {
		switch {
		case r.Count == 0:
			all.add(fmt.Sprintf("%s[%d].count", field, i), "it is 0: expected at least 1")
			whole = false
		case r.Count > math.MaxUint32-max(r.Guest, r.Host):
			all.add(fmt.Sprintf("%s[%d]", field, i), "the range goes beyond the last id: expected it to end at %d", uint32(math.MaxUint32-1))
			whole = false
		}
	}
	if whole {
		all.overlap(field, "guest", m, func(r IDRange) uint32 { return r.Guest })
		all.overlap(field, "host", m, func(r IDRange) uint32 { return r.Host })
	}
}

// overlap adds each range that has an id in common with another, of those that from tells the first of.
func (all *problems) overlap(field, side string, m []IDRange, from func(IDRange) uint32) {
	order := make([]int, len(m))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(from(m[a]), from(m[b])) })
	for i := 1; i < len(order); i++ {
		a, b := order[i-1], order[i]
		if from(m[b])-from(m[a]) < m[a].Count {
			all.add(fmt.Sprintf("%s[%d].%s", field, max(a, b), side), "%d is in two ranges, also in %d, counted from 0: expected each id in one",
				from(m[b]), min(a, b))
		}
	}
}
