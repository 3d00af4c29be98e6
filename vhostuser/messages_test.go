package vhostuser_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
)

// sample is one legal message; the tests break each in every way.
type sample struct {
	req     vhostuser.Request
	payload []byte
	fds     int
	stray   bool   // one descriptor more is tolerated
	feature uint64 // protocol feature that it needs
	typed   bool
	badRing []byte // the payload for a ring that does not exist
}

var sampleRegion = vhostuser.MemRegion{GuestPhysAddr: 0, Size: memSize, UserAddr: memUser}

const (
	slots  = vhostuser.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
	config = vhostuser.VHOST_USER_PROTOCOL_F_CONFIG
)

var samples = []sample{
	{req: vhostuser.VHOST_USER_GET_FEATURES, typed: true},
	{req: vhostuser.VHOST_USER_SET_FEATURES, payload: vhosttest.U64(allFeatures)},
	{req: vhostuser.VHOST_USER_SET_OWNER},
	{req: vhostuser.VHOST_USER_RESET_OWNER},
	{req: vhostuser.VHOST_USER_SET_MEM_TABLE, payload: vhosttest.MemTable(sampleRegion), fds: 1},
	{req: vhostuser.VHOST_USER_SET_VRING_NUM, payload: vhosttest.State(1, 256), badRing: vhosttest.State(2, 256)},
	{req: vhostuser.VHOST_USER_SET_VRING_ADDR, payload: vringAddr(1), badRing: vringAddr(2)},
	{req: vhostuser.VHOST_USER_SET_VRING_BASE, payload: vhosttest.State(1, 0), badRing: vhosttest.State(1<<31, 0)},
	{req: vhostuser.VHOST_USER_GET_VRING_BASE, payload: vhosttest.State(1, 0), badRing: vhosttest.State(^uint32(0), 0), typed: true},
	{req: vhostuser.VHOST_USER_SET_VRING_KICK, payload: vhosttest.U64(1), fds: 1, badRing: vhosttest.U64(2)},
	{req: vhostuser.VHOST_USER_SET_VRING_CALL, payload: vhosttest.U64(1), fds: 1, badRing: vhosttest.U64(255)},
	{req: vhostuser.VHOST_USER_SET_VRING_ERR, payload: vhosttest.U64(1), fds: 1, badRing: vhosttest.U64(2)},
	{req: vhostuser.VHOST_USER_SET_VRING_KICK, payload: vhosttest.U64(1 | vhostuser.VringNoFD), badRing: vhosttest.U64(2 | vhostuser.VringNoFD)},
	{req: vhostuser.VHOST_USER_SET_VRING_CALL, payload: vhosttest.U64(1 | vhostuser.VringNoFD), badRing: vhosttest.U64(2 | vhostuser.VringNoFD)},
	{req: vhostuser.VHOST_USER_SET_VRING_ERR, payload: vhosttest.U64(1 | vhostuser.VringNoFD), badRing: vhosttest.U64(2 | vhostuser.VringNoFD)},
	{req: vhostuser.VHOST_USER_GET_PROTOCOL_FEATURES, typed: true},
	{req: vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES, payload: vhosttest.U64(vhostuser.VHOST_USER_PROTOCOL_F_REPLY_ACK | slots)},
	{req: vhostuser.VHOST_USER_GET_QUEUE_NUM, feature: vhostuser.VHOST_USER_PROTOCOL_F_MQ, typed: true},
	{req: vhostuser.VHOST_USER_SET_VRING_ENABLE, payload: vhosttest.State(1, 1), badRing: vhosttest.State(2, 1)},
	{req: vhostuser.VHOST_USER_SET_BACKEND_REQ_FD, fds: 1, feature: vhostuser.VHOST_USER_PROTOCOL_F_BACKEND_REQ},
	{req: vhostuser.VHOST_USER_GET_CONFIG, payload: vhosttest.Config(0, 36, 0), feature: config, typed: true},
	{req: vhostuser.VHOST_USER_SET_CONFIG, payload: vhosttest.Config(0, 36, vhostuser.ConfigMigration), feature: config},
	{req: vhostuser.VHOST_USER_RESET_DEVICE, feature: vhostuser.VHOST_USER_PROTOCOL_F_RESET_DEVICE},
	{req: vhostuser.VHOST_USER_GET_MAX_MEM_SLOTS, feature: slots, typed: true},
	{req: vhostuser.VHOST_USER_ADD_MEM_REG, payload: vhosttest.MemReg(sampleRegion), fds: 1, feature: slots},
	{req: vhostuser.VHOST_USER_REM_MEM_REG, payload: vhosttest.MemReg(sampleRegion), stray: true, feature: slots},
}

