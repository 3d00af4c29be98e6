package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// MaxManifest is the largest manifest, in bytes, as registries have it.
const MaxManifest = 4 << 20

// MaxLayers is how many layers an image may have.
const MaxLayers = 500

// Manifest gets what an image's reference names, as it is, and its digest. One that is asked for by its digest has it.
func (c *Client) Manifest(ctx context.Context, image Reference) (raw []byte, digest string, err error) {
	origin, repo := repoOf(image.Image)
	id := image.Image.Identifier()
	err = c.try(ctx, c.hostsOf(origin), func(ctx context.Context, h *host, w *watchdog) error {
		u := h.url(repo, "manifests", id)
		accept := http.Header{"Accept": {strings.Join([]string{
			string(types.OCIManifestSchema1), string(types.OCIImageIndex), string(types.DockerManifestSchema2), string(types.DockerManifestList),
		}, ", ")}}
		resp, err := c.ask(ctx, h, repo, http.MethodGet, u, accept)
		if err != nil {
			return err
		}
		if resp, _, err = c.follow(ctx, h, repo, u, resp, http.MethodGet, accept); err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return statusFailure(h.name, resp)
		}
		in := &body{r: resp.Body, w: w, count: func(int) {}}
		b, err := io.ReadAll(io.LimitReader(in, MaxManifest+1))
		if err != nil {
			return netFailure(ctx, h.name, err)
		}
		if len(b) > MaxManifest {
			return &failure{kind: elsewhere, err: fmt.Errorf("the manifest at %s is larger than %d bytes", h.name, MaxManifest)}
		}
		sum := DigestOf(b)
		if want := resp.Header.Get("Docker-Content-Digest"); strings.HasPrefix(want, "sha256:") && want != sum {
			return &failure{kind: elsewhere, err: fmt.Errorf("the manifest at %s is not what its digest says", h.name)}
		}
		if _, ok := image.Image.(name.Digest); ok && id != sum {
			return &failure{kind: elsewhere, err: fmt.Errorf("the manifest at %s is not what its digest says", h.name)}
		}
		raw, digest = b, sum
		return nil
	})
	if err != nil {
		return nil, "", fmt.Errorf("get the manifest of %s: %w", image, err)
	}
	return raw, digest, nil
}

// DigestOf is the digest of b, "sha256:…".
func DigestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// Pick finds, in a manifest, the layers; or, in an index, the reference of the manifest for a platform ("linux/arm64/v8").
func Pick(image Reference, raw []byte, platform string) (layers []v1.Descriptor, next Reference, err error) {
	var head struct {
		MediaType types.MediaType   `json:"mediaType"`
		Layers    []json.RawMessage `json:"layers"`
		Manifests []json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return nil, next, fmt.Errorf("read the manifest of %s: it is no JSON", image)
	}
	if head.MediaType.IsIndex() || head.MediaType == "" && len(head.Manifests) > 0 {
		next, err := pickPlatform(image, raw, platform)
		return nil, next, err
	}
	if !head.MediaType.IsImage() && head.MediaType != "" || len(head.Layers) == 0 {
		return nil, next, fmt.Errorf("read the manifest of %s: it is none of an image with layers, but %q", image, head.MediaType)
	}
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, next, fmt.Errorf("read the manifest of %s: it cannot be read", image)
	}
	if len(m.Layers) > MaxLayers {
		return nil, next, fmt.Errorf("read the manifest of %s: it has %d layers, at most %d can be served", image, len(m.Layers), MaxLayers)
	}
	for i, l := range m.Layers {
		if l.Digest.Algorithm != "sha256" || l.Size <= 0 {
			return nil, next, fmt.Errorf("read the manifest of %s: layer %d has no sha256 digest, or no size", image, i)
		}
	}
	return m.Layers, next, nil
}

func pickPlatform(image Reference, raw []byte, platform string) (next Reference, err error) {
	index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return next, fmt.Errorf("read the index of %s: it cannot be read", image)
	}
	want, err := v1.ParsePlatform(platform)
	if err != nil {
		return next, fmt.Errorf("%q is no platform: expected OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT", platform)
	}
	var have []string
	for _, m := range index.Manifests {
		if m.Platform == nil || m.Digest.Algorithm != "sha256" {
			continue
		}
		if m.Platform.Satisfies(*want) {
			return Reference{Image: image.Image.Context().Digest(m.Digest.String())}, nil
		}
		have = append(have, m.Platform.String())
	}
	return next, fmt.Errorf("the image %s has nothing for %s: it is for %s", image, platform, strings.Join(have, ", "))
}

// Pin is image by digest.
func Pin(image Reference, digest string) Reference {
	return Reference{Image: image.Image.Context().Digest(digest)}
}
