package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/imagefetch"
)

// maxConfig is the longest configuration of an image, in bytes of JSON.
const maxConfig = 64 << 10

// maxFiles is how many descriptors may come with it.
const maxFiles = 2

// message is one on the control line.
type message struct {
	imagefetch.Config
	// Stats asks for those of all images instead, by Config.ID, as JSON into the descriptor that came along.
	Stats bool `json:"stats,omitempty"`
}

// serveControl opens an image for each message on the control line and serves its session, until the line is closed or ctx ends. With
// a message come one descriptor, of the session, or two: that of the cache's directory then, in place of the one it names.
func serveControl(ctx context.Context, fd int, log *slog.Logger) error {
	if typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || typ != unix.SOCK_SEQPACKET {
		return fmt.Errorf("descriptor %d is no SOCK_SEQPACKET socket: sluiced starts this program; see --help for what it does by hand", fd)
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		return fmt.Errorf("use the control line: %w", err)
	}
	line := os.NewFile(uintptr(fd), "control")
	defer line.Close()
	defer context.AfterFunc(ctx, func() { line.Close() })()

	p := program{fetcher: imagefetch.NewFetcher(log), log: log}
	defer p.close()
	for {
		cfg, files, err := receive(line)
		if err == io.EOF || ctx.Err() != nil {
			closeAll(files)
			return nil
		}
		if err != nil {
			closeAll(files)
			return fmt.Errorf("read from the control line: %w", err)
		}
		p.open(cfg, files)
	}
}

// receive reads one message.
func receive(line *os.File) (b []byte, files []*os.File, err error) {
	raw, err := line.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	b = make([]byte, maxConfig)
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	var n, oobn, flags int
	var recvErr error
	err = raw.Read(func(fd uintptr) bool {
		n, oobn, flags, _, recvErr = unix.Recvmsg(int(fd), b, oob, unix.MSG_CMSG_CLOEXEC)
		return !errors.Is(recvErr, unix.EAGAIN) && !errors.Is(recvErr, unix.EINTR)
	})
	if err = errors.Join(err, recvErr); err != nil {
		return nil, nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, nil, err
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "given"))
		}
	}
	if n == 0 && len(files) == 0 {
		return nil, nil, io.EOF
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return nil, files, fmt.Errorf("a message is longer than %d bytes, or has more than %d descriptors", maxConfig, maxFiles)
	}
	return b[:n], files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// program is the images that are open.
type program struct {
	fetcher *imagefetch.Fetcher
	log     *slog.Logger

	mu     sync.Mutex
	images map[*imagefetch.Image]string // their IDs
}

// open opens an image and serves it in the background. What is wrong is told to who opens the session: nobody reads it here.
func (p *program) open(b []byte, files []*os.File) {
	if len(files) == 0 {
		p.log.Error("an image came without a session to serve it on")
		return
	}
	session, rest := files[0], files[1:]
	var msg message
	err := json.Unmarshal(b, &msg)
	if err == nil && msg.Stats {
		closeAll(rest)
		go p.report(session)
		return
	}
	var m *imagefetch.Image
	if err != nil {
		err = fmt.Errorf("read the configuration of an image: %w", err)
	} else {
		m, err = p.openImage(msg.Config, rest)
	}
	closeAll(rest)
	var s store.Store
	if err != nil {
		p.log.Error("cannot open an image", "err", err)
		s = broken{err}
	} else {
		s = m
	}
	go func() {
		if err := store.Serve(session, s); err != nil {
			p.log.Error("a session has failed", "err", err)
		}
		if m != nil {
			p.forget(m)
		}
	}()
}

// report writes the counts of all images to who has asked for them, and waits until they are taken or nobody wants them any more.
func (p *program) report(to *os.File) {
	defer to.Close()
	p.mu.Lock()
	images := maps.Clone(p.images)
	p.mu.Unlock()
	all := make(map[string]imagefetch.Stats, len(images))
	for m, id := range images {
		all[id] = m.Stats()
	}
	_ = json.NewEncoder(to).Encode(all)
}

func (p *program) openImage(cfg imagefetch.Config, rest []*os.File) (*imagefetch.Image, error) {
	if len(rest) > 0 {
		cfg.Cache.Dir = fmt.Sprintf("/proc/self/fd/%d", rest[0].Fd())
	}
	m, err := p.fetcher.Open(cfg)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.images == nil {
		p.images = map[*imagefetch.Image]string{}
	}
	p.images[m] = cfg.ID
	return m, nil
}

func (p *program) forget(m *imagefetch.Image) {
	if err := m.Close(); err != nil {
		p.log.Error("cannot close an image", "err", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.images, m)
}

// close ends what is being fetched. The sessions end with the process.
func (p *program) close() {
	p.mu.Lock()
	images := slices.Collect(maps.Keys(p.images))
	p.mu.Unlock()
	for _, m := range images {
		p.forget(m)
	}
}

// broken is an image that could not be opened.
type broken struct{ err error }

func (b broken) Layers(context.Context) ([]store.Layer, error) { return nil, b.err }
func (b broken) Chunk(context.Context, int, uint32) (*os.File, error) {
	return nil, store.ErrUnavailable
}
func (b broken) Status(context.Context, int) (store.Status, error) { return store.Status{}, b.err }
func (b broken) Prefetched(context.Context) error                  { return b.err }
func (b broken) Reach(context.Context) error                       { return b.err }
func (b broken) Note(int, string)                                  {}
func (b broken) Close() error                                      { return nil }
