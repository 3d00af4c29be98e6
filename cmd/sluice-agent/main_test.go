package main

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// maxSize is what the program may be, in bytes: it is put into guests that are small.
const maxSize = 4 << 20

// TestProgram builds the program as it is shipped, and calls it.
func TestProgram(t *testing.T) {
	program := filepath.Join(t.TempDir(), "sluice-agent")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	info, err := os.Stat(program)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes", info.Size())
	if info.Size() >= maxSize {
		t.Errorf("%d bytes, want less than %d", info.Size(), maxSize)
	}
	file, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if libraries, err := file.ImportedLibraries(); err != nil || len(libraries) > 0 {
		t.Errorf("it needs the libraries %q: %v", libraries, err)
	}
	dir := t.TempDir()
	for _, tt := range []struct {
		args   string
		status int
		says   string
	}{
		{"--help", exitOK, "Usage: sluice-agent --mount DIR"},
		{"--version", exitOK, "sluice-agent "},
		{"", exitUsage, "--mount is missing"},
		{"--mount /mnt", exitUsage, "--connect is missing"},
		{"--mount /mnt --connect tcp:1", exitUsage, "expected vsock:CID:PORT, unix:PATH or stdin"},
		{"--mount /mnt --connect stdin extra", exitUsage, `unexpected argument "extra"`},
		{"--bad", exitUsage, "-bad"},
		{"--connect stdin --mount " + dir + "/none", exitFailed, "no such file or directory"},
		{"--connect stdin --mount " + dir, exitFailed, "no virtio-fs is mounted there"},
	} {
		cmd := exec.Command(program, strings.Fields(tt.args)...)
		out, _ := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != tt.status || !strings.Contains(string(out), tt.says) {
			t.Errorf("%s: status %d, %q; want %d, %q", tt.args, got, out, tt.status, tt.says)
		}
		if tt.status == exitUsage && !strings.Contains(string(out), "see sluice-agent --help") {
			t.Errorf("%s: %q does not lead to the help", tt.args, out)
		}
	}
}

func TestUnescape(t *testing.T) {
	if got := unescape(`a\040b\011c\134040`); got != "a b\tc\\040" {
		t.Errorf("%q", got)
	}
}
