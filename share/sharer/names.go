package sharer

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// Names in the guest's shared directory, as in Kata.
const (
	sandboxMountsDir = "sandbox-mounts"
	sandboxScope     = "sandbox"
	watchableDir     = "watchable"
	rootfsName       = "rootfs"
	// nameMax is what a name of a file may have, in bytes (NAME_MAX).
	nameMax = 255
)

// idPattern is that of Kata's VerifyContainerID, but for an ID of one character, which it does not have.
var idPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// validateID says what is wrong with an ID, which becomes part of paths on the host and in the guest.
func validateID(whose, id string) error {
	switch {
	case !idPattern.MatchString(id) || strings.Contains(id, ".."):
		return fmt.Errorf("%s ID %q: expected letters, digits, '_', '-' and single dots, the first a letter or digit", whose, id)
	// What follows it in a name must have room.
	case len(id) > 128:
		return fmt.Errorf("%s ID of %d characters: expected 128 at most", whose, len(id))
	case id == sandboxMountsDir || id == watchableDir:
		return fmt.Errorf("%s ID %q is the name of a directory that all containers have", whose, id)
	}
	return nil
}

// fileName is a name that nothing else has: scope, 16 hexadecimal digits and the last element of where. An element that is too
// long is cut off, one that is not UTF-8 (and could not be said in JSON) changed.
func fileName(scope, where string) (string, error) {
	base := filepath.Base(filepath.Clean("/" + where))
	if base == "/" {
		return "", fmt.Errorf("name a share for %q: expected a path with a last element", where)
	}
	var random [8]byte
	rand.Read(random[:]) // never fails
	prefix := scope + "-" + hex.EncodeToString(random[:]) + "-"
	base = strings.ToValidUTF8(base, "_")
	if room := nameMax - len(prefix); len(base) > room {
		for room > 0 && !utf8.RuneStart(base[room]) {
			room--
		}
		base = base[:room]
	}
	return prefix + base, nil
}

// ownPattern is what fileName and the fixed names look like: with it Cleanup tells what a sandbox has made.
var ownPattern = regexp.MustCompile(`^(?:[a-zA-Z0-9][a-zA-Z0-9_.-]*-[0-9a-f]{16}-[^/]+|[a-zA-Z0-9][a-zA-Z0-9_.-]*/` + rootfsName + `|` + sandboxMountsDir + `/[^/]+)$`)

// rootPath is where a container's root is.
func rootPath(id string) string { return path.Join(id, rootfsName) }

// Types of Kubernetes' volumes, as the second last element of their paths has them.
const (
	k8sEmptyDir    = "kubernetes.io~empty-dir"
	k8sConfigMap   = "kubernetes.io~configmap"
	k8sSecret      = "kubernetes.io~secret"
	k8sProjected   = "kubernetes.io~projected"
	k8sDownwardAPI = "kubernetes.io~downward-api"
)

var watchableTypes = []string{k8sConfigMap, k8sSecret, k8sProjected, k8sDownwardAPI}

// volumeType is the second last element of a source.
func volumeType(source string) string { return filepath.Base(filepath.Dir(source)) }

// watchableVolume says whether kubelet updates the volume while it is used.
func watchableVolume(source string) bool { return slices.Contains(watchableTypes, volumeType(source)) }

// watchablePattern is what the path of such a volume is like in a pod of root.
func watchablePattern(root string) *regexp.Regexp {
	types := make([]string, len(watchableTypes))
	for i, t := range watchableTypes {
		types[i] = regexp.QuoteMeta(t)
	}
	return regexp.MustCompile(`^` + regexp.QuoteMeta(strings.TrimSuffix(root, "/")) + `/pods/[0-9a-fA-F-]{36}/volumes/(?:` + strings.Join(types, "|") + `)/[^/]+$`)
}
