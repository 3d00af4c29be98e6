// Package registry reads images from where they are kept: manifests, and ranges of blobs, from registries, their mirrors and plain
// web servers, and from local files.
//
// It trusts none of them. What it hands on is what it was asked for or an error, within the limits of its Config; whether that is
// also the right content is found out by digests, by whoever asked.
package registry

import (
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"
)

// Config says how registries are spoken to. The zero value is usable.
type Config struct {
	// Hosts are settings by the host of references, as they name it ("registry.example:5000"; "index.docker.io" for Docker Hub).
	Hosts map[string]HostConfig `json:"hosts,omitempty"`
	// DockerConfig is a directory with a docker config.json, for credentials. It is read again when they are refused, so that they
	// can be changed at any time. "" is $DOCKER_CONFIG, ~/.docker, and where podman keeps its own.
	DockerConfig string `json:"docker_config,omitempty"`
	// Tries is how often something is asked of all hosts that may have it; 0 is 5.
	Tries int `json:"tries,omitempty"`
	// Backoff is the pause after the first try, which doubles with each further one up to MaxBackoff; 0 are 30 ms and 5 s.
	Backoff    Duration `json:"backoff,omitempty"`
	MaxBackoff Duration `json:"max_backoff,omitempty"`
	// Timeout is for one call, with all tries and pauses; 0 is DefaultTimeout. Stall is how long a host may stay silent in it; 0 is 10 s.
	Timeout Duration `json:"timeout,omitempty"`
	Stall   Duration `json:"stall,omitempty"`
	// MaxSkip is how many bytes that are not wanted are read to get at those that are, from a server that ignores ranges; 0 is 4 MiB.
	MaxSkip int64 `json:"max_skip,omitempty"`
	// SingleRange has every range asked for by itself. A server that refuses several at once is found out anyway.
	SingleRange bool `json:"single_range,omitempty"`
	// Log is for what goes wrong on the way and is tried again; nil is for nobody.
	Log *slog.Logger `json:"-"`
}

// DefaultTimeout is Config.Timeout's: less than those who wait for a chunk wait (store.DefaultTimeout), so that they hear what was
// wrong.
const DefaultTimeout = 40 * time.Second

// HostConfig is what is particular about a host.
type HostConfig struct {
	// Mirrors are asked first, in this order, and the host itself last.
	Mirrors []Mirror `json:"mirrors,omitempty"`
	Access
}

// Mirror is a registry that may have what another one has, under the same repositories. It is told which by "?ns=HOST".
type Mirror struct {
	Host string `json:"host"`
	Access
}

// Access is how a host is spoken to.
type Access struct {
	// PlainHTTP is without TLS, which is how loopback addresses are spoken to anyway. Insecure takes any certificate.
	PlainHTTP bool `json:"plain_http,omitempty"`
	Insecure  bool `json:"insecure,omitempty"`
	// Headers are sent along, but not to where the host redirects.
	Headers map[string]string `json:"headers,omitempty"`
}

// Duration is a time.Duration that is written as "5s".
type Duration time.Duration

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is no duration: one is written as 30s or 1m30s", text)
	}
	*d = Duration(v)
	return nil
}

// Validate says what about c cannot be.
func (c *Config) Validate() error {
	if c.Tries < 0 || c.Backoff < 0 || c.MaxBackoff < 0 || c.Timeout < 0 || c.Stall < 0 || c.MaxSkip < 0 {
		return fmt.Errorf("limits of the registry are negative: expected 0 for the default, or more")
	}
	for host, h := range c.Hosts {
		if host == "" || strings.ContainsAny(host, "/@ ") {
			return fmt.Errorf("%q is no registry's host: expected HOST or HOST:PORT", host)
		}
		for _, m := range h.Mirrors {
			if m.Host == "" || strings.ContainsAny(m.Host, "/@ ") {
				return fmt.Errorf("%q is no mirror's host: expected HOST or HOST:PORT", m.Host)
			}
		}
	}
	return nil
}

func (c Config) withDefaults() Config {
	for _, d := range []struct {
		v   *Duration
		def time.Duration
	}{
		{&c.Backoff, 30 * time.Millisecond},
		{&c.MaxBackoff, 5 * time.Second},
		{&c.Timeout, DefaultTimeout},
		{&c.Stall, 10 * time.Second},
	} {
		if *d.v == 0 {
			*d.v = Duration(d.def)
		}
	}
	if c.Tries == 0 {
		c.Tries = 5
	}
	if c.MaxSkip == 0 {
		c.MaxSkip = 4 << 20
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// loopback reports whether host, with a port or without, is this machine.
func loopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
