package bundle

import (
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzPlan plans shares from any configuration. What is planned lies in the share, at a path that the root filesystem does
// not lead elsewhere.
func FuzzPlan(f *testing.F) {
	seeds, err := filepath.Glob("testdata/*.json")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("seeds %v, %v", seeds, err)
	}
	for _, name := range seeds {
		config, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(config)
	}
	for _, seed := range []string{
		`{"ociVersion":"1.0.0","root":{"path":"rootfs"},"mounts":[{"destination":"/up/../escape/a"},{"destination":"/slashed/outer","type":"tmpfs","options":["size=1k","mode=7","tmpcopyup"]},{"destination":"/abs","type":"bind","source":"../pod/volume"},{"destination":"/data/link/x","source":"../pod/volume/sub","options":["rbind"]}],"annotations":{"io.sluice.mount./abs.backend":"x","io.sluice.option.a":"b"}}`,
		`{"ociVersion":"1.0.0","root":{"path":"rootfs"},"mounts":[{"destination":"/a","source":"spare","options":["bind","idmap"],"uidMappings":[{"containerID":7,"hostID":3,"size":9}],"gidMappings":[{"hostID":2,"size":4294967290}]}],"linux":{"uidMappings":[{"hostID":5,"size":8},{"containerID":8,"hostID":20,"size":1}],"gidMappings":[{"hostID":1,"size":4294967290}]}}`,
	} {
		f.Add([]byte(seed))
	}
	host := makeHost(f)
	rootfs := filepath.Join(host, "b/rootfs")
	f.Fuzz(func(t *testing.T, config []byte) {
		write(t, host, config)
		b, err := Load(filepath.Join(host, "b"), "")
		if err != nil {
			return
		}
		plan, err := b.Plan()
		if err != nil {
			return
		}
		checkMount(t, &plan.Root)
		mounts := map[string]*Mount{}
		for i := range plan.Mounts {
			m := &plan.Mounts[i]
			checkMount(t, m)
			if path.Clean(m.Path) != m.Path || !path.IsAbs(m.Path) || m.Path == "/" || mounts[m.Path] != nil {
				t.Errorf("a mount at %q", m.Path)
			}
			if top, ok := below(m.Path, guestPaths...); ok {
				t.Errorf("a mount at %q, below %s", m.Path, top)
			}
			for dir := m.Path; dir != "/" && plan.Root.Source == rootfs; dir = path.Dir(dir) {
				// What an earlier mount covers is that mount's own.
				if covered(mounts, dir) {
					continue
				}
				if st, err := os.Lstat(filepath.Join(rootfs, dir)); err == nil && st.Mode()&os.ModeSymlink != 0 {
					t.Errorf("a mount at %q, where %q is a symbolic link", m.Path, dir)
				}
			}
			for earlier := range mounts {
				if _, hidden := below(earlier, m.Path); hidden {
					t.Errorf("%q comes before %q", earlier, m.Path)
				}
			}
			mounts[m.Path] = m
		}
	})
}

// covered says whether one of the mounts covers what the root filesystem has at dir.
func covered(mounts map[string]*Mount, dir string) bool {
	for ; dir != "/"; dir = path.Dir(dir) {
		if mounts[dir] != nil {
			return true
		}
	}
	return false
}

func checkMount(t *testing.T, m *Mount) {
	t.Helper()
	if m.Source != "" {
		fileType, err := typeOf(m.Source)
		if !filepath.IsAbs(m.Source) || err != nil || m.Kind == Tmpfs || m.Kind != Other && (fileType == unix.S_IFDIR) != (m.Kind == Dir) {
			t.Errorf("source %q of a %v: type %#o, %v", m.Source, m.Kind, fileType, err)
		}
	} else if m.Kind == Dir || m.Kind == File {
		t.Errorf("no source of the %v at %q", m.Kind, m.Path)
	}
	if m.Size < 0 || m.Mode > 0o7777 || strings.ContainsRune(m.Path, 0) {
		t.Errorf("mount %+v", m)
	}
	for _, ranges := range [][]IDRange{m.UIDMap, m.GIDMap} {
		end := uint64(0)
		for _, r := range ranges {
			if r.Count == 0 || uint64(r.Guest) < end || uint64(r.Host)+uint64(r.Count) >= 1<<32 {
				t.Errorf("map %v", ranges)
			}
			end = uint64(r.Guest) + uint64(r.Count)
		}
		if end >= 1<<32 {
			t.Errorf("map %v", ranges)
		}
	}
}
