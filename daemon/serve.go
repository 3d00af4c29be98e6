package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"

	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/virtiofs"
)

// server serves one share to one front-end after the other.
type server interface {
	// Serve runs the session of a front-end on conn, which stays the caller's. It returns nil when the front-end has
	// closed the connection in good order, soon after ctx is done, and otherwise what broke the session.
	Serve(ctx context.Context, conn *net.UnixConn) error
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

// newServer opens the share of cfg: the directory, what answers requests for it, and the device that they come through.
func newServer(cfg config.Config, log *slog.Logger) (server, error) {
	share := cfg.Share
	backend, err := passthrough.New(passthrough.Config{Dir: share.Dir, MaxFDs: share.MaxFDs, MaxInodes: share.MaxInodes, Log: log})
	if err != nil {
		return nil, err
	}
	answers, err := fuseserver.New(fuseserver.Config{
		Backend:       backend,
		Log:           log,
		ReadOnly:      share.ReadOnly,
		Writeback:     share.Writeback,
		Xattr:         share.Xattr,
		NoReaddirplus: share.NoReaddirplus,
		AllowMmap:     share.AllowMmap,
		AllowDirectIO: share.AllowDirectIO,
		Cache:         cachePolicies[share.Cache],
	})
	if err != nil {
		return nil, errors.Join(err, backend.Close())
	}
	device, err := virtiofs.New(virtiofs.Config{Server: answers, Tag: share.Tag, NumRequestQueues: cfg.RequestQueues, Log: log})
	if err != nil {
		return nil, errors.Join(err, answers.Close())
	}
	return device, nil
}
