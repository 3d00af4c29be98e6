package api

import (
	"path"
	"strings"
	"unicode/utf8"
)

// Limits of what names and paths can be.
const (
	// MaxTag is the size of the tag in struct virtio_fs_config, in bytes (virtio 1.3, 5.11.4).
	MaxTag = 36
	// MaxPath is Linux's PATH_MAX without the NUL at its end.
	MaxPath = 4095
	// MaxName is Linux's NAME_MAX.
	MaxName = 255
)

// CheckTag says as CodeInvalid why tag cannot be a share's.
func CheckTag(tag string) error {
	switch {
	case tag == "":
		return Errorf(CodeInvalid, "tag is empty: expected 1 to %d bytes", MaxTag)
	case len(tag) > MaxTag:
		return Errorf(CodeInvalid, "tag has %d bytes: expected 1 to %d", len(tag), MaxTag)
	case tag == "." || tag == "..":
		return Errorf(CodeInvalid, "tag %q cannot be the name of a socket: expected another", tag)
	case !utf8.ValidString(tag):
		return Errorf(CodeInvalid, "tag %q is not UTF-8", tag)
	}
	for _, r := range tag {
		if r < ' ' || r == 0x7f {
			return Errorf(CodeInvalid, "tag %q has a control character", tag)
		}
	}
	return nil
}

// CheckPath says as CodeInvalid why p cannot be the place of a graft: that has to be absolute and clean, "/" or "/data/x".
func CheckPath(p string) error {
	switch {
	case p == "":
		return Errorf(CodeInvalid, "path is empty: expected an absolute path in the share, such as /data")
	case len(p) > MaxPath:
		return Errorf(CodeInvalid, "path has %d bytes: expected at most %d", len(p), MaxPath)
	case strings.IndexByte(p, 0) >= 0:
		return Errorf(CodeInvalid, "path %q has a NUL", p)
	case !utf8.ValidString(p):
		return Errorf(CodeInvalid, "path %q is not UTF-8, which JSON cannot carry", p)
	case p[0] != '/':
		return Errorf(CodeInvalid, "path %q is relative: expected an absolute path in the share, such as /data", p)
	case path.Clean(p) != p:
		return Errorf(CodeInvalid, "path %q is not clean: expected %q", p, path.Clean(p))
	}
	for name := range strings.SplitSeq(p, "/") {
		if len(name) > MaxName {
			return Errorf(CodeInvalid, "path %q has a name of %d bytes: expected at most %d", p, len(name), MaxName)
		}
	}
	return nil
}
