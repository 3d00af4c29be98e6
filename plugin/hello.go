package plugin

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
)

// Hello is what each side says first, as JSON. Neither waits for the other's.
type Hello struct {
	// Proto is the version of the protocol: 1.
	Proto int `json:"proto"`
	// Name is what a plug-in is called in //NAME/DATA/PATH; the server's is "sluice".
	Name string `json:"name"`
	// Ops are the operations that a plug-in answers. Names that are not known are passed over.
	Ops []string `json:"ops,omitempty"`
	// Needs are what a plug-in cannot do without.
	Needs Needs `json:"needs,omitzero"`
	// MaxRequests is how many requests the server will have waiting at a time: a promise.
	MaxRequests int `json:"max_requests,omitempty"`
}

// Needs are what a plug-in cannot do without. The network is given to who asks; the rest tells who runs Sluice, and grants nothing.
type Needs struct {
	Network  bool     `json:"network,omitempty"`  // connections to other machines
	Syscalls []string `json:"syscalls,omitempty"` // beyond those that every program needs
	Caps     []string `json:"caps,omitempty"`     // capabilities, as CAP_DAC_READ_SEARCH
	Read     []string `json:"read,omitempty"`     // paths of the host to read
	Write    []string `json:"write,omitempty"`    // paths of the host to write
}

// maxHello is the size of the largest hello, in bytes.
const maxHello = 16 << 10

var nameRule = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// ValidPluginName says whether a plug-in can be called name: 1 to 64 letters, digits, '.', '_' and '-', the first of them a
// letter or digit.
func ValidPluginName(name string) bool { return nameRule.MatchString(name) }

// ParseHello takes the other side's hello apart. An error says what was expected.
func ParseHello(b []byte) (*Hello, error) {
	if len(b) > maxHello {
		return nil, fmt.Errorf("hello of %d bytes: expected at most %d", len(b), maxHello)
	}
	h := new(Hello)
	if err := json.Unmarshal(b, h); err != nil {
		return nil, fmt.Errorf("hello: expected JSON like {\"proto\":%d,\"name\":\"example\",\"ops\":[…]}: %w", Proto, err)
	}
	if h.Proto != Proto {
		return nil, fmt.Errorf("hello: it speaks version %d of the protocol, expected %d", h.Proto, Proto)
	}
	if !ValidPluginName(h.Name) {
		return nil, fmt.Errorf("hello: its name is %.100q, expected 1 to 64 letters, digits, '.', '_' and '-'", h.Name)
	}
	return h, nil
}

// Has says whether a plug-in answers the operation.
func (h *Hello) Has(op Op) bool { return slices.Contains(h.Ops, op.String()) }

func (h *Hello) encode() ([]byte, error) {
	b, err := json.Marshal(h)
	if err == nil {
		_, err = ParseHello(b)
	}
	return b, err
}
