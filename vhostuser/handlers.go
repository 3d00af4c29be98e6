package vhostuser

import (
	"fmt"

	"github.com/sluicefs/sluice/guestmem"
)

// handler is one row of the table: what must hold before do is called, and how the message is answered.
//
// To add a message: its number and name in message.go, its struct there and the struct's size in message_unsafe.go, its
// feature in protocolFeatures, a row here, a sample in messages_test.go (which then breaks it in every way), and, if a
// front-end of the field sends it, a step in vhosttest/sequences.go.
type handler struct {
	size    int                                // payload bytes, the same for every such message unless tail is set
	tail    func(fixed []byte) int             // payload bytes after the first size, as those tell; nil: none
	fds     func(m *message) (least, most int) // nil: none
	feature uint64                             // protocol features that must have been negotiated
	typed   bool                               // do has put the reply in s.reply; otherwise the message is acknowledged if asked for
	// do carries the message out. A *deviceError is our own failure; any other error is the front-end's fault.
	do func(s *session, m *message) error
}

// refused are messages of features that are never offered.
var refused = handler{}

// handlers is indexed by request. Size, descriptors and feature are checked before do runs.
var handlers = [numRequests]handler{
	VHOST_USER_GET_FEATURES:              {typed: true, do: (*session).getFeatures},
	VHOST_USER_SET_FEATURES:              {size: 8, do: (*session).setFeatures},
	VHOST_USER_SET_OWNER:                 {do: (*session).setOwner},
	VHOST_USER_RESET_OWNER:               {do: (*session).resetOwner},
	VHOST_USER_SET_MEM_TABLE:             {size: sizeOf[MemTable](), tail: memTableTail, fds: memTableFDs, do: (*session).setMemTable},
	VHOST_USER_SET_LOG_BASE:              refused, // LOG_SHMFD
	VHOST_USER_SET_LOG_FD:                refused, // VHOST_F_LOG_ALL
	VHOST_USER_SET_VRING_NUM:             {size: sizeOf[VringState](), do: (*session).setVringNum},
	VHOST_USER_SET_VRING_ADDR:            {size: sizeOf[VringAddr](), do: (*session).setVringAddr},
	VHOST_USER_SET_VRING_BASE:            {size: sizeOf[VringState](), do: (*session).setVringBase},
	VHOST_USER_GET_VRING_BASE:            {size: sizeOf[VringState](), typed: true, do: (*session).getVringBase},
	VHOST_USER_SET_VRING_KICK:            {size: 8, fds: vringFDs, do: (*session).setVringKick},
	VHOST_USER_SET_VRING_CALL:            {size: 8, fds: vringFDs, do: (*session).setVringCall},
	VHOST_USER_SET_VRING_ERR:             {size: 8, fds: vringFDs, do: (*session).setVringErr},
	VHOST_USER_GET_PROTOCOL_FEATURES:     {typed: true, do: (*session).getProtocolFeatures},
	VHOST_USER_SET_PROTOCOL_FEATURES:     {size: 8, do: (*session).setProtocolFeatures},
	VHOST_USER_GET_QUEUE_NUM:             {feature: VHOST_USER_PROTOCOL_F_MQ, typed: true, do: (*session).getQueueNum},
	VHOST_USER_SET_VRING_ENABLE:          {size: sizeOf[VringState](), do: (*session).setVringEnable},
	VHOST_USER_SEND_RARP:                 refused, // network
	VHOST_USER_NET_SET_MTU:               refused, // network
	VHOST_USER_SET_BACKEND_REQ_FD:        {fds: oneFD, feature: VHOST_USER_PROTOCOL_F_BACKEND_REQ, do: (*session).setBackendReqFD},
	VHOST_USER_IOTLB_MSG:                 refused, // VIRTIO_F_ACCESS_PLATFORM
	VHOST_USER_SET_VRING_ENDIAN:          refused, // CROSS_ENDIAN; virtio-fs was never a legacy device
	VHOST_USER_GET_CONFIG:                {size: sizeOf[ConfigWindow](), tail: configTail, feature: VHOST_USER_PROTOCOL_F_CONFIG, typed: true, do: (*session).getConfig},
	VHOST_USER_SET_CONFIG:                {size: sizeOf[ConfigWindow](), tail: configTail, feature: VHOST_USER_PROTOCOL_F_CONFIG, do: (*session).setConfig},
	VHOST_USER_CREATE_CRYPTO_SESSION:     refused, // crypto
	VHOST_USER_CLOSE_CRYPTO_SESSION:      refused, // crypto
	VHOST_USER_POSTCOPY_ADVISE:           refused, // PAGEFAULT
	VHOST_USER_POSTCOPY_LISTEN:           refused, // PAGEFAULT
	VHOST_USER_POSTCOPY_END:              refused, // PAGEFAULT
	VHOST_USER_GET_INFLIGHT_FD:           refused, // INFLIGHT_SHMFD
	VHOST_USER_SET_INFLIGHT_FD:           refused, // INFLIGHT_SHMFD
	VHOST_USER_GPU_SET_SOCKET:            refused, // GPU
	VHOST_USER_RESET_DEVICE:              {feature: VHOST_USER_PROTOCOL_F_RESET_DEVICE, do: (*session).resetDevice},
	VHOST_USER_VRING_KICK:                refused, // INBAND_NOTIFICATIONS
	VHOST_USER_GET_MAX_MEM_SLOTS:         {feature: VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, typed: true, do: (*session).getMaxMemSlots},
	VHOST_USER_ADD_MEM_REG:               {size: sizeOf[MemReg](), fds: oneFD, feature: VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, do: (*session).addMemReg},
	VHOST_USER_REM_MEM_REG:               {size: sizeOf[MemReg](), fds: strayFD, feature: VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, do: (*session).remMemReg},
	VHOST_USER_SET_STATUS:                refused, // STATUS
	VHOST_USER_GET_STATUS:                refused, // STATUS
	VHOST_USER_GET_SHARED_OBJECT:         refused, // SHARED_OBJECT
	VHOST_USER_SET_DEVICE_STATE_FD:       refused, // DEVICE_STATE
	VHOST_USER_CHECK_DEVICE_STATE:        refused, // DEVICE_STATE
	VHOST_USER_GET_SHMEM_CONFIG:          refused, // SHMEM
	VHOST_USER_GET_VRING_BASE_SKIP_DRAIN: refused, // GET_VRING_BASE_SKIP_DRAIN
}

