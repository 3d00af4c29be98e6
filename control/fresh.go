package control

import (
	"net"
	"net/http"
	"sync"
)

// fresh are the connections on which nothing has been asked yet, as HTTP clients keep some in reserve. At the end
// http.Server.Shutdown would wait five seconds for each, because it cannot know that nothing is on its way.
type fresh struct {
	mu    sync.Mutex
	conns map[net.Conn]struct{}
	ended bool
}

// note is the http.Server's ConnState.
func (f *fresh) note(c net.Conn, state http.ConnState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case state != http.StateNew:
		delete(f.conns, c)
	case f.ended:
		_ = c.Close()
	default:
		f.conns[c] = struct{}{}
	}
}

// end closes them, and those that come from now on.
func (f *fresh) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	for c := range f.conns {
		_ = c.Close()
	}
}