// notOffered are the messages of features that are never offered, and numbers that nobody has given a meaning.
var notOffered = []vhostuser.Request{
	vhostuser.VHOST_USER_SET_LOG_BASE, vhostuser.VHOST_USER_SET_LOG_FD, vhostuser.VHOST_USER_SEND_RARP, vhostuser.VHOST_USER_NET_SET_MTU,
	vhostuser.VHOST_USER_IOTLB_MSG, vhostuser.VHOST_USER_SET_VRING_ENDIAN, vhostuser.VHOST_USER_CREATE_CRYPTO_SESSION,
	vhostuser.VHOST_USER_CLOSE_CRYPTO_SESSION, vhostuser.VHOST_USER_POSTCOPY_ADVISE, vhostuser.VHOST_USER_POSTCOPY_LISTEN,
	vhostuser.VHOST_USER_POSTCOPY_END, vhostuser.VHOST_USER_GET_INFLIGHT_FD, vhostuser.VHOST_USER_SET_INFLIGHT_FD,
	vhostuser.VHOST_USER_GPU_SET_SOCKET, vhostuser.VHOST_USER_VRING_KICK, vhostuser.VHOST_USER_SET_STATUS, vhostuser.VHOST_USER_GET_STATUS,
	vhostuser.VHOST_USER_GET_SHARED_OBJECT, vhostuser.VHOST_USER_SET_DEVICE_STATE_FD, vhostuser.VHOST_USER_CHECK_DEVICE_STATE,
	vhostuser.VHOST_USER_GET_SHMEM_CONFIG, vhostuser.VHOST_USER_GET_VRING_BASE_SKIP_DRAIN,
	46, 63, 1000, 1 << 31, 1<<32 - 1,
}

func vringAddr(index uint32) []byte {
	return vhostuser.Append(nil, vhostuser.VringAddr{Index: index, Desc: memUser, Avail: memUser + 0x4000, Used: memUser + 0x5000})
}

func (m *sample) String() string {
	if len(m.payload) == 8 && vhostuser.Decode[uint64](m.payload)&vhostuser.VringNoFD != 0 {
		return m.req.String() + " without fd"
	}
	return m.req.String()
}

// files returns n descriptors: the one of memory if the message is to map it.
func (m *sample) files(t testing.TB, n int) []int {
	fds := make([]int, 0, n)
	for range n {
		if m.req == vhostuser.VHOST_USER_SET_MEM_TABLE || m.req == vhostuser.VHOST_USER_ADD_MEM_REG {
			fds = append(fds, region(t, 0).FD)
		} else {
			fds = append(fds, eventFD(t))
		}
	}
	return fds
}

// ready is a session in which m is legal.
func (m *sample) ready(t testing.TB) *session {
	s := negotiated(t, func(d *fakeDevice, _ *vhostuser.Config) { d.config = make([]byte, 40) })
	s.must(s.SetFeatures(allFeatures))
	if m.req == vhostuser.VHOST_USER_REM_MEM_REG {
		s.must(s.AddMemReg(region(t, 0)))
	}
	s.dev.history()
	return s
}

func TestEveryRequestHasASample(t *testing.T) {
	for req := vhostuser.VHOST_USER_GET_FEATURES; req <= vhostuser.VHOST_USER_GET_VRING_BASE_SKIP_DRAIN; req++ {
		if strings.HasPrefix(req.String(), "request") {
			t.Errorf("%v has no name", req)
		}
		handled := slices.ContainsFunc(samples, func(m sample) bool { return m.req == req })
		if handled == slices.Contains(notOffered, req) {
			t.Errorf("%v is to be in one of samples and notOffered", req)
		}
	}
	if got := vhostuser.Request(99).String(); got != "request 99" {
		t.Errorf("an unknown request is called %q", got)
	}
}

func TestEveryMessage(t *testing.T) {
	for _, m := range samples {
		t.Run(m.String(), func(t *testing.T) {
			t.Run("legal", func(t *testing.T) { m.testLegal(t) })
			t.Run("wrong size", func(t *testing.T) { m.testSize(t) })
			t.Run("wrong fds", func(t *testing.T) { m.testFDs(t) })
			t.Run("missing feature", func(t *testing.T) { m.testFeature(t) })
			t.Run("bad ring", func(t *testing.T) { m.testRing(t) })
			t.Run("bad header", func(t *testing.T) { m.testHeader(t) })
			t.Run("truncated", func(t *testing.T) { m.testTruncated(t) })
			t.Run("late fds", func(t *testing.T) { m.testLateFDs(t) })
		})
	}
}

func (m *sample) testLegal(t *testing.T) {
	checkLeaks(t)
	s := m.ready(t)
	if m.typed {
		if _, err := s.Ask(m.req, m.payload); err != nil {
			t.Error(err)
		}
	} else if err := s.Tell(m.req, m.payload, m.files(t, m.fds)...); err != nil {
		t.Error(err)
	}
	s.must(s.end())
	// Without asking for an acknowledgement there is none: the next answer is another request's.
	s = m.ready(t)
	if !m.typed {
		s.must(s.Send(m.req, m.payload, false, m.files(t, m.fds)...))
	}
	s.sync()
}

