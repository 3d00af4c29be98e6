package imagefetch

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/imagefetch/registry"
)

// podmanLayers are layers of testdata/zstdchunked, as the programs that they are named after have made them of the same tar file: skopeo
// of Debian 12, as podman and buildah do, and the library of today's, whose tables of contents have holes and whose footer is longer.
func podmanLayers(t *testing.T) map[string]imagetest.Layer {
	t.Helper()
	names, err := filepath.Glob("testdata/zstdchunked/*.zst")
	if err != nil || len(names) != 2 {
		t.Fatalf("the layers are %v, %v", names, err)
	}
	layers := map[string]imagetest.Layer{}
	for _, name := range names {
		l := imagetest.Layer{MediaType: types.OCILayerZStd}
		if l.Blob, err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
		l.Digest = registry.DigestOf(l.Blob)
		name = strings.TrimSuffix(name, ".zst")
		annotations, err := os.ReadFile(name + ".json")
		if err == nil {
			err = json.Unmarshal(annotations, &l.Annotations)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range tarOf(t, l.Blob) {
			l.Files = append(l.Files, imagetest.File{Name: f.Name, Type: f.Typeflag, Data: f.data})
			if f.Typeflag == tar.TypeReg {
				l.Files[len(l.Files)-1].Type = 0
			}
		}
		layers[filepath.Base(name)] = l
	}
	return layers
}

type tarFile struct {
	*tar.Header
	data []byte
}

// tarOf is what a layer is without a table of contents.
func tarOf(t *testing.T, blob []byte) (files []tarFile) {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, tarFile{h, data})
	}
}

// TestPodmanLayer is of zstd:chunked as podman, buildah and skopeo make it: the manifest says where the table of contents is; files have
// several chunks of various sizes, each a frame of its own, with the tar's headers between them, and only the first says where the last
// one ends.
func TestPodmanLayer(t *testing.T) {
	for name, l := range podmanLayers(t) {
		t.Run(name, func(t *testing.T) {
			img := imagetest.NewServer(t).Push(t, "a/b", l)
			m := open(t, quick(img))
			layer := layersOf(t, m)[0]
			if reqs := img.Server.Requests(); len(reqs) != 2 || reqs[1].Range == "" {
				t.Errorf("opening took %+v, expected the manifest and the table of contents", reqs)
			}
			check(t, m, img)

			// Each entry is the tar's.
			files := tarOf(t, l.Blob)
			if len(layer.Entries) != len(files) {
				t.Fatalf("%d entries, expected %d", len(layer.Entries), len(files))
			}
			kinds := map[byte]uint32{
				tar.TypeReg: unix.S_IFREG, tar.TypeDir: unix.S_IFDIR, tar.TypeSymlink: unix.S_IFLNK, tar.TypeLink: unix.S_IFREG,
				tar.TypeFifo: unix.S_IFIFO, tar.TypeChar: unix.S_IFCHR,
			}
			for i, e := range layer.Entries {
				h := files[i]
				got, want := map[string]string{}, map[string]string{}
				for _, x := range e.Xattrs {
					got[x.Name] = string(x.Value)
				}
				for k, v := range h.PAXRecords {
					if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
						want[name] = v
					}
				}
				if e.Path != strings.TrimSuffix(h.Name, "/") || e.Mode != kinds[h.Typeflag]|uint32(h.Mode) || int(e.UID) != h.Uid || int(e.GID) != h.Gid ||
					int64(e.Size) != h.Size || e.Target != h.Linkname || e.Hardlink != (h.Typeflag == tar.TypeLink) || !maps.Equal(got, want) ||
					int64(e.RdevMajor) != h.Devmajor || int64(e.RdevMinor) != h.Devminor || e.MtimeSec != h.ModTime.Unix() || int(e.MtimeNsec) != h.ModTime.Nanosecond() {
					t.Errorf("the entry %+v\nis not the tar's %+v", e, h.Header)
				}
			}
			if n := len(entryOf(t, m, 0, "numbers").Chunks); n < 2 {
				t.Errorf("the file that should have several chunks has %d", n)
			}

			// A chunk is fetched as the frame that it is packed in: of no byte less, nor of one more.
			z, err := zstd.NewReader(nil)
			if err != nil {
				t.Fatal(err)
			}
			defer z.Close()
			layers := m.layers0(t)
			for i, c := range layers.chunks {
				s := layers.streams[layers.at[i].stream]
				data, err := z.DecodeAll(l.Blob[s.off:s.end], nil)
				if err != nil || len(data) != int(c.Size) || s.hi-s.lo != 1 {
					t.Errorf("bytes %d to %d are unpacked to %d bytes, %v; expected chunk %d of %d alone", s.off, s.end, len(data), err, i, c.Size)
				}
			}

			// Without a manifest, the end of the layer says where its table of contents is.
			path := filepath.Join(t.TempDir(), "layer")
			if err := os.WriteFile(path, l.Blob, 0o600); err != nil {
				t.Fatal(err)
			}
			alone := open(t, Config{Reference: "file=" + path, SkipVerify: true})
			check(t, alone, img)
			if k := alone.layers0(t).kind; k != "zstd:chunked" {
				t.Errorf("the layer is %s", k)
			}
		})
	}
}

// TestBadAnnotations is of manifests that say of a zstd:chunked layer what cannot be.
func TestBadAnnotations(t *testing.T) {
	const checksum, position = "io.containers.zstd-chunked.manifest-checksum", "io.containers.zstd-chunked.manifest-position"
	layer := podmanLayers(t)["skopeo-1.9.3"]
	good := layer.Annotations[position]
	for _, bad := range []string{"", "x", "1:2", "0:0:0:1", "1:99999999:1:1", "-1:5:5:1", "9223372036854775807:5:1:1", "1:2:3:4:5", "1:2:3:2"} {
		layer.Annotations[position] = bad
		img := imagetest.NewServer(t).Push(t, "a/b", layer)
		if _, err := open(t, quick(img)).Layers(within(t)); !errors.Is(err, errNoTOC) {
			t.Errorf("a table of contents at %q: %v", bad, err)
		}
	}
	layer.Annotations[position] = good
	layer.Annotations[checksum] = registry.DigestOf(nil)
	if _, err := open(t, quick(imagetest.NewServer(t).Push(t, "a/b", layer))).Layers(within(t)); !errors.Is(err, registry.ErrContent) {
		t.Errorf("a table of contents of another digest: %v", err)
	}
}
