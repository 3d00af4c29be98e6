package client

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// UnreachableError is a daemon that cannot be connected to, or went away before it had answered.
type UnreachableError struct {
	Socket string
	// Connected says that it was there at first: whether it did what it was asked is not known.
	Connected bool
	Err       error
}

func (e *UnreachableError) Error() string {
	switch {
	case e.Connected:
		return fmt.Sprintf("sluiced at %s went away before it had answered, and may or may not have done it: %v", e.Socket, e.Err)
	case errors.Is(e.Err, fs.ErrNotExist):
		return fmt.Sprintf("sluiced is not running at %s: start it with --control-socket", e.Socket)
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return fmt.Sprintf("nothing listens at %s (a sluiced that was killed leaves its socket behind): start sluiced with --control-socket", e.Socket)
	case errors.Is(e.Err, fs.ErrPermission):
		return fmt.Sprintf("no permission to connect to %s: be the user that runs sluiced, or in the socket's group", e.Socket)
	case errors.Is(e.Err, syscall.EPROTOTYPE):
		return fmt.Sprintf("%s is not sluiced's control socket: expected the path of its --control-socket", e.Socket)
	}
	return fmt.Sprintf("connect to sluiced at %s: %v", e.Socket, e.Err)
}

// Unwrap returns the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }
