package registry

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// Client speaks to registries. It may be used from many goroutines.
type Client struct {
	cfg      Config
	keychain authn.Keychain
	strict   *http.Transport
	lax      *http.Transport // takes any certificate
	failures failureCounts

	mu       sync.Mutex
	hosts    map[hostKey]*host
	sessions map[sessionKey]*session
}

type hostKey struct{ origin, host string }

type sessionKey struct {
	h    *host
	repo string
}

// host is one that can be asked for something.
type host struct {
	name   string
	origin string // that it is a mirror of, or ""
	access Access

	mu sync.Mutex
	// failed is until when it is asked last, because it has not answered well.
	failed time.Time
}

// New makes a client, to be closed. cfg must be valid.
func New(cfg Config) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	c := &Client{
		cfg: cfg, keychain: keychain(cfg.DockerConfig),
		hosts: map[hostKey]*host{}, sessions: map[sessionKey]*session{},
	}
	c.strict = newTransport(cfg, nil)
	c.lax = newTransport(cfg, &tls.Config{InsecureSkipVerify: true})
	return c, nil
}

func newTransport(cfg Config, t *tls.Config) *http.Transport {
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		TLSClientConfig:     t,
		TLSHandshakeTimeout: time.Duration(cfg.Stall),
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     time.Minute,
		// Ranges are of the blob as it is, not of what a server would pack it into on the way.
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
	}
}

// Close ends what connections there are. What is being asked ends with its context, not by this.
func (c *Client) Close() {
	c.strict.CloseIdleConnections()
	c.lax.CloseIdleConnections()
}

// hostsOf are those that may have what origin has, in the order they are asked in.
func (c *Client) hostsOf(origin string) []*host {
	c.mu.Lock()
	defer c.mu.Unlock()
	cfg := c.cfg.Hosts[origin]
	var list []*host
	for _, m := range cfg.Mirrors {
		list = append(list, c.hostLocked(hostKey{origin, m.Host}, m.Access))
	}
	return append(list, c.hostLocked(hostKey{"", origin}, cfg.Access))
}

func (c *Client) hostLocked(k hostKey, a Access) *host {
	h := c.hosts[k]
	if h == nil {
		h = &host{name: k.host, origin: k.origin, access: a}
		c.hosts[k] = h
	}
	return h
}

func (h *host) scheme() string {
	if h.access.PlainHTTP || loopback(h.name) && !h.access.Insecure {
		return "http"
	}
	return "https"
}

// url is where h has a thing of a repository: kind is "blobs" or "manifests".
func (h *host) url(repo, kind, id string) *url.URL {
	u := &url.URL{Scheme: h.scheme(), Host: h.name, Path: "/v2/" + repo + "/" + kind + "/" + id}
	if h.origin != "" {
		u.RawQuery = url.Values{"ns": {h.origin}}.Encode()
	}
	return u
}

func (c *Client) transport(h *host) *http.Transport {
	if h.access.Insecure {
		return c.lax
	}
	return c.strict
}

// ask sends a request to h itself, with its headers and what credentials it wants.
func (c *Client) ask(ctx context.Context, h *host, repo, method string, u *url.URL, header http.Header) (*http.Response, error) {
	return c.session(h, repo).do(ctx, func() (*http.Request, error) {
		r, err := newRequest(ctx, method, u, header)
		if err != nil {
			return nil, err
		}
		for k, v := range h.access.Headers {
			r.Header.Set(k, v)
		}
		return r, nil
	})
}

func newRequest(ctx context.Context, method string, u *url.URL, header http.Header) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("ask %s: the address is none", redact(u))
	}
	for k, v := range header {
		r.Header[k] = v
	}
	r.Header.Set("User-Agent", "sluice-fetch")
	return r, nil
}

// maxRedirects is how often one redirect may lead to another.
const maxRedirects = 5

// follow goes where resp redirects until there is an answer. The credentials and headers of h stay with h.
func (c *Client) follow(ctx context.Context, h *host, repo string, at *url.URL, resp *http.Response, method string, header http.Header) (*http.Response, *url.URL, error) {
	for n := 0; ; n++ {
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return resp, at, nil
		}
		discard(resp)
		if n == maxRedirects {
			return nil, nil, &failure{kind: elsewhere, err: fmt.Errorf("%s redirects more than %d times", h.name, maxRedirects)}
		}
		to, err := at.Parse(resp.Header.Get("Location"))
		if err != nil || to.Host == "" || to.Scheme != "https" && to.Scheme != "http" {
			return nil, nil, &failure{kind: elsewhere, err: fmt.Errorf("%s redirects to no address", h.name)}
		}
		if at.Scheme == "https" && to.Scheme == "http" {
			return nil, nil, &failure{kind: elsewhere, err: fmt.Errorf("%s redirects to %s without TLS", h.name, to.Host)}
		}
		at = to
		if resp, err = c.askAt(ctx, h, repo, at, method, header); err != nil {
			return nil, nil, err
		}
	}
}

// askAt sends a request to where h has redirected.
func (c *Client) askAt(ctx context.Context, h *host, repo string, u *url.URL, method string, header http.Header) (*http.Response, error) {
	if u.Host == h.name && u.Scheme == h.scheme() {
		return c.ask(ctx, h, repo, method, u, header)
	}
	r, err := newRequest(ctx, method, u, header)
	if err != nil {
		return nil, err
	}
	resp, err := c.transport(h).RoundTrip(r)
	if err != nil {
		return nil, netFailure(ctx, u.Host, err)
	}
	return resp, nil
}

func repoOf(r name.Reference) (origin, repo string) {
	return r.Context().RegistryStr(), r.Context().RepositoryStr()
}

func (c *Client) stall() time.Duration { return time.Duration(c.cfg.Stall) }
