package fsbackend

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// TestMessages sends from pieces of memory over a socket and receives into others.
func TestMessages(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	pieces := func(b []byte, size int) (iov []unix.Iovec) {
		for len(b) > 0 {
			n := min(size, len(b))
			iov = append(iov, sys.MakeIovec(b[:n]))
			b = b[n:]
		}
		return iov
	}
	var m sys.Message
	from, to := []byte("0123456789abcdefghij"), make([]byte, 20)
	var source Source
	source.Reset(pieces(from, 3), 0, 20)
	var sink Sink
	sink.Reset(pieces(to, 7), 0, 20)
	head, got := []byte("head"), make([]byte, 4)

	var gate Gate
	gate.Close()
	source.SetGate(&gate)
	if errno := source.SendMsg(&m, fds[0], head, 5, unix.MSG_DONTWAIT); errno != unix.EIO || source.Len() != 20 {
		t.Errorf("behind a closed gate: %v, %d bytes left", errno, source.Len())
	}
	source.SetGate(nil)
	if errno := source.SendMsg(&m, fds[0], head, 11, unix.MSG_DONTWAIT); errno != OK || source.Len() != 9 {
		t.Fatalf("SendMsg: %v, %d bytes left", errno, source.Len())
	}
	sink.SetGate(&gate)
	if _, _, errno := sink.ReceiveMsg(&m, fds[1], got, 20, unix.MSG_DONTWAIT); errno != unix.EIO {
		t.Errorf("behind a closed gate: %v", errno)
	}
	sink.SetGate(nil)
	n, flags, errno := sink.ReceiveMsg(&m, fds[1], got, 20, unix.MSG_DONTWAIT)
	if errno != OK || n != 15 || flags&unix.MSG_TRUNC != 0 || string(got) != "head" || sink.Written() != 11 || !bytes.Equal(to[:12], append(from[:11:11], 0)) {
		t.Errorf("ReceiveMsg: %d bytes, flags %#x, %v, %q and %q", n, flags, errno, got, to)
	}
	// What does not fit is said to be cut off, and nothing is written behind the room that there is.
	if errno := source.SendMsg(&m, fds[0], head, 9, unix.MSG_DONTWAIT); errno != OK {
		t.Fatal(errno)
	}
	n, flags, errno = sink.ReceiveMsg(&m, fds[1], got, 4, unix.MSG_DONTWAIT)
	if errno != OK || n != 8 || flags&unix.MSG_TRUNC == 0 || sink.Written() != 15 || to[15] != 0 {
		t.Errorf("ReceiveMsg of a longer one: %d bytes, flags %#x, %v, %q", n, flags, errno, to)
	}
	if _, _, errno := sink.ReceiveMsg(&m, fds[1], got, 4, unix.MSG_DONTWAIT); errno != unix.EAGAIN {
		t.Errorf("ReceiveMsg of nothing: %v", errno)
	}

	many := make([]byte, sys.IOVMax+5)
	source.Reset(pieces(many, 1), 0, uint64(len(many)))
	sink.Reset(pieces(many, 1), 0, uint64(len(many)))
	if s, r := source.Fits(len(many)), sink.Fits(len(many)); s != sys.IOVMax-1 || r != sys.IOVMax-1 {
		t.Errorf("%d and %d bytes fit", s, r)
	}
	if errno := source.SendMsg(&m, fds[0], head, len(many), unix.MSG_DONTWAIT); errno != unix.EMSGSIZE || source.Len() != len(many) {
		t.Errorf("SendMsg of too many pieces: %v, %d bytes left", errno, source.Len())
	}
}
