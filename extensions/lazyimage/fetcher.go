package lazyimage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/internal/program"
)

const (
	// programName is the fetcher's.
	programName = "sluice-fetch"
	// stopLimit is how long it may take to end.
	stopLimit = 10 * time.Second
	// maxConfig is the longest configuration of an image that it takes, in bytes of JSON.
	maxConfig = 64 << 10
)

// environment is what it has of the daemon's, beside program.DefaultEnv: where credentials, proxies and certificates are.
var environment = []string{
	"HOME", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
	"SSL_CERT_FILE", "SSL_CERT_DIR",
}

// fetcher is the one program of the keeper's that fetches images, for as long as there are some.
type fetcher struct {
	starting   sync.Mutex // held while it is started or stopped
	supervisor *program.Supervisor
	paths      []string // that it was started with

	mu      sync.Mutex
	control *os.File // nil where it does not run
	images  map[*hosted]struct{}
}

// hosted is an image that is served: what the fetcher is told of it, and who gets the sessions.
type hosted struct {
	config []byte
	cache  *os.File // nil: none
	giver  *store.Giver
	log    *slog.Logger
	given  bool // it has had a session; under fetcher.mu
	// id is what the fetcher calls it, share and path are where it is.
	id, share, path string
}

// lastID is of the image that was opened last.
var lastID atomic.Uint64

// open has an image fetched, and returns the server's end of the line that its sessions come over.
func (f *fetcher) open(ctx context.Context, out *extensions.Outside, e *Extension, o *options, m *extensions.Mount) (line *os.File, err error) {
	h := &hosted{log: out.Log, id: strconv.FormatUint(lastID.Add(1), 10), share: m.Share, path: m.Path}
	o.fetch.ID = h.id
	if h.config, err = json.Marshal(o.fetch); err != nil {
		return nil, err
	}
	if len(h.config) > maxConfig {
		return nil, fmt.Errorf("options of %d bytes for an image: expected at most %d", len(h.config), maxConfig)
	}
	if o.cacheDir != "" {
		if err := os.MkdirAll(o.cacheDir, 0o700); err != nil {
			return nil, fmt.Errorf("make the cache directory: %w", err)
		}
		if h.cache, err = os.OpenFile(o.cacheDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return nil, fmt.Errorf("open the cache directory: %w", err)
		}
		out.OnClose(h.cache.Close)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a pair of sockets: %w", err)
	}
	line = os.NewFile(uintptr(fds[0]), "line of sessions")
	h.giver, err = store.NewGiver(os.NewFile(uintptr(fds[1]), "line of sessions"), func() { f.give(h) })
	if err != nil {
		return nil, errors.Join(err, line.Close())
	}
	f.mu.Lock()
	if f.images == nil {
		f.images = make(map[*hosted]struct{})
	}
	f.images[h] = struct{}{}
	f.mu.Unlock()
	out.OnClose(func() error { return f.close(h) })
	if err := f.start(ctx, out, e, o); err != nil {
		return nil, errors.Join(err, line.Close())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !h.given { // the program ran already
		f.giveLocked(h)
	}
	return line, nil
}

// start starts the program, unless it runs already and reaches what this image needs.
func (f *fetcher) start(ctx context.Context, out *extensions.Outside, e *Extension, o *options) error {
	f.starting.Lock()
	defer f.starting.Unlock()
	binary, err := e.find()
	if err != nil {
		return err
	}
	paths := f.paths
	for _, p := range o.writable {
		paths = with(paths, p)
	}
	for _, p := range append(o.visible, binary) {
		if strings.HasPrefix(p, "/tmp/") { // it would have an empty one of its own
			paths = with(paths, p)
		}
	}
	if f.supervisor != nil && len(paths) == len(f.paths) {
		return nil
	}
	f.stop()
	c := program.Config{
		Name: programName, Args: []string{binary}, Env: program.DefaultEnv(), OnStart: f.started, Log: out.Log,
		Confine: program.Confinement{None: e.unconfined, Network: true, ReadOnly: !e.unconfined, Seccomp: true},
	}
	if !e.unconfined {
		c.Confine.Writable = paths
	}
	for _, name := range environment {
		if v, ok := os.LookupEnv(name); ok {
			c.Env = append(c.Env, name+"="+v)
		}
	}
	f.supervisor, err = program.Start(ctx, c)
	if err != nil {
		f.supervisor = nil
		return fmt.Errorf("start the program that fetches images: %w", err)
	}
	f.paths = paths
	return nil
}

// with returns paths with p, in order, as a copy if p is not below one of them.
func with(paths []string, p string) []string {
	for _, had := range paths {
		if p == had || strings.HasPrefix(p, had+"/") {
			return paths
		}
	}
	return append(slices.Clone(paths), p)
}

// find returns the program's path.
func (e *Extension) find() (string, error) {
	if e.program != "" {
		if !filepath.IsAbs(e.program) {
			return "", fmt.Errorf("--lazyimage-fetcher %s: expected an absolute path", e.program)
		}
		return e.program, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find %s: %w", programName, err)
	}
	if beside := filepath.Join(filepath.Dir(self), programName); isProgram(beside) {
		return beside, nil
	}
	return programName, nil
}

func isProgram(p string) bool {
	info, err := os.Stat(p)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// stop ends the program. starting is held.
func (f *fetcher) stop() {
	if f.supervisor == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	_ = f.supervisor.Stop(ctx)
	f.supervisor, f.paths = nil, nil
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.control != nil {
		_ = f.control.Close()
		f.control = nil
	}
}

// started takes the program's control line over, each time that it has been started, and has all images opened anew.
func (f *fetcher) started(control *os.File) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.control != nil {
		_ = f.control.Close()
	}
	f.control = control
	for h := range f.images {
		f.giveLocked(h)
	}
}

// give has an image opened and gives the session to who serves it.
func (f *fetcher) give(h *hosted) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.giveLocked(h)
}

