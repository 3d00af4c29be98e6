package frontend

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// hotFiles is how many files the workloads on known files have.
const hotFiles = 64

// hot is the part of a program that has known files: the first of the directory of dirEntries.
type hot struct {
	*client
	dir     uint64
	names   [hotFiles]string
	nodes   [hotFiles]uint64
	lookups [hotFiles]uint64 // beyond the client's
}

func (h *hot) prepare(q *queue) (err error) {
	h.client = newClient(q)
	if h.dir, err = h.walk(dirName); err != nil {
		return err
	}
	for i := range h.nodes {
		h.names[i] = entryName(i)
		e, err := h.lookup(h.dir, h.names[i])
		if err != nil {
			return err
		}
		h.nodes[i] = e.NodeId
	}
	return nil
}

func (h *hot) finish(*queue) error {
	for i, n := range h.lookups {
		h.client.lookups[h.nodes[i]] += n
	}
	return h.forgetAll()
}

// checkAttr checks what does not change of the i-th small file's attributes.
func checkAttr(op fuseproto.Opcode, a *fuseproto.Attr, i int) error {
	if a.Size != uint64(smallSize(i)) || a.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%v: small file %d has size %d and mode %#o, expected a regular file of %d bytes", op, i, a.Size, a.Mode, smallSize(i))
	}
	return nil
}

type nop struct{}

func (nop) prepare(*queue) error { return nil }
func (nop) finish(*queue) error  { return nil }

func (nop) begin(_ *queue, s *slot) { s.message().header().NodeId = fuseproto.FUSE_ROOT_ID }

func (nop) answer(_ *queue, s *slot, r result) (bool, error) {
	if r.errno != syscall.ENOSYS {
		return false, fmt.Errorf("%v: answer has errno %d, expected ENOSYS", s.message().op, int(r.errno))
	}
	return false, nil
}

type getattr struct{ hot }

func (p *getattr) begin(q *queue, s *slot) {
	s.file = q.rand(hotFiles)
	s.message().header().NodeId = p.nodes[s.file]
}

func (p *getattr) answer(_ *queue, s *slot, r result) (bool, error) {
	m := s.message()
	if err := m.success(r, 104); err != nil {
		return false, err
	}
	return false, checkAttr(m.op, &as[fuseproto.AttrOut](m.out[outHeader:]).Attr, s.file)
}

type lookup struct{ hot }

func (p *lookup) begin(q *queue, s *slot) {
	s.file = q.rand(hotFiles)
	s.message().header().NodeId = p.dir
	s.message().name(0, p.names[s.file])
}

func (p *lookup) answer(_ *queue, s *slot, r result) (bool, error) {
	e, err := checkEntry(s.message(), r, s.file)
	if err != nil {
		return false, err
	}
	if e.NodeId != p.nodes[s.file] {
		return false, fmt.Errorf("%v: %s is node %d, and was node %d before", s.message().op, p.names[s.file], e.NodeId, p.nodes[s.file])
	}
	p.hot.lookups[s.file]++
	return false, nil
}

// checkEntry checks the answer to a LOOKUP of the i-th small file.
func checkEntry(m *message, r result, i int) (*fuseproto.EntryOut, error) {
	if err := m.success(r, 128); err != nil {
		return nil, err
	}
	e := as[fuseproto.EntryOut](m.out[outHeader:])
	if e.NodeId == 0 {
		return nil, fmt.Errorf("%v: small file %d is not there", m.op, i)
	}
	return e, checkAttr(m.op, &e.Attr, i)
}

// lookupCold has its part of the cold files: every Queues-th directory.
type lookupCold struct {
	*client
	dirs   []uint64
	first  []int // number of each directory's first file
	names  []string
	nodes  []uint64 // 0 unless known
	next   int
	forget [forgetBatch]forget
}

func (p *lookupCold) prepare(q *queue) error {
	p.client = newClient(q)
	for i := q.ring.index - 1; i < coldDirs; i += len(q.f.queues) {
		dir, err := p.walk(coldPath(i))
		if err != nil {
			return err
		}
		p.dirs, p.first = append(p.dirs, dir), append(p.first, i*coldFiles)
		for n := range coldFiles {
			p.names = append(p.names, coldFileName(i*coldFiles+n))
		}
	}
	if len(p.dirs) < 4 {
		return fmt.Errorf("too many queues: %d of %d directories for this one, expected 4 or more", len(p.dirs), coldDirs)
	}
	p.nodes = make([]uint64, len(p.names))
	return nil
}

