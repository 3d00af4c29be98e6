package lazyimage

import (
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluicefs/sluice/fsbackend/lazyimage"
)

// options are mount options, read.
type options struct {
	fetch  fetchConfig
	inside insideOptions
	// cacheDir is made where it is missing, and handed over as a descriptor.
	cacheDir string
	// inMemory says that no directory is wanted.
	inMemory bool
	// writable are the host's directories that the fetcher writes to, and visible what it reads.
	writable, visible []string
}

// fetchConfig is what sluice-fetch is told, as imagefetch.Config has it.
type fetchConfig struct {
	ID         string           `json:"id,omitempty"`
	Reference  string           `json:"reference"`
	Layer      string           `json:"layer,omitempty"`
	Platform   string           `json:"platform,omitempty"`
	TOCDigest  string           `json:"toc_digest,omitempty"`
	SkipVerify bool             `json:"skip_verify,omitempty"`
	Fallback   string           `json:"fallback,omitempty"`
	Registry   registryConfig   `json:"registry,omitzero"`
	Cache      cacheConfig      `json:"cache,omitzero"`
	Prefetch   prefetchConfig   `json:"prefetch,omitzero"`
	Background backgroundConfig `json:"background,omitzero"`
	Bandwidth  int64            `json:"bandwidth,omitempty"`
	Trace      string           `json:"trace,omitempty"`
}

type registryConfig struct {
	Hosts        map[string]*hostConfig `json:"hosts,omitempty"`
	DockerConfig string                 `json:"docker_config,omitempty"`
	Tries        int                    `json:"tries,omitempty"`
	Timeout      string                 `json:"timeout,omitempty"`
	Stall        string                 `json:"stall,omitempty"`
	SingleRange  bool                   `json:"single_range,omitempty"`
}

type hostConfig struct {
	Mirrors []mirrorConfig `json:"mirrors,omitempty"`
	accessConfig
}

type mirrorConfig struct {
	Host string `json:"host"`
	accessConfig
}

type accessConfig struct {
	PlainHTTP bool              `json:"plain_http,omitempty"`
	Insecure  bool              `json:"insecure,omitempty"`
	Headers   map[string]string `json:"headers,omitempty"`
}

type cacheConfig struct {
	Budget       int64 `json:"budget,omitempty"`
	MemoryBudget int64 `json:"memory_budget,omitempty"`
}

type prefetchConfig struct {
	Off       bool   `json:"off,omitempty"`
	Size      int64  `json:"size,omitempty"`
	List      string `json:"list,omitempty"`
	Timeout   string `json:"timeout,omitempty"`
	AsyncSize int64  `json:"async_size,omitempty"`
}

type backgroundConfig struct {
	Off         bool   `json:"off,omitempty"`
	Concurrency int    `json:"concurrency,omitempty"`
	Silence     string `json:"silence,omitempty"`
	Batch       int64  `json:"batch,omitempty"`
}

