package registry

import (
	"fmt"
	"net/url"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// Reference says where an image is. One of its fields is set.
type Reference struct {
	// Image is in a registry.
	Image name.Reference
	// URL is of one layer on a web server, File of one in a file.
	URL  *url.URL
	File string
}

// ParseReference reads REGISTRY/REPO@DIGEST, REGISTRY/REPO:TAG, http://… or https://… of one layer, or file=PATH of one.
func ParseReference(s string) (Reference, error) {
	if path, ok := strings.CutPrefix(s, "file="); ok {
		if path == "" {
			return Reference{}, fmt.Errorf("%q names no file: expected file=PATH", s)
		}
		return Reference{File: path}, nil
	}
	if strings.HasPrefix(s, "http://") || strings.HasPrefix(s, "https://") {
		u, err := url.Parse(s)
		if err != nil || u.Host == "" {
			return Reference{}, fmt.Errorf("the address of the layer is no URL: expected http(s)://HOST/PATH")
		}
		if u.User != nil {
			return Reference{}, fmt.Errorf("the address of a layer at %s has credentials in it: put them into the docker config", u.Host)
		}
		return Reference{URL: u}, nil
	}
	ref, err := name.ParseReference(s)
	if err != nil {
		return Reference{}, fmt.Errorf("%q is no reference: expected REGISTRY/REPO@sha256:DIGEST, REGISTRY/REPO:TAG, http(s)://… or file=PATH", s)
	}
	return Reference{Image: ref}, nil
}

// String is r as ParseReference reads it, without a query, which may be a secret.
func (r Reference) String() string {
	switch {
	case r.Image != nil:
		return r.Image.Name()
	case r.URL != nil:
		return redact(r.URL)
	}
	return "file=" + r.File
}

func redact(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}
