package daemon

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/bundle"
)

// What the keeper asks the server, over the link. The keeper has checked what people say; the server does as it is told.
const (
	askHello       = "hello"        // answered once the server is confined
	askAddShare    = "add share"    // shareOrder; a share without grafts but its root's, which nobody can connect to
	askAddGraft    = "add graft"    // graftOrder, and its directory
	askChangeGraft = "change graft" // graftChange → graftChanged
	askRemoveGraft = "remove graft" // graftName
	askOpenShare   = "open share"   // a tag, and the socket: front-ends may come
	askRemoveShare = "remove share" // shareRemoval
	askShares      = "shares"       // → []shareStatus
	askGrafts      = "grafts"       // a tag → []api.Graft, of which the keeper knows better what was asked for
	askReplay      = "replay"       // a tag: from now on sluice-agent may come → its token
	askAnnounce    = "announce"     // announcement
	askStats       = "stats"        // → api.Stats
	askTell        = "tell"         // tellOrder, and files → what the half of a graft inside answers
	askGone        = "gone"         // the ID of a graft in two halves; answered when it is gone for good
)

// shareOrder asks for a share. A graft at "/", if there is one, comes with it, and its directory.
type shareOrder struct {
	Spec api.ShareSpec // without Grafts
	Root *graftOrder
}

// graftOrder asks for a graft.
type graftOrder struct {
	Tag     string
	Replace bool
	Spec    api.GraftSpec
	Mount   bundle.Mount
	// OCI is what extensions are told is being served.
	OCI *specs.Spec
	// Dir says that the directory, that of Mount or of its file, comes with the message.
	Dir bool
	// Hosted is of a graft in two halves, whose descriptors come with the message instead.
	Hosted *hostedOrder
}

type graftName struct{ Tag, Path string }

type graftChange struct {
	graftName
	Change api.GraftChange
}

// graftChanged says that a graft has changed.
type graftChanged struct {
	// Unsettled says that it is read-only from now on, but that a change by the guest that began before still goes on.
	Unsettled bool
}

type shareRemoval struct {
	Tag   string
	Force bool
}

// shareStatus is what the server knows of a share that the keeper does not.
type shareStatus struct {
	Tag    string
	State  string // api.StateWaiting and the like
	Guests uint64
}

// announcement is events that sluice-agent is about to be told.
type announcement struct {
	Tag    string
	Events []api.Event
}
