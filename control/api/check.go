package api

import (
	"fmt"
	"path"
	"strings"
	"unicode/utf8"
)

// Limits of what names and paths can be.
const (
	// MaxTag is the size of the tag in struct virtio_fs_config, in bytes (virtio 1.3, 5.11.4).
	MaxTag = 36
	// MaxSocketPath is the longest path a Unix socket can be bound to, in bytes: sun_path less its NUL.
	MaxSocketPath = 107
	// MaxPath is Linux's PATH_MAX without the NUL at its end.
	MaxPath = 4095
	// MaxName is Linux's NAME_MAX.
	MaxName = 255
)

// CheckTag says as CodeInvalid why tag cannot be a share's.
func CheckTag(tag string) error {
	return asError("tag", checkTag(tag))
}

// CheckPath says as CodeInvalid why p cannot be the place of a graft: that has to be absolute and clean, "/" or "/data/x".
func CheckPath(p string) error {
	return asError("path", checkPath(p))
}

func asError(field, problem string) error {
	if problem == "" {
		return nil
	}
	return (&FieldError{field, problem}).API()
}

// The following return what is wrong and was expected, "" for nothing.

func checkTag(tag string) string {
	switch {
	case tag == "":
		return fmt.Sprintf("it is empty: expected 1 to %d bytes", MaxTag)
	case len(tag) > MaxTag:
		return fmt.Sprintf("it has %d bytes: expected 1 to %d", len(tag), MaxTag)
	case !utf8.ValidString(tag):
		return fmt.Sprintf("%q is not UTF-8: expected a name of 1 to %d bytes", tag, MaxTag)
	case tag == "." || tag == "..":
		return fmt.Sprintf("%q means a directory in URLs: expected another name", tag)
	case strings.Contains(tag, "/"):
		return fmt.Sprintf("%q has a slash: expected a name that can be part of a URL and the name of a file", tag)
	case hasControl(tag):
		return fmt.Sprintf("%q has a control character: expected a name that can be shown", tag)
	}
	return ""
}

func checkPath(p string) string {
	switch {
	case p == "":
		return "it is empty: expected an absolute path in the share, such as /data"
	case p[0] != '/':
		return quote(p) + " is relative: expected an absolute path in the share, such as /data"
	}
	if problem := checkAnyPath(p); problem != "" {
		return problem
	}
	if clean := path.Clean(p); clean != p {
		return fmt.Sprintf("%s is not clean: expected %s", quote(p), quote(clean))
	}
	for name := range strings.SplitSeq(p, "/") {
		if len(name) > MaxName {
			return fmt.Sprintf("a name in it has %d bytes: expected at most %d", len(name), MaxName)
		}
	}
	return ""
}

func checkSource(p string) string {
	if p[0] != '/' {
		return quote(p) + " is relative: expected an absolute path of the host"
	}
	return checkAnyPath(p)
}

func checkSocket(p string) string {
	switch {
	case p[0] != '/':
		return quote(p) + " is relative: expected an absolute path for a Unix socket"
	case len(p) > MaxSocketPath:
		return fmt.Sprintf("%d bytes are too long for a Unix socket: expected at most %d", len(p), MaxSocketPath)
	case strings.HasSuffix(p, "/"):
		return quote(p) + " ends in a slash: expected the path of a Unix socket"
	}
	return checkAnyPath(p)
}

func checkAnyPath(p string) string {
	switch {
	case len(p) > MaxPath:
		return fmt.Sprintf("it has %d bytes: expected at most %d", len(p), MaxPath)
	case strings.IndexByte(p, 0) >= 0:
		return quote(p) + " has a NUL: expected a path without"
	case !utf8.ValidString(p):
		return quote(p) + " is not UTF-8, which JSON cannot carry: expected a path that is"
	}
	return ""
}

// hasControl also finds newlines and NUL.
func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// quote shows the beginning of s, which somebody else wrote, in one line.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%q…", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