// known are the options by name. Those that are flags take no value.
var known = map[string]struct {
	flag bool
	read func(o *options, value string) error
}{
	"image":                  {read: (*options).image},
	"data":                   {read: (*options).data},
	"url":                    {read: (*options).url},
	"file":                   {read: (*options).file},
	"layer":                  {read: func(o *options, v string) error { return digest(&o.fetch.Layer, v) }},
	"platform":               {read: func(o *options, v string) error { return text(&o.fetch.Platform, v) }},
	"toc-digest":             {read: func(o *options, v string) error { return digest(&o.fetch.TOCDigest, v) }},
	"skip-verify":            {flag: true, read: func(o *options, _ string) error { o.fetch.SkipVerify = true; return nil }},
	"fallback":               {read: func(o *options, v string) error { return oneOf(&o.fetch.Fallback, v, "pull") }},
	"opaque":                 {read: (*options).opaque},
	"read-ahead":             {read: (*options).readAhead},
	"docker-config":          {read: func(o *options, v string) error { return o.path(&o.fetch.Registry.DockerConfig, v) }},
	"mirror":                 {read: (*options).mirror},
	"plain-http":             {read: func(o *options, v string) error { return o.host(v, func(a *accessConfig) { a.PlainHTTP = true }) }},
	"insecure":               {read: func(o *options, v string) error { return o.host(v, func(a *accessConfig) { a.Insecure = true }) }},
	"header":                 {read: (*options).header},
	"tries":                  {read: func(o *options, v string) error { return number(&o.fetch.Registry.Tries, v) }},
	"timeout":                {read: (*options).timeout},
	"stall":                  {read: func(o *options, v string) error { return duration(&o.fetch.Registry.Stall, v) }},
	"single-range":           {flag: true, read: func(o *options, _ string) error { o.fetch.Registry.SingleRange = true; return nil }},
	"cache-dir":              {read: (*options).cache},
	"cache-bytes":            {read: func(o *options, v string) error { return size(&o.fetch.Cache.Budget, v) }},
	"cache-memory":           {read: func(o *options, v string) error { return size(&o.fetch.Cache.MemoryBudget, v) }},
	"prefetch":               {read: (*options).prefetch},
	"prefetch-list":          {read: func(o *options, v string) error { return o.path(&o.fetch.Prefetch.List, v) }},
	"prefetch-timeout":       {read: func(o *options, v string) error { return duration(&o.fetch.Prefetch.Timeout, v) }},
	"prefetch-async":         {read: func(o *options, v string) error { return size(&o.fetch.Prefetch.AsyncSize, v) }},
	"background":             {read: (*options).background},
	"background-concurrency": {read: func(o *options, v string) error { return number(&o.fetch.Background.Concurrency, v) }},
	"background-silence":     {read: func(o *options, v string) error { return duration(&o.fetch.Background.Silence, v) }},
	"background-batch":       {read: func(o *options, v string) error { return size(&o.fetch.Background.Batch, v) }},
	"bandwidth":              {read: func(o *options, v string) error { return size(&o.fetch.Bandwidth, v) }},
	"trace":                  {read: (*options).trace},
	"ro":                     {flag: true, read: func(*options, string) error { return nil }},
}

// repeated are those that may be given more than once.
var repeated = []string{"mirror", "plain-http", "insecure", "header", "ro"}

