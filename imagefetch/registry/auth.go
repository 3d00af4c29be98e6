package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/types"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// keychain is where credentials come from. It reads its files anew each time.
func keychain(dir string) authn.Keychain {
	if dir == "" {
		return authn.DefaultKeychain
	}
	return dirKeychain(dir)
}

// dirKeychain is a directory with a config.json as docker has it.
type dirKeychain string

func (d dirKeychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	f, err := os.Open(filepath.Join(string(d), "config.json"))
	if errors.Is(err, os.ErrNotExist) {
		return authn.Anonymous, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read credentials: %w", err)
	}
	defer f.Close()
	cf, err := config.LoadFromReader(io.LimitReader(f, 4<<20))
	if err != nil {
		return nil, fmt.Errorf("read credentials: %s is no docker config", f.Name())
	}
	for _, key := range []string{target.String(), target.RegistryStr()} {
		if key == name.DefaultRegistry {
			key = authn.DefaultAuthKey
		}
		a, err := cf.GetAuthConfig(key)
		if err != nil {
			return nil, fmt.Errorf("read credentials for %s: %w", target.RegistryStr(), err)
		}
		a.ServerAddress = ""
		if a != (types.AuthConfig{}) {
			return authn.FromConfig(authn.AuthConfig{
				Username: a.Username, Password: a.Password, Auth: a.Auth, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
			}), nil
		}
	}
	return authn.Anonymous, nil
}

// session is what a host has been told and has told about who asks, for one repository.
type session struct {
	c    *Client
	h    *host
	repo string

	// lock is held while logging in, a channel so that whoever waits for it can give up. It guards rt and count.
	lock  chan struct{}
	rt    http.RoundTripper // adds what the host wants; nil while it has wanted nothing
	count int               // of logins
}

func (c *Client) session(h *host, repo string) *session {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := sessionKey{h, repo}
	s := c.sessions[k]
	if s == nil {
		s = &session{c: c, h: h, repo: repo, lock: make(chan struct{}, 1)}
		c.sessions[k] = s
	}
	return s
}

func (s *session) current(ctx context.Context) (http.RoundTripper, int, error) {
	select {
	case s.lock <- struct{}{}:
	case <-ctx.Done():
		return nil, 0, context.Cause(ctx)
	}
	defer func() { <-s.lock }()
	return s.rt, s.count, nil
}

// do sends what request makes. If the host wants credentials, or others than it has been given, they are looked up and it is sent
// again, once.
func (s *session) do(ctx context.Context, request func() (*http.Request, error)) (*http.Response, error) {
	rt, count, err := s.current(ctx)
	if err != nil {
		return nil, err
	}
	for again := false; ; again = true {
		r, err := request()
		if err != nil {
			return nil, err
		}
		var resp *http.Response
		if rt != nil {
			resp, err = rt.RoundTrip(r)
			var refused *transport.Error
			if errors.As(err, &refused) && !refused.Temporary() && !again {
				// The token service knows these credentials no more. Without them, the host says what it wants.
				if r, err = request(); err == nil {
					resp, err = s.c.transport(s.h).RoundTrip(r)
				}
			}
		} else {
			resp, err = s.c.transport(s.h).RoundTrip(r)
		}
		if err != nil {
			return nil, netFailure(ctx, s.h.name, err)
		}
		if resp.StatusCode != http.StatusUnauthorized || again {
			return resp, nil
		}
		ch, ok := challengeOf(resp.Header, s.h.scheme() == "http")
		if !ok {
			return resp, nil
		}
		discard(resp)
		if rt, err = s.login(ctx, count, ch); err != nil {
			return nil, err
		}
	}
}

