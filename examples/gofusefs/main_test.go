package main

import (
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/extensions"
)

// TestLife takes the extension through its steps, with and without its annotation.
func TestLife(t *testing.T) {
	e := &extension{names: []string{"/proc/uptime"}}
	plain := &specs.Spec{}
	at := &specs.Spec{Annotations: map[string]string{"io.sluice.x.gofusefs.at": "/host"}}
	if err := e.Prepare(extensions.PrepareContext{Spec: plain}); err != nil {
		t.Fatal(err)
	}
	defer e.files[0].Close()
	host := &specs.Mount{Destination: "/host"}
	for _, row := range []struct {
		spec   *specs.Spec
		mount  *specs.Mount
		claims bool
	}{
		{plain, nil, true},
		{plain, host, false},
		{at, nil, false},
		{at, host, true},
		{at, &specs.Mount{Destination: "/other"}, false},
	} {
		b, options, err := e.TryHandleMount(row.spec, row.mount, "", true)
		if err != nil || (b != nil) != row.claims || !options.ReadOnly {
			t.Errorf("mount %v with annotations %v: %v, %+v, %v, expected claimed %v, read-only", row.mount, row.spec.Annotations, b, options, err, row.claims)
		}
		if b != nil {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	missing := &extension{names: []string{"/proc/no such file"}}
	if err := missing.Prepare(extensions.PrepareContext{Spec: plain}); err == nil {
		t.Error("a file that is not there is prepared")
	}
}
