package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A SOCK_SEQPACKET pair is the line between who starts the fetcher (the Giver) and who serves its images (a SocketLine). The Giver
// sends a byte with a descriptor for each session; the SocketLine sends how many it has had, four bytes, when it waits for one more.
const (
	givenByte = 's'
	wantSize  = 4
	// wantEvery is how often a SocketLine that waits says so.
	wantEvery = 5 * time.Second
	// giveEvery is how often a Giver gives because somebody wants.
	giveEvery = time.Second
)

// SocketLine is a Line over a socket.
type SocketLine struct {
	conn *conn
	next sync.Mutex // held in Next
	had  uint32
}

// NewSocketLine takes f over, an end of a SOCK_SEQPACKET pair whose other end is a Giver's.
func NewSocketLine(f *os.File) (*SocketLine, error) {
	c, err := newConn(f)
	if err != nil {
		return nil, err
	}
	return &SocketLine{conn: c}, nil
}

// Close ends the line, and a Next that waits.
func (l *SocketLine) Close() error {
	l.conn.close()
	return nil
}

// Next implements Line. Of several sessions that are there it returns the last: the others are over.
func (l *SocketLine) Next(ctx context.Context) (*os.File, error) {
	l.next.Lock()
	defer l.next.Unlock()
	for {
		last, err := l.newest()
		if last != nil || err != nil {
			return last, err
		}
		if err := l.conn.send(le.AppendUint32(nil, l.had), -1); err != nil && !errors.Is(err, unix.EPIPE) {
			return nil, fmt.Errorf("ask for a session: %w", err)
		}
		if err := l.wait(ctx); err != nil {
			return nil, err
		}
	}
}

// newest returns the last session that is there, nil if there is none.
func (l *SocketLine) newest() (last *os.File, err error) {
	if err := l.conn.file.SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	buf := make([]byte, 1)
	for {
		_, f, _, err := l.conn.receiveNow(buf, true)
		switch {
		case err == unix.EAGAIN:
			return last, nil
		case err == io.EOF && last != nil: // the next call says so
			return last, nil
		case err != nil:
			if last != nil {
				_ = last.Close()
			}
			if err == io.EOF {
				err = errors.New("who starts the fetcher has gone")
			}
			return nil, err
		}
		l.had++
		if f != nil { // it is lost where the limit of open files is reached
			if last != nil {
				_ = last.Close()
			}
			last = f
		}
	}
}

// wait returns when there is something to read, or it is time to ask again.
func (l *SocketLine) wait(ctx context.Context) error {
	if err := l.conn.file.SetReadDeadline(time.Now().Add(wantEvery)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = l.conn.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err := l.conn.raw.Read(func(raw uintptr) bool {
		_, _, _, _, err := unix.Recvmsg(int(raw), make([]byte, 1), nil, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return err != unix.EAGAIN
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case l.conn.isClosed():
		return os.ErrClosed
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil
	}
	return err
}

// Giver is the other end of a SocketLine.
type Giver struct {
	conn *conn
	open func()
	done chan struct{}

	mu    sync.Mutex
	given uint32
}

// NewGiver takes f over, an end of a SOCK_SEQPACKET pair whose other end is a SocketLine's. want is called when that waits for a session
// and has had all that were given, at most once a second; it may Give one, or leave it.
func NewGiver(f *os.File, want func()) (*Giver, error) {
	c, err := newConn(f)
	if err != nil {
		return nil, err
	}
	g := &Giver{conn: c, open: want, done: make(chan struct{})}
	go g.listen()
	return g, nil
}

// Give gives a session, of which it sends a copy. It does not wait: an error says that the other end has gone, or does not listen.
func (g *Giver) Give(session *os.File) error {
	raw, err := session.SyscallConn()
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var sent error
	err = raw.Control(func(fd uintptr) { sent = g.conn.sendNow([]byte{givenByte}, int(fd)) })
	if err = errors.Join(err, sent); err == nil {
		g.given++
	}
	return err
}

// listen calls open for each wish, until the line ends.
func (g *Giver) listen() {
	defer close(g.done)
	buf := make([]byte, wantSize)
	for {
		b, _, _, err := g.conn.receive(buf, false)
		if err != nil {
			return
		}
		if len(b) < wantSize {
			continue
		}
		g.mu.Lock()
		wanted := le.Uint32(b) == g.given
		g.mu.Unlock()
		if !wanted {
			continue
		}
		g.open()
		select {
		case <-time.After(giveEvery):
		case <-g.conn.gone:
			return
		}
	}
}

// Close ends the line. want is not called any more once it has returned, so it must not be called from there.
func (g *Giver) Close() error {
	g.conn.close()
	<-g.done
	return nil
}
