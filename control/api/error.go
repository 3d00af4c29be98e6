package api

import "fmt"

// Codes of errors.
const (
	CodeInvalid     = "invalid"     // the request can never work as it is; HTTP 400
	CodeNotFound    = "not_found"   // no such share or graft; 404
	CodeForbidden   = "forbidden"   // not allowed on this listener; 403
	CodeExists      = "exists"      // there is one already; 409
	CodeBusy        = "busy"        // not in this state; 409
	CodeUnsupported = "unsupported" // the backend, or this daemon, cannot; 501
	CodeUnavailable = "unavailable" // not now, or not in time; 503
	CodeInternal    = "internal"    // 500
)

// Error is an answer that is not success. Message says what is wrong and was expected; Hint, if any, what to do.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Message
	}
	return e.Message + ": " + e.Hint
}

// Errorf makes an Error without a hint.
func Errorf(code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}
