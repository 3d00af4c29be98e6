package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Message gathers the memory that one message of a socket is sent from, or received into. It may be used again and again,
// by one call at a time.
type Message struct {
	hdr unix.Msghdr
	iov [IOVMax]unix.Iovec
	n   int
}

// Reset makes it head, and nothing if that is empty.
func (m *Message) Reset(head []byte) {
	m.n = 0
	if len(head) > 0 {
		m.iov[0] = MakeIovec(head)
		m.n = 1
	}
}

// Add appends up to n bytes of the pieces, as far as there is room for pieces, and returns how many bytes that were.
func (m *Message) Add(pieces []unix.Iovec, n int) int {
	total := 0
	for i := 0; i < len(pieces) && total < n && m.n < len(m.iov); i++ {
		v := pieces[i]
		v.Len = min(v.Len, uint64(n-total))
		total += int(v.Len)
		m.iov[m.n] = v
		m.n++
	}
	return total
}

// Send sends it over the socket fd with MSG_* flags. unix.SendmsgBuffers allocates; this does not.
func (m *Message) Send(fd, flags int) (int, unix.Errno) {
	return m.call(unix.SYS_SENDMSG, fd, flags)
}

// Receive receives a message into it; received says with MSG_TRUNC that it was longer.
func (m *Message) Receive(fd, flags int) (n int, received int, errno unix.Errno) {
	n, errno = m.call(unix.SYS_RECVMSG, fd, flags)
	return n, int(m.hdr.Flags), errno
}

func (m *Message) call(trap uintptr, fd, flags int) (int, unix.Errno) {
	m.hdr = unix.Msghdr{Iov: &m.iov[0], Iovlen: uint64(m.n)}
	n, _, errno := unix.Syscall(trap, uintptr(fd), uintptr(unsafe.Pointer(&m.hdr)), uintptr(flags))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
