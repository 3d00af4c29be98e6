package registry

import (
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"strconv"
	"strings"
)

// Range is a run of a blob's bytes.
type Range struct{ Off, Len int64 }

func (r Range) end() int64 { return r.Off + r.Len }

// header is the Range header that asks for ranges (RFC 9110, 14.2).
func header(ranges []Range) string {
	var b strings.Builder
	b.WriteString("bytes=")
	for i, r := range ranges {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%d-%d", r.Off, r.end()-1)
	}
	return b.String()
}

// parseContentRange reads "bytes A-B/SIZE" (RFC 9110, 14.4). size is -1 for "*".
func parseContentRange(s string) (r Range, size int64, err error) {
	bad := fmt.Errorf("the answer has no Content-Range that can be read")
	rest, ok := strings.CutPrefix(s, "bytes ")
	if !ok {
		return r, 0, bad
	}
	span, total, ok := strings.Cut(rest, "/")
	if !ok {
		return r, 0, bad
	}
	first, last, ok := strings.Cut(span, "-")
	if !ok {
		return r, 0, bad
	}
	a, errA := strconv.ParseUint(first, 10, 62)
	b, errB := strconv.ParseUint(last, 10, 62)
	if errA != nil || errB != nil || b < a {
		return r, 0, bad
	}
	size = -1
	if total != "*" {
		n, err := strconv.ParseUint(total, 10, 62)
		if err != nil || b >= n {
			return r, 0, bad
		}
		size = int64(n)
	}
	return Range{int64(a), int64(b-a) + 1}, size, nil
}

// parts are the pieces of a blob that an answer consists of.
type parts struct {
	size int64 // the blob's
	next func() (Range, io.Reader, error)
}

// partsOf takes an answer apart. r is its body.
func partsOf(resp *http.Response, r io.Reader, size int64) (*parts, error) {
	single := func(piece Range) *parts {
		done := false
		return &parts{size, func() (Range, io.Reader, error) {
			if done {
				return Range{}, nil, io.EOF
			}
			done = true
			return piece, r, nil
		}}
	}
	if resp.StatusCode == http.StatusOK {
		if resp.ContentLength >= 0 && resp.ContentLength != size {
			return nil, sizeFailure(resp.ContentLength, size)
		}
		return single(Range{0, size}), nil
	}
	if kind, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err == nil && kind == "multipart/byteranges" {
		m := multipart.NewReader(r, params["boundary"])
		return &parts{size, func() (Range, io.Reader, error) {
			p, err := m.NextRawPart()
			if err != nil {
				return Range{}, nil, err
			}
			piece, err := checkContentRange(p.Header.Get("Content-Range"), size)
			return piece, p, err
		}}, nil
	}
	piece, err := checkContentRange(resp.Header.Get("Content-Range"), size)
	if err != nil {
		return nil, err
	}
	return single(piece), nil
}

func checkContentRange(s string, size int64) (Range, error) {
	r, total, err := parseContentRange(s)
	if err != nil {
		return r, &failure{kind: temporary, err: err}
	}
	if total >= 0 && total != size {
		return r, sizeFailure(total, size)
	}
	return r, nil
}

func sizeFailure(is, want int64) error {
	return &failure{kind: elsewhere, err: fmt.Errorf("the blob has %d bytes, and should have %d", is, want)}
}
