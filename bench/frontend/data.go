package frontend

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// openFile is the part of a program that has one file open.
type openFile struct {
	*client
	node, fh uint64
}

func (p *openFile) open(q *queue, name string, flags uint32) (err error) {
	p.client = newClient(q)
	if p.node, err = p.walk(name); err != nil {
		return err
	}
	p.fh, err = p.client.open(openShape, p.node, flags)
	return err
}

func (p *openFile) finish(*queue) error {
	return errors.Join(p.release(releaseShape, p.node, p.fh), p.forgetAll())
}

// sample is how often an answer is compared word by word; of the others, each page's first and last words are.
const sample = 64

// readRandom reads the data file at random, aligned to what it reads.
type readRandom struct {
	openFile
	reads uint64
}

func (p *readRandom) prepare(q *queue) error { return p.open(q, dataName, unix.O_RDONLY) }

func (p *readRandom) begin(q *queue, s *slot) {
	n := len(s.message().data)
	p.read(s, uint64(q.rand(dataSize/n)*n))
}

func (p *readRandom) read(s *slot, off uint64) {
	m := s.message()
	s.offset = off
	in := as[fuseproto.ReadIn](m.in)
	in.NodeId, in.Fh, in.Offset, in.Size = p.node, p.fh, off, uint32(len(m.data))
}

func (p *readRandom) answer(q *queue, s *slot, r result) (bool, error) {
	m := s.message()
	if err := m.success(r, len(m.data)); err != nil {
		return false, err
	}
	p.reads++
	q.bytes += uint64(len(m.data))
	step := vqtest.Page/8 - 1
	if p.reads%sample == 0 {
		step = 1
	}
	for i := range len(m.data) / vqtest.Page {
		w, off := words(m.page(i)), s.offset+uint64(i*vqtest.Page)
		for j := 0; j < len(w); j += step {
			if at := off + uint64(8*j); w[j] != dataWord(at) {
				return false, fmt.Errorf("%v of %d bytes at %d: at %d is %#016x, expected %#016x", m.op, len(m.data), s.offset, at, w[j], dataWord(at))
			}
		}
	}
	return false, nil
}

// readSequential reads the data file from end to end, again and again; each queue starts somewhere else.
type readSequential struct {
	readRandom
	next uint64
}

func (p *readSequential) prepare(q *queue) error {
	n := len(q.f.queues)
	p.next = uint64((q.ring.index-1)*(dataSize/n)) &^ (maxData - 1)
	return p.readRandom.prepare(q)
}

func (p *readSequential) begin(_ *queue, s *slot) {
	p.read(s, p.next)
	p.next = (p.next + uint64(len(s.message().data))) % dataSize
}

// writeRandom writes to the file for that, aligned to what it writes. Every page has the same words for a whole Run but for the first and the
// last, which say where it is: what a page has in the end does not depend on which of several writes came last.
type writeRandom struct {
	openFile
	seed    uint64
	written []bool // by block
	size    int
}

func (p *writeRandom) prepare(q *queue) error {
	p.size = len(q.slots[0].messages[0].data)
	p.written = make([]bool, writtenSize/p.size)
	p.seed = mix(uint64(os.Getpid())<<32 ^ uint64(clock()) ^ q.f.seed<<56)
	if i := q.ring.index - 1; i > 0 {
		p.seed = q.f.queues[0].program.(*writeRandom).seed // of all queues alike: they write to one file
	}
	for i := range q.slots {
		w := words(q.slots[i].messages[0].data)
		for j := range w {
			w[j] = p.inner(j % (vqtest.Page / 8))
		}
	}
	return p.open(q, writtenName, unix.O_RDWR)
}

// inner is the j-th word of every page, edge the first and the last one at offset off.
func (p *writeRandom) inner(j int) uint64     { return mix(p.seed + uint64(j)) }
func (p *writeRandom) edge(off uint64) uint64 { return mix(p.seed ^ off<<8) }
func (p *writeRandom) block(off uint64) *bool { return &p.written[off/uint64(p.size)] }
func (p *writeRandom) word(off uint64) uint64 {
	if j := int(off % vqtest.Page / 8); j > 0 && j < vqtest.Page/8-1 {
		return p.inner(j)
	}
	return p.edge(off)
}

func (p *writeRandom) begin(q *queue, s *slot) {
	m := s.message()
	s.offset = uint64(q.rand(writtenSize/p.size) * p.size)
	for i := range p.size / vqtest.Page {
		w, off := words(m.page(i)), s.offset+uint64(i*vqtest.Page)
		w[0], w[len(w)-1] = p.edge(off), p.edge(off+vqtest.Page-8)
	}
	in := as[fuseproto.WriteIn](m.in)
	in.NodeId, in.Fh, in.Offset, in.Size, in.Flags = p.node, p.fh, s.offset, uint32(p.size), unix.O_RDWR
}

func (p *writeRandom) answer(q *queue, s *slot, r result) (bool, error) {
	m := s.message()
	if err := m.success(r, 8); err != nil {
		return false, err
	}
	if n := as[fuseproto.WriteOut](m.out[outHeader:]).Size; n != uint32(p.size) {
		return false, fmt.Errorf("%v of %d bytes at %d wrote %d", m.op, p.size, s.offset, n)
	}
	*p.block(s.offset) = true
	q.bytes += uint64(p.size)
	return false, nil
}

// finish checks what was written: in the host's file if Config.Dir says where it is, by READ otherwise.
func (p *writeRandom) finish(q *queue) error {
	return errors.Join(p.verify(q), p.openFile.finish(q))
}

func (p *writeRandom) verify(q *queue) (err error) {
	var from io.ReaderAt = reader{p}
	if dir := q.f.config.Dir; dir != "" {
		f, err := os.Open(filepath.Join(dir, writtenName))
		if err != nil {
			return fmt.Errorf("verify what was written: %w", err)
		}
		defer f.Close()
		from = f
	}
	buf := make([]byte, p.size)
	w := words(buf)
	for off := uint64(0); off < writtenSize; off += uint64(p.size) {
		if !*p.block(off) {
			continue
		}
		if _, err := from.ReadAt(buf, int64(off)); err != nil {
			return fmt.Errorf("verify what was written at %d: %w", off, err)
		}
		for j := range w {
			if at := off + uint64(8*j); w[j] != p.word(at) {
				return fmt.Errorf("verify what was written at %d: at %d is %#016x, expected %#016x", off, at, w[j], p.word(at))
			}
		}
	}
	return nil
}

// reader reads a program's file through the server.
type reader struct{ p *writeRandom }

func (r reader) ReadAt(b []byte, off int64) (int, error) {
	k := r.p.caller(readShape(len(b)))
	in := as[fuseproto.ReadIn](k.m.in)
	in.NodeId, in.Fh, in.Offset, in.Size, in.Flags = r.p.node, r.p.fh, uint64(off), uint32(len(b)), unix.O_RDWR
	if err := k.do(len(b)); err != nil {
		return 0, err
	}
	k.m.copyData(b)
	return len(b), nil
}
