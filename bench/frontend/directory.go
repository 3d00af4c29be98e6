package frontend

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// listing is the part of a program that lists directories of known small files and checks what comes.
type listing struct {
	*client
	first int      // number of the first file
	nodes []uint64 // by number, from first on
	count []uint64 // lookups, beyond the client's
	buf   []byte
	// Where the fuse_direntplus now looked at goes: kept, so that no closure is made in the loop.
	slot *slot
	size int // files in the directory
	each func(name []byte, e *fuseproto.EntryOut) error
}

func (p *listing) init(q *queue) {
	p.client = newClient(q)
	p.buf = make([]byte, readdirplusShape.outData)
	p.each = p.entry
}

// learn looks up all of a directory, whose files have the numbers from first on.
func (p *listing) learn(dir uint64) error {
	n := 0
	err := p.list(dir, func(name []byte, e *fuseproto.EntryOut) error {
		i, ok := entryNumber(name)
		if i -= p.first; !ok || i < 0 || i >= len(p.nodes) || e.NodeId == 0 {
			return fmt.Errorf("FUSE_READDIRPLUS: has %q as node %d, which is none of MakeTree's or not looked up", name, e.NodeId)
		}
		p.nodes[i] = e.NodeId
		n++
		return nil
	})
	if err == nil && n != p.size {
		err = fmt.Errorf("FUSE_READDIRPLUS: the directory has %d entries, expected %d", n, p.size)
	}
	return err
}

// entry checks one entry: its number must be in the directory's range, of which s.count files have come.
func (p *listing) entry(name []byte, e *fuseproto.EntryOut) error {
	i, ok := entryNumber(name)
	if !ok || i < p.slot.file || i >= p.slot.file+p.size {
		return fmt.Errorf("FUSE_READDIRPLUS: has %q, which is not in that directory", name)
	}
	if err := checkAttr(fuseproto.FUSE_READDIRPLUS, &e.Attr, i); err != nil {
		return err
	}
	if e.NodeId != p.nodes[i-p.first] {
		return fmt.Errorf("FUSE_READDIRPLUS: %s is node %d, and was node %d before", name, e.NodeId, p.nodes[i-p.first])
	}
	p.count[i-p.first]++
	p.slot.count++
	p.slot.sum += i - p.slot.file
	return nil
}

// start fills in the first READDIRPLUS of a directory that is open as fh.
func (p *listing) start(s *slot, dir, fh uint64) {
	in := as[fuseproto.ReadIn](s.message().in)
	in.NodeId, in.Fh, in.Offset, in.Size = dir, fh, 0, uint32(len(s.message().data))
	s.count, s.sum = 0, 0
}

// listed checks an answer and fills in the next READDIRPLUS, unless this was the last.
func (p *listing) listed(s *slot, r result) (more bool, err error) {
	m := s.message()
	if r.errno != 0 {
		return false, m.success(r, 0)
	}
	if r.size > 0 {
		p.slot = s
		m.copyData(p.buf[:r.size])
		as[fuseproto.ReadIn](m.in).Offset, err = entries(p.buf[:r.size], p.each)
		return true, err
	}
	// Each of n different numbers below n, or else something came twice and something not at all.
	if want := p.size * (p.size - 1) / 2; s.count != p.size || s.sum != want {
		return false, fmt.Errorf("%v: %d entries with the sum of numbers %d, expected %d with %d", m.op, s.count, s.sum, p.size, want)
	}
	return false, nil
}

func (p *listing) finish(*queue) error {
	for i, n := range p.count {
		if n > 0 {
			p.lookups[p.nodes[i]] += n
		}
	}
	return p.forgetAll()
}

// readdirplus lists the directory of dirEntries; each slot has it open for itself.
type readdirplus struct {
	listing
	dir uint64
	fhs []uint64 // by slot
}