func (f *fetcher) giveLocked(h *hosted) {
	if _, ok := f.images[h]; !ok || f.control == nil {
		return // it is asked for again when there is one
	}
	h.given = true
	// A program that has just ended is started again, and a server that has gone needs none.
	if err := f.session(h); err != nil && !errors.Is(err, unix.EPIPE) {
		h.log.Warn("no session for an image could be had; it is tried again", "error", err)
	}
}

func (f *fetcher) session(h *hosted) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a pair of sockets: %w", err)
	}
	server := os.NewFile(uintptr(fds[0]), "session")
	defer server.Close()
	give := []int{fds[1]}
	defer unix.Close(fds[1])
	if h.cache != nil {
		give = append(give, int(h.cache.Fd()))
	}
	if err := f.send(h.config, give...); err != nil {
		return fmt.Errorf("have an image opened: %w", err)
	}
	return h.giver.Give(server)
}

// send sends the program a message. mu is held, and control there.
func (f *fetcher) send(message []byte, fds ...int) error {
	raw, err := f.control.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) {
		sent = unix.Sendmsg(int(fd), message, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	})
	return errors.Join(err, sent)
}

// statsLimit is how long the program may take to say what it has counted, and maxStats how much that may be, in bytes of JSON.
const (
	statsLimit = 2 * time.Second
	maxStats   = 16 << 20
)

// stats asks the program what it has counted of each image. Those that it has just been given, or is to be given when it has been started
// again, are not among them.
func (f *fetcher) stats(ctx context.Context) (all []api.ImageStats, err error) {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	defer ours.Close()
	f.mu.Lock()
	images := slices.Collect(maps.Keys(f.images))
	asked := f.control != nil && len(images) > 0
	if asked {
		err = f.send([]byte(`{"stats":true}`), int(theirs.Fd()))
	}
	f.mu.Unlock()
	_ = theirs.Close()
	if err != nil || !asked {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, statsLimit)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = ours.SetReadDeadline(time.Now()) })()
	var by map[string]api.ImageStats
	if err := json.NewDecoder(io.LimitReader(ours, maxStats)).Decode(&by); err != nil {
		return nil, fmt.Errorf("read what %s has counted: %w", programName, err)
	}
	for _, h := range images {
		if s, ok := by[h.id]; ok {
			s.Tag, s.Path = h.share, h.path
			all = append(all, s)
		}
	}
	return all, nil
}

// close ends an image, and the program with the last.
func (f *fetcher) close(h *hosted) error {
	f.starting.Lock()
	defer f.starting.Unlock()
	f.mu.Lock()
	delete(f.images, h)
	last := len(f.images) == 0
	f.mu.Unlock()
	err := h.giver.Close()
	if last {
		f.stop()
	}
	return err
}
