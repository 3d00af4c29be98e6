package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/sluicefs/sluice/control/api"
)

// maxBody bounds the body of a request, in bytes.
const maxBody = 1 << 20

// A call is one request, and the answer to it.
type call struct {
	*http.Request
	server *Server
	peer   *peer
	w      http.ResponseWriter
	tag    string // {tag} of the path
	body   []byte
}

// allow is what may be done; nil is everything.
func (c *call) allow() *Allow { return c.peer.allow }

// readBody reads the whole body, whether the operation has one or not: who sends it slowly has to be done with it in the
// time that the server gives to a request, and not while the answer is written.
func (c *call) readBody() error {
	body, err := io.ReadAll(http.MaxBytesReader(c.w, c.Request.Body, maxBody))
	var big *http.MaxBytesError
	switch {
	case errors.As(err, &big), errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case err != nil:
		return api.Errorf(api.CodeInvalid, "body cannot be read: %v", err)
	}
	c.body = body
	return nil
}

// decode reads the body as JSON; a field that into does not have is an error.
func (c *call) decode(into any) error {
	dec := json.NewDecoder(strings.NewReader(string(c.body)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return describeJSON(err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return api.Errorf(api.CodeInvalid, "body has more behind its JSON: expected one object")
	}
	return nil
}

// describeJSON says what is wrong with a body in the words of who wrote it.
func describeJSON(err error) error {
	var syntax *json.SyntaxError
	var wrong *json.UnmarshalTypeError
	switch {
	case errors.Is(err, io.EOF):
		return api.Errorf(api.CodeInvalid, "body is empty: expected a JSON object")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return api.Errorf(api.CodeInvalid, "body ends inside its JSON")
	case errors.As(err, &syntax):
		return api.Errorf(api.CodeInvalid, "body is not JSON: %v at byte %d", syntax, syntax.Offset)
	case errors.As(err, &wrong) && wrong.Field == "":
		return api.Errorf(api.CodeInvalid, "body is a JSON %s: expected an object", wrong.Value)
	case errors.As(err, &wrong):
		return api.Errorf(api.CodeInvalid, "field %q is a JSON %s: expected what makes a %s", wrong.Field, wrong.Value, wrong.Type)
	}
	// encoding/json has no type for it.
	if field, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return &api.Error{Code: api.CodeInvalid, Message: "no field " + field, Hint: "see GET /v1/openapi.yaml for those there are"}
	}
	return api.Errorf(api.CodeInvalid, "body: %v", err)
}

// parseQuery returns the parameters of a query, of which each of names may be there once, and nothing else.
func parseQuery(raw string, names ...string) (map[string]string, error) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, api.Errorf(api.CodeInvalid, "query: %v", err)
	}
	out := make(map[string]string, len(values))
	for name, all := range values {
		switch {
		case !slices.Contains(names, name) && len(names) == 0:
			return nil, api.Errorf(api.CodeInvalid, "no parameter %q here: expected none", name)
		case !slices.Contains(names, name):
			return nil, api.Errorf(api.CodeInvalid, "no parameter %q here: expected %s", name, strings.Join(names, ", "))
		case len(all) > 1:
			return nil, api.Errorf(api.CodeInvalid, "parameter %q is there %d times: expected one", name, len(all))
		}
		out[name] = all[0]
	}
	return out, nil
}

// noQuery checks that there are no parameters.
func (c *call) noQuery() error {
	_, err := parseQuery(c.URL.RawQuery)
	return err
}

// parseGraftPath returns the parameter "path" of a query.
func parseGraftPath(raw string) (string, error) {
	q, err := parseQuery(raw, "path")
	if err != nil {
		return "", err
	}
	p, ok := q["path"]
	if !ok {
		return "", api.Errorf(api.CodeInvalid, "parameter \"path\" is missing: expected the graft's path in the share, as in ?path=/data")
	}
	return p, api.CheckPath(p)
}