func (m *sample) testSize(t *testing.T) {
	checkLeaks(t)
	sizes := []int{len(m.payload) + 1, len(m.payload) + 8, vhostuser.MaxPayload}
	if n := len(m.payload); n > 0 {
		sizes = append(sizes, 0, 1, n-1)
	}
	for _, size := range sizes {
		payload := append(slices.Clone(m.payload), make([]byte, size)...)[:size]
		s := m.ready(t)
		s.must(s.Send(m.req, payload, true, m.files(t, m.fds)...))
		s.brokenBy(m.req)
		if got := s.dev.history(); strings.Contains(got, "start") || strings.Contains(got, "reset") {
			t.Errorf("device was told %q of a message of %d bytes", got, size)
		}
	}
}

func (m *sample) testFDs(t *testing.T) {
	checkLeaks(t)
	for _, n := range []int{0, 1, 2, 3, 253} {
		if n == m.fds || m.stray && n == 1 {
			continue
		}
		fds := m.files(t, min(n, 3))
		fds = slices.Repeat(fds, n)[:n]
		s := m.ready(t)
		s.must(s.Send(m.req, m.payload, true, fds...))
		if !m.typed {
			ack, err := s.Receive(m.req)
			if err != nil || !slices.Equal(ack, vhosttest.U64(1)) {
				t.Errorf("%d descriptors: acknowledged with % x, error %v, expected 1", n, ack, err)
			}
			s.calls("")
			s.must(s.Send(m.req, m.payload, false, fds...))
		}
		s.brokenBy(m.req)
	}
}

func (m *sample) testFeature(t *testing.T) {
	checkLeaks(t)
	s := m.ready(t)
	s.must(s.SetProtocolFeatures(vhostuser.VHOST_USER_PROTOCOL_F_REPLY_ACK))
	s.must(s.Send(m.req, m.payload, true, m.files(t, m.fds)...))
	if m.feature != 0 {
		ack, err := s.Receive(m.req)
		if err != nil || !slices.Equal(ack, vhosttest.U64(1)) {
			t.Errorf("acknowledged with % x, error %v, expected 1", ack, err)
		}
		s.calls("")
		s.must(s.Send(m.req, m.payload, false, m.files(t, m.fds)...))
		s.brokenBy(m.req)
		return
	}
	// Without any protocol feature nothing is acknowledged, but all is done.
	if _, err := s.Receive(m.req); err != nil {
		t.Error(err)
	}
	s.must(s.Send(vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES, vhosttest.U64(0), false))
	s.must(s.Send(m.req, m.payload, true, m.files(t, m.fds)...))
	if m.typed {
		if _, err := s.Receive(m.req); err != nil {
			t.Error(err)
		}
	}
	if m.req != vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES { // which turns acknowledgements on again
		s.sync()
	}
}

func (m *sample) testRing(t *testing.T) {
	if m.badRing == nil {
		return
	}
	checkLeaks(t)
	s := m.ready(t)
	s.must(s.Send(m.req, m.badRing, true, m.files(t, m.fds)...))
	if !m.typed {
		if ack, err := s.Receive(m.req); err != nil || !slices.Equal(ack, vhosttest.U64(1)) {
			t.Errorf("acknowledged with % x, error %v, expected 1", ack, err)
		}
		s.calls("")
		s.must(s.Send(m.req, m.badRing, false, m.files(t, m.fds)...))
	}
	s.brokenBy(m.req)
}

func (m *sample) testHeader(t *testing.T) {
	checkLeaks(t)
	for _, flags := range []uint32{0, 2, 3, 0x5, 0xd, 0x11, 0x8000_0001, ^uint32(0)} {
		s := m.ready(t)
		s.must(s.Write(vhosttest.Message(m.req, flags, m.payload), m.files(t, m.fds)...))
		s.brokenBy(m.req)
	}
	for _, size := range []uint32{vhostuser.MaxPayload + 1, 1 << 31, ^uint32(0)} {
		s := m.ready(t)
		header := vhostuser.Header{Request: m.req, Flags: vhostuser.Version, Size: size}
		s.must(s.Write(vhostuser.Append(nil, header), m.files(t, m.fds)...))
		s.brokenBy(m.req)
	}
}

