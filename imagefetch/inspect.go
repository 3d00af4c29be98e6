package imagefetch

import (
	"context"
	"errors"
	"sync"

	"github.com/sluicefs/sluice/imagefetch/registry"
)

// LayerInfo is what can be said of a layer before anything of it is served.
type LayerInfo struct {
	Digest string `json:"digest"`
	// Size is the blob's, Unpacked that of the files in it, in bytes; the latter is known of lazy layers only, as what follows is.
	Size     int64 `json:"size"`
	Unpacked int64 `json:"unpacked,omitempty"`
	// Lazy says whether it can be fetched in pieces, Reason why not. Kind is "eStargz" or "zstd:chunked" then.
	Lazy   bool   `json:"lazy"`
	Reason string `json:"reason,omitempty"`
	Kind   string `json:"kind,omitempty"`
	Files  int    `json:"files,omitempty"`
	Chunks int    `json:"chunks,omitempty"`
	// Prefetch is how many bytes of the blob its landmark has fetched at once, -1 if it has none.
	Prefetch int64 `json:"prefetch"`
}

// Inspect says what the layers of the image are, the lowest first, without Config.Fallback.
func (m *Image) Inspect(ctx context.Context) ([]LayerInfo, error) {
	layers, err := m.findLayers(ctx)
	if err != nil {
		return nil, err
	}
	infos := make([]LayerInfo, len(layers))
	errs := make([]error, len(layers))
	var all sync.WaitGroup
	for i, l := range layers {
		all.Go(func() { errs[i] = l.inspect(ctx, &infos[i]) })
	}
	all.Wait()
	return infos, errors.Join(append(errs, m.closeFiles())...)
}

func (l *layer) inspect(ctx context.Context, info *LayerInfo) error {
	*info = LayerInfo{Digest: l.digest, Size: l.blob.Size(), Prefetch: -1}
	if err := l.loadTOC(ctx); err != nil {
		if !errors.Is(err, errNoTOC) && !errors.Is(err, registry.ErrContent) {
			return err
		}
		info.Reason = err.Error()
		return nil
	}
	info.Lazy, info.Kind, info.Files, info.Chunks = true, l.kind, len(l.entries), len(l.chunks)
	info.Unpacked, info.Prefetch = l.total, l.landmark
	return nil
}
