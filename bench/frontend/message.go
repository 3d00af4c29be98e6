package frontend

import (
	"fmt"
	"syscall"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/virtqueue"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// Bytes of the headers of requests and answers.
const (
	inHeader  = 40
	outHeader = 16
)

// shape is what requests of one kind have in common, in bytes. A message of it is built once and sent again and again.
type shape struct {
	op      fuseproto.Opcode
	in      int // arguments, the largest if they vary
	inData  int
	out     int // room for the answer's arguments
	outData int
	noReply bool
}

// descs returns how many descriptors a message of s takes.
func (s shape) descs(layout Layout) int {
	n := 4 // headers and arguments
	for _, size := range []int{s.inData, s.outData} {
		if layout == Pages {
			n += (size + vqtest.Page - 1) / vqtest.Page
		} else if size > 0 {
			n++
		}
	}
	return n
}

// message is a request and the room for its answer in guest memory, and the indirect table that describes them.
type message struct {
	shape
	in, out   []byte // headers with arguments
	data      []byte // read or written
	pages     bool   // data lies page by page, from the last to the first
	table     []virtqueue.Desc
	tableAddr uint64
	tableLen  uint32
	unique    uint64          // of the request under way
	args      *virtqueue.Desc // of the arguments, whose length may change
}

// newMessage lays a message out as Linux does (fs/fuse/virtio_fs.c, virtio_fs_enqueue_req): header, arguments, data; then room for
// the answer in the same way.
func newMessage(mem *vqtest.Memory, s shape, layout Layout, uid, gid uint32) *message {
	in, out := mem.Alloc(uint64(inHeader+s.in), vqtest.Page), mem.Alloc(uint64(outHeader+s.out), vqtest.Page)
	size := max(s.inData, s.outData)
	pages := (size + vqtest.Page - 1) / vqtest.Page
	m := &message{
		shape: s, pages: layout == Pages,
		in: mem.Bytes(in, uint64(inHeader+s.in)), out: mem.Bytes(out, uint64(outHeader+s.out)),
	}
	var data uint64
	if size > 0 {
		data = mem.Alloc(uint64(pages)*vqtest.Page, vqtest.Page)
		m.data = mem.Bytes(data, uint64(pages)*vqtest.Page)
	}

	var c []virtqueue.Desc
	add := func(addr uint64, n int, flags uint16) {
		if n > 0 {
			c = append(c, virtqueue.Desc{Addr: addr, Len: uint32(n), Flags: flags | virtqueue.VIRTQ_DESC_F_NEXT, Next: uint16(len(c) + 1)})
		}
	}
	addData := func(n int, flags uint16) {
		if layout == Contiguous {
			add(data, n, flags)
			return
		}
		for i := 0; i*vqtest.Page < n; i++ {
			// Descending, so that no two neighbours can be joined: page-cache pages lie anywhere.
			add(data+uint64(pages-1-i)*vqtest.Page, min(n-i*vqtest.Page, vqtest.Page), flags)
		}
	}
	add(in, inHeader, 0)
	add(in+inHeader, s.in, 0)
	addData(s.inData, 0)
	if !s.noReply {
		add(out, outHeader, virtqueue.VIRTQ_DESC_F_WRITE)
		add(out+outHeader, s.out, virtqueue.VIRTQ_DESC_F_WRITE)
		addData(s.outData, virtqueue.VIRTQ_DESC_F_WRITE)
	}
	c[len(c)-1].Flags &^= virtqueue.VIRTQ_DESC_F_NEXT
	c[len(c)-1].Next = 0
	m.tableLen = uint32(16 * len(c))
	m.tableAddr = mem.Alloc(uint64(m.tableLen), 16)
	m.table = table(mem.Bytes(m.tableAddr, uint64(m.tableLen)), len(c))
	copy(m.table, c)
	if s.in > 0 {
		m.args = &m.table[1]
	}
	clear(m.in)
	h := m.header()
	h.Opcode = uint32(s.op)
	h.Length = uint32(inHeader + s.in + s.inData)
	h.Uid, h.Gid, h.Pid = uid, gid, 1
	return m
}

func (m *message) header() *fuseproto.InHeader { return as[fuseproto.InHeader](m.in) }

// size says that the arguments are of n bytes this time.
func (m *message) size(n int) {
	m.args.Len = uint32(n)
	m.header().Length = uint32(inHeader + n + m.inData)
}

// name puts name and its NUL after the first fixed bytes of the arguments.
func (m *message) name(fixed int, name string) {
	n := copy(m.in[inHeader+fixed:], name)
	m.in[inHeader+fixed+n] = 0
	m.size(fixed + n + 1)
}

// page returns the i-th 4 KiB of the data.
func (m *message) page(i int) []byte {
	if m.pages {
		i = len(m.data)/vqtest.Page - 1 - i
	}
	return m.data[i*vqtest.Page : (i+1)*vqtest.Page : (i+1)*vqtest.Page]
}

// copyData copies the first len(p) bytes of the data.
func (m *message) copyData(p []byte) {
	for i := 0; len(p) > 0; i++ {
		p = p[copy(p, m.page(i)):]
	}
}

// result is what the answer's header says.
type result struct {
	errno syscall.Errno
	size  int // bytes after the header
}

// result checks the answer's header against what the device says to have written.
func (m *message) result(written uint32) (result, error) {
	h := *as[fuseproto.OutHeader](m.out)
	switch {
	case h.Unique != m.unique:
		return result{}, fmt.Errorf("%v: answer is to request %d, expected %d", m.op, h.Unique, m.unique)
	case h.Length != written || h.Length < outHeader || int(h.Length) > outHeader+m.shape.out+m.outData:
		return result{}, fmt.Errorf("%v: answer of %d bytes by its header and %d by the ring, expected %d to %d", m.op, h.Length, written, outHeader, outHeader+m.shape.out+m.outData)
	case h.Status > 0 || h.Status < -4095:
		return result{}, fmt.Errorf("%v: answer has error %d, which is no errno", m.op, h.Status)
	}
	return result{syscall.Errno(-h.Status), int(h.Length) - outHeader}, nil
}

// success is an error unless the answer is without one and of n bytes.
func (m *message) success(r result, n int) error {
	switch {
	case r.errno != 0:
		return fmt.Errorf("%v of node %d failed: %w (errno %d)", m.op, m.header().NodeId, r.errno, int(r.errno))
	case r.size != n:
		return fmt.Errorf("%v of node %d: answer of %d bytes, expected %d", m.op, m.header().NodeId, r.size, n)
	}
	return nil
}
