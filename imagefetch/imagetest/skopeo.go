package imagetest

import (
	"io"
	"os/exec"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Skopeo has skopeo(1) copy the image to a registry on the loopback, where it is ref: HOST:PORT/REPO:TAG. With
// --dest-compress-format=zstd:chunked it packs the layers as podman and buildah do, but for those that the registry has already.
func (i *Image) Skopeo(t testing.TB, ref string, args ...string) *Image {
	t.Helper()
	args = append([]string{"--insecure-policy", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"}, args...)
	if out, err := exec.Command("skopeo", append(args, "docker://"+i.Tag, "docker://"+ref)...).CombinedOutput(); err != nil {
		t.Fatalf("skopeo, of scripts/packages.txt: %v\n%s", err, out)
	}
	tag, err := name.NewTag(ref)
	must(t, err)
	got, err := remote.Image(tag)
	must(t, err)
	sum, err := got.Digest()
	must(t, err)
	m, err := got.Manifest()
	must(t, err)
	blobs, err := got.Layers()
	must(t, err)
	made := &Image{Ref: tag.Context().Name() + "@" + sum.String(), Tag: ref, Digest: sum.String()}
	for n, d := range m.Layers {
		r, err := blobs[n].Compressed()
		must(t, err)
		data, err := io.ReadAll(r)
		must(t, err)
		must(t, r.Close())
		made.Layers = append(made.Layers, Layer{Files: i.Layers[n].Files, Blob: data, MediaType: d.MediaType, Digest: d.Digest.String(), Annotations: d.Annotations})
	}
	return made
}