// wantSize returns the payload size that m must have.
func (h *handler) wantSize(m *message) int {
	if h.tail == nil || len(m.payload) < h.size {
		return h.size
	}
	return h.size + h.tail(m.payload)
}

// checkFDs returns an error unless m has as many descriptors as it must.
func (h *handler) checkFDs(m *message) error {
	least, most := 0, 0
	if h.fds != nil {
		least, most = h.fds(m)
	}
	if n := len(m.fds); n < least || n > most {
		return fmt.Errorf("it came with %d file descriptors, expected %d to %d", n, least, most)
	}
	return nil
}

func memTableTail(fixed []byte) int {
	return int(Decode[MemTable](fixed).NumRegions) * memRegionSize
}

func configTail(fixed []byte) int {
	return int(Decode[ConfigWindow](fixed).Size)
}

func oneFD(*message) (least, most int) { return 1, 1 }

// strayFD is for REM_MEM_REG: some front-ends send the region's descriptor, which is to be closed unused.
func strayFD(*message) (least, most int) { return 0, 1 }

func vringFDs(m *message) (least, most int) {
	if Decode[uint64](m.payload)&VringNoFD != 0 {
		return 0, 0
	}
	return 1, 1
}

func memTableFDs(m *message) (least, most int) {
	n := int(Decode[MemTable](m.payload).NumRegions)
	return n, n
}

func (s *session) getFeatures(*message) error {
	s.reply = Append(s.reply, s.offered)
	return nil
}

func (s *session) setFeatures(m *message) error {
	v := Decode[uint64](m.payload)
	if extra := v &^ s.offered; extra != 0 {
		return fmt.Errorf("features %#x were not offered", extra)
	}
	s.device.SetFeatures(v &^ VHOST_USER_F_PROTOCOL_FEATURES)
	if v&VHOST_USER_F_PROTOCOL_FEATURES == 0 {
		return s.enableAll()
	}
	return nil
}

func (s *session) getProtocolFeatures(*message) error {
	s.reply = Append(s.reply, s.protocolOffered)
	return nil
}

func (s *session) setProtocolFeatures(m *message) error {
	v := Decode[uint64](m.payload)
	if extra := v &^ s.protocolOffered; extra != 0 {
		return fmt.Errorf("protocol features %#x were not offered", extra)
	}
	s.protocol = v
	return nil
}

// setOwner only marks a session's start; some front-ends send it first, QEMU after a few others.
func (s *session) setOwner(*message) error { return nil }

// resetOwner is deprecated; the specification leaves ignoring it or this.
func (s *session) resetOwner(*message) error {
	s.disableAll()
	return nil
}

