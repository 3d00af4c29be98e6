package vqtest

// Request is a FUSE request as Linux's driver lays it out (fs/fuse/virtio_fs.c, virtio_fs_enqueue_req): the header, the other
// arguments in one buffer, data by pages; then room for the reply in the same way.
type Request struct {
	Header  []byte // fuse_in_header
	Args    []byte // the arguments after it
	Data    []byte // data, in pages
	OutArgs int    // room for the reply's arguments after the 16-byte header, in bytes
	OutData int    // room for the reply's data in pages, in bytes
	NoReply bool   // no writable part, as FUSE_FORGET
}

// outHeaderSize is the size of fuse_out_header in bytes.
const outHeaderSize = 16

// Build allocates r's buffers in m and fills the readable ones. The Chain can be offered any number of times.
func (m *Memory) Build(r Request) Chain {
	var c Chain
	for _, p := range [][]byte{r.Header, r.Args} {
		if len(p) > 0 {
			addr := m.Alloc(uint64(len(p)), 8)
			m.Write(addr, p)
			c = append(c, Buffer{Addr: addr, Len: uint32(len(p))})
		}
	}
	pages := len(c)
	c = m.pages(c, len(r.Data), false)
	for _, b := range c[pages:] {
		m.Write(b.Addr, r.Data[:b.Len])
		r.Data = r.Data[b.Len:]
	}
	if r.NoReply {
		return c
	}
	c = append(c, Buffer{Addr: m.Alloc(outHeaderSize, 8), Len: outHeaderSize, Write: true})
	if r.OutArgs > 0 {
		c = append(c, Buffer{Addr: m.Alloc(uint64(r.OutArgs), 8), Len: uint32(r.OutArgs), Write: true})
	}
	return m.pages(c, r.OutData, true)
}

func (m *Memory) pages(c Chain, n int, write bool) Chain {
	for n > 0 {
		size := min(n, Page)
		c = append(c, Buffer{Addr: m.Alloc(Page, Page), Len: uint32(size), Write: write})
		n -= size
	}
	return c
}

// Reply returns a copy of the first n bytes of c's writable part: what the device says it has written there.
func (m *Memory) Reply(c Chain, n uint32) []byte {
	out := make([]byte, 0, n)
	for _, b := range c {
		if left := n - uint32(len(out)); b.Write && left > 0 {
			p := make([]byte, min(b.Len, left))
			m.Read(b.Addr, p)
			out = append(out, p...)
		}
	}
	return out
}
