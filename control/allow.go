package control

import (
	"fmt"
	"math"
	"net"
	"slices"
	"strings"

	"github.com/mdlayher/vsock"

	"github.com/sluicefs/sluice/control/api"
)

// AnyCID in Allow.CIDs is every guest of the host, VMADDR_CID_ANY of vsock(7).
const AnyCID = math.MaxUint32

// Allow is what those on the other end of a listener may do: nothing but what is named. Where it holds, paths and ids of the
// host are left out of answers, and what is said of shares that are not named is what is said of those that do not exist.
type Allow struct {
	// Operations are operationIds of the OpenAPI document. Those that take paths of the host cannot be among them.
	Operations []string
	// Shares are the tags of the shares there are for them. They need not exist yet.
	Shares []string
	// CIDs are the guests that may connect, for vsock listeners only; AnyCID is all.
	CIDs []uint32
}

// validate checks everything but the CIDs.
func (a *Allow) validate() error {
	if len(a.Operations) == 0 {
		return fmt.Errorf("no operation is allowed: expected some of %s", strings.Join(allowable(), ", "))
	}
	for _, name := range a.Operations {
		i := slices.IndexFunc(routes, func(r route) bool { return r.operation == name })
		switch {
		case i < 0:
			return fmt.Errorf("no operation %q: expected some of %s", name, strings.Join(allowable(), ", "))
		case routes[i].hostOnly != "":
			return fmt.Errorf("operation %q cannot be allowed to a guest: %s", name, routes[i].hostOnly)
		}
	}
	for _, tag := range a.Shares {
		if err := api.CheckTag(tag); err != nil {
			return fmt.Errorf("share that is allowed: %w", err)
		}
	}
	return nil
}

// allowable returns the operations that can be allowed.
func allowable() []string {
	var names []string
	for _, r := range routes {
		if r.hostOnly == "" {
			names = append(names, r.operation)
		}
	}
	return names
}

// operation says whether one may be done. A nil Allow is an operator of the host.
func (a *Allow) operation(name string) bool { return a == nil || slices.Contains(a.Operations, name) }

// share says whether one is there to be seen.
func (a *Allow) share(tag string) bool { return a == nil || slices.Contains(a.Shares, tag) }

// cid returns the context id of the other end, if it has one.
func cid(c net.Conn) (uint32, bool) {
	addr, ok := c.RemoteAddr().(*vsock.Addr)
	if !ok {
		return 0, false
	}
	return addr.ContextID, true
}

// The following leave out what a guest has no business to know.

func (a *Allow) showGraftSpec(g api.GraftSpec) api.GraftSpec {
	if a != nil {
		g.Source, g.Options, g.UIDMap, g.GIDMap = "", nil, nil, nil
	}
	return g
}

func (a *Allow) showGraft(g api.Graft) api.Graft {
	g.GraftSpec = a.showGraftSpec(g.GraftSpec)
	return g
}

func (a *Allow) showShare(s api.Share) api.Share {
	if a == nil {
		return s
	}
	s.Socket, s.SocketGroup = "", ""
	s.Grafts = slices.Clone(s.Grafts) // they may be the daemon's own
	for i := range s.Grafts {
		s.Grafts[i] = a.showGraftSpec(s.Grafts[i])
	}
	return s
}

// showStats also leaves out what is of the whole daemon: it tells of other guests.
func (a *Allow) showStats(st api.Stats) api.Stats {
	if a == nil {
		return st
	}
	var out api.Stats
	for _, s := range st.Shares {
		if a.share(s.Tag) {
			out.Shares = append(out.Shares, s)
		}
	}
	for _, e := range st.Events {
		if a.share(e.Tag) {
			out.Events = append(out.Events, e)
		}
	}
	for _, i := range st.Images {
		if a.share(i.Tag) {
			i.CacheBytes, i.CacheBudget = 0, 0 // of a cache that others may share
			out.Images = append(out.Images, i)
		}
	}
	return out
}
