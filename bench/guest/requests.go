package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/sluicefs/sluice/bench/server"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/testguest"
)

// addCounter has an entrant count its requests: Sluice tells them by its control API, the others log each.
func addCounter(e *entrant, spec *server.Spec, scratch string) {
	if spec.Kind == server.Sluice {
		socket := filepath.Join(scratch, spec.Tag+".control")
		spec.Args = append(spec.Args, "--control-socket="+socket)
		e.count = func(ctx context.Context) (map[string]int, error) { return askSluice(ctx, socket) }
		return
	}
	if spec.Kind == server.C {
		spec.Args = append(spec.Args, "-d")
	} else {
		spec.Args = append(spec.Args, "--log-level=debug")
	}
	log := newRequestLog()
	spec.Output = log
	e.count = log.settled
}

// askSluice asks a sluiced for its counters.
func askSluice(ctx context.Context, socket string) (map[string]int, error) {
	root, err := testguest.ModuleRoot()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "bin", "sluicectl"), "--socket", socket, "--json", "stat", "--once")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("ask sluiced for its counters: %w\n%s", err, &stderr)
	}
	return parseStats(out)
}

// parseStats reads the counters of the one share in sluicectl's answer.
func parseStats(text []byte) (map[string]int, error) {
	var answer struct {
		Stats struct {
			Shares []struct {
				Ops []struct {
					Op    string `json:"op"`
					Count int    `json:"count"`
				} `json:"ops"`
				Queues []struct {
					Kicks         int `json:"kicks"`
					Notifications int `json:"notifications"`
				} `json:"queues"`
			} `json:"shares"`
		} `json:"stats"`
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return nil, fmt.Errorf("read sluiced's counters: %w", err)
	}
	if len(answer.Stats.Shares) != 1 {
		return nil, fmt.Errorf("read sluiced's counters: %d shares, expected 1", len(answer.Stats.Shares))
	}
	share, counts := answer.Stats.Shares[0], make(map[string]int)
	for _, op := range share.Ops {
		counts[op.Op] = op.Count
	}
	for _, queue := range share.Queues {
		counts[kicks] += queue.Kicks
		counts[notifications] += queue.Notifications
	}
	return counts, nil
}

// What is counted beside requests, where the server tells it.
const (
	kicks         = "kicks"
	notifications = "notifications"
)

// requestLog counts the requests in what a server logs. Reading a mount's DESTROY it has read all of that mount's requests.
type requestLog struct {
	mu      sync.Mutex
	partial []byte // of a line
	counts  map[string]int
	changed chan struct{} // closed, and replaced, at each mount's end
}

func newRequestLog() *requestLog {
	return &requestLog{counts: make(map[string]int), changed: make(chan struct{})}
}

// loggedRequest is in the lines of virtiofsd, "Received request: opcode=Lookup (1), …", and of the C server, "…, opcode: LOOKUP (1), …".
var loggedRequest = regexp.MustCompile(`opcode(?:=|: )\w+ \((\d+)\)`)

func (l *requestLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.partial = append(l.partial, b...)
	rest := l.partial
	for {
		line, more, ok := bytes.Cut(rest, []byte{'\n'})
		if !ok {
			break
		}
		rest = more
		found := loggedRequest.FindSubmatch(line)
		if found == nil {
			continue
		}
		number, err := strconv.ParseUint(string(found[1]), 10, 32)
		if err != nil {
			continue
		}
		op := strings.TrimPrefix(fuseproto.Opcode(number).String(), "FUSE_")
		l.counts[op]++
		if op == destroy {
			close(l.changed)
			l.changed = make(chan struct{})
		}
	}
	l.partial = append(l.partial[:0], rest...)
	return len(b), nil
}

const destroy = "DESTROY"

// settled returns the counts as soon as each INIT has its DESTROY.
func (l *requestLog) settled(ctx context.Context) (map[string]int, error) {
	for {
		l.mu.Lock()
		counts, changed := make(map[string]int, len(l.counts)), l.changed
		for op, n := range l.counts {
			counts[op] = n
		}
		l.mu.Unlock()
		if counts["INIT"] == counts[destroy] {
			return counts, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errors.Join(errors.New("the server has not logged the end of the mount"), context.Cause(ctx))
		}
	}
}

// difference is what has been counted between before and after, without what belongs to the mount.
func difference(after, before map[string]int) map[string]int {
	d := make(map[string]int)
	for op, n := range after {
		if n -= before[op]; n > 0 && op != "INIT" && op != destroy {
			d[op] = n
		}
	}
	return d
}
