package daemon

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/internal/listen"
	"github.com/sluicefs/sluice/internal/sandbox"
)

// With --sandbox namespace there are two processes. The one that was started keeps what is outside: the socket's path, its
// pid file, the service manager. The other one, in the namespaces, serves.

// statusError ends this process with the status of the one that served, which has said why.
type statusError struct{ status int }

func (e statusError) Error() string {
	return fmt.Sprintf("the serving process ended with status %d", e.status)
}

// Descriptors handed to the serving process, in this order.
const (
	handedSocket = iota
	handedReady  // the write end of a pipe: a byte once it serves
	handedOutput // the first of the outputs that there are
)

// launch starts the serving process, tells the service manager when that is ready, passes signals on, and returns when it
// has ended.
func (p *program) launch(cfg config.Config, what *source, log *slog.Logger, signals <-chan os.Signal) (err error) {
	needs, err := p.registry.Needs(what.bundle.Spec)
	if err != nil {
		return err
	}
	uids, gids, err := idMaps(cfg)
	if err != nil {
		return usageError{err}
	}
	ln, err := openListener(cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ln.Close()) }()
	socket, err := ln.File()
	if err != nil {
		return err
	}
	ready, toldReady, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("create a pipe: %w", errors.Join(err, socket.Close()))
	}
	defer ready.Close()
	files := []*os.File{handedSocket: socket, handedReady: toldReady}
	out, err := createOutputs(cfg)
	if err != nil {
		return errors.Join(err, socket.Close(), toldReady.Close())
	}
	files = append(files, out.files()...)

	child, err := sandbox.Start(sandbox.Launch{
		Network: needs.Network, UIDMap: uids, GIDMap: gids, Args: os.Args, Keep: toRemoveSocket(cfg),
		Files: files,
	})
	if err != nil {
		return err
	}
	// Only the serving process may hold the socket: it refuses further front-ends by closing it.
	release := ln.Refuse
	if ln.Connected() {
		release = ln.Close
	}
	if err := release(); err != nil {
		log.Warn("cannot close the socket", "error", err)
	}
	go func() {
		if n, _ := io.ReadFull(ready, make([]byte, 1)); n == 1 {
			tell(p.dialNotify(log), log)
		}
	}()
	status, err := child.Wait(signals)
	if err != nil || status == exitOK {
		return err
	}
	return statusError{status}
}

// toRemoveSocket are the capabilities that it takes to remove the socket in the end from a directory of somebody else's.
func toRemoveSocket(cfg config.Config) sandbox.CapSet {
	var st unix.Stat_t
	if cfg.SocketPath == "" || unix.Stat(filepath.Dir(cfg.SocketPath), &st) != nil || int(st.Uid) == os.Geteuid() {
		return 0
	}
	return 1 << unix.CAP_DAC_OVERRIDE
}

// dialNotify connects to the service manager. Not to reach it is no reason not to serve.
func (p *program) dialNotify(log *slog.Logger) *listen.Notifier {
	n, err := listen.DialNotify(p.getenv)
	if err != nil {
		log.Warn("the service manager does not know that sluiced is ready", "error", err)
	}
	return n
}

// tell tells the service manager that sluiced is ready, and hangs up.
func tell(n *listen.Notifier, log *slog.Logger) {
	if err := errors.Join(n.Ready(), n.Close()); err != nil {
		log.Warn("the service manager does not know that sluiced is ready", "error", err)
	}
}
