// Package model is what a program believes, or knows, to be in a directory: for tests that compare a guest's belief with the host's files.
package model

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// Files describes files by their paths.
type Files map[string]string

// Dir is how a directory is described.
const Dir = "dir"

// Describe says what is at path: a directory, a file and what is in it, or a symbolic link and where it leads. "" is nothing.
func Describe(path string) string {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ""
	case err != nil:
		return err.Error()
	case info.IsDir():
		return Dir
	case info.Mode().IsRegular():
		content, err := os.ReadFile(path)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprintf("file %x", sha256.Sum256(content))
	}
	target, _ := os.Readlink(path)
	return "other " + target
}

// Read describes all that is in the directory root.
func Read(root string) (Files, error) {
	f := Files{}
	return f, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			f[path] = Describe(path)
		}
		return err
	})
}

// Sum stands for what is in the directory root, but for the file end in it.
func (f Files) Sum(root, end string) string {
	h := sha256.New()
	n := 0
	for _, path := range slices.Sorted(maps.Keys(f)) {
		if rel, _ := filepath.Rel(root, path); rel != "." && rel != end {
			fmt.Fprintf(h, "%s %s\n", rel, f[path])
			n++
		}
	}
	return fmt.Sprintf("%x %d", h.Sum(nil)[:8], n)
}
