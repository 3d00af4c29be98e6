package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
)

// address is where events come from.
type address struct {
	stdin bool
	unix  string
	cid   uint32
	port  uint32
}

func parseAddress(text string) (address, error) {
	kind, rest, _ := strings.Cut(text, ":")
	switch {
	case text == "stdin":
		return address{stdin: true}, nil
	case kind == "unix" && rest != "":
		return address{unix: rest}, nil
	case kind == "vsock":
		cid, port, _ := strings.Cut(rest, ":")
		c, err := strconv.ParseUint(cid, 10, 32)
		p, err2 := strconv.ParseUint(port, 10, 32)
		if err == nil && err2 == nil {
			return address{cid: uint32(c), port: uint32(p)}, nil
		}
	}
	return address{}, fmt.Errorf("--connect %q: expected vsock:CID:PORT, unix:PATH or stdin", text)
}

func (a address) String() string {
	switch {
	case a.stdin:
		return "stdin"
	case a.unix != "":
		return "unix:" + a.unix
	}
	return fmt.Sprintf("vsock:%d:%d", a.cid, a.port)
}

// dial connects. Package net would make the program twice as large.
func (a address) dial() (*os.File, error) {
	family, to := unix.AF_VSOCK, unix.Sockaddr(&unix.SockaddrVM{CID: a.cid, Port: a.port})
	if a.unix != "" {
		family, to = unix.AF_UNIX, &unix.SockaddrUnix{Name: a.unix}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		if err = again(func() error { return unix.Connect(fd, to) }); err == nil {
			return os.NewFile(uintptr(fd), a.String()), nil
		}
		unix.Close(fd)
	}
	return nil, fmt.Errorf("connect to %v: %w", a, err)
}

// request asks for the events of a share after the one with ID since.
func request(tag string, since uint64) string {
	return fmt.Sprintf("GET /v1/shares/%s/events?since=%d HTTP/1.0\r\nHost: sluice\r\nAccept: application/x-ndjson\r\n\r\n", url.PathEscape(tag), since)
}

const (
	maxLine  = 64 << 10 // of an event: two paths of 4 KiB, escaped, fit many times over
	maxHead  = 64       // lines
	maxError = 16 << 10
)

// stream reads an HTTP/1.0 answer whose body is one JSON object a line.
type stream struct{ r *bufio.Reader }

func newStream(r io.Reader) *stream { return &stream{bufio.NewReaderSize(r, maxLine)} }

// line returns the next line without its end. What is not ended by a newline is none: it may be half of one.
func (s *stream) line() ([]byte, error) {
	line, err := s.r.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return nil, fmt.Errorf("a line has more than %d bytes", maxLine)
	case err != nil:
		return nil, err
	}
	return bytes.TrimRight(line, "\r\n"), nil
}

// head reads the answer's head. What is not 200 is an error that says what the daemon says.
func (s *stream) head() error {
	line, err := s.line()
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	protocol, rest, _ := strings.Cut(string(line), " ")
	code, _, _ := strings.Cut(rest, " ")
	status, err := strconv.Atoi(code)
	if !strings.HasPrefix(protocol, "HTTP/1.") || err != nil {
		return fmt.Errorf("read the answer: it begins with %.60q, expected HTTP/1.x and a status: is this the control API?", line)
	}
	for n := 0; ; n++ {
		line, err := s.line()
		switch {
		case err != nil:
			return fmt.Errorf("read the answer: %w", err)
		case n == maxHead:
			return errors.New("read the answer: its head does not end")
		}
		if len(line) == 0 {
			break
		}
		name, value, _ := strings.Cut(string(line), ":")
		if strings.EqualFold(name, "Transfer-Encoding") && !strings.EqualFold(strings.TrimSpace(value), "identity") {
			return fmt.Errorf("read the answer: transfer encoding %.60q, expected none for HTTP/1.0", value)
		}
	}
	if status == 200 {
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(s.r, maxError))
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	var said api.Error
	if json.Unmarshal(body, &said) != nil || said.Message == "" {
		return fmt.Errorf("ask for events: status %d: %.200q", status, body)
	}
	return fmt.Errorf("ask for events: %w (%s)", &said, said.Code)
}

// idle says that nothing more has come yet.
func (s *stream) idle() bool { return s.r.Buffered() == 0 }

// next returns the next event; empty lines only keep the connection open. At the end it is io.EOF.
func (s *stream) next() (e api.Event, err error) {
	for {
		line, err := s.line()
		switch {
		case errors.Is(err, io.EOF):
			return e, io.EOF
		case err != nil:
			return e, fmt.Errorf("read events: %w", err)
		case len(line) == 0:
			continue
		}
		if err := json.Unmarshal(line, &e); err != nil {
			return api.Event{}, fmt.Errorf("read events: line %.60q: %w", line, err)
		}
		return e, nil
	}
}

// isToken says whether a name made of the token is one of the share's reserved names, and none with a path in it.
func isToken(token string) bool {
	if len(token) != 32 {
		return false
	}
	return strings.Trim(token, "0123456789abcdef") == ""
}
