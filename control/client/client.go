// Package client speaks Sluice's control API: a Client does what a control.Daemon does, by asking the one behind a socket.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

// Config says where the daemon is.
type Config struct {
	// Socket is the path of the daemon's Unix socket, that of its --control-socket; "@NAME" is an abstract one.
	Socket string
	// Dial connects to the daemon in another way, over AF_VSOCK for one; Socket is then only what errors call it.
	Dial func(ctx context.Context) (net.Conn, error)
}

// maxSocketPath is what sockaddr_un holds, in bytes, with the final NUL.
const maxSocketPath = 107

// Validate says what is wrong with c.
func (c Config) Validate() error {
	switch {
	case c.Socket == "":
		return errors.New("no control socket is given: expected its path")
	case c.Dial == nil && len(c.Socket) > maxSocketPath:
		return fmt.Errorf("path of the control socket is %d bytes long; expected at most %d: give a shorter or a relative one", len(c.Socket), maxSocketPath)
	}
	return nil
}

// Client is a daemon's client. Its methods may be called from many goroutines.
//
// Their errors are *api.Error where the daemon said one, *UnreachableError if it did not answer, and the context's.
type Client struct {
	socket string
	http   *http.Client
}

// New makes a Client. It connects when it is asked for something.
func New(c Config) (*Client, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	dial := c.Dial
	if dial == nil {
		dial = func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", c.Socket)
		}
	}
	return &Client{
		socket: c.Socket,
		http: &http.Client{
			Transport: &http.Transport{
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					conn, err := dial(ctx)
					if err != nil {
						return nil, &UnreachableError{Socket: c.Socket, Err: err}
					}
					return conn, nil
				},
				MaxIdleConnsPerHost: 4,
				IdleConnTimeout:     time.Minute,
				DisableCompression:  true,
			},
			// A daemon never redirects; following one would make another request of a change.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Close closes the connections that are idle. The Client can still be used.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// Info implements control.Daemon.
func (c *Client) Info(ctx context.Context) (info api.Info, err error) {
	return info, c.call(ctx, http.MethodGet, "/v1/info", nil, &info)
}

// Shares implements control.Daemon.
func (c *Client) Shares(ctx context.Context) (shares []api.Share, err error) {
	return shares, c.call(ctx, http.MethodGet, "/v1/shares", nil, &shares)
}

// AddShare implements control.Daemon.
func (c *Client) AddShare(ctx context.Context, spec api.ShareSpec) (share api.Share, err error) {
	return share, c.call(ctx, http.MethodPost, "/v1/shares", spec, &share)
}

// RemoveShare implements control.Daemon.
func (c *Client) RemoveShare(ctx context.Context, tag string, force bool) error {
	path, err := sharePath(tag)
	if err != nil {
		return err
	}
	if force {
		path += "?force=true"
	}
	return c.call(ctx, http.MethodDelete, path, nil, nil)
}

// Grafts implements control.Daemon.
func (c *Client) Grafts(ctx context.Context, tag string) (grafts []api.Graft, err error) {
	path, err := sharePath(tag)
	if err != nil {
		return nil, err
	}
	return grafts, c.call(ctx, http.MethodGet, path+"/grafts", nil, &grafts)
}

// AddGraft implements control.Daemon.
func (c *Client) AddGraft(ctx context.Context, tag string, spec api.GraftSpec, replace bool) (graft api.Graft, err error) {
	path, err := sharePath(tag)
	if err != nil {
		return api.Graft{}, err
	}
	method := http.MethodPost
	if replace {
		method = http.MethodPut
	}
	return graft, c.call(ctx, method, path+"/grafts", spec, &graft)
}

// ChangeGraft implements control.Daemon.
func (c *Client) ChangeGraft(ctx context.Context, tag, path string, change api.GraftChange) (graft api.Graft, err error) {
	share, err := sharePath(tag)
	if err != nil {
		return api.Graft{}, err
	}
	return graft, c.call(ctx, http.MethodPatch, share+"/grafts?path="+url.QueryEscape(path), change, &graft)
}

// RemoveGraft implements control.Daemon.
func (c *Client) RemoveGraft(ctx context.Context, tag, path string) error {
	share, err := sharePath(tag)
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodDelete, share+"/grafts?path="+url.QueryEscape(path), nil, nil)
}

