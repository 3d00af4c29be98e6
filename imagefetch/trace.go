package imagefetch

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// TraceEntry is a file that was opened, as a line of JSON in a trace or in a prefetch list.
type TraceEntry struct {
	// Layer is the digest of the layer, Path the file's in it.
	Layer string `json:"layer"`
	Path  string `json:"path"`
}

// maxTrace is the largest trace that is read or written, in bytes.
const maxTrace = 64 << 20

// trace appends to a file.
type trace struct {
	mu   sync.Mutex
	f    *os.File
	left int64
	seen map[TraceEntry]struct{}
}

func openTrace(path string) (*trace, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the trace: %w", err)
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open the trace: %w", err)
	}
	return &trace{f: f, left: maxTrace - fi.Size(), seen: map[TraceEntry]struct{}{}}, nil
}

// note writes e if it is new. A trace that cannot be written to any more is left as it is.
func (t *trace) note(e TraceEntry) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.seen[e]; ok || t.left <= 0 {
		return nil
	}
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if t.left -= int64(len(line)) + 1; t.left <= 0 {
		return fmt.Errorf("the trace has reached %d bytes: it ends here", int64(maxTrace))
	}
	t.seen[e] = struct{}{}
	if _, err := t.f.Write(append(line, '\n')); err != nil {
		t.left = 0
		return fmt.Errorf("write the trace, which ends here: %w", err)
	}
	return nil
}

// PrefetchList makes a prefetch list of traces, or of other lists: each file once, those that were opened early first. It reads at
// most 64 MiB.
func PrefetchList(r io.Reader) ([]TraceEntry, error) {
	limited := &io.LimitedReader{R: r, N: maxTrace + 1}
	s := bufio.NewScanner(limited)
	s.Buffer(nil, 64<<10)
	var list []TraceEntry
	seen := map[TraceEntry]struct{}{}
	for n := 1; s.Scan(); n++ {
		if len(s.Bytes()) == 0 {
			continue
		}
		var e TraceEntry
		if err := json.Unmarshal(s.Bytes(), &e); err != nil || !isDigest(e.Layer) {
			return nil, fmt.Errorf(`read a trace: line %d is none: expected {"layer":"sha256:…","path":"…"}`, n)
		}
		if _, ok := seen[e]; !ok {
			seen[e] = struct{}{}
			list = append(list, e)
		}
	}
	if limited.N <= 0 {
		return nil, fmt.Errorf("read a trace: it is larger than %d bytes", int64(maxTrace))
	}
	if errors.Is(s.Err(), bufio.ErrTooLong) {
		return nil, errors.New("read a trace: a line is longer than 64 KiB")
	}
	return list, s.Err()
}