func (p *readdirplus) prepare(q *queue) (err error) {
	p.init(q)
	p.size = dirEntries
	p.nodes, p.count = make([]uint64, dirEntries), make([]uint64, dirEntries)
	if p.dir, err = p.walk(dirName); err != nil {
		return err
	}
	for range q.slots {
		fh, err := p.open(opendirShape, p.dir, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		p.fhs = append(p.fhs, fh)
	}
	return p.learn(p.dir)
}

func (p *readdirplus) begin(_ *queue, s *slot) { p.start(s, p.dir, p.fhs[s.index]) }

func (p *readdirplus) answer(_ *queue, s *slot, r result) (bool, error) { return p.listed(s, r) }

func (p *readdirplus) finish(q *queue) error {
	var errs []error
	for _, fh := range p.fhs {
		errs = append(errs, p.release(releasedirShape, p.dir, fh))
	}
	return errors.Join(append(errs, p.listing.finish(q))...)
}

// Steps of gitstatus.
const (
	stepGetattr = iota
	stepLookup
	stepOpendir
	stepReaddirplus
	stepReleasedir
)

// gitstatus goes through all cold directories, which are known. Each queue starts somewhere else.
type gitstatus struct {
	listing
	dirs  []uint64
	names []string
	next  int
}

func (p *gitstatus) prepare(q *queue) error {
	p.init(q)
	p.size = coldFiles
	p.nodes, p.count = make([]uint64, coldDirs*coldFiles), make([]uint64, coldDirs*coldFiles)
	for i := range coldDirs {
		dir, err := p.walk(coldPath(i))
		if err != nil {
			return err
		}
		if err := p.learn(dir); err != nil {
			return err
		}
		p.dirs = append(p.dirs, dir)
		for n := range coldFiles {
			p.names = append(p.names, coldFileName(i*coldFiles+n))
		}
	}
	p.next = (q.ring.index - 1) * coldDirs / len(q.f.queues)
	return nil
}

func (p *gitstatus) begin(_ *queue, s *slot) {
	s.node, s.file = p.dirs[p.next], p.next*coldFiles
	p.next = (p.next + 1) % coldDirs
	s.message().header().NodeId = s.node
}

func (p *gitstatus) answer(_ *queue, s *slot, r result) (bool, error) {
	m := s.message()
	switch s.step {
	case stepGetattr:
		if err := m.success(r, 104); err != nil {
			return false, err
		}
		if a := &as[fuseproto.AttrOut](m.out[outHeader:]).Attr; a.Mode&unix.S_IFMT != unix.S_IFDIR {
			return false, fmt.Errorf("%v: a directory has mode %#o", m.op, a.Mode)
		}
		s.count = 0
		p.lookup(s)
	case stepLookup:
		e, err := checkEntry(m, r, s.file+s.count)
		if err != nil {
			return false, err
		}
		if want := p.nodes[s.file+s.count]; e.NodeId != want {
			return false, fmt.Errorf("%v: %s is node %d, and was node %d before", m.op, p.names[s.file+s.count], e.NodeId, want)
		}
		p.count[s.file+s.count]++
		if s.count++; s.count < coldFiles {
			p.lookup(s)
			return true, nil
		}
		s.step = stepOpendir
		s.message().header().NodeId = s.node
		as[fuseproto.OpenIn](s.message().in).Flags = unix.O_RDONLY | unix.O_DIRECTORY
	case stepOpendir:
		if err := m.success(r, 16); err != nil {
			return false, err
		}
		s.fh = as[fuseproto.OpenOut](m.out[outHeader:]).Fh
		s.step = stepReaddirplus
		p.start(s, s.node, s.fh)
	case stepReaddirplus:
		if more, err := p.listed(s, r); more || err != nil {
			return more, err
		}
		s.step = stepReleasedir
		s.message().header().NodeId = s.node
		as[fuseproto.ReleaseIn](s.message().in).Fh = s.fh
	case stepReleasedir:
		return false, m.success(r, 0)
	}
	return true, nil
}

// lookup fills in the LOOKUP of the next file.
func (p *gitstatus) lookup(s *slot) {
	s.step = stepLookup
	s.message().header().NodeId = s.node
	s.message().name(0, p.names[s.file+s.count])
}
