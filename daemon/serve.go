package daemon

import (
	"context"
	"log/slog"
	"net"
	"time"

	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/virtiofs"
)

// server serves one share to one front-end after the other.
type server interface {
	// Serve runs the session of a front-end on conn, which stays the caller's. It returns nil when the front-end has
	// closed the connection in good order, soon after ctx is done, and otherwise what broke the session.
	Serve(ctx context.Context, conn *net.UnixConn) error
	// Stats returns what has been counted. It may be called at any time before Close.
	Stats() virtiofs.Stats
	// Close gives back what the share holds, after the last Serve. It may be called again.
	Close() error
}

// cachePolicies are the options' words in the server's own.
var cachePolicies = map[config.CachePolicy]fuseserver.CachePolicy{
	config.CacheNever:    fuseserver.CacheNever,
	config.CacheMetadata: fuseserver.CacheMetadata,
	config.CacheAuto:     fuseserver.CacheAuto,
	config.CacheAlways:   fuseserver.CacheAlways,
}

// pollWindow is an option's window in the device's words.
func pollWindow(p config.PollWindow) time.Duration {
	switch p {
	case config.PollAuto:
		return virtiofs.PollAuto
	case config.PollNever:
		return virtiofs.PollNever
	default:
		return time.Duration(p) * time.Microsecond
	}
}

// newServer makes what answers requests for t, as cfg's share is to look, and the device that they come through.
func newServer(cfg config.Config, t *tree, log *slog.Logger) (server, error) {
	share := cfg.Share
	answers, err := fuseserver.New(fuseserver.Config{
		Backend:       t.backend,
		Log:           log,
		ReadOnly:      t.readOnly,
		Writeback:     share.Writeback,
		Xattr:         share.Xattr,
		NoReaddirplus: share.NoReaddirplus,
		AllowMmap:     share.AllowMmap,
		AllowDirectIO: share.AllowDirectIO,
		PosixLock:     share.PosixLock,
		Flock:         share.Flock,
		Cache:         cachePolicies[share.Cache],
	})
	if err != nil {
		return nil, err
	}
	device, err := virtiofs.New(virtiofs.Config{
		Server: answers, Tag: share.Tag, NumRequestQueues: cfg.RequestQueues, PollWindow: pollWindow(share.PollWindow), Log: log,
	})
	if err != nil {
		return nil, err
	}
	return device, nil
}
