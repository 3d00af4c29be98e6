// Package tree makes and compares directory trees, on both sides of a share.
package tree

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
)

// Digest returns the SHA-256 sum of everything below root that a copy must have the same: names, types, permissions, targets of symbolic links,
// sizes and contents. It also counts the entries.
func Digest(root string) (sum string, entries int, err error) {
	h := sha256.New()
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		entries++
		switch {
		case info.Mode().IsRegular():
			fmt.Fprintf(h, "%q %v %d\n", name, info.Mode(), info.Size())
			return addFile(h, path, info.Size())
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			fmt.Fprintf(h, "%q %v %q\n", name, info.Mode(), target)
			return err
		default:
			fmt.Fprintf(h, "%q %v\n", name, info.Mode())
			return nil
		}
	})
	if err != nil {
		return "", 0, fmt.Errorf("sum %s: %w", root, err)
	}
	return hex.EncodeToString(h.Sum(nil)), entries, nil
}

func addFile(w io.Writer, path string, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(w, f)
	if err == nil && n != size {
		err = fmt.Errorf("%s has %d bytes, its size is %d", path, n, size)
	}
	return err
}

// WriteRandom writes a file of size bytes that depend only on the seed.
func WriteRandom(path string, size int64, seed byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if _, err := io.CopyN(f, rand.NewChaCha8([32]byte{seed}), size); err != nil {
		f.Close()
		return fmt.Errorf("write %s: %w", path, err)
	}
	return f.Close()
}

// WriteSample makes a small tree in dir, which must not exist: directories, files of many sizes, and symbolic links.
func WriteSample(dir string, seed byte) error {
	for i := range 40 {
		sub := filepath.Join(dir, fmt.Sprintf("dir%d", i%8), fmt.Sprintf("sub%d", i%3))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return err
		}
		file := filepath.Join(sub, fmt.Sprintf("file%d", i))
		if err := WriteRandom(file, int64(i*i*17), seed+byte(i)); err != nil {
			return err
		}
		if err := os.Symlink(filepath.Base(file), file+".link"); err != nil {
			return err
		}
	}
	return nil
}
