package imagefetch

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/sluicefs/sluice/imagefetch/registry"
)

// manifest finds the layers of the image. A tag is resolved once; what it stood for is remembered, for when the registry is gone.
func (m *Image) manifest(ctx context.Context) ([]v1.Descriptor, error) {
	ref := m.pinned
	for range 3 {
		raw, err := m.rawManifest(ctx, ref)
		if err != nil {
			return nil, err
		}
		layers, next, err := registry.Pick(ref, raw, m.cfg.Platform)
		if err != nil || next.Image == nil {
			return layers, err
		}
		ref = next
	}
	return nil, errors.New("the image's index leads to another one, and that to a third")
}

func (m *Image) rawManifest(ctx context.Context, ref registry.Reference) ([]byte, error) {
	if _, ok := ref.Image.(name.Digest); ok {
		return m.manifestByDigest(ctx, ref)
	}
	raw, digest, err := m.client.Manifest(ctx, ref)
	tag := sha256.Sum256([]byte(ref.Image.Name()))
	tagName := "tag-" + hex.EncodeToString(tag[:])
	if err != nil {
		known := string(m.cache.Meta(tagName))
		if ctx.Err() != nil || !isDigest(known) {
			return nil, err
		}
		m.log.Warn("cannot ask what the tag stands for: what it stood for the last time is taken", "digest", known, "err", err)
		raw, knownErr := m.manifestByDigest(ctx, registry.Pin(ref, known))
		if knownErr != nil {
			return nil, err
		}
		m.pinned = registry.Pin(ref, known)
		return raw, nil
	}
	m.pinned = registry.Pin(ref, digest)
	m.cache.PutMeta(tagName, []byte(digest))
	m.cache.PutMeta(manifestName(digest), raw)
	return raw, nil
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

func manifestName(digest string) string { return "manifest-" + strings.TrimPrefix(digest, "sha256:") }
