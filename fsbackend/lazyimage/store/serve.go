package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxRunning is how many requests of a session Serve has in hand at a time; it reads no more until one is answered. A Client has
// fewer (maxAsked).
const maxRunning = 256

// Serve answers the server's requests on conn, the fetcher's end of a SOCK_SEQPACKET pair, which it takes over, from s, which
// stays the caller's. It returns nil when the server is gone, and an error when it says what no Client does; both once all calls
// of s have returned, whose contexts end with the session.
func Serve(conn *os.File, s Store) error {
	c, err := newConn(conn)
	if err != nil {
		return err
	}
	v := &session{conn: c, store: s, free: make(chan struct{}, maxRunning), running: make(map[uint64]context.CancelFunc)}
	ctx, cancel := context.WithCancel(context.Background())
	err = v.receive(ctx)
	cancel()
	c.close()
	v.calls.Wait()
	if v.meta != nil {
		_ = v.meta.Close()
	}
	if err == io.EOF {
		return nil
	}
	return fmt.Errorf("session with the server: %w", err)
}

// session is the fetcher's side of one.
type session struct {
	conn  *conn
	store Store
	free  chan struct{} // has an element for each call that runs
	calls sync.WaitGroup

	mu      sync.Mutex
	running map[uint64]context.CancelFunc

	metaMu sync.Mutex
	meta   *os.File // the answer to opLayers
}

// receive takes requests until there are no more.
func (v *session) receive(ctx context.Context) error {
	buf := make([]byte, maxMessage)
	for {
		b, _, _, err := v.conn.receive(buf, false)
		if err != nil {
			return err
		}
		var h header
		body, err := h.parse(b)
		if err != nil {
			return err
		}
		switch h.op {
		case opNote:
			path := string(body)
			if err := checkPath(path); err != nil || h.layer >= MaxLayers {
				return fmt.Errorf("a note about layer %d: %w", h.layer, err)
			}
			v.store.Note(int(h.layer), path)
			continue
		case opCancel:
			v.mu.Lock()
			if end := v.running[h.id]; end != nil {
				end()
			}
			v.mu.Unlock()
			continue
		}
		if len(body) > 0 || h.status != 0 || h.layer >= MaxLayers {
			return fmt.Errorf("operation %d for layer %d with status %d and %d bytes", h.op, h.layer, h.status, len(body))
		}
		v.free <- struct{}{}
		if !v.begin(ctx, h) {
			return fmt.Errorf("two requests with id %d", h.id)
		}
	}
}

// begin has a request answered, unless there is one with its id.
func (v *session) begin(ctx context.Context, h header) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.running[h.id] != nil {
		return false
	}
	ctx, end := context.WithCancel(ctx)
	v.running[h.id] = end
	v.calls.Go(func() {
		body, file, err := v.call(ctx, h)
		v.mu.Lock()
		delete(v.running, h.id) // before the answer: the server may use the id again then
		v.mu.Unlock()
		end()
		v.answer(h, body, file, err)
		<-v.free
	})
	return true
}

// call does what was asked for. The file is the session's, where it is the description of the layers, else the caller's.
func (v *session) call(ctx context.Context, h header) (body []byte, file *os.File, err error) {
	switch h.op {
	case opLayers:
		file, err = v.layers(ctx)
	case opChunk:
		file, err = v.store.Chunk(ctx, int(h.layer), h.index)
	case opPrefetched:
		err = v.store.Prefetched(ctx)
	case opReach:
		err = v.store.Reach(ctx)
	case opStatus:
		var st Status
		st, err = v.store.Status(ctx, int(h.layer))
		for _, n := range []int64{st.Size, st.Fetched, st.Requests, st.Bytes} {
			body = le.AppendUint64(body, uint64(n))
		}
		body = append(body, plain(st.Err)...)
	}
	return body, file, err
}

// answer answers a request. That the server is gone, receive finds out, too.
func (v *session) answer(h header, body []byte, file *os.File, err error) {
	switch {
	case err == nil:
		h.status = statusOK
	case errors.Is(err, ErrCorrupt):
		h.status, body = statusCorrupt, nil
	case h.op == opChunk:
		h.status, body = statusUnavailable, nil
	default:
		h.status, body = statusFailed, []byte(plain(err.Error()))
	}
	message := append(h.append(make([]byte, 0, headerSize+len(body))), body...)
	if file == nil {
		err = v.conn.send(message, -1)
	} else {
		raw, rawErr := file.SyscallConn()
		if rawErr == nil {
			rawErr = raw.Control(func(fd uintptr) { err = v.conn.send(message, int(fd)) })
		}
		if h.op == opChunk {
			_ = file.Close()
		}
		err = errors.Join(rawErr, err)
	}
	if err != nil {
		v.conn.close()
	}
}

// layers returns the description of the layers, which is made once for the session.
func (v *session) layers(ctx context.Context) (*os.File, error) {
	all, err := v.store.Layers(ctx)
	if err != nil {
		return nil, err
	}
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	if v.meta == nil {
		b, err := EncodeMeta(all)
		if err != nil {
			return nil, err
		}
		if v.meta, err = sealed("layers", b); err != nil {
			return nil, err
		}
	}
	return v.meta, nil
}

// sealed returns a memfd that holds b for good.
func sealed(name string, b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(b); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("fill a file in memory: %w", err)
	}
	const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("seal a file in memory: %w", err)
	}
	return f, nil
}
