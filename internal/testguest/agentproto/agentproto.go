// Package agentproto is what the host and a test guest's init say to each other: JSON lines over a port that both sides treat as a byte stream.
//
// A line that does not start with '{' is no message and is ignored: kernels and firmware write to serial ports when they probe them.
package agentproto

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"sync"
)

// Parameters on the kernel's command line that tell the guest's init what to do.
const (
	// ParamPort names the device that carries the messages.
	ParamPort = "sluice.port"
	// ParamShell, when it is a tag, asks for an interactive shell with that share mounted at /mnt, instead of the agent.
	ParamShell = "sluice.shell"
	// ParamModules names the directory of the kernel's drivers, which has their names in the file "order".
	ParamModules = "sluice.modules"
)

// MaxChunk is how many bytes of a command's output one Reply carries at most.
const MaxChunk = 32 << 10

// MaxRequest is how many bytes a message to the guest has at most. User-Mode Linux stops taking input for good
// when it has once had 4 KiB to take at a time (its driver loses the interrupt when the line is throttled).
const MaxRequest = 3 << 10

// Request is a message to the guest: a command to run, or what to do with the machine.
type Request struct {
	// Seq is repeated in every Reply to the request.
	Seq uint64
	// Exec is the command to run.
	Exec *Exec `json:",omitempty"`
	// Power is "off" or "reboot"; it has no reply.
	Power string `json:",omitempty"`
}

// Exec is a command. Paths without a slash are looked up in the guest's PATH.
type Exec struct {
	Args     []string
	Dir      string   `json:",omitempty"`
	Env      []string `json:",omitempty"`
	UID, GID uint32   `json:",omitempty"`
	Groups   []uint32 `json:",omitempty"`
}

// Reply is a message from the guest. The one with Done set is a request's last.
type Reply struct {
	// Hello is sent once, when the guest is ready for requests.
	Hello  bool   `json:",omitempty"`
	Seq    uint64 `json:",omitempty"`
	Stdout []byte `json:",omitempty"`
	Stderr []byte `json:",omitempty"`
	Done   bool   `json:",omitempty"`
	// Status is the exit status, or 128 + the signal that killed the command.
	Status int `json:",omitempty"`
	// Error says why the command could not be started.
	Error string `json:",omitempty"`
}

// Writer sends messages; it may be used by several goroutines.
type Writer struct {
	mu sync.Mutex
	w  io.Writer
}

// NewWriter returns a Writer that sends to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Send writes one message.
func (w *Writer) Send(message any) error {
	line, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if _, ok := message.(Request); ok && len(line) >= MaxRequest {
		return fmt.Errorf("send message: it has %d bytes, at most %d are possible", len(line), MaxRequest)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := w.w.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("send message: %w", err)
	}
	return nil
}

// Reader receives messages; only one goroutine may use it.
type Reader struct{ r *bufio.Reader }

// NewReader returns a Reader that receives from r.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReader(r)} }

// Receive reads the next message into message, which is a pointer to a Request or a Reply.
func (r *Reader) Receive(message any) error {
	for {
		line, err := r.r.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("receive message: %w", err)
		}
		if line[0] != '{' {
			continue
		}
		if err := json.Unmarshal(line, message); err != nil {
			return fmt.Errorf("decode message: %w", err)
		}
		return nil
	}
}
