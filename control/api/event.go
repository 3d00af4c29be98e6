package api

import "time"

// Kinds of events.
const (
	EventHello  = "hello"  // the first of a stream: Token is set
	EventCreate = "create" // Path has come into being, and its content is complete
	EventModify = "modify" // the content of Path has changed, and is complete
	EventAttrib = "attrib" // mode, owner, times or extended attributes have
	EventDelete = "delete" // Path is gone
	EventRename = "rename" // Path is To now; what was at To before is gone
	EventRescan = "rescan" // anything in the directory Path, or below, may have changed: events were lost or gathered
	// EventLimit says that Path's changes will not be sent, because a limit of the graft is reached; its content is current.
	EventLimit = "limit"
)

// Event is a change that the host has made in a watched graft. Events of a share are in order, and later than what they tell.
type Event struct {
	// ID rises by 1 in each share, and no two runs of the daemon give the same. That of EventHello is of the event before the first to come.
	ID   uint64    `json:"id"`
	Time time.Time `json:"time"`
	Kind string    `json:"kind"`
	// Path and To are paths in the share, that of the graft included.
	Path string `json:"path,omitempty"`
	To   string `json:"to,omitempty"`
	// Dir says that it is a directory.
	Dir bool `json:"dir,omitempty"`
	// Token is what sluice-agent has to prove in the guest: see share.Share.ReplayToken.
	Token string `json:"token,omitempty"`
}
