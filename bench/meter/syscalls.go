package meter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// Syscalls counts the system calls of a process, its descendants and the threads that they still start. It slows them
// down: what they cost is another measurement.
type Syscalls struct {
	counters []*sys.FD // by thread
}

// CountSyscalls begins to count, with perf_event_open(2) and the kernel's tracepoint raw_syscalls:sys_enter. It takes
// root, or CAP_PERFMON and a readable tracefs.
func CountSyscalls(pid int) (*Syscalls, error) {
	id, err := tracepoint("raw_syscalls/sys_enter")
	if err != nil {
		return nil, fmt.Errorf("count system calls: %w", err)
	}
	pids, err := family(pid)
	if err != nil {
		return nil, fmt.Errorf("count system calls of process %d: %w", pid, err)
	}
	s := new(Syscalls)
	for _, p := range pids {
		if err := s.add(p, id); err != nil {
			s.Close()
			return nil, fmt.Errorf("count system calls of process %d: %w", p, err)
		}
	}
	return s, nil
}

func (s *Syscalls) add(pid int, id uint64) error {
	tids, err := threads(pid)
	if err != nil {
		return err
	}
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT, Config: id, Bits: unix.PerfBitInherit}
	attr.Size = uint32(binary.Size(attr))
	for _, t := range tids {
		tid, err := strconv.Atoi(t)
		if err != nil {
			return err
		}
		fd, err := unix.PerfEventOpen(&attr, tid, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
		if errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return fmt.Errorf("perf_event_open for thread %d: %w", tid, err)
		}
		s.counters = append(s.counters, sys.NewFD(fd))
	}
	return nil
}

// Read returns how many system calls have begun since CountSyscalls.
func (s *Syscalls) Read() (uint64, error) {
	sum := uint64(0)
	for _, fd := range s.counters {
		var b [8]byte
		if n, err := unix.Read(fd.Int(), b[:]); err != nil || n != len(b) {
			return 0, fmt.Errorf("read a counter of system calls: %d bytes, %w", n, err)
		}
		sum += binary.NativeEndian.Uint64(b[:])
	}
	return sum, nil
}

// Close stops counting.
func (s *Syscalls) Close() {
	for _, fd := range s.counters {
		_ = fd.Close()
	}
	s.counters = nil
}

// tracepoint returns the number that the kernel has given a tracepoint.
func tracepoint(name string) (uint64, error) {
	var errs []error
	for _, dir := range []string{"/sys/kernel/tracing", "/sys/kernel/debug/tracing"} {
		b, err := os.ReadFile(filepath.Join(dir, "events", name, "id"))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	}
	return 0, fmt.Errorf("no tracefs that can be read: mount it with 'mount -t tracefs tracefs /sys/kernel/tracing', and be root: %w", errors.Join(errs...))
}
