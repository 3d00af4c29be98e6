package vhostuser

import "fmt"

// ProtocolError says how the front-end broke the vhost-user protocol. It ends the session, because nothing later in the
// stream can be trusted, unless the front-end asked for an acknowledgement of the message and so can be told.
type ProtocolError struct {
	Request Request // 0: the fault came before a whole header
	Err     error   // what was wrong and what was expected
}

// Error returns the request's name and the fault.
func (e *ProtocolError) Error() string {
	if e.Request == 0 {
		return fmt.Sprintf("vhost-user front-end broke the protocol: %v", e.Err)
	}
	return fmt.Sprintf("vhost-user front-end broke the protocol with %v: %v", e.Request, e.Err)
}

// Unwrap returns the fault.
func (e *ProtocolError) Unwrap() error {
	return e.Err
}

// deviceError is a failure of our own while carrying out a legal message: the session tells the front-end and goes on.
type deviceError struct {
	error
}
