package main

import (
	"context"
	"errors"
	"log/slog"
	"net"

	"github.com/sluicefs/sluice/internal/config"
)

// server serves one share to one front-end after the other.
type server interface {
	// Serve runs the session of a front-end on conn, which stays the caller's. It returns nil when the front-end has
	// closed the connection in good order, soon after ctx is done, and otherwise what broke the session.
	Serve(ctx context.Context, conn *net.UnixConn) error
	// Close gives back what the share holds, after the last Serve. It may be called again.
	Close() error
}

// newServer opens the share of cfg. Whatever is wrong with it should be found here, before there is a socket.
func newServer(config.Config, *slog.Logger) (server, error) {
	return nil, errors.New("not wired")
}
