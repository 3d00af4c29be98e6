// Package examples has programs that are sluiced with an extension more. See README.md.
package examples

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// daemons are the programs, and how many lines each may take, the imports included.
var daemons = map[string]int{"hellofs": 30, "httpfs": 59, "cryptfs": 59, "gofusefs": 59}

// TestLines counts the lines of each daemon that are neither blank nor comments. Its directory has no other code; the file
// system that it serves, in a package below, knows nothing of the daemon.
func TestLines(t *testing.T) {
	for name, limit := range daemons {
		files, err := filepath.Glob(filepath.Join(name, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		lines := 0
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.SplitSeq(string(text), "\n") {
				if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "//") {
					lines++
				}
			}
		}
		t.Logf("%s: %d lines", name, lines)
		if lines == 0 || lines > limit {
			t.Errorf("%s has %d lines of code, expected %d at most", name, lines, limit)
		}
	}
}

// TestBuild builds each daemon as the README says, and has it show its options.
func TestBuild(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command("go", "build", "-o", dir, "./...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	for name := range daemons {
		out, err := exec.Command(filepath.Join(dir, name), "--help").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--shared-dir") {
			t.Errorf("%s --help: %v, expected sluiced's\n%s", name, err, out)
		}
		_, own, has := strings.Cut(string(out), "\nOptions of the extension "+name+":\n")
		if has != (name != "hellofs") || has && !strings.HasPrefix(strings.TrimSpace(own), "--"+name+"-") {
			t.Errorf("%s --help has its own options after the others: %v, expected that of all but hellofs\n%s", name, has, out)
		}
	}
}

// TestDocumentation holds what people copy to what is tested.
func TestDocumentation(t *testing.T) {
	program, err := os.ReadFile("hellofs/main.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range []string{"README.md", "../docs/extensions.md"} {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "```go\n"+string(program)+"```\n") {
			t.Errorf("%s does not show hellofs/main.go as it is", page)
		}
	}
}

// TestOtherModule builds a program with two extensions in a module of its own, and has it list them.
func TestOtherModule(t *testing.T) {
	dir := t.TempDir()
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	sum, err := os.ReadFile("go.sum")
	if err != nil {
		t.Fatal(err)
	}
	own := strings.NewReplacer("module github.com/sluicefs/sluice/examples", "module example.org/two", "=> ../", "=> "+root).Replace(string(mod))
	for name, content := range map[string]string{"go.mod": own, "go.sum": string(sum), "main.go": twoExtensions} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("go", "build", "-o", "two", ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	out, err := exec.Command(filepath.Join(dir, "two"), "--list-extensions").CombinedOutput()
	if want := "zeta\nalpha\nmem\npassthrough\n"; err != nil || string(out) != want {
		t.Errorf("--list-extensions: %v, %q, expected %q", err, out, want)
	}
}

const twoExtensions = `package main

import (
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/daemon"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/seccomp"
)

func main() { os.Exit(daemon.Main(none("zeta"), none("alpha"))) }

type none string

func (n none) Name() string { return string(n) }

func (none) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, extensions.Options, error) {
	return nil, extensions.Options{}, nil
}

func (none) SeccompRules() seccomp.Rules { return nil }
`
