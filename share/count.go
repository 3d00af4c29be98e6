package share

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// maxDepth bounds how deep a walk goes.
const maxDepth = 4096

// Recount counts what is stored in the graft at path anew, if it has a quota, and returns when it is done. Requests go on meanwhile; what they
// change is counted with them.
func (s *Share) Recount(path string) error {
	s.mu.Lock()
	g, err := s.graftAt(path)
	s.mu.Unlock()
	if err == nil && g.metered() != nil {
		done := s.startCount(g)
		if done == nil || !<-done {
			err = fmt.Errorf("count of its files came to no end: another one is under way, or there is no session")
		}
	}
	if err != nil {
		return fmt.Errorf("graft %s: %w", path, err)
	}
	return nil
}

// startCount begins a walk of p, unless there is no session, or one is under way. The channel says whether it came to its end.
func (s *Share) startCount(p *part) <-chan bool {
	s.mu.Lock()
	session, in := s.sessions, s.features != nil
	s.mu.Unlock()
	q := p.metered()
	if q == nil || !in || !p.calls.enter(0) {
		return nil
	}
	uncount := func() {
		p.calls.at(0).Add(-oneCall)
		p.left()
	}
	if !q.restart() {
		uncount()
		return nil
	}
	done := make(chan bool, 1)
	go func() {
		w := walker{s: s, p: p, q: q, session: session}
		ended := false
		<-s.aside(p, "count", func() { ended = w.walk() })
		q.names.Lock() // the walk may have come across what is being made
		q.mu.Lock()
		q.counting, q.seen = false, nil
		q.counted = q.counted || ended
		q.mu.Unlock()
		q.names.Unlock()
		uncount()
		done <- ended
	}()
	return done
}

// restart forgets what was counted but for what requests have in hand, and says whether no walk is under way.
func (q *quota) restart() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.counting {
		return false
	}
	q.counting, q.seen = true, make(map[uint64]struct{})
	q.bytes, q.inodes = 0, 0
	for _, o := range q.orphans {
		q.seen[o.ino] = struct{}{}
		q.bytes += o.bytes
		q.inodes++
	}
	for _, n := range q.changing {
		if _, ok := q.seen[n.ino]; !ok {
			q.seen[n.ino] = struct{}{}
			q.bytes += n.bytes
			q.inodes++
		}
	}
	return true
}

// walker counts a tree, through the backend's own interface.
type walker struct {
	s       *Share
	p       *part
	q       *quota
	session uint64
	c       fsbackend.Context
}

// walk says whether it has come to the end.
func (w *walker) walk() bool {
	w.c.MayBlock = true
	return w.p.DirReader == nil || w.dir(rootID, 0)
}

// over says that nobody is interested any more.
func (w *walker) over() bool {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	return w.p.leaving.Load() || w.s.sessions != w.session
}

// dir counts what is in a directory and below.
func (w *walker) dir(node uint64, depth int) bool {
	if depth > maxDepth {
		return true
	}
	header := fuseproto.InHeader{NodeId: node}
	var open fuseproto.OpenOut
	if w.p.Opendir(&w.c, &fuseproto.OpenIn{InHeader: header, Flags: unix.O_DIRECTORY}, &open) != fsbackend.OK {
		return !w.over() // it has gone, or nobody may read it
	}
	defer w.p.Releasedir(&w.c, &fuseproto.ReleaseIn{InHeader: header, Fh: open.Fh})
	buf := make([]byte, 16<<10)
	for off := uint64(0); ; {
		if w.over() {
			return false
		}
		list := new(fsbackend.DirList)
		list.Reset([]unix.Iovec{{Base: &buf[0], Len: uint64(len(buf))}}, 0, uint64(len(buf)))
		_ = w.p.Readdir(&w.c, &fuseproto.ReadIn{InHeader: header, Fh: open.Fh, Offset: off, Size: uint32(len(buf))}, list)
		names, next := direntNames(buf[:list.Written()])
		if len(names) == 0 || next == off {
			return true
		}
		for _, name := range names {
			if !w.name(node, name, depth) {
				return false
			}
		}
		off = next
	}
}

// name counts one entry of a directory and all that is below.
func (w *walker) name(parent uint64, name string, depth int) bool {
	var out fuseproto.EntryOut
	if name == "." || name == ".." || w.p.Lookup(&w.c, parent, fsbackend.MakeName(name), &out) != fsbackend.OK || out.NodeId == 0 {
		return true
	}
	defer w.q.unlook(out.NodeId)
	w.q.mu.Lock()
	w.q.see(&out.Attr)
	w.q.mu.Unlock()
	return out.Mode&unix.S_IFMT != unix.S_IFDIR || w.dir(out.NodeId, depth+1)
}

// direntNames takes the names out of a list, and the offset behind them.
func direntNames(buf []byte) (names []string, off uint64) {
	for len(buf) >= direntHeader {
		length := binary.NativeEndian.Uint32(buf[16:])
		if length > unix.NAME_MAX || len(buf) < (direntHeader+int(length)+7)&^7 {
			break
		}
		off = binary.NativeEndian.Uint64(buf[8:])
		names = append(names, string(buf[direntHeader:direntHeader+length]))
		buf = buf[(direntHeader+length+7)&^7:]
	}
	return names, off
}