// testTruncated ends the stream after every byte.
func (m *sample) testTruncated(t *testing.T) {
	checkLeaks(t)
	whole := vhosttest.Message(m.req, vhostuser.Version|vhostuser.FlagNeedReply, m.payload)
	fds := m.files(t, m.fds)
	for n := range whole {
		s := m.ready(t)
		if n > 0 {
			s.must(s.Write(whole[:n], fds...))
		}
		s.must(s.CloseWrite())
		switch {
		case n == 0:
			if err := s.wait(); err != nil {
				t.Errorf("session ended with %v at a message boundary", err)
			}
		case n < 12:
			s.brokenBy(0)
		default:
			s.brokenBy(m.req)
		}
	}
}

// testLateFDs sends descriptors with another byte than the first; and the message in pieces, which is legal.
func (m *sample) testLateFDs(t *testing.T) {
	checkLeaks(t)
	whole := vhosttest.Message(m.req, vhostuser.Version, m.payload)
	fds := m.files(t, max(m.fds, 1))
	if len(m.payload) > 0 {
		s := m.ready(t)
		s.must(s.Write(whole[:12]))
		s.must(s.Write(whole[12:], fds...))
		s.brokenBy(m.req)
	}
	s := m.ready(t)
	s.must(s.Write(whole[:1], fds[:m.fds]...))
	for i := range whole[1:] {
		s.must(s.Write(whole[i+1 : i+2]))
	}
	if m.typed {
		if _, err := s.Receive(m.req); err != nil {
			t.Error(err)
		}
	}
	s.sync()
}

func TestNotOffered(t *testing.T) {
	for _, req := range notOffered {
		t.Run(fmt.Sprint(req), func(t *testing.T) {
			checkLeaks(t)
			for _, size := range []int{0, 8, 16, 40, vhostuser.MaxPayload} {
				s := negotiated(t, nil)
				for range 2 {
					s.must(s.Send(req, make([]byte, size), true, eventFD(t), eventFD(t)))
					if ack, err := s.Receive(req); err != nil || !slices.Equal(ack, vhosttest.U64(1)) {
						t.Fatalf("acknowledged with % x, error %v, expected 1", ack, err)
					}
				}
				s.calls("")
				s.must(s.Send(req, make([]byte, size), false, eventFD(t)))
				s.brokenBy(req)
			}
		})
	}
}

func TestBadValues(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	for _, c := range []struct {
		req     vhostuser.Request
		payload []byte
	}{
		{vhostuser.VHOST_USER_SET_VRING_NUM, vhosttest.State(0, 0)},
		{vhostuser.VHOST_USER_SET_VRING_NUM, vhosttest.State(0, 32769)},
		{vhostuser.VHOST_USER_SET_VRING_NUM, vhosttest.State(0, 65536+256)},
		{vhostuser.VHOST_USER_SET_VRING_ENABLE, vhosttest.State(0, 2)},
		{vhostuser.VHOST_USER_SET_VRING_ENABLE, vhosttest.State(0, ^uint32(0))},
		{vhostuser.VHOST_USER_SET_FEATURES, vhosttest.U64(1 << 63)},
		{vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES, vhosttest.U64(1 << 63)},
	} {
		if err := s.Tell(c.req, c.payload); !errors.As(err, new(*vhosttest.AckError)) {
			t.Errorf("%v % x: got %v, expected a failed acknowledgement", c.req, c.payload, err)
		}
	}
	s.calls("")
}

// TestDescriptorsLost is MSG_CTRUNC: the process can take only some of the descriptors sent.
func TestDescriptorsLost(t *testing.T) {
	checkLeaks(t)
	s := negotiated(t, nil)
	fds := []int{eventFD(t), eventFD(t)}
	var was unix.Rlimit
	s.must(unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	// The lowest free descriptor is below the limit, the next is not.
	next := eventFD(t)
	limit := was
	limit.Cur = uint64(next) + 2
	s.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
	err := s.Send(vhostuser.VHOST_USER_SET_MEM_TABLE, vhosttest.MemTable(sampleRegion, sampleRegion), true, fds...)
	result := s.wait()
	s.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &was))
	s.must(err)
	var broken *vhostuser.ProtocolError
	if !errors.As(result, &broken) || !strings.Contains(result.Error(), "descriptors were lost") {
		t.Errorf("session ended with %v, expected the lost descriptors as the reason", result)
	}
}

func TestMemTableCount(t *testing.T) {
	checkLeaks(t)
	for _, n := range []uint32{0, 2, 127, 128, 1 << 27, ^uint32(0)} {
		s := negotiated(t, nil)
		payload := vhosttest.MemTable(sampleRegion)
		copy(payload, vhosttest.State(n, 0)[:4])
		s.must(s.Send(vhostuser.VHOST_USER_SET_MEM_TABLE, payload, true, region(t, 0).FD))
		s.brokenBy(vhostuser.VHOST_USER_SET_MEM_TABLE)
	}
	s := negotiated(t, nil)
	s.must(s.SetMemTable(region(t, 0), region(t, memSize)))
	s.must(s.SetMemTable()) // none is legal
	s.calls("memory; memory")
}