// parseForce returns the parameter "force" of a query.
func parseForce(raw string) (bool, error) {
	q, err := parseQuery(raw, "force")
	if err != nil {
		return false, err
	}
	switch q["force"] {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	}
	return false, api.Errorf(api.CodeInvalid, "parameter \"force\" is %q: expected true or false", q["force"])
}

// parseSince returns the parameter "since" of a query.
func parseSince(raw string) (uint64, error) {
	q, err := parseQuery(raw, "since")
	if err != nil {
		return 0, err
	}
	if q["since"] == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(q["since"], 10, 64)
	if err != nil {
		return 0, api.Errorf(api.CodeInvalid, "parameter \"since\" is %q: expected an event's id, 0 to %d", q["since"], uint64(1<<64-1))
	}
	return n, nil
}

// checkShare is CodeNotFound for a share that is not there for the caller.
func (c *call) checkShare() error {
	if !c.allow().share(c.tag) {
		return noShare(c.tag)
	}
	return nil
}

func noShare(tag string) error { return api.Errorf(api.CodeNotFound, "no share %q", tag) }

// reply answers with v as JSON.
func (c *call) reply(status int, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write the answer as JSON: %w", err)
	}
	return c.send(status, "application/json", append(text, '\n'))
}

// send answers with text. That the client does not take it is nobody's error.
func (c *call) send(status int, kind string, text []byte) error {
	h := c.w.Header()
	h.Set("Content-Type", kind)
	h.Set("Content-Length", strconv.Itoa(len(text)))
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	c.w.WriteHeader(status)
	_, _ = c.w.Write(text)
	return nil
}

// done answers that there is nothing to say.
func (c *call) done() error {
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}

// replyError answers with err.
func (c *call) replyError(err error) {
	status, e := c.describe(err)
	if status == http.StatusRequestEntityTooLarge || status == http.StatusRequestTimeout {
		c.w.Header().Set("Connection", "close") // the rest of the body would be read as the next request
	}
	if isNydus(c.URL.Path) {
		// Its clients show the message and know of no hint.
		e = &api.Error{Code: e.Code, Message: e.Error()}
	}
	_ = c.reply(status, e)
}

// describe returns err as the client gets it.
func (c *call) describe(err error) (int, *api.Error) {
	var known *api.Error
	var big *http.MaxBytesError
	switch {
	case errors.As(err, &known):
		return statusOf(known.Code), known
	case errors.As(err, &big):
		return http.StatusRequestEntityTooLarge, api.Errorf(api.CodeInvalid, "body is too large: expected at most %d bytes", maxBody)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return http.StatusRequestTimeout, api.Errorf(api.CodeInvalid, "body did not come within %v", c.server.limits.read)
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusServiceUnavailable, &api.Error{Code: api.CodeUnavailable, Message: "the daemon did not answer in time", Hint: "it may be busy: look at its log, and try again"}
	case errors.Is(err, context.Canceled):
		return http.StatusServiceUnavailable, api.Errorf(api.CodeUnavailable, "the daemon is ending")
	}
	c.peer.log.Error("the control API failed", "operation", c.Method+" "+c.URL.Path, "error", err)
	if c.allow() != nil {
		// The text may have paths of the host in it.
		return http.StatusInternalServerError, api.Errorf(api.CodeInternal, "the daemon could not: see its log")
	}
	return http.StatusInternalServerError, api.Errorf(api.CodeInternal, "%v", err)
}

// statusOf returns the HTTP status of an api.Error.
func statusOf(code string) int {
	switch code {
	case api.CodeInvalid:
		return http.StatusBadRequest
	case api.CodeNotFound:
		return http.StatusNotFound
	case api.CodeForbidden:
		return http.StatusForbidden
	case api.CodeExists, api.CodeBusy:
		return http.StatusConflict
	case api.CodeUnsupported:
		return http.StatusNotImplemented
	case api.CodeUnavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
