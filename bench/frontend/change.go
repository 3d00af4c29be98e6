package frontend

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// scratch is the part of a program that changes the directory for that.
type scratch struct {
	*client
	dir uint64
}

func (p *scratch) prepare(q *queue) (err error) {
	p.client = newClient(q)
	p.dir, err = p.walk(scratchName)
	return err
}

func (p *scratch) finish(*queue) error { return p.forgetAll() }

// create makes files of names that never come twice.
type create struct {
	scratch
	forget [1]forget
}

// Steps of create.
const (
	stepCreate = iota
	stepRelease
	stepUnlink
)

func (p *create) begin(q *queue, s *slot) {
	s.count++
	m := s.message()
	in := as[fuseproto.CreateIn](m.in)
	in.NodeId, in.Flags, in.Mode, in.Umask = p.dir, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, unix.S_IFREG|0o644, 0o022
	n := hex(m.in[inHeader+16:], p.id(q, s))
	m.size(16 + n + 1)
}

// id is of one queue, slot and operation.
func (p *create) id(q *queue, s *slot) uint64 {
	return uint64(q.ring.index)<<56 | uint64(s.index)<<40 | uint64(s.count)&(1<<40-1)
}

func (p *create) answer(q *queue, s *slot, r result) (bool, error) {
	m := s.message()
	switch s.step {
	case stepCreate:
		if err := m.success(r, 128+16); err != nil {
			return false, err
		}
		out := as[fuseproto.CreateOut](m.out[outHeader:])
		if out.NodeId == 0 || out.Mode != unix.S_IFREG|0o644 || out.Size != 0 {
			return false, fmt.Errorf("%v: node %d of mode %#o and %d bytes, expected an empty file of mode 0100644", m.op, out.NodeId, out.Mode, out.Size)
		}
		s.node = out.NodeId
		s.step = stepRelease
		s.message().header().NodeId = s.node
		as[fuseproto.ReleaseIn](s.message().in).Fh = out.Fh
		return true, nil
	case stepRelease:
		if err := m.success(r, 0); err != nil {
			return false, err
		}
		s.step = stepUnlink
		m = s.message()
		m.header().NodeId = p.dir
		m.size(hex(m.in[inHeader:], p.id(q, s)) + 1)
		return true, nil
	default:
		if err := m.success(r, 0); err != nil {
			return false, err
		}
		p.forget[0] = forget{Nodeid: s.node, Nlookup: 1}
		return false, q.f.hiprio.send(p.forget[:])
	}
}

// owned is the part of a program that has a file for each slot.
type owned struct {
	scratch
	names []string // by slot
	nodes []uint64
}

func (p *owned) prepare(q *queue) error {
	if err := p.scratch.prepare(q); err != nil {
		return err
	}
	for i := range q.slots {
		name := fmt.Sprintf("owned-%d-%d", q.ring.index, i)
		node, err := p.create(p.dir, name)
		if err != nil {
			return err
		}
		p.names, p.nodes = append(p.names, name), append(p.nodes, node)
	}
	return nil
}

func (p *owned) finish(q *queue) error {
	var errs []error
	for _, name := range p.names {
		errs = append(errs, p.unlink(p.dir, name))
	}
	return errors.Join(append(errs, p.scratch.finish(q))...)
}

// rename renames each slot's file to and fro.
type rename struct {
	owned
	others []string // the names that the files have not
}

func (p *rename) prepare(q *queue) error {
	err := p.owned.prepare(q)
	for _, name := range p.names {
		p.others = append(p.others, "re"+name)
	}
	return err
}

func (p *rename) begin(_ *queue, s *slot) {
	m := s.message()
	in := as[fuseproto.RenameIn](m.in)
	in.NodeId, in.Newdir = p.dir, p.dir
	m.name(8, p.names[s.index])
	m.name(8+len(p.names[s.index])+1, p.others[s.index])
}

func (p *rename) answer(_ *queue, s *slot, r result) (bool, error) {
	p.names[s.index], p.others[s.index] = p.others[s.index], p.names[s.index]
	return false, s.message().success(r, 0)
}

// setattr changes mode and times of each slot's file by turns.
type setattr struct{ owned }

func (p *setattr) begin(_ *queue, s *slot) {
	s.count++
	in := as[fuseproto.SetattrIn](s.message().in)
	in.NodeId = p.nodes[s.index]
	if s.count%2 == 0 {
		in.Valid = fuseproto.FATTR_MODE
		in.Mode = unix.S_IFREG | 0o600 | uint32(s.count)>>1&0o77
		return
	}
	in.Valid = fuseproto.FATTR_ATIME | fuseproto.FATTR_MTIME
	in.Atime, in.Atimensec = uint64(s.count), 1
	in.Mtime, in.Mtimensec = 1e9+uint64(s.count), 2
}

func (p *setattr) answer(_ *queue, s *slot, r result) (bool, error) {
	m := s.message()
	if err := m.success(r, 104); err != nil {
		return false, err
	}
	in, a := as[fuseproto.SetattrIn](m.in), &as[fuseproto.AttrOut](m.out[outHeader:]).Attr
	if s.count%2 == 0 {
		if a.Mode != in.Mode {
			return false, fmt.Errorf("%v: mode is %#o afterwards, expected %#o", m.op, a.Mode, in.Mode)
		}
	} else if a.Atime != in.Atime || a.Mtime != in.Mtime || a.Mtimensec != in.Mtimensec {
		return false, fmt.Errorf("%v: times are %d and %d.%d afterwards, expected %d and %d.%d", m.op, a.Atime, a.Mtime, a.Mtimensec, in.Atime, in.Mtime, in.Mtimensec)
	}
	return false, nil
}
