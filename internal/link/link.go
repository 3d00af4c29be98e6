// Package link is the line between sluiced's two processes: the keeper, which stays outside the sandbox, asks, and the server
// inside it answers.
//
// A frame is a length of four bytes, the machine's order, and as many bytes of JSON. Descriptors travel with a question's first
// byte. Questions are answered in any order. The server trusts the keeper. The keeper does not trust the server, which speaks
// to guests: it takes no descriptors from it, and no frame longer than MaxFrame.
package link

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
)

const (
	// MaxFrame is the longest JSON that is sent or taken, in bytes.
	MaxFrame = 64 << 20
	// MaxFiles is the most descriptors that go with one question.
	MaxFiles = 253 // SCM_MAX_FD

	headerSize = 4
)

// ErrClosed is the answer when the other process is gone.
var ErrClosed = errors.New("the serving process is gone")

// Pair returns the two ends.
func Pair() (keeper, server *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a pair of sockets: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "link to the server"), os.NewFile(uintptr(fds[1]), "link to the keeper"), nil
}

// frame is a question if Method is set, and an answer otherwise.
type frame struct {
	ID     uint64          `json:"id"`
	Method string          `json:"method,omitempty"`
	Body   json.RawMessage `json:"body,omitempty"`
	Error  *api.Error      `json:"error,omitempty"`
}

// line sends and receives frames.
type line struct {
	conn *net.UnixConn
	mu   sync.Mutex // held while a frame is written
}

// newLine takes f over.
func newLine(f *os.File) (*line, error) {
	conn, err := net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("use the link between the processes: %w", err)
	}
	return &line{conn: conn.(*net.UnixConn)}, nil
}

func (l *line) send(f *frame, files []*os.File) error {
	if len(files) > MaxFiles {
		return fmt.Errorf("%d descriptors in one message: expected at most %d", len(files), MaxFiles)
	}
	data, err := json.Marshal(f)
	if err != nil {
		return err
	}
	if len(data) > MaxFrame {
		return fmt.Errorf("a message of %d bytes: expected at most %d", len(data), MaxFrame)
	}
	data = append(binary.NativeEndian.AppendUint32(nil, uint32(len(data))), data...)
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(files) > 0 {
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		n, _, err := l.conn.WriteMsgUnix(data[:headerSize], unix.UnixRights(fds...), nil)
		if err != nil {
			return err
		}
		data = data[n:]
	}
	_, err = l.conn.Write(data) // the server may make no other call
	return err
}

// receive returns the next frame and its descriptors, of which take says whether there may be any.
func (l *line) receive(take bool) (_ *frame, files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
		}
	}()
	var header [headerSize]byte
	var oob []byte
	if take {
		oob = make([]byte, unix.CmsgSpace(MaxFiles*4))
	}
	for got := 0; got < headerSize; {
		n, oobn, flags, _, err := l.conn.ReadMsgUnix(header[got:], oob)
		received, e := parseRights(oob[:oobn])
		files = append(files, received...)
		switch {
		case err != nil:
			return nil, files, err
		case e != nil:
			return nil, files, e
		case take && flags&unix.MSG_CTRUNC != 0:
			return nil, files, errors.New("descriptors were lost: the limit of open files is reached")
		case n == 0:
			return nil, files, io.EOF
		}
		got += n
	}
	size := binary.NativeEndian.Uint32(header[:])
	if size > MaxFrame {
		return nil, files, fmt.Errorf("a message of %d bytes: expected at most %d", size, MaxFrame)
	}
	data, err := io.ReadAll(io.LimitReader(l.conn, int64(size))) // grows with what comes, not with what is promised
	if err != nil {
		return nil, files, err
	}
	if len(data) < int(size) {
		return nil, files, io.ErrUnexpectedEOF
	}
	f := new(frame)
	if err := json.Unmarshal(data, f); err != nil {
		return nil, files, fmt.Errorf("a message that is none: %w", err)
	}
	return f, files, nil
}

