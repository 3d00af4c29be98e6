package lazyimage

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/imagefetch"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
)

// imageFiles are what a tar file has, for imagetest.
func imageFiles(t *testing.T, packed []byte) []imagetest.File {
	t.Helper()
	var files []imagetest.File
	r := tar.NewReader(bytes.NewReader(packed))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		f := imagetest.File{
			Name: h.Name, Type: h.Typeflag, Mode: h.Mode, UID: h.Uid, GID: h.Gid, ModTime: h.ModTime, Link: h.Linkname,
			Major: h.Devmajor, Minor: h.Devminor, Xattrs: make(map[string]string),
		}
		if f.Data, err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
		for record, v := range h.PAXRecords {
			if name, ok := strings.CutPrefix(record, "SCHILY.xattr."); ok {
				f.Xattrs[name] = v
			}
		}
		files = append(files, f)
	}
}

// compareImage compares the tree of an image, read with a fetcher of its own, with what it should be.
func compareImage(t *testing.T, what string, want snapshot, cfg imagefetch.Config) {
	t.Helper()
	store, err := imagefetch.NewFetcher(nil).Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f, err := New(context.Background(), Config{Store: store, Merge: true})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	i := &image{Client: &fsbackendtest.Client{R: fsbackend.Resolve(f)}, fs: f}
	snapshotOf(t, i).compare(t, what, want)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// T-D9, T-D14: images of a registry, fetched into memory or a directory, are what unpacking their layers gives; and those in a directory
// are still when the registry is gone.
func TestRealImages(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test makes devices: run it as root")
	}
	for seed, format := range []imagetest.Format{imagetest.EStargz, imagetest.ZstdChunked} {
		packed := randomLayers(t, rand.New(rand.NewPCG(uint64(seed), 14)), 1) // what builds tables of contents rounds times
		host := t.TempDir()
		for _, p := range packed {
			unpack(t, host, p)
		}
		want := snapshotDir(t, host, true)
		server := imagetest.NewServer(t)
		var built []imagetest.Layer
		for _, p := range packed {
			built = append(built, imagetest.Build(t, imageFiles(t, p), imagetest.Options{Format: format, ChunkSize: 100}))
		}
		ref := server.Push(t, "test/image", built...).Ref
		look := func(what, dir string) {
			compareImage(t, fmt.Sprintf("format %d, %s", format, what), want, imagefetch.Config{Reference: ref, Cache: imagefetch.CacheConfig{Dir: dir}})
		}
		dir := t.TempDir()
		look("in memory", "")
		look("in a directory", dir)
		server.Close()
		look("without the registry", dir)
	}
}
