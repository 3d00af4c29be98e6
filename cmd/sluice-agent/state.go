package main

import (
	"fmt"
	"os"
	"time"
)

// state is the file of --state. It has one line of one length, so that one write leaves the old one or the new one: the ID of the last
// event that was dealt with, and its time.
type state struct{ f *os.File }

const stateFormat = "%020d %020d\n"

func openState(path string) (*state, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--state: %w", err)
	}
	return &state{f}, nil
}

// load returns zeros, which are from now on, for what is no state.
func (s *state) load() (last uint64, at time.Time) {
	var nanos int64
	line := make([]byte, len(fmt.Sprintf(stateFormat, 0, 0)))
	if n, _ := s.f.ReadAt(line, 0); n < len(line) {
		return 0, time.Time{}
	}
	if n, err := fmt.Sscanf(string(line), "%d %d\n", &last, &nanos); n < 2 || err != nil || last == 0 {
		return 0, time.Time{}
	}
	return last, time.Unix(0, nanos)
}

func (s *state) store(last uint64, at time.Time) error {
	if _, err := s.f.WriteAt(fmt.Appendf(nil, stateFormat, last, at.UnixNano()), 0); err != nil {
		return fmt.Errorf("--state: %w", err)
	}
	return nil
}

func (s *state) close() { s.f.Close() }