// ActGraft implements control.Daemon.
func (c *Client) ActGraft(ctx context.Context, tag, path, action string, arg json.RawMessage) (answer json.RawMessage, err error) {
	share, err := sharePath(tag)
	if err != nil {
		return nil, err
	}
	return answer, c.call(ctx, http.MethodPost, share+"/grafts/act?path="+url.QueryEscape(path)+"&action="+url.QueryEscape(action), arg, &answer)
}

// Stats implements control.Daemon.
func (c *Client) Stats(ctx context.Context) (stats api.Stats, err error) {
	return stats, c.call(ctx, http.MethodGet, "/v1/stats", nil, &stats)
}

// Events implements control.Daemon. That the daemon ended the stream, because the share was removed, is nil.
func (c *Client) Events(ctx context.Context, tag string, since uint64, send func(api.Event) error) error {
	path, err := sharePath(tag)
	if err != nil {
		return err
	}
	body, err := c.do(ctx, http.MethodGet, path+"/events?since="+strconv.FormatUint(since, 10), nil)
	if err != nil {
		return err
	}
	defer body.Close() // and the connection with it: there may be no end to read
	for dec := json.NewDecoder(body); ; {
		var e api.Event
		if err := dec.Decode(&e); err == io.EOF {
			return nil
		} else if err != nil {
			return c.broken(ctx, err)
		}
		if err := send(e); err != nil {
			return err
		}
	}
}

// call makes one request, with in as its body unless that is nil, and decodes the answer into out unless that is nil.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	body, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer closeBody(body)
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return c.broken(ctx, err)
	}
	return nil
}

// do makes one request. The body that it returns, of an answer that is success, is the caller's to close.
func (c *Client) do(ctx context.Context, method, path string, in any) (io.ReadCloser, error) {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode the request: %w", err)
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://sluiced"+path, body)
	if err != nil {
		return nil, fmt.Errorf("make the request: %w", err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.broken(ctx, err)
	}
	if resp.StatusCode/100 != 2 {
		defer closeBody(resp.Body)
		return nil, c.refusal(ctx, resp)
	}
	return resp.Body, nil
}

// maxError bounds what is read of an answer that is an error, in bytes.
const maxError = 64 << 10

// refusal is what an answer that is not success says.
func (c *Client) refusal(ctx context.Context, resp *http.Response) error {
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	if err != nil {
		return c.broken(ctx, err)
	}
	e := new(api.Error)
	if err := json.Unmarshal(text, e); err != nil || e.Code == "" {
		return fmt.Errorf("%s answers %q to %s %s: expected the control API of a sluiced as new as this program", c.socket, resp.Status, resp.Request.Method, resp.Request.URL.Path)
	}
	return e
}

// broken is the error of an exchange that failed with err.
func (c *Client) broken(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if e := (*UnreachableError)(nil); errors.As(err, &e) {
		return e // without the URL that net/http adds, which nobody has typed
	}
	var (
		syntax *json.SyntaxError
		kind   *json.UnmarshalTypeError
	)
	if errors.As(err, &syntax) || errors.As(err, &kind) {
		return fmt.Errorf("%s does not answer in the control API's JSON: expected a sluiced as new as this program: %w", c.socket, err)
	}
	if e := (*url.Error)(nil); errors.As(err, &e) {
		err = e.Err
	}
	return &UnreachableError{Socket: c.socket, Connected: true, Err: err}
}

// sharePath is the path of a share. One whose tag cannot be a share's might be another path.
func sharePath(tag string) (string, error) {
	if err := api.CheckTag(tag); err != nil {
		return "", err
	}
	return "/v1/shares/" + url.PathEscape(tag), nil
}

// closeBody reads what little is left of an answer, so that its connection can be used again. A long one's is closed.
func closeBody(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, 512)
	_ = body.Close()
}
