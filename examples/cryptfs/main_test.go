package main

import (
	"os"
	"path/filepath"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/extensions"
)

// TestLife takes the extension through its steps: the key outlives its file.
func TestLife(t *testing.T) {
	spec := &specs.Spec{}
	off := new(extension)
	if err := off.Prepare(extensions.PrepareContext{Spec: spec}); err != nil {
		t.Fatal(err)
	}
	if b, _, err := off.TryHandleMount(spec, nil, t.TempDir(), false); b != nil || err != nil {
		t.Errorf("without a key it answers %v, %v, expected that it declines", b, err)
	}
	key := filepath.Join(t.TempDir(), "key")
	for size, ok := range map[int]bool{31: false, 32: true, 33: false} {
		if err := os.WriteFile(key, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		e := &extension{keyFile: key}
		if err := e.Prepare(extensions.PrepareContext{Spec: spec}); (err == nil) != ok {
			t.Errorf("a key of %d bytes: %v", size, err)
		}
		if err := os.Remove(key); err != nil {
			t.Fatal(err)
		}
		if !ok {
			continue
		}
		b, options, err := e.TryHandleMount(spec, nil, t.TempDir(), false)
		if err != nil || b == nil || options.ReadOnly {
			t.Fatalf("the root: %v, %+v, %v, expected a backend", b, options, err)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if b, _, err := e.TryHandleMount(spec, &specs.Mount{Destination: "/data"}, t.TempDir(), false); b != nil || err != nil {
			t.Errorf("a mount: %v, %v, expected that it declines", b, err)
		}
		if b, _, err := e.TryHandleMount(spec, nil, filepath.Join(t.TempDir(), "none"), false); b != nil || err == nil {
			t.Errorf("a root that is not there: %v, %v, expected an error", b, err)
		}
	}
}