func parseRights(oob []byte) (files []*os.File, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "from the keeper"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// Keeper asks.
type Keeper struct {
	line *line
	done chan struct{} // closed when no answers come any more

	mu      sync.Mutex
	last    uint64
	waiting map[uint64]chan *frame
	err     error
}

// NewKeeper takes the keeper's end over.
func NewKeeper(f *os.File) (*Keeper, error) {
	l, err := newLine(f)
	if err != nil {
		return nil, err
	}
	k := &Keeper{line: l, done: make(chan struct{}), waiting: make(map[uint64]chan *frame)}
	go k.answers()
	return k, nil
}

// answers gives each answer to who waits for it.
func (k *Keeper) answers() {
	defer close(k.done)
	for {
		f, _, err := k.line.receive(false)
		k.mu.Lock()
		if err != nil {
			k.err = ErrClosed
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
				k.err = fmt.Errorf("%w: %w", ErrClosed, err)
			}
			for _, c := range k.waiting {
				close(c)
			}
			k.waiting = nil
			k.mu.Unlock()
			return
		}
		c := k.waiting[f.ID]
		delete(k.waiting, f.ID)
		k.mu.Unlock()
		if c != nil {
			c <- f // buffered
		}
	}
}

// Call has the server do method with params, and files, which stay the caller's, and decodes its answer into result unless that
// is nil. An error of the server's is an *api.Error; ErrClosed says that it is gone. When ctx ends first Call returns its error,
// and what was asked for is done all the same.
func (k *Keeper) Call(ctx context.Context, method string, params, result any, files ...*os.File) error {
	body, err := json.Marshal(params)
	if err != nil {
		return err
	}
	c := make(chan *frame, 1)
	k.mu.Lock()
	if k.waiting == nil {
		defer k.mu.Unlock()
		return k.err
	}
	k.last++
	id := k.last
	k.waiting[id] = c
	k.mu.Unlock()
	if err := k.line.send(&frame{ID: id, Method: method, Body: body}, files); err != nil {
		k.forget(id)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, net.ErrClosed) {
			return ErrClosed
		}
		return fmt.Errorf("ask the serving process: %w", err)
	}
	var f *frame
	var ok bool
	select {
	case f, ok = <-c:
	case <-ctx.Done():
		k.forget(id)
		return ctx.Err()
	}
	switch {
	case !ok:
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.err
	case f.Error != nil:
		return f.Error
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(f.Body, result); err != nil {
		return fmt.Errorf("answer of the serving process to %s: %w", method, err)
	}
	return nil
}

// forget has nobody wait for an answer.
func (k *Keeper) forget(id uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.waiting, id)
}

// Close ends the link; calls under way answer ErrClosed.
func (k *Keeper) Close() error {
	err := k.line.conn.Close()
	<-k.done
	return err
}

// Handler answers a question. It owns the files. An error that is no *api.Error is told as CodeInternal.
type Handler func(method string, body json.RawMessage, files []*os.File) (result any, err error)

// Serve answers, on the server's end f, which it takes over, until the keeper is gone: then it returns nil. Questions are
// handled each on a goroutine of its own. Serve does not wait for those: one that hangs must not keep the process from its end.
func Serve(f *os.File, handle Handler) error {
	l, err := newLine(f)
	if err != nil {
		return err
	}
	defer l.conn.Close()
	for {
		q, files, err := l.receive(true)
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("link to the keeper: %w", err)
		}
		go func() {
			a := answer(q, files, handle)
			if err := l.send(a, nil); err != nil {
				// A result that is too long, say. If the link is broken, receive finds out.
				_ = l.send(&frame{ID: q.ID, Error: api.Errorf(api.CodeInternal, "%v", err)}, nil)
			}
		}()
	}
}

func answer(q *frame, files []*os.File, handle Handler) *frame {
	a := &frame{ID: q.ID}
	result, err := handle(q.Method, q.Body, files)
	if err == nil && result != nil {
		a.Body, err = json.Marshal(result)
	}
	if err != nil && !errors.As(err, &a.Error) {
		a.Error = api.Errorf(api.CodeInternal, "%v", err)
	}
	return a
}
