package sharer

import (
	"slices"
	"testing"
)

func TestParseMountinfo(t *testing.T) {
	got, err := parseMountinfo([]byte(`22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
36 35 98:0 /mnt1 /mnt\0402\134x ro,noatime master:1 - ext3 /dev/root rw,errors=continue
37 36 0:5 / /only rw - tmpfs shared:9 ro
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []mountPoint{{path: "/", shared: true}, {path: `/mnt 2\x`, readOnly: true}, {path: "/only"}}
	if !slices.Equal(got, want) {
		t.Errorf("parsed %+v, want %+v", got, want)
	}
	if _, err := parseMountinfo([]byte("1 2 3\n")); err == nil {
		t.Error("a line without a mount point passes")
	}
}

func FuzzParseMountinfo(f *testing.F) {
	f.Add([]byte("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"))
	f.Add([]byte("36 35 98:0 /mnt1 /mnt\\0402\\134x\\7 ro master:1 - ext3 a b"))
	f.Fuzz(func(t *testing.T, content []byte) {
		mounts, err := parseMountinfo(content)
		if err != nil && mounts != nil {
			t.Error("mounts beside an error")
		}
		for _, m := range mounts {
			if m.path == "" {
				t.Errorf("a mount point without a path in %q", content)
			}
		}
	})
}
