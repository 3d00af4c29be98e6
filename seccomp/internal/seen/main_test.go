package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMerge(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"a+none.1.txt": "allow  read    any arguments                  base         12\n" +
			"allow  tgkill  arg0 & 0xffffffff == 0x17      base         1\n" +
			"allow  fsync   any arguments                  passthrough  0\n",
		"b+none.1.txt": "refuse  socket  (none)  1\nrefuse  openat  keeper  1\nallow  read  any arguments  base  1\nallow  connect  any arguments  http  1\n",
		"b+none.2.txt": "allow  tgkill  arg0 & 0xffffffff == 0x2  base  7\n",
		"c+none.1.txt": "",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "seen")
	if err := merge(dir, file); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	const want = "# Which rules the guest and escape tests have needed, and where: `make seccomp-seen`. TestBaseIsWhatWasSeen reads it.\n" +
		"base     read    any arguments             a+none,b+none\n" +
		"base     tgkill  arg0 & 0xffffffff == PID  a+none,b+none\n" +
		"refused  socket  (none)                    b+none\n"
	if string(got) != want {
		t.Errorf("merged:\n%s\nwant:\n%s", got, want)
	}
}

func TestMergeRefuses(t *testing.T) {
	dir := t.TempDir()
	if err := merge(dir, filepath.Join(dir, "seen")); err == nil {
		t.Error("no report is no error")
	}
	if err := os.WriteFile(filepath.Join(dir, "a.txt"), []byte("something else\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := merge(dir, filepath.Join(dir, "seen")); err == nil {
		t.Error("a text that is no report is no error")
	}
}
