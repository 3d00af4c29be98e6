// Package imagefetch opens images in registries and fetches what is read of them, when it is read.
//
// It is the side with the network of fsbackend/lazyimage/store: an Image is a store.Store. A layer in a format that has a table of
// contents (eStargz, zstd:chunked) is fetched in pieces: of a chunk that is asked for, exactly the bytes of the blob that it is packed
// in. Each chunk is verified against the table, the table against the manifest, and the manifest against the reference, before any of
// it is used or kept.
package imagefetch

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"time"

	"github.com/sluicefs/sluice/imagefetch/registry"
)

// Config is an image to open. It is what sluice-fetch is sent, as JSON.
type Config struct {
	// ID is what whoever opens the image calls it.
	ID string `json:"id,omitempty"`
	// Reference says where it is: see registry.ParseReference.
	Reference string `json:"reference"`
	// Layer is the digest of one of its layers, which is then the only one.
	Layer string `json:"layer,omitempty"`
	// Platform is which of an index' images; "" is linux on this machine's architecture.
	Platform string `json:"platform,omitempty"`
	// TOCDigest is the digest of the table of contents of a layer that no manifest speaks of: one at a URL or in a file.
	TOCDigest string `json:"toc_digest,omitempty"`
	// TOCImage is the image that has the tables of contents of layers that do not have them themselves; "" is the reference's tag with
	// "-esgztoc" behind it.
	TOCImage string `json:"toc_image,omitempty"`
	// SkipVerify takes tables of contents for what they should be where no digest of them is known.
	SkipVerify bool `json:"skip_verify,omitempty"`
	// Fallback is what is done with a layer that cannot be fetched in pieces: "" is an error, "pull" fetches it whole.
	Fallback string `json:"fallback,omitempty"`
	// Registry says how registries are spoken to.
	Registry registry.Config `json:"registry,omitzero"`
	Cache    CacheConfig     `json:"cache,omitzero"`
	Prefetch PrefetchConfig  `json:"prefetch,omitzero"`
	// Background is the fetching of what nobody has asked for.
	Background BackgroundConfig `json:"background,omitzero"`
	// Bandwidth is how many bytes a second prefetching and the background may take together; 0 is any number.
	Bandwidth int64 `json:"bandwidth,omitempty"`
	// Trace is a file that gets a line for each file that is opened first, to make a prefetch list of; "" is none.
	Trace string `json:"trace,omitempty"`
}

// CacheConfig says where what was fetched is kept. Images of one process with the same directory share it, and so do processes.
type CacheConfig struct {
	// Dir is the directory. "" keeps everything in memory. A descriptor that was handed over is /proc/self/fd/N.
	Dir string `json:"dir,omitempty"`
	// Budget and MemoryBudget are as in cache.Config, in bytes.
	Budget       int64 `json:"budget,omitempty"`
	MemoryBudget int64 `json:"memory_budget,omitempty"`
}

// PrefetchConfig says what is fetched at once.
type PrefetchConfig struct {
	// Off fetches nothing, whatever landmarks there are.
	Off bool `json:"off,omitempty"`
	// Size is how many bytes from the start of each layer that has no landmark.
	Size int64 `json:"size,omitempty"`
	// List is a file with a prefetch list, whose files come before all else: see PrefetchList.
	List string `json:"list,omitempty"`
	// Timeout is how long Image.Prefetched waits; 0 is 10 s. It does not where AsyncSize or more bytes are to be fetched and AsyncSize
	// is not 0.
	Timeout   registry.Duration `json:"timeout,omitempty"`
	AsyncSize int64             `json:"async_size,omitempty"`
}

// BackgroundConfig says how the rest of an image is fetched.
type BackgroundConfig struct {
	// Off fetches nothing that is not asked for.
	Off bool `json:"off,omitempty"`
	// Concurrency is how many requests there are at once; 0 is 2.
	Concurrency int `json:"concurrency,omitempty"`
	// Silence is how long nothing may have been asked for before it goes on; 0 is 5 s.
	Silence registry.Duration `json:"silence,omitempty"`
	// Batch is how many bytes are asked for at once, where no chunk is larger; 0 is 1 MiB.
	Batch int64 `json:"batch,omitempty"`
}

// Validate says what about c cannot be.
func (c *Config) Validate() error {
	ref, err := registry.ParseReference(c.Reference)
	if err != nil {
		return err
	}
	for _, d := range []struct{ what, digest string }{{"layer", c.Layer}, {"toc_digest", c.TOCDigest}} {
		if d.digest != "" && !isDigest(d.digest) {
			return fmt.Errorf("%s=%q is no digest: expected sha256: and 64 hexadecimal digits", d.what, d.digest)
		}
	}
	if c.Layer != "" && ref.Image == nil {
		return errors.New("layer= picks one of an image's layers, and the reference is of none")
	}
	if c.TOCDigest != "" && ref.Image != nil {
		return errors.New("toc_digest= is for a layer without a manifest: an image's says it itself")
	}
	if c.TOCImage != "" {
		if ref, err := registry.ParseReference(c.TOCImage); err != nil || ref.Image == nil {
			return fmt.Errorf("toc_image=%q is no image: expected REGISTRY/REPO:TAG or REGISTRY/REPO@sha256:DIGEST", c.TOCImage)
		}
	}
	if c.Fallback != "" && c.Fallback != "pull" {
		return fmt.Errorf("fallback=%q is none: expected pull, or nothing", c.Fallback)
	}
	if p := c.Platform; p != "" && strings.Count(p, "/") != 1 && strings.Count(p, "/") != 2 {
		return fmt.Errorf("%q is no platform: expected OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT", p)
	}
	if c.Bandwidth < 0 || c.Prefetch.Size < 0 || c.Prefetch.AsyncSize < 0 || c.Prefetch.Timeout < 0 || c.Background.Concurrency < 0 ||
		c.Background.Silence < 0 || c.Background.Batch < 0 || c.Cache.Budget < 0 || c.Cache.MemoryBudget < 0 {
		return errors.New("limits of the image are negative: expected 0 for the default, or more")
	}
	return c.Registry.Validate()
}

func (c Config) withDefaults() Config {
	if c.Platform == "" {
		c.Platform = "linux/" + runtime.GOARCH
	}
	if c.Prefetch.Timeout == 0 {
		c.Prefetch.Timeout = registry.Duration(10 * time.Second)
	}
	if c.Background.Concurrency == 0 {
		c.Background.Concurrency = 2
	}
	if c.Background.Silence == 0 {
		c.Background.Silence = registry.Duration(5 * time.Second)
	}
	if c.Background.Batch == 0 {
		c.Background.Batch = 1 << 20
	}
	if c.Registry.Timeout == 0 {
		c.Registry.Timeout = registry.Duration(registry.DefaultTimeout)
	}
	return c
}

func isDigest(s string) bool {
	_, err := parseDigest(s)
	return err == nil
}