// login looks up credentials and has them exchanged for a token if that is what the host wants. count is that of the login that
// was not good enough: another one since then is.
func (s *session) login(ctx context.Context, count int, ch *transport.Challenge) (http.RoundTripper, error) {
	select {
	case s.lock <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-s.lock }()
	if s.count != count {
		return s.rt, nil
	}
	opts := []name.Option{name.WeakValidation}
	if s.h.scheme() == "http" {
		opts = append(opts, name.Insecure)
	}
	reg, err := name.NewRegistry(s.h.name, opts...)
	if err != nil {
		return nil, &failure{kind: elsewhere, err: fmt.Errorf("log in at %s: it is no registry's host", s.h.name)}
	}
	auth, err := authn.Resolve(ctx, s.c.keychain, reg)
	if err != nil {
		return nil, &failure{kind: elsewhere, err: fmt.Errorf("log in at %s: %w", s.h.name, err)}
	}
	t := s.c.transport(s.h)
	token := &transport.Token{}
	if strings.EqualFold(ch.Scheme, "bearer") {
		cfg, err := authn.Authorization(ctx, auth)
		if err != nil {
			return nil, &failure{kind: elsewhere, err: fmt.Errorf("log in at %s: %w", s.h.name, err)}
		}
		if token.Token = cfg.RegistryToken; token.Token == "" {
			token, err = transport.Exchange(ctx, reg, auth, t, []string{s.scope(ch)}, ch)
			if err != nil {
				return nil, loginFailure(ctx, s.h.name, err)
			}
			if token.Token == "" {
				token.Token = token.AccessToken
			}
		}
	}
	rt, err := transport.FromToken(reg, auth, t, ch, token)
	if err != nil {
		return nil, loginFailure(ctx, s.h.name, err)
	}
	s.rt = rt
	s.count++
	return rt, nil
}

func (s *session) scope(ch *transport.Challenge) string {
	if scope := ch.Parameters["scope"]; scope != "" {
		return scope
	}
	return "repository:" + s.repo + ":" + transport.PullScope
}

// challengeOf reads WWW-Authenticate headers (RFC 9110, 11.6.1) and picks the first challenge that can be met.
func challengeOf(h http.Header, insecure bool) (*transport.Challenge, bool) {
	for _, line := range h.Values("WWW-Authenticate") {
		scheme, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !strings.EqualFold(scheme, "basic") && !strings.EqualFold(scheme, "bearer") {
			continue
		}
		return &transport.Challenge{Scheme: scheme, Parameters: parameters(rest), Insecure: insecure}, true
	}
	return nil, false
}

// parameters reads name=value or name="value", separated by commas, as far as it can be read.
func parameters(s string) map[string]string {
	m := map[string]string{}
	for {
		key, rest, ok := strings.Cut(strings.TrimLeft(s, " \t,"), "=")
		if !ok {
			return m
		}
		key = strings.ToLower(strings.TrimSpace(key))
		if rest = strings.TrimLeft(rest, " \t"); !strings.HasPrefix(rest, `"`) {
			m[key], s, _ = strings.Cut(rest, ",")
			m[key] = strings.TrimSpace(m[key])
			continue
		}
		var value strings.Builder
		i := 1
		for ; i < len(rest) && rest[i] != '"'; i++ {
			if rest[i] == '\\' && i+1 < len(rest) {
				i++
			}
			value.WriteByte(rest[i])
		}
		m[key] = value.String()
		s = rest[min(i+1, len(rest)):]
	}
}

func loginFailure(ctx context.Context, host string, err error) error {
	var refused *transport.Error
	if !errors.As(err, &refused) {
		var u *url.Error
		if errors.As(err, &u) || ctx.Err() != nil {
			return netFailure(ctx, host, err)
		}
		// What the service has said begins in the second line, if it is there.
		line, _, _ := strings.Cut(err.Error(), "\n")
		return &failure{kind: elsewhere, err: fmt.Errorf("log in at %s: %.200s", host, line)}
	}
	// Its text has the address in it, and what the service has said.
	f := &failure{kind: elsewhere, reason: reasonStatus4xx, err: fmt.Errorf("log in at %s: refused with status %d: the docker config should have credentials for it", host, refused.StatusCode)}
	if refused.Temporary() || refused.StatusCode == http.StatusTooManyRequests {
		f.kind = temporary
	}
	return f
}
