package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// workload is something that people do in guests, with the programs that they do it with.
type workload struct {
	name string
	text string // what it does to each of ops
	// prepare makes the directory of a server's own ready on the host; nil if nothing is needed there. The share is not mounted then.
	prepare func(work string, round int) error
	// command is what is timed; share and work are the directories in the guest.
	command func(share, work string) []string
	fio     bool // the time is what fio reports
	// policies are the cache policies that it says something about; nil means all.
	policies []string
	// ops is how many files or requests it is about, by which FUSE requests are divided.
	ops int
	// lines is how many lines the command must write if it does its work.
	lines int
	// target is how many times as fast as with Rust virtiofsd it shall be.
	target float64
}

// Cache policies, by the name that Sluice and Rust virtiofsd have for them.
const (
	auto  = "auto"
	never = "never"
)

// workloads returns all of them.
func workloads(f fixtures, s sizes) []workload {
	work := func(name string) func(string, string) string {
		return func(_, work string) string { return filepath.Join(work, name) }
	}
	entry := func(name string) func(string, string) string {
		return func(share, _ string) string { return filepath.Join(share, name) }
	}
	command := func(path func(share, work string) string, format ...string) func(string, string) []string {
		return func(share, work string) []string {
			args := slices.Clone(format)
			for i, arg := range args {
				if arg == "{}" {
					args[i] = path(share, work)
				}
			}
			return args
		}
	}
	files := s.dirs * s.files
	list := []workload{
		{name: "find", text: "find an entry of a tree", command: command(entry(treeDir), "find", "{}"), ops: files, lines: files + s.dirs + 1, target: 1.4},
		{name: "find-size", text: "find a file of a tree by its size", command: command(entry(treeDir), "find", "{}", "-type", "f", "-size", "-2"), ops: files, lines: files, target: 1.4, policies: []string{auto}},
		{
			name: "stat", text: "stat a file of a tree, in no order", command: command(entry(treeDir), "guestbench", "stat", "{}", strconv.Itoa(s.dirs), strconv.Itoa(s.files), strconv.Itoa(s.stats)),
			ops: s.stats, target: 1.4,
		},
		{
			name: "create", text: "create a file, stat it, remove it", prepare: emptied("new", ""),
			command: command(work("new"), "guestbench", "create", "{}", strconv.Itoa(s.created)), ops: s.created, target: 1,
		},
		{name: "untar", text: "unpack an entry of Go's source", prepare: emptied("source", ""), command: command(work("source"), "tar", "-x", "-f", sourceArchive, "-C", "{}"), ops: f.entries, target: 1.4},
		{name: "rm", text: "remove an entry of Go's source by rm -rf", prepare: emptied("source", filepath.Join(f.dir, archiveFile)), command: command(work("source"), "rm", "-rf", "{}"), ops: f.entries, target: 1.4},
		{
			name: "git-status", text: "have git status look at a file",
			command: command(entry(repoDir), "git", "--no-optional-locks", "-c", "safe.directory=*", "-C", "{}", "status", "--porcelain"),
			ops:     s.repoDirs * repoFiles, target: 1,
		},
		{
			name: "go-build", text: "compile a package of a module by go build",
			prepare: func(work string, round int) error {
				module := filepath.Join(work, moduleDir)
				if _, err := os.Stat(module); err != nil {
					if err := os.CopyFS(module, os.DirFS(filepath.Join(f.dir, moduleDir))); err != nil {
						return err
					}
					if err := os.CopyFS(filepath.Join(work, cacheDir), os.DirFS(filepath.Join(f.dir, cacheDir))); err != nil {
						return err
					}
				}
				return changeModule(module, round+1)
			},
			command: func(_, work string) []string {
				return append(append([]string{"env"}, moduleEnv(filepath.Join(work, cacheDir))...),
					filepath.Join(f.goroot, "bin", "go"), "build", "-C", filepath.Join(work, moduleDir), "-o", "program", ".")
			},
			// The compiler maps files as shared, which the policy never forbids.
			policies: []string{auto}, ops: modulePackages + 1, target: 1,
		},
	}
	for _, job := range []struct {
		name   string
		job    fioJob
		count  int
		target float64
	}{
		{"randread", fioJob{rw: "randread", block: 4 << 10}, s.ios, 1.4},
		{"seqread", fioJob{rw: "read", block: 1 << 20}, int(s.data >> 20), 1.2},
		{"randwrite", fioJob{rw: "randwrite", block: 4 << 10}, s.ios, 1},
	} {
		for _, direct := range []bool{false, true} {
			for _, depth := range []int{1, 16} {
				j := job.job
				j.direct, j.depth = direct, depth
				w := workload{name: job.name + "-buffered", text: fmt.Sprintf("fio --rw=%s with blocks of %d KiB", j.rw, j.block>>10), fio: true, ops: job.count, target: job.target}
				if direct {
					w.name = job.name + "-direct"
					// With the policy never, all reads and writes are direct.
					w.policies = []string{auto}
				}
				w.name = fmt.Sprint(w.name, "-", depth)
				path := entry(dataFile)
				if j.rw == "randwrite" {
					path = work(dataFile)
					w.prepare = func(work string, _ int) error { return sized(filepath.Join(work, dataFile), s.data) }
				}
				w.command = func(share, work string) []string { return j.args(path(share, work), s.data, job.count) }
				list = append(list, w)
			}
		}
	}
	return list
}

// emptied returns a function that has a directory of a server's own hold nothing but what is in the archive, if there is one.
func emptied(name, archive string) func(string, int) error {
	return func(work string, _ int) error {
		dir := filepath.Join(work, name)
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o755); err != nil || archive == "" {
			return err
		}
		return host(dir, nil, "tar", "-x", "-f", archive)
	}
}

// sized makes sure of a file of that size, with all of it allocated.
func sized(path string, size int64) error {
	if info, err := os.Stat(path); err == nil && info.Size() == size {
		return nil
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	block := make([]byte, 1<<20)
	for written := int64(0); written < size; written += int64(len(block)) {
		if _, err := f.Write(block[:min(int64(len(block)), size-written)]); err != nil {
			f.Close()
			return err
		}
	}
	return f.Close()
}
