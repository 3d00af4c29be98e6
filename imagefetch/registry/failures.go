package registry

import (
	"context"
	"errors"
	"iter"
	"sync/atomic"
)

// reason is a kind of failure, for people who count them.
type reason int

const (
	reasonProtocol reason = iota // an answer that is none
	reasonStatus4xx
	reasonStatus5xx
	reasonNetwork // no connection, or one that breaks off
	reasonStalled // nothing came for Config.Stall
	reasonTimeout // nor enough within Config.Timeout
	reasonContent // other bytes than they should be
	reasons
)

var reasonNames = [reasons]string{"protocol", "status_4xx", "status_5xx", "network", "stalled", "timeout", "content"}

// failureCounts count attempts that have come to nothing.
type failureCounts [reasons]atomic.Int64

// Failures are how many attempts at a host have come to nothing, by why: "protocol", "status_4xx", "status_5xx", "network", "stalled",
// "timeout", "content".
func (c *Client) Failures() iter.Seq2[string, int64] {
	return func(yield func(string, int64) bool) {
		for r := range reasons {
			if !yield(reasonNames[r], c.failures[r].Load()) {
				return
			}
		}
	}
}

// count counts an attempt within ctx that has come to err. One that was given up is none, nor is a failure of who takes what came.
func (f *failureCounts) count(ctx context.Context, err error) {
	var fail *failure
	switch known := errors.As(err, &fail); {
	case ctx.Err() != nil:
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			f[reasonTimeout].Add(1)
		}
	case errors.Is(err, ErrContent):
		f[reasonContent].Add(1)
	case errors.Is(err, errStalled):
		f[reasonStalled].Add(1)
	case known && fail.kind != final:
		f[fail.reason].Add(1)
	}
}
