package report

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Machine describes what is measured on, with the share in dir: benchstat wants such lines.
func Machine(dir string) []Subject {
	var uts unix.Utsname
	// Without a kernel's name the report is still one.
	_ = unix.Uname(&uts)
	return []Subject{
		{Name: "goos", Text: runtime.GOOS},
		{Name: "goarch", Text: runtime.GOARCH},
		{Name: "cpu", Text: fmt.Sprintf("%d × %s", runtime.NumCPU(), cpuModel())},
		{Name: "kernel", Text: unix.ByteSliceToString(uts.Release[:])},
		{Name: "filesystem", Text: fileSystem(dir)},
		{Name: "go", Text: runtime.Version()},
		{Name: "commit", Text: commit()},
		{Name: "date", Text: time.Now().UTC().Format("2006-01-02 15:04 UTC")},
	}
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, value, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

// fileSystem names the file system of dir, as /proc/self/mountinfo does.
func fileSystem(dir string) string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "unknown"
	}
	best, kind := -1, "unknown"
	for line := range strings.Lines(string(text)) {
		before, after, ok := strings.Cut(line, " - ")
		fields, more := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(more) == 0 {
			continue
		}
		point := fields[4]
		// Of mounts on one point the last is on top.
		if rel, err := filepath.Rel(point, dir); err == nil && filepath.IsLocal(rel) && len(point) >= best {
			best, kind = len(point), more[0]
		}
	}
	return kind
}

func commit() string {
	out, err := exec.Command("git", "describe", "--always", "--dirty").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out))
}

// Load is how busy the machine is: with what is measured alone it comes to about one.
func Load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(text))[:3], " ")
}
