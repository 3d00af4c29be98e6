//go:build !(linux && cgo && (amd64 || arm64))

package seccomp

import "errors"

var errNoCgo = errors.New("this sluiced was built without cgo and has no seccomp; build it with cgo and libseccomp-dev, or run with --seccomp=none")

// Supported returns nil if filters can be installed, and what is missing otherwise.
func Supported() error { return errNoCgo }

// Install fails for every action but None.
func Install(cfg InstallConfig) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if cfg.Action == None {
		return nil
	}
	return errNoCgo
}

// Violations is 0: nothing is counted.
func Violations() uint64 { return 0 }

// Seen is empty: nothing is seen.
func Seen() []Violation { return nil }

// Used is empty, too.
func Used() []Use { return nil }

// ConfineProgram fails.
func ConfineProgram(bool) error { return programError(errNoCgo) }
