package sharer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// shared is one thing that the guest has, and who uses it.
type shared struct {
	// Path is where, below the guest's shared directory.
	Path string `json:"path"`
	what
	// Watch has changes in it followed.
	Watch bool   `json:"watch,omitempty"`
	Users []user `json:"users"`

	// applied says that the back-end is known to have it. What a process before this one has recorded may not be there.
	applied bool
}

// what is shared: users of the same what have one share of it.
type what struct {
	// At is Path, where that is not made up.
	At       string `json:"at,omitempty"`
	Source   string `json:"source"`
	Backend  string `json:"backend,omitempty"`
	Type     string `json:"type,omitempty"`
	Options  string `json:"options,omitempty"` // joined by commas
	MaxBytes uint64 `json:"max_bytes,omitempty"`
	// ReadOnly is part of it for back-ends that cannot change a share.
	ReadOnly bool `json:"read_only,omitempty"`

	NoSUID       bool `json:"nosuid,omitempty"`
	NoDev        bool `json:"nodev,omitempty"`
	NoExec       bool `json:"noexec,omitempty"`
	NoSymfollow  bool `json:"nosymfollow,omitempty"`
	FollowMounts bool `json:"follow_mounts,omitempty"`
}

// user is a mount of a container; Container is "" for the sandbox's own.
type user struct {
	Container   string `json:"container,omitempty"`
	Destination string `json:"destination,omitempty"`
	ReadOnly    bool   `json:"read_only,omitempty"`
}

// is says whether two are the same mount, whatever they may do.
func (u user) is(other user) bool {
	return u.Container == other.Container && u.Destination == other.Destination
}

// readOnly says whether nobody may write.
func (sh *shared) readOnly() bool {
	return !slices.ContainsFunc(sh.Users, func(u user) bool { return !u.ReadOnly })
}

// with and without are the users when u is one of them, as it is now, and when not. Neither changes sh.
func (sh *shared) with(u user) []user { return append(sh.without(u), u) }

func (sh *shared) without(u user) []user {
	return slices.DeleteFunc(slices.Clone(sh.Users), u.is)
}

// journalName is the file of a sandbox's directory with what is shared. It is written before a share is made and after one is
// gone: what is in it may not be there, but all that is there is in it.
const journalName = "shared.json"

// journal is its content.
type journal struct {
	Version int       `json:"version"`
	Sandbox string    `json:"sandbox"`
	Shared  []*shared `json:"shared"`
}

// writeJournal records what is shared.
func (s *Sandbox) writeJournal() error {
	content, err := json.Marshal(journal{Version: 1, Sandbox: s.config.ID, Shared: append([]*shared{}, s.shared...)})
	if err != nil {
		return err
	}
	if err := s.sys.writeFile(filepath.Join(s.dir, journalName), content); err != nil {
		return fmt.Errorf("record what is shared: %w", err)
	}
	return nil
}

// readJournal takes up what a process before this one has recorded. One that cannot be read is as good as none: Cleanup finds
// what there is without.
func (s *Sandbox) readJournal() error {
	content, err := os.ReadFile(filepath.Join(s.dir, journalName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read what sandbox %s has shared: %w", s.config.ID, err)
	}
	var j journal
	if err := json.Unmarshal(content, &j); err != nil || j.Version != 1 || j.Sandbox != s.config.ID {
		s.log.Warn("what was shared before is not recorded in a way that can be read: sharing starts anew", "version", j.Version, "error", err)
		return nil
	}
	s.shared = slices.DeleteFunc(j.Shared, func(sh *shared) bool {
		return sh == nil || !ownPattern.MatchString(sh.Path)
	})
	return nil
}