func coldPath(dir int) string {
	return coldName + "/" + coldTopName(dir/coldSub) + "/" + coldSubName(dir%coldSub)
}

func (p *lookupCold) begin(_ *queue, s *slot) {
	s.file = p.next
	p.next = (p.next + 1) % len(p.names)
	m := s.message()
	m.header().NodeId = p.dirs[s.file/coldFiles]
	m.name(0, p.names[s.file])
}

func (p *lookupCold) answer(q *queue, s *slot, r result) (bool, error) {
	e, err := checkEntry(s.message(), r, p.first[s.file/coldFiles]+s.file%coldFiles)
	if err != nil {
		return false, err
	}
	if p.nodes[s.file] != 0 {
		return false, fmt.Errorf("%v: %s was looked up before and has not been forgotten", s.message().op, p.names[s.file])
	}
	p.nodes[s.file] = e.NodeId
	if s.file%forgetBatch != 0 {
		return false, nil
	}
	// Half of all names stay known: what is forgotten here comes again only much later.
	return false, p.forgetSome(q, (s.file+len(p.names)/2)%len(p.names))
}

// forgetSome forgets what is known of forgetBatch files from first on.
func (p *lookupCold) forgetSome(q *queue, first int) error {
	n := 0
	for i := range forgetBatch {
		if node := &p.nodes[(first+i)%len(p.names)]; *node != 0 {
			p.forget[n] = forget{Nodeid: *node, Nlookup: 1}
			n++
			*node = 0
		}
	}
	if n == 0 {
		return nil
	}
	return q.f.hiprio.send(p.forget[:n])
}

func (p *lookupCold) finish(q *queue) error {
	for i := 0; i < len(p.names); i += forgetBatch {
		if err := p.forgetSome(q, i); err != nil {
			return err
		}
	}
	return p.forgetAll()
}

type lookupMiss struct{ hot }

func (p *lookupMiss) begin(_ *queue, s *slot) {
	m := s.message()
	m.header().NodeId = p.dir
	s.count++
	m.name(0, "missing-")
	at := len("missing-")
	m.size(at + hex(m.in[inHeader+at:], uint64(s.index)<<32|uint64(s.count)&0xffff_ffff) + 1)
}

// hex writes v in 16 digits and a NUL, and returns 16.
func hex(b []byte, v uint64) int {
	const digits = "0123456789abcdef"
	for i := range 16 {
		b[i] = digits[v>>(60-4*i)&0xf]
	}
	b[16] = 0
	return 16
}

func (p *lookupMiss) answer(_ *queue, s *slot, r result) (bool, error) {
	m := s.message()
	if r.errno == syscall.ENOENT {
		return false, nil
	}
	if err := m.success(r, 128); err != nil {
		return false, err
	}
	// Without a node the guest may remember that there is nothing.
	if e := as[fuseproto.EntryOut](m.out[outHeader:]); e.NodeId != 0 {
		return false, fmt.Errorf("%v: a file that is not there is node %d", m.op, e.NodeId)
	}
	return false, nil
}

type openrel struct{ hot }

func (p *openrel) begin(q *queue, s *slot) {
	s.node = p.nodes[q.rand(hotFiles)]
	s.message().header().NodeId = s.node
	as[fuseproto.OpenIn](s.message().in).Flags = unix.O_RDONLY
}

func (p *openrel) answer(_ *queue, s *slot, r result) (bool, error) {
	m := s.message()
	if s.step == 1 {
		return false, m.success(r, 0)
	}
	if err := m.success(r, 16); err != nil {
		return false, err
	}
	s.step = 1
	s.message().header().NodeId = s.node
	as[fuseproto.ReleaseIn](s.message().in).Fh = as[fuseproto.OpenOut](m.out[outHeader:]).Fh
	return true, nil
}

type statfs struct{}

func (statfs) prepare(*queue) error { return nil }
func (statfs) finish(*queue) error  { return nil }

func (statfs) begin(_ *queue, s *slot) { s.message().header().NodeId = fuseproto.FUSE_ROOT_ID }

func (statfs) answer(_ *queue, s *slot, r result) (bool, error) {
	m := s.message()
	if err := m.success(r, 80); err != nil {
		return false, err
	}
	if o := as[fuseproto.StatfsOut](m.out[outHeader:]); o.Blocks == 0 || o.Bsize == 0 {
		return false, fmt.Errorf("%v: %d blocks of %d bytes, expected some", m.op, o.Blocks, o.Bsize)
	}
	return false, nil
}
