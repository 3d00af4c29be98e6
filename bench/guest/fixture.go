package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/sluicefs/sluice/bench/guest/guestbench/timing"
	"github.com/sluicefs/sluice/internal/testguest/tree"
)

// sizes are how much each workload does.
type sizes struct {
	dirs, files int   // of the tree: files in each of so many directories
	stats       int   // files of the tree that the storm looks at
	created     int   // files that the storm creates
	repoDirs    int   // of the git repository, with repoFiles files each
	data        int64 // bytes of the file that fio reads and writes
	ios         int   // 4 KiB requests of a job of fio's
	source      []string
}

var (
	// usualSizes have each workload take about a second.
	usualSizes = sizes{
		dirs: 100, files: 200, stats: 2000, created: 500, repoDirs: 150, data: 128 << 20, ios: 4000,
		source: []string{"archive", "bufio", "bytes", "compress", "container", "context", "database", "encoding", "errors", "expvar", "flag", "fmt", "go", "hash", "html"},
	}
	// fullSizes are for a machine that has time.
	fullSizes = sizes{dirs: 100, files: 200, stats: 20000, created: 10000, repoDirs: 250, data: 512 << 20, ios: 100_000, source: []string{"."}}
)

// Names in the directory that all servers serve. What is written to is below a directory of each server's own, so that none finds what
// another has left in the host's caches.
const (
	treeDir  = "tree"
	repoDir  = "repo"
	dataFile = "data"

	// Beside the directory, copied to each server's own.
	moduleDir   = "module"
	cacheDir    = "cache"
	archiveFile = "source.tar"
)

// repoFiles is how many files each directory of the git repository has.
const repoFiles = 40

// fixtures are the files that the workloads are about.
type fixtures struct {
	dir     string // has the share in it, and what is copied from there
	goroot  string
	entries int // of the archive
}

// share is the directory that all servers serve.
func (f fixtures) share() string { return filepath.Join(f.dir, "share") }

// makeFixtures makes them in dir.
func makeFixtures(dir string, s sizes) (fixtures, error) {
	f := fixtures{dir: dir}
	for d := range s.dirs {
		for i := range s.files {
			if err := writeFile(filepath.Join(f.share(), treeDir, timing.TreeFile(d, i)), bytes.Repeat([]byte{'x'}, timing.TreeFileSize)); err != nil {
				return f, err
			}
		}
	}
	err := tree.WriteRandom(filepath.Join(f.share(), dataFile), s.data, 1)
	if err == nil {
		err = makeRepo(filepath.Join(f.share(), repoDir), s.repoDirs)
	}
	if err == nil {
		err = makeModule(filepath.Join(dir, moduleDir), filepath.Join(dir, cacheDir))
	}
	if err == nil {
		f.goroot, err = output(dir, "go", "env", "GOROOT")
	}
	if err != nil {
		return f, err
	}
	archive := filepath.Join(dir, archiveFile)
	if err := host(filepath.Join(f.goroot, "src"), nil, "tar", append([]string{"-c", "-f", archive, "--owner=0", "--group=0"}, s.source...)...); err != nil {
		return f, err
	}
	names, err := output(dir, "tar", "-t", "-f", archive)
	f.entries = len(strings.Split(names, "\n"))
	return f, err
}

// makeRepo makes a git repository whose working tree is clean.
func makeRepo(dir string, dirs int) error {
	for d := range dirs {
		for f := range repoFiles {
			name := filepath.Join(dir, fmt.Sprintf("pkg%02d", d%20), fmt.Sprintf("sub%03d", d), fmt.Sprintf("file%02d.txt", f))
			if err := writeFile(name, fmt.Appendf(nil, "file %d of directory %d\n", f, d)); err != nil {
				return err
			}
		}
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "."}, {"-c", "user.name=bench", "-c", "user.email=bench@localhost", "commit", "-q", "-m", "all"}} {
		if err := host(dir, nil, "git", args...); err != nil {
			return err
		}
	}
	return nil
}

// makeModule makes a small Go module, and a build cache that has all of the standard library that it needs.
func makeModule(dir, cache string) error {
	main := "package main\n\nimport (\n"
	calls := "func main() {\n"
	for i := range modulePackages {
		main += fmt.Sprintf("\t\"example.test/m/p%d\"\n", i)
		calls += fmt.Sprintf("\tp%d.Print(os.Stdout)\n", i)
	}
	if err := writeFile(filepath.Join(dir, "main.go"), []byte(main+"\t\"os\"\n)\n\n"+calls+"}\n")); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, "go.mod"), []byte("module example.test/m\n\ngo 1.21\n")); err != nil {
		return err
	}
	if err := changeModule(dir, 0); err != nil {
		return err
	}
	return host(dir, append(os.Environ(), moduleEnv(cache)...), "go", "build", "-o", "/dev/null", ".")
}

// modulePackages is how many packages the module has beside the command.
const modulePackages = 3

// changeModule changes each package of the module, so that the next build compiles all of them.
func changeModule(dir string, n int) error {
	for i := range modulePackages {
		text := fmt.Sprintf(`package p%d

import (
	"fmt"
	"io"
	"sort"
	"strings"
)

// Round changes with each build.
const Round = %d

// Print writes the words of a sentence in order.
func Print(w io.Writer) {
	words := strings.Fields("a small package that is compiled anew in round %d")
	sort.Strings(words)
	for i, word := range words {
		fmt.Fprintf(w, "%%d %%d %%s\n", Round, i, word)
	}
}
`, i, n, n)
		if err := writeFile(filepath.Join(dir, fmt.Sprintf("p%d", i), "p.go"), []byte(text)); err != nil {
			return err
		}
	}
	return nil
}

// moduleEnv is the environment of a build that uses nothing but the toolchain and this cache.
func moduleEnv(cache string) []string {
	return []string{"GOCACHE=" + cache, "GOFLAGS=-mod=mod -buildvcs=false", "GOTOOLCHAIN=local", "GOPROXY=off", "GOWORK=off", "CGO_ENABLED=0", "GOTELEMETRY=off"}
}

func writeFile(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}

// host runs a program on the host, with this process's environment where env is nil.
func host(dir string, env []string, program string, args ...string) error {
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Env = dir, env
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q: %w\n%s", program, args, err, out)
	}
	return nil
}
