// Package share puts one tree together from several backends.
//
// A Share is itself a fsbackend.Backend. Its Grafts say which backend is at which path: one is the root, the others cover
// what is at their paths, as mounts do, and may be nested.
//
// # Numbers
//
// Each graft has an index, 0 for the root. The share's nodeids and file handles are the backend's own with that index in
// bits 48 and up, so that a request finds its backend with a shift, and the root's numbers pass as they are. One more index
// belongs to directories that the share makes up (madeUp). Numbers come from the guest: a nodeid with an unknown index is
// ESTALE, and a handle that is not of its node's graft EBADF. In structs are changed in place on the way to a backend, and
// put back after it, because a call that ends in ErrMayBlock is made again with the same struct; Out structs are changed
// after it.
//
// # Positions
//
// A position is a path that leads to a mount point: for a graft at /a/b these are "/", "/a" and "/a/b". Which node a
// directory on the way is, only its backend knows, and the host may put another one in its place at any time. So each LOOKUP
// of such a name goes to the backend, and what it finds is recorded, with a lookup that the share itself holds, so that the
// number cannot become another file's. Where the backend has no directory of that name, the share makes one up, with nothing
// in it but the way. Names that lead to mount points cannot be created over, renamed or removed. Only requests that have to
// do with names look for positions: one look-up in a map that never changes.
//
// A guest that gives back more lookups than it was given can end the share's own; all that it gains is that its own view of
// a directory on the way may be mistaken until it looks the name up again.
//
// # What a graft adds
//
// Read-only, id maps and the hiding of everything but one file (Graft.File) are enforced here, whatever the backend does.
// With an id map, POSIX access lists, which have ids in them, are out of reach.
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
//	share.go     Config, New, and which part a request is for
//	part.go      numbers and ids on the way in and out
//	position.go  the tree of positions; lookup.go walks it
//	madeup.go    directories that no backend has
//	guard.go     calls that may not hang or panic; session.go Init, Reset, Close
//	replay.go    answers to a helper in the guest that has inotify fire there
//	attr.go, dir.go, file.go, names.go, xattr.go    requests by subject, as fuseserver's ops_*.go
package share
