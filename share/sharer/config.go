package sharer

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
)

// Config says what a Sandbox is. ID and Backend must be there; the zero values of all others are Kata's defaults.
type Config struct {
	// ID is the sandbox's.
	ID string
	// Backend is Grafts, BindMounts or Copy.
	Backend Backend
	// HostDir has a directory for each sandbox: what it has shared is recorded there, and BindMounts mounts there.
	// Default: /run/kata-containers/shared/sandboxes.
	HostDir string
	// GuestDir is where the guest has mounted the share. Default: /run/kata-containers/shared/containers.
	GuestDir string
	// SandboxBindMounts are directories of the host that all of the sandbox sees in sandbox-mounts: "path[:ro|:rw]", ro without
	// either. No two may have the same last element.
	SandboxBindMounts []string
	// KubeletRoot is where kubelet has its pods. Default: /var/lib/kubelet.
	KubeletRoot string
	Limits      Limits
	// DisableGuestEmptyDir shares an emptyDir of the host's disk instead of making it in the guest (Kata's option of that name).
	DisableGuestEmptyDir bool
	// MemoryGrafts serves emptyDirs of medium Memory from the daemon's memory, with the limit that the volume has, instead of
	// having the guest mount a tmpfs. For Grafts only.
	MemoryGrafts bool
	// MemoryBytes is the limit of a volume in memory that says none itself. Default: 64 MiB.
	MemoryBytes uint64
	// Log gets what is not an error to the caller. Default: none.
	Log *slog.Logger
}

// Limits are those of a watchable volume (ConfigMap, Secret, …). A volume above them is shared all the same and its content is
// current; what ends is that changes are told as events. 0 is Kata's number, less is no limit.
type Limits struct {
	// HostFiles is what Kata's runtime allows. Default: 8.
	HostFiles int
	// Files and Bytes are what Kata's agent allows. Default: 16 and 1 MiB.
	Files int
	Bytes int64
}

// Backend is Grafts, BindMounts or Copy.
type Backend interface {
	validate() error
	open(s *Sandbox) backend
}

// Where things are, and what they are limited to, in Kata.
const (
	defaultHostDir     = "/run/kata-containers/shared/sandboxes"
	defaultGuestDir    = "/run/kata-containers/shared/containers"
	defaultKubeletRoot = "/var/lib/kubelet"
	defaultHostFiles   = 8
	defaultFiles       = 16
	defaultBytes       = 1 << 20
	defaultMemoryBytes = 64 << 20
)

// Validate says what is wrong with c.
func (c *Config) Validate() error {
	if err := validateID("sandbox", c.ID); err != nil {
		return err
	}
	if c.Backend == nil {
		return errors.New("no backend: expected Grafts, BindMounts or Copy")
	}
	if err := c.Backend.validate(); err != nil {
		return err
	}
	for name, dir := range map[string]string{"host": c.HostDir, "guest": c.GuestDir, "kubelet": c.KubeletRoot} {
		if dir != "" && !filepath.IsAbs(dir) {
			return fmt.Errorf("%s directory %q is not an absolute path", name, dir)
		}
	}
	if _, ok := c.Backend.(Grafts); c.MemoryGrafts && !ok {
		return errors.New("memory grafts need the backend Grafts")
	}
	_, err := parseSandboxBindMounts(c.SandboxBindMounts)
	return err
}

// withDefaults is c with the defaults for what is zero.
func (c Config) withDefaults() Config {
	c.HostDir = filepath.Clean(cmp.Or(c.HostDir, defaultHostDir))
	c.GuestDir = filepath.Clean(cmp.Or(c.GuestDir, defaultGuestDir))
	c.KubeletRoot = filepath.Clean(cmp.Or(c.KubeletRoot, defaultKubeletRoot))
	c.Limits.HostFiles = cmp.Or(c.Limits.HostFiles, defaultHostFiles)
	c.Limits.Files = cmp.Or(c.Limits.Files, defaultFiles)
	c.Limits.Bytes = cmp.Or(c.Limits.Bytes, defaultBytes)
	c.MemoryBytes = cmp.Or(c.MemoryBytes, defaultMemoryBytes)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// bindMount is one of SandboxBindMounts.
type bindMount struct {
	source   string
	readOnly bool
}

// parseSandboxBindMounts reads "path[:ro|:rw]", of which no two may have the same name in sandbox-mounts.
func parseSandboxBindMounts(specs []string) ([]bindMount, error) {
	mounts := make([]bindMount, 0, len(specs))
	names := make(map[string]string, len(specs))
	for _, spec := range specs {
		m := bindMount{readOnly: true}
		if source, ok := strings.CutSuffix(spec, ":rw"); ok {
			m.source, m.readOnly = source, false
		} else {
			m.source = strings.TrimSuffix(spec, ":ro")
		}
		if !filepath.IsAbs(m.source) || filepath.Clean(m.source) == "/" {
			return nil, fmt.Errorf("sandbox bind mount %q: expected an absolute path other than /, and :ro or :rw after it or nothing", spec)
		}
		m.source = filepath.Clean(m.source)
		name := filepath.Base(m.source)
		if other, ok := names[name]; ok {
			return nil, fmt.Errorf("sandbox bind mounts %q and %q have the same name %q: expected names that differ", other, spec, name)
		}
		names[name] = spec
		mounts = append(mounts, m)
	}
	return mounts, nil
}
