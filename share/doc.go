// Package share puts one tree together from several backends.
//
// A Share is itself a fsbackend.Backend. Its Grafts say which backend is at which path: one is the root, the others cover
// what is at their paths, as mounts do, and may be nested.
//
// # Numbers
//
// Each graft has an index, 0 for the root. The share's nodeids and file handles are the backend's own with that index in
// bits 48 and up, so that a request finds its backend with a shift and two loads (table), and the root's numbers pass as they
// are. The last index belongs to directories that the share makes up (madeUp). Numbers come from the guest: a nodeid with an
// unknown index is ESTALE, and a handle that is not of its node's graft EBADF. In structs are changed in place on the way to a
// backend, and put back after it, because a call that ends in ErrMayBlock is made again with the same struct; Out structs are
// changed after it.
//
// # Positions
//
// A position is a path that leads to a mount point: for a graft at /a/b these are "/", "/a" and "/a/b". Which node a
// directory on the way is, only its backend knows, and the host may put another one in its place at any time. So each LOOKUP
// of such a name goes to the backend, and what it finds is recorded, with a lookup that the share itself holds, so that the
// number cannot become another file's. Where the backend has no directory of that name, the share makes one up, with nothing
// in it but the way. Names that lead to mount points cannot be created over, renamed or removed. Only requests that have to
// do with names look for positions: one look-up in a map that is copied when it changes.
//
// A guest that gives back more lookups than it was given can end the share's own; all that it gains is that its own view of
// a directory on the way may be mistaken until it looks the name up again.
//
// # Grafts that come and go
//
// In a Dynamic share the calls of each part but the root are counted, by thread, and its handles (life, calls). Remove takes the
// graft off the tree and says that it leaves; whoever ends the last call finds that and closes its calls: it
// has gone, and none can begin any more. Then everybody who keeps something for the part is told (fsbackend.Changing), and the
// backend is closed on a goroutine of its own. Nothing is held meanwhile that another part's requests need.
//
// The guest may still have nodeids of what has gone. So the share counts the lookups of each part, and keeps its index until
// they are given back or the session ends; free indexes are given out in turn. A guest that lies about its lookups can have an
// index freed early: then its old numbers are numbers of the graft that comes next, which knows them or answers ESTALE. It
// could have asked for those at once. A request that is on its way meanwhile is not handed to a part that its thread was not
// chosen for (Context.Part).
//
// Guests ask for names that lead to mount points each time, for a reply says that they are stale at once. When a graft is
// added, the share looks its way up itself, so that directories which the guest knows already lead there.
//
// A backend that comes late finds a session agreed on. So Dynamic shares do without what not all backends can do, or make up
// for it: see Share.WantFlags.
//
// # What a graft adds
//
// Its Policy, id maps and the hiding of everything but one file (Graft.File) are enforced here, whatever the backend does.
// With an id map, POSIX access lists, which have ids in them, are out of reach. Policies are replaced as a whole; requests see
// one or the other. What is stored in a graft with a limit is counted: see quota.
//
// What a backend cannot do must not be ENOSYS as soon as there is a second graft: from that a guest would conclude that none
// can. Share.lacks and Share.known see to that, and CREATE, STATX, LSEEK and READDIRPLUS are made of other calls.
//
// # Parts that misbehave
//
// Requests run on threads chosen by the part that their node belongs to (PartOf). The few calls that the share makes of an
// isolated part on behalf of another's request, or of none, run on goroutines of their own and are given up after a while:
// see guard.go. A goroutine whose call never comes back is the one thing that a Share may leak.
//
// # Where things are
//
//	share.go     Config, New, and which part a request is for; table.go finds it
//	change.go    Add, Replace, Change, Remove, Grafts
//	life.go      what keeps a part, and its end; calls.go counts calls until there are none
//	part.go      numbers and ids on the way in and out; policy.go what else is hidden or refused
//	quota.go     what is stored in a part; count.go the walk that begins it
//	position.go  the tree of positions; lookup.go walks it
//	madeup.go    directories that no backend has
//	guard.go     calls that may not hang or panic; session.go WantFlags, Init, Reset, Close
//	replay.go    answers to a helper in the guest that has inotify fire there
//	attr.go, dir.go, file.go, names.go, xattr.go    requests by subject, as fuseserver's ops_*.go
package share
