package imagefetch

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/sluicefs/sluice/imagefetch/registry"
)

// manifest finds the layers of an image. If pinned is a tag, it becomes what that stands for now, so that it is resolved once; what it
// stood for is remembered, for when the registry is gone.
func (m *Image) manifest(ctx context.Context, pinned *registry.Reference) ([]v1.Descriptor, error) {
	ref := *pinned
	for n := range 3 {
		raw, at, err := m.rawManifest(ctx, ref)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			*pinned = at
		}
		layers, next, err := registry.Pick(ref, raw, m.cfg.Platform)
		if err != nil || next.Image == nil {
			return layers, err
		}
		ref = next
	}
	return nil, errors.New("the image's index leads to another one, and that to a third")
}

// rawManifest gets what ref names, and ref by digest.
func (m *Image) rawManifest(ctx context.Context, ref registry.Reference) ([]byte, registry.Reference, error) {
	if _, ok := ref.Image.(name.Digest); ok {
		raw, err := m.manifestByDigest(ctx, ref)
		return raw, ref, err
	}
	raw, digest, err := m.client.Manifest(ctx, ref)
	tag := sha256.Sum256([]byte(ref.Image.Name()))
	tagName := "tag-" + hex.EncodeToString(tag[:])
	if err == nil {
		m.cache.PutMeta(tagName, []byte(digest))
		m.cache.PutMeta(manifestName(digest), raw)
		return raw, registry.Pin(ref, digest), nil
	}
	known := string(m.cache.Meta(tagName))
	if ctx.Err() != nil || !isDigest(known) {
		return nil, ref, err
	}
	m.log.Warn("cannot ask what the tag stands for: what it stood for the last time is taken", "digest", known, "err", err)
	raw, knownErr := m.manifestByDigest(ctx, registry.Pin(ref, known))
	if knownErr != nil {
		return nil, ref, err
	}
	return raw, registry.Pin(ref, known), nil
}

func (m *Image) manifestByDigest(ctx context.Context, ref registry.Reference) ([]byte, error) {
	digest := ref.Image.Identifier()
	if raw := m.cache.Meta(manifestName(digest)); raw != nil && registry.DigestOf(raw) == digest {
		return raw, nil
	}
	raw, _, err := m.client.Manifest(ctx, ref)
	if err == nil {
		m.cache.PutMeta(manifestName(digest), raw)
	}
	return raw, err
}

// layerOf is the annotation that says which layer a table of contents in an image of those is of.
const layerOf = "containerd.io/snapshot/stargz/layer.digest"

// externalTOC gets the table of contents of a layer from the image that has those of this one's layers.
func (m *Image) externalTOC(ctx context.Context, layer string) ([]byte, error) {
	where := m.cfg.TOCImage
	if where == "" {
		tag, ok := m.ref.Image.(name.Tag)
		if !ok {
			return nil, fmt.Errorf("%w: its table of contents is in another image, and toc_image does not say in which", errNoTOC)
		}
		where = tag.Name() + "-esgztoc"
	}
	ref, err := registry.ParseReference(where)
	if err != nil {
		return nil, err
	}
	descs, err := m.manifest(ctx, &ref)
	if err != nil {
		return nil, fmt.Errorf("find its table of contents: %w", err)
	}
	for _, d := range descs {
		if d.Annotations[layerOf] != layer {
			continue
		}
		if d.Size > maxPackedTOC {
			return nil, fmt.Errorf("%w: its table of contents has %d bytes, expected at most %d", errNoTOC, d.Size, maxPackedTOC)
		}
		return fetchRange(ctx, m.client.Blob(ref, d.Digest.String(), d.Size), registry.Range{Len: d.Size})
	}
	return nil, fmt.Errorf("%w: the image %s has no table of contents of it", errNoTOC, ref)
}

func manifestName(digest string) string { return "manifest-" + strings.TrimPrefix(digest, "sha256:") }