func (s *session) getQueueNum(*message) error {
	s.reply = Append(s.reply, uint64(len(s.rings)))
	return nil
}

func (s *session) setBackendReqFD(m *message) error {
	_ = s.backendReq.Close()
	s.backendReq = m.takeFD()
	return nil
}

func (s *session) resetDevice(*message) error {
	s.resetRings()
	s.device.Reset()
	return nil
}

// index checks a ring's number.
func (s *session) index(i uint64) (int, error) {
	if i >= uint64(len(s.rings)) {
		return 0, fmt.Errorf("ring %d does not exist, expected one below %d", i, len(s.rings))
	}
	return int(i), nil
}

// vringState decodes and checks the payload of the messages that have one.
func (s *session) vringState(m *message) (i int, num uint32, err error) {
	v := Decode[VringState](m.payload)
	i, err = s.index(uint64(v.Index))
	return i, v.Num, err
}

func (s *session) setVringNum(m *message) error {
	i, num, err := s.vringState(m)
	if err != nil {
		return err
	}
	if num == 0 || num > 32768 {
		return fmt.Errorf("ring %d has size %d, expected 1 to 32768", i, num)
	}
	return s.change(i, func(r *ring) { r.num = uint16(num) })
}

func (s *session) setVringBase(m *message) error {
	i, base, err := s.vringState(m)
	if err != nil {
		return err
	}
	return s.change(i, func(r *ring) { r.base = base })
}

// setVringAddr comes again for a running ring when dirty logging is switched: with the same addresses it must not be disturbed.
func (s *session) setVringAddr(m *message) error {
	v := Decode[VringAddr](m.payload)
	i, err := s.index(uint64(v.Index))
	if err != nil {
		return err
	}
	r := &s.rings[i]
	if r.hasAddr && r.addr.Desc == v.Desc && r.addr.Avail == v.Avail && r.addr.Used == v.Used {
		return s.start(i)
	}
	return s.change(i, func(r *ring) { r.addr, r.hasAddr = v, true })
}

func (s *session) getVringBase(m *message) error {
	i, _, err := s.vringState(m)
	if err != nil {
		return err
	}
	s.stop(i)
	s.unkick(i)
	s.device.SetCall(i, nil)
	s.reply = Append(s.reply, VringState{Index: uint32(i), Num: s.rings[i].base})
	return nil
}

func (s *session) setVringEnable(m *message) error {
	i, on, err := s.vringState(m)
	if err != nil {
		return err
	}
	if on > 1 {
		return fmt.Errorf("ring %d is set to %d, expected 0 (disabled) or 1 (enabled)", i, on)
	}
	return s.enable(i, on == 1)
}

// vringFile decodes and checks the payload of the messages that bring a ring's descriptor.
func (s *session) vringFile(m *message) (int, error) {
	return s.index(Decode[uint64](m.payload) & VringIndexMask)
}

func (s *session) setVringKick(m *message) error {
	i, err := s.vringFile(m)
	if err != nil {
		return err
	}
	return s.kicked(i, m.takeFD())
}

func (s *session) setVringCall(m *message) error {
	i, err := s.vringFile(m)
	if err == nil {
		s.device.SetCall(i, m.takeFD())
	}
	return err
}

func (s *session) setVringErr(m *message) error {
	i, err := s.vringFile(m)
	if err == nil {
		s.device.SetErr(i, m.takeFD())
	}
	return err
}

// getConfig answers any window of the space, of which the device may have less: User-Mode Linux reads byte by byte, and the
// drivers know of fields that we do not. An empty reply is how the specification reports an error.
func (s *session) getConfig(m *message) error {
	w := Decode[ConfigWindow](m.payload)
	if uint64(w.Offset)+uint64(w.Size) > MaxConfigSpace {
		s.log.Debug("config window refused", "offset", w.Offset, "size", w.Size)
		return nil
	}
	var space [MaxConfigSpace]byte
	copy(space[:], s.device.ConfigSpace())
	s.reply = Append(s.reply, w)
	s.reply = append(s.reply, space[w.Offset:w.Offset+w.Size]...)
	return nil
}

// setConfig refuses what a guest writes: the config space of a file system device is read-only. What a migration restores is
// what the device has already.
func (s *session) setConfig(m *message) error {
	w := Decode[ConfigWindow](m.payload)
	if w.Flags != ConfigMigration {
		return fmt.Errorf("config space is read-only: flags are %d, expected %d (migration)", w.Flags, ConfigMigration)
	}
	return nil
}

func (s *session) getMaxMemSlots(*message) error {
	s.reply = Append(s.reply, uint64(guestmem.MaxRegions))
	return nil
}
