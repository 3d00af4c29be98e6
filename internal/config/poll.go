package config

import (
	"fmt"
	"strconv"
	"strings"
)

const (
	// PollAuto has each worker find out whether polling pays.
	PollAuto PollWindow = 0
	// PollNever has workers sleep at once.
	PollNever PollWindow = -1
	// MaxPoll is the longest fixed PollWindow.
	MaxPoll PollWindow = 1000
)

// PollWindow is how long a worker with nothing to do looks at its rings before it sleeps, in microseconds, beside PollAuto
// and PollNever. As text it is "auto", or the number, of which 0 is never.
type PollWindow int32

const pollAuto = "auto"

func (p PollWindow) String() string {
	if p == PollAuto {
		return pollAuto
	}
	return strconv.Itoa(int(max(p, 0)))
}

// Set reads p from its text.
func (p *PollWindow) Set(s string) error {
	if strings.EqualFold(s, pollAuto) {
		*p = PollAuto
		return nil
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || PollWindow(n) > MaxPoll {
		return fmt.Errorf("%q is not a time to poll for; expected auto, or 0 to %d microseconds", s, MaxPoll)
	}
	if *p = PollWindow(n); n == 0 {
		*p = PollNever
	}
	return nil
}

// Type implements pflag.Value.
func (PollWindow) Type() string { return "time" }