// parse reads mount options.
func parse(list []string) (*options, error) {
	o := new(options)
	seen := make(map[string]bool)
	for _, option := range list {
		name, value, hasValue := strings.Cut(option, "=")
		k, ok := known[name]
		switch {
		case !ok:
			return nil, fmt.Errorf("option %q is not known: expected some of %s", name, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		case k.flag && hasValue:
			return nil, fmt.Errorf("option %s has the value %q: expected none", name, value)
		case !k.flag && value == "":
			return nil, fmt.Errorf("option %s has no value: expected %s=…", name, name)
		case strings.ContainsRune(value, 0):
			return nil, fmt.Errorf("option %s=%q: expected no NUL in it", name, value)
		case seen[name] && !slices.Contains(repeated, name):
			return nil, fmt.Errorf("option %s is given twice: expected it once", name)
		}
		seen[name] = true
		if err := k.read(o, value); err != nil {
			return nil, fmt.Errorf("option %s=%s: %w", name, value, err)
		}
	}
	sources := 0
	for _, name := range []string{"image", "data", "url", "file"} {
		if seen[name] {
			sources++
		}
	}
	seen["image"] = seen["image"] || seen["data"]
	switch {
	case sources != 1:
		return nil, fmt.Errorf("%d images are named: expected one of image=REGISTRY/REPO@sha256:DIGEST, url=http(s)://… and file=PATH", sources)
	case seen["layer"] && !seen["image"]:
		return nil, errors.New("option layer picks one of an image's layers: expected image= beside it")
	case seen["toc-digest"] && seen["image"]:
		return nil, errors.New("option toc-digest is for a layer that no manifest speaks of: expected url= or file= beside it")
	case o.fetch.Prefetch.Off && (seen["prefetch-list"] || seen["prefetch-timeout"] || seen["prefetch-async"]):
		return nil, errors.New("options for prefetching beside prefetch=off: expected the one or the other")
	case o.fetch.Background.Off && (seen["background-concurrency"] || seen["background-silence"] || seen["background-batch"]):
		return nil, errors.New("options for the background beside background=off: expected the one or the other")
	case seen["cache-bytes"] && seen["cache-memory"] && !seen["cache-dir"]:
		return nil, errors.New("options cache-bytes and cache-memory: expected the one for a cache on the disk or the other for one in memory, or cache-dir beside them")
	}
	o.inMemory = seen["cache-memory"] && !seen["cache-dir"]
	if !seen["timeout"] {
		if err := o.timeout(timeout.String()); err != nil {
			return nil, err
		}
	}
	// One layer is for an overlay to make something of: it shows what it hides.
	o.inside.Merge = seen["image"] && !seen["layer"]
	if seen["opaque"] && o.inside.Merge {
		return nil, errors.New("option opaque is for one layer: expected layer=, url= or file= beside it")
	}
	return o, nil
}

func (o *options) image(v string) error {
	if strings.Contains(v, "://") || strings.HasPrefix(v, "file=") {
		return errors.New("expected REGISTRY/REPO@sha256:DIGEST or REGISTRY/REPO:TAG; url= and file= are for one layer")
	}
	o.fetch.Reference = v
	return nil
}

// data is image in base64, for //lazyimage/DATA/ in lowerdir, where a slash ends it.
func (o *options) data(v string) error {
	plain := strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimRight(v, "="))
	name, err := base64.RawStdEncoding.DecodeString(plain)
	if err != nil {
		return fmt.Errorf("%w: expected the reference of an image in base64", err)
	}
	return o.image(strings.TrimPrefix(string(name), "docker://"))
}

func (o *options) url(v string) error {
	u, err := url.Parse(v)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return errors.New("expected http://HOST/PATH or https://HOST/PATH of one layer")
	}
	o.fetch.Reference = v
	return nil
}

func (o *options) file(v string) error {
	var p string
	if err := o.path(&p, v); err != nil {
		return err
	}
	o.fetch.Reference = "file=" + p
	return nil
}

// path takes a path that the fetcher reads.
func (o *options) path(to *string, v string) error {
	if !filepath.IsAbs(v) {
		return errors.New("expected an absolute path")
	}
	*to = filepath.Clean(v)
	o.visible = append(o.visible, *to)
	return nil
}

func (o *options) trace(v string) error {
	if !filepath.IsAbs(v) || filepath.Clean(v) == "/" {
		return errors.New("expected the absolute path of a file")
	}
	o.fetch.Trace = filepath.Clean(v)
	o.writable = append(o.writable, filepath.Dir(o.fetch.Trace))
	return nil
}

func (o *options) cache(v string) error {
	if !filepath.IsAbs(v) {
		return errors.New("expected the absolute path of a directory")
	}
	o.cacheDir = filepath.Clean(v)
	return nil
}

func (o *options) timeout(v string) (err error) {
	if err = duration(&o.fetch.Registry.Timeout, v); err == nil {
		o.inside.Timeout, err = time.ParseDuration(v)
	}
	return err
}

func (o *options) opaque(v string) error {
	for mode, name := range []string{lazyimage.OpaqueAll: "all", lazyimage.OpaqueTrusted: "trusted", lazyimage.OpaqueUser: "user"} {
		if v == name {
			o.inside.Opaque = lazyimage.Opaque(mode)
			return nil
		}
	}
	return errors.New("expected all, trusted or user")
}

func (o *options) readAhead(v string) error {
	var n int64
	if err := size(&n, v); err != nil {
		return err
	}
	o.inside.ReadAhead = int(n)
	if n == 0 {
		o.inside.ReadAhead = -1
	}
	return nil
}

