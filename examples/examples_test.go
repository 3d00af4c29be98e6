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
