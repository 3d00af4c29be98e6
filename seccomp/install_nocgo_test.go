//go:build !(linux && cgo && (amd64 || arm64))

package seccomp

import (
	"strings"
	"testing"
)

func TestWithoutCgo(t *testing.T) {
	for _, err := range []error{Supported(), Install(InstallConfig{Action: Kill}), Install(InstallConfig{Action: Log})} {
		if err == nil || !strings.Contains(err.Error(), "--seccomp=none") {
			t.Errorf("got %v, want an error that says what to do", err)
		}
	}
	if n, seen := Violations(), Seen(); n != 0 || seen != nil {
		t.Errorf("%d violations %v without a filter", n, seen)
	}
}