func (o *options) prefetch(v string) error {
	if v == "off" {
		o.fetch.Prefetch.Off = true
		return nil
	}
	if err := size(&o.fetch.Prefetch.Size, v); err != nil {
		return fmt.Errorf("%w, or off", err)
	}
	return nil
}

func (o *options) background(v string) error {
	if v != "off" && v != "on" {
		return errors.New("expected on or off")
	}
	o.fetch.Background.Off = v == "off"
	return nil
}

// at returns the settings of a registry's host.
func (o *options) at(host string) (*hostConfig, error) {
	if host == "" || strings.ContainsAny(host, "/@= ") {
		return nil, fmt.Errorf("%q is no registry's host: expected HOST or HOST:PORT, as references have it", host)
	}
	if o.fetch.Registry.Hosts == nil {
		o.fetch.Registry.Hosts = make(map[string]*hostConfig)
	}
	if o.fetch.Registry.Hosts[host] == nil {
		o.fetch.Registry.Hosts[host] = new(hostConfig)
	}
	return o.fetch.Registry.Hosts[host], nil
}

func (o *options) host(v string, set func(*accessConfig)) error {
	h, err := o.at(v)
	if err == nil {
		set(&h.accessConfig)
	}
	return err
}

// mirror reads HOST=MIRROR, where a MIRROR may have http:// or https:// before its host.
func (o *options) mirror(v string) error {
	host, of, ok := strings.Cut(v, "=")
	h, err := o.at(host)
	if !ok || err != nil {
		return errors.Join(err, errors.New("expected HOST=MIRROR, where MIRROR is HOST or HOST:PORT, with http:// before it where that is how it is spoken to"))
	}
	plain := strings.HasPrefix(of, "http://")
	of = strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(of, "http://"), "https://"), "/")
	if of == "" || strings.ContainsAny(of, "/@= ") {
		return fmt.Errorf("%q is no mirror's host: expected HOST or HOST:PORT", of)
	}
	h.Mirrors = append(h.Mirrors, mirrorConfig{Host: of, accessConfig: accessConfig{PlainHTTP: plain}})
	return nil
}

// header reads HOST=NAME:VALUE.
func (o *options) header(v string) error {
	host, line, _ := strings.Cut(v, "=")
	name, value, ok := strings.Cut(line, ":")
	h, err := o.at(host)
	if !ok || name == "" || err != nil || strings.ContainsAny(line, "\r\n") {
		return errors.New("expected HOST=NAME:VALUE")
	}
	if h.Headers == nil {
		h.Headers = make(map[string]string)
	}
	h.Headers[name] = strings.TrimSpace(value)
	return nil
}

func text(to *string, v string) error {
	*to = v
	return nil
}

func digest(to *string, v string) error {
	if hex, ok := strings.CutPrefix(v, "sha256:"); !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return errors.New("expected sha256: and 64 hexadecimal digits")
	}
	*to = v
	return nil
}

func oneOf(to *string, v string, values ...string) error {
	if !slices.Contains(values, v) {
		return fmt.Errorf("expected %s", strings.Join(values, ", "))
	}
	*to = v
	return nil
}

func number(to *int, v string) error {
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > 1000 {
		return errors.New("expected a number from 1 to 1000")
	}
	*to = n
	return nil
}

func duration(to *string, v string) error {
	d, err := time.ParseDuration(v)
	if err != nil || d <= 0 || d > 24*time.Hour {
		return errors.New("expected a duration of at most a day, as 30s or 1m30s")
	}
	*to = d.String()
	return nil
}

// size reads bytes, with K, M, G or T behind them for powers of 1024.
func size(to *int64, v string) error {
	digits, shift := v, 0
	if i := strings.IndexAny("KMGT", v[len(v)-1:]); i >= 0 {
		digits, shift = v[:len(v)-1], 10*(i+1)
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift {
		return errors.New("expected a number of bytes, as 1048576, 512M or 10G")
	}
	*to = n << shift
	return nil
}
