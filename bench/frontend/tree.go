package frontend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
)

// What MakeTree makes, by name. Sizes are in bytes.
const (
	dataName    = "data"    // content of dataSize: word i is dataWord(8*i)
	writtenName = "written" // writtenSize, what the writes of a Run leave in it
	dirName     = "thousand"
	coldName    = "cold"
	scratchName = "scratch"
	doneName    = "complete"

	dataSize    = 64 << 20
	writtenSize = 64 << 20
	dirEntries  = 1000
	// Cold files: coldTop directories of coldSub directories of coldFiles files.
	coldTop   = 20
	coldSub   = 10
	coldFiles = 100
	coldDirs  = coldTop * coldSub
)

// dataWord is the 8 bytes of the data file at offset off, which is a multiple of 8.
func dataWord(off uint64) uint64 { return mix(off) }

// mix is the finaliser of SplitMix64: neighbours have nothing in common.
func mix(x uint64) uint64 {
	x += 0x9e37_79b9_7f4a_7c15
	x = (x ^ x>>30) * 0xbf58_476d_1ce4_e5b9
	x = (x ^ x>>27) * 0x94d0_49bb_1331_11eb
	return x ^ x>>31
}

// entryName is the i-th name in the directory of dirEntries.
func entryName(i int) string { return fmt.Sprintf("entry-%06d.txt", i) }

// entryNumber returns i of an entryName or coldFileName.
func entryNumber(name []byte) (int, bool) {
	const prefix, suffix = len("entry-"), len(".txt")
	if len(name) != prefix+6+suffix {
		return 0, false
	}
	n := 0
	for _, c := range name[prefix : prefix+6] {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = 10*n + int(c-'0')
	}
	return n, true
}

// smallSize is the size of the i-th small file.
func smallSize(i int) int { return 100 + 37*i%400 }

func coldTopName(i int) string  { return "module-" + strconv.Itoa(i) }
func coldSubName(i int) string  { return "package-" + strconv.Itoa(i) }
func coldFileName(i int) string { return fmt.Sprintf("cfile-%06d.txt", i) }

// MakeTree makes what the workloads need in dir, which must be the directory that the server shares. What is there from an earlier
// time is left as it is, but for what a Run that did not end has left. It takes 150 MiB.
func MakeTree(dir string) error {
	if err := makeTree(dir); err != nil {
		return fmt.Errorf("make the files to measure with in %s: %w", dir, err)
	}
	return nil
}

func makeTree(dir string) error {
	scratch := filepath.Join(dir, scratchName)
	if err := os.RemoveAll(scratch); err != nil {
		return err
	}
	if err := os.MkdirAll(scratch, 0o755); err != nil {
		return err
	}
	done := filepath.Join(dir, doneName)
	if _, err := os.Stat(done); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	block := make([]byte, 1<<20)
	if err := makeFile(filepath.Join(dir, dataName), dataSize, block, dataWord); err != nil {
		return err
	}
	if err := makeFile(filepath.Join(dir, writtenName), writtenSize, block, func(uint64) uint64 { return 0 }); err != nil {
		return err
	}
	small := block[:512]
	if err := makeSmall(filepath.Join(dir, dirName), 0, dirEntries, entryName, small); err != nil {
		return err
	}
	for i := range coldDirs {
		sub := filepath.Join(dir, coldName, coldTopName(i/coldSub), coldSubName(i%coldSub))
		if err := makeSmall(sub, i*coldFiles, coldFiles, coldFileName, small); err != nil {
			return err
		}
	}
	return os.WriteFile(done, nil, 0o644)
}

// makeFile makes a file of size bytes, whose words word says.
func makeFile(path string, size int, block []byte, word func(off uint64) uint64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := words(block)
	for off := 0; off < size; off += len(block) {
		for i := range w {
			w[i] = word(uint64(off + 8*i))
		}
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	return nil
}

// makeSmall makes the small files first to first+n-1 in dir.
func makeSmall(dir string, first, n int, name func(int) string, content []byte) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for i := first; i < first+n; i++ {
		if err := os.WriteFile(filepath.Join(dir, name(i)), content[:smallSize(i)], 0o644); err != nil {
			return err
		}
	}
	return nil
}
