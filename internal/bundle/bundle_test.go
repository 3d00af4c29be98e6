package bundle

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLoad(t *testing.T) {
	const minimal = `{"ociVersion": "1.0.0"}`
	for _, tt := range []struct {
		name, config string
		want         []string // of the error
	}{
		{"minimal", minimal, nil},
		{"candidate", `{"ociVersion": "1.0.2-rc.1"}`, nil},
		{"unknown fields", `{"ociVersion": "1.9.0", "new": {"in": "1.9"}}`, nil},
		{"largest", minimal + strings.Repeat(" ", MaxConfig-len(minimal)), nil},
		{"too large", minimal + strings.Repeat(" ", MaxConfig-len(minimal)+1), []string{"larger than 16 MiB"}},
		{"empty", "", []string{":1:1: unexpected end"}},
		{"cut off", "{\n\"ociVersion\": \"1.0.0\"", []string{":2:21: unexpected end"}},
		{"syntax", "{\n\t\"ociVersion\": \"1.0.0\",\n\t\"root\": oops\n}", []string{":3:10: invalid character 'o'"}},
		{"two documents", minimal + "\n" + minimal, []string{":2:1: invalid character '{'"}},
		{"type", "{\n\t\"ociVersion\": \"1.0.0\",\n\t\"mounts\": {}\n}", []string{":3:", "mounts is a JSON object", "[]specs.Mount"}},
		{"number too large", `{"ociVersion": "1.0.0", "linux": {"uidMappings": [{"size": 4294967296}]}}`, []string{":1:", "linux.uidMappings", "number 4294967296", "uint32"}},
		{"list", "[]", []string{":1:1: it is a JSON array"}},
		{"null", "null", []string{"ociVersion is missing"}},
		{"no version", `{"root": {"path": "rootfs"}}`, []string{"ociVersion is missing"}},
		{"version 0", `{"ociVersion": "0.5.0"}`, []string{`"0.5.0"`, "1.0.0 or later"}},
		{"version 2", `{"ociVersion": "2.0.0"}`, []string{`"2.0.0"`}},
		{"version 10", `{"ociVersion": "10.0.0"}`, []string{`"10.0.0"`}},
		{"half a version", `{"ociVersion": "1.0"}`, []string{`"1.0"`}},
		{"not UTF-8", "{\"ociVersion\": \"1.0.0\",\n\"hostname\": \"\u00e9\ufffd\xff\"}", []string{":2:19: not UTF-8"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, ConfigFile)
			if err := os.WriteFile(file, []byte(tt.config), 0o644); err != nil {
				t.Fatal(err)
			}
			b, err := Load(dir, "")
			wantError(t, err, tt.want...)
			if err != nil {
				wantError(t, err, file)
				return
			}
			if b.Dir != dir || b.Spec.Version == "" {
				t.Errorf("bundle %+v of %s", b, dir)
			}
		})
	}
}

func TestLoadSpecFile(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "other.json"), []byte(`{"ociVersion": "1.0.0"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	b, err := Load("", "other.json")
	if err != nil {
		t.Fatal(err)
	}
	if !filepath.IsAbs(b.Dir) || filepath.Base(b.Dir) != filepath.Base(dir) {
		t.Errorf("directory %q, want %q", b.Dir, dir)
	}
}

func TestLoadRefusesFiles(t *testing.T) {
	dir := t.TempDir()
	_, err := Load("", "")
	wantError(t, err, "neither")
	_, err = Load(dir, "x")
	wantError(t, err, "exclude each other")
	_, err = Load(dir, "")
	wantError(t, err, filepath.Join(dir, ConfigFile), "no such file")
	_, err = Load("", dir)
	wantError(t, err, dir, "not a regular file")
	// Nobody writes to it: whoever opened it the plain way would wait.
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Load("", fifo)
	wantError(t, err, fifo, "not a regular file")
}

func TestPosition(t *testing.T) {
	data := []byte("ab\n\ncd")
	for offset, want := range map[int]string{-1: "1:1", 0: "1:1", 1: "1:2", 2: "1:3", 3: "2:1", 4: "3:1", 5: "3:2", 6: "3:3", 99: "3:3"} {
		if got := position(data, offset); got != want {
			t.Errorf("position(%d) = %s, want %s", offset, got, want)
		}
	}
}

func TestFromDir(t *testing.T) {
	host := makeHost(t)
	t.Chdir(host)
	for _, dir := range []string{filepath.Join(host, "pod"), "pod"} {
		plan, err := FromDir(dir, true).Plan()
		if err != nil {
			t.Fatal(err)
		}
		r := plan.Root
		if filepath.Base(r.Source) != "pod" || !filepath.IsAbs(r.Source) || r.Path != "/" || r.Kind != Dir || !r.ReadOnly || r.Spec != nil || r.UIDMap != nil {
			t.Errorf("root of %s: %+v", dir, r)
		}
		if len(plan.Mounts)+len(plan.Notes)+len(plan.Options) != 0 {
			t.Errorf("plan of %s: %+v", dir, plan)
		}
	}
	for _, dir := range []string{"", "absent", "pod/hosts"} {
		if _, err := FromDir(dir, false).Plan(); err == nil {
			t.Errorf("%q passes as a directory", dir)
		}
	}
	b := FromDir("pod\xff", false)
	if b.Spec.Root.Path != "pod\xff" || b.Dir != "" || !strings.HasPrefix(b.Spec.Version, "1.") {
		t.Errorf("bundle %+v", b)
	}
}
