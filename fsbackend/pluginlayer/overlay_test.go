package pluginlayer

import (
	"archive/tar"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/overlay"
)

// TestOverlayOfLayers is row B3 as a guest sees it: what the first layer has whited out of the third is not there.
func TestOverlayOfLayers(t *testing.T) {
	dir := t.TempDir()
	writeTar(t, filepath.Join(dir, "1.tar"),
		tar.Header{Name: "hidden", Typeflag: tar.TypeChar, Mode: 0o600},
		tar.Header{Name: "dir/.wh.other", Mode: 0o644},
		tar.Header{Name: "opaque/", Typeflag: tar.TypeDir, Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y"}},
	)
	writeTar(t, filepath.Join(dir, "2.tar"), tar.Header{Name: "middle", Mode: 0o644, Uname: "second"})
	writeTar(t, filepath.Join(dir, "3.tar"),
		tar.Header{Name: "hidden", Mode: 0o644, Uname: "third"},
		tar.Header{Name: "dir/other", Mode: 0o644, Uname: "other"},
		tar.Header{Name: "dir/shown", Mode: 0o644, Uname: "shown"},
		tar.Header{Name: "opaque/below", Mode: 0o644, Uname: "below"},
	)
	c := tarPlugin(t)
	layers, err := c.Layers(t.Context(), "", strings.TrimPrefix(dir, "/"))
	if err != nil {
		t.Fatal(err)
	}
	var lowers []overlay.Layer
	for i := range layers.Len() {
		l, err := layers.Open(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		lowers = append(lowers, overlay.Layer{Backend: l, NoACL: !l.ACL(), StableIno: true})
	}
	o, err := overlay.New(overlay.Config{Lowers: lowers})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	client := &fsbackendtest.Client{R: fsbackend.Resolve(o)}
	for path, want := range map[string][]string{"": {"dir", "middle", "opaque"}, "dir": {"shown"}, "opaque": nil} {
		node := uint64(fsbackendtest.Root)
		if path != "" {
			e, errno := client.Lookup(node, path)
			if errno != 0 {
				t.Fatal(errno)
			}
			node = e.NodeId
		}
		names := client.List(t, node, 4096)
		slices.Sort(names)
		if !slices.Equal(names, want) {
			t.Errorf("/%s lists %q, expected %q", path, names, want)
		}
	}
	if _, errno := client.Lookup(fsbackendtest.Root, "hidden"); errno != unix.ENOENT {
		t.Errorf("LOOKUP of what is whited out: %v, expected ENOENT", errno)
	}
	node, fh := mustOpen(t, client, "middle")
	if b, errno := client.Read(node, fh, 0, 10); string(b) != "second" || errno != 0 {
		t.Errorf("READ: %q, %v", b, errno)
	}
}
