package control

import (
	"context"
	"encoding/json"

	"github.com/sluicefs/sluice/control/api"
)

// Daemon is what the API controls. Errors are *api.Error where somebody can do something about them; others are CodeInternal.
// Calls come from many goroutines; the daemon orders them. A call whose ctx ends has either no effect or all of it.
type Daemon interface {
	Info(ctx context.Context) (api.Info, error)
	Shares(ctx context.Context) ([]api.Share, error)
	// AddShare returns when the socket is there to be connected to.
	AddShare(ctx context.Context, spec api.ShareSpec) (api.Share, error)
	// RemoveShare ends a share. With a guest connected it is CodeBusy, unless force; the guest's requests in flight finish then.
	RemoveShare(ctx context.Context, tag string, force bool) error

	// Grafts are those of a share, the root first, then by path; those that are Leaving last.
	Grafts(ctx context.Context, tag string) ([]api.Graft, error)
	// AddGraft returns when the guest sees it. With replace what is at its path is exchanged for it in one step; otherwise there
	// must be nothing (CodeExists).
	AddGraft(ctx context.Context, tag string, spec api.GraftSpec, replace bool) (api.Graft, error)
	ChangeGraft(ctx context.Context, tag, path string, change api.GraftChange) (api.Graft, error)
	// RemoveGraft returns when the guest no longer finds it; files that are open go on.
	RemoveGraft(ctx context.Context, tag, path string) error
	// ActGraft has a graft's backend do something that is its own: an overlay's "checkpoint", say. arg and the answer are JSON.
	ActGraft(ctx context.Context, tag, path, action string, arg json.RawMessage) (json.RawMessage, error)

	// Events calls send with each event of a share after the one with ID since (0: from now on), EventHello first, until ctx ends
	// or send fails, which it returns, or until the share is removed (nil). Events too long ago to be there are told as one
	// EventRescan of "/" with the ID of the latest. send may wait for a slow client, so nothing is to be locked around it.
	Events(ctx context.Context, tag string, since uint64, send func(api.Event) error) error
	Stats(ctx context.Context) (api.Stats, error)
}
