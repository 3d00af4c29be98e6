package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/virtiofs"
)

// TestMain makes the test binary a sluiced with a fakeServer when a script runs it by that name.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"sluiced": func() {
			p := program{
				stdio:       stdio{out: os.Stdout, err: os.Stderr},
				getenv:      fakeSystemd,
				newServer:   newFakeServer,
				stopTimeout: stopTimeout,
			}
			if os.Getenv("HALVES") != "" {
				var err error
				if p.registry, err = extensions.NewRegistry(newHalves()); err != nil {
					panic(err)
				}
			}
			if d, err := time.ParseDuration(os.Getenv("STOP_TIMEOUT")); err == nil {
				p.stopTimeout = d
			}
			os.Exit(p.run(context.Background(), os.Args[1:]))
		},
	})
}

// fakeSystemd is os.Getenv, but LISTEN_PID=self is the pid that only systemd can know before the process starts.
func fakeSystemd(name string) string {
	if v := os.Getenv(name); name != "LISTEN_PID" || v != "self" {
		return v
	}
	return strconv.Itoa(os.Getpid())
}

// fakeServer is a server whose front-end says what shall become of the session.
type fakeServer struct {
	log       *slog.Logger
	connected atomic.Int32
}

func newFakeServer(cfg config.Config, _ *tree, log *slog.Logger) (server, error) {
	if cfg.Share.Tag == "unservable" {
		return nil, errors.New("open the share: made to fail")
	}
	log.Debug("serving", "max-fds", cfg.Share.MaxFDs, "max-inodes", cfg.Share.MaxInodes)
	return &fakeServer{log: log}, nil
}

// Stats implements server.
func (s *fakeServer) Stats() virtiofs.Stats { return virtiofs.Stats{Connected: s.connected.Load() > 0} }

// Serve ends in good order with the connection, in an error after "break" and "gone", and never after "hang"; "create" makes a file.
func (s *fakeServer) Serve(ctx context.Context, conn *net.UnixConn) error {
	s.connected.Add(1)
	defer s.connected.Add(-1)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(0, 1)) })
	defer stop()
	buf := make([]byte, 16)
	for {
		n, err := conn.Read(buf)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		switch string(buf[:n]) {
		case "create":
			if err := os.WriteFile("created", nil, 0o666); err != nil {
				return err
			}
			s.log.Info("created")
		case "break":
			return errors.New("message 99: not a request of vhost-user")
		case "gone":
			return fmt.Errorf("send the reply: %w", syscall.EPIPE)
		case "hang":
			s.log.Info("hanging")
			select {}
		}
	}
}

func (s *fakeServer) Close() error {
	s.log.Info("server closed")
	return nil
}
