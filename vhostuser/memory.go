package vhostuser

import (
	"errors"
	"fmt"
	"time"

	"github.com/sluicefs/sluice/guestmem"
)

func (r *MemRegion) config() guestmem.RegionConfig {
	return guestmem.RegionConfig{GuestPhysAddr: r.GuestPhysAddr, Size: r.Size, UserAddr: r.UserAddr, MmapOffset: r.MmapOffset}
}

// setMemTable is legal with CONFIGURE_MEM_SLOTS too: Cloud Hypervisor sends its first table so.
func (s *session) setMemTable(m *message) error {
	n := int(Decode[MemTable](m.payload).NumRegions)
	regions := make([]guestmem.RegionConfig, 0, n) // n is what the payload holds
	for b := m.payload[sizeOf[MemTable]():]; len(b) > 0; b = b[memRegionSize:] {
		r := Decode[MemRegion](b)
		regions = append(regions, r.config())
	}
	old, err := s.memory.Replace(regions, m.fds)
	if err != nil {
		return err
	}
	s.regions = n
	return s.memoryRemoved(old)
}

func (s *session) addMemReg(m *message) error {
	r := Decode[MemReg](m.payload).Region
	if _, err := s.memory.Add(r.config(), m.fds[0]); err != nil {
		return err
	}
	s.regions++
	return s.memoryChanged() // the new Map holds all that the old one did: no need to wait
}

func (s *session) remMemReg(m *message) error {
	r := Decode[MemReg](m.payload).Region
	old, err := s.memory.Remove(r.config())
	if err != nil {
		return err
	}
	s.regions--
	return s.memoryRemoved(old)
}

// memoryChanged tells the device, and starts the rings that waited for memory; those that still cannot are no fault of
// this message.
func (s *session) memoryChanged() error {
	err := s.device.MemoryChanged()
	for i := range s.rings {
		_ = s.start(i)
	}
	if err != nil {
		return &deviceError{fmt.Errorf("change memory: %w", err)}
	}
	return nil
}

// memoryRemoved is memoryChanged for a change that took memory away, which old still holds.
func (s *session) memoryRemoved(old *guestmem.Map) error {
	err := s.memoryChanged()
	if drained := s.drain(old); drained != nil {
		return drained
	}
	return err
}

// drain waits until no request uses old, for after the acknowledgement the front-end may free what it lent.
func (s *session) drain(old *guestmem.Map) error {
	timeout := time.NewTimer(s.drainTimeout)
	defer timeout.Stop()
	select {
	case <-old.Done():
		return nil
	case <-timeout.C:
		return &deviceError{fmt.Errorf("requests still use the memory that was removed after %v; it goes when they end", s.drainTimeout)}
	case <-s.done:
		return &deviceError{errors.New("session ends while requests use the memory that was removed")}
	}
}
