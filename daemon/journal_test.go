package daemon

import (
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/internal/listen"
)

// leave leaves a socket behind that nobody listens on.
func leave(t *testing.T, path string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestJournal(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c[1].shares") // no pattern
	var j journal
	if err := j.add("/s"); err != nil { // before it is open it keeps nothing
		t.Fatal(err)
	}
	if err := j.open(path, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		err  error
		want string
	}{
		{j.add("/b"), `["/b"]`}, {j.add("/a"), `["/a","/b"]`}, {j.drop("/b"), `["/a"]`}, {j.drop("/b"), `["/a"]`},
	} {
		if step.err != nil {
			t.Error(step.err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != `["/a"]` {
		t.Errorf("%s, %v", got, err)
	}
	// What cannot be noted is not to be made, and what was noted stays.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := j.add("/c"); err == nil || !strings.Contains(err.Error(), "note the sockets") {
		t.Errorf("a journal that cannot be written: %v", err)
	}
	if j.sockets["/c"] || !j.sockets["/a"] {
		t.Errorf("noted: %v", j.sockets)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := j.drop("/a"); err != nil {
		t.Fatal(err)
	}
	if err := j.close(); err != nil {
		t.Error(err)
	}
	if err := j.close(); err != nil {
		t.Error(err)
	}
	if got := entries(t, dir); len(got) != 0 {
		t.Errorf("%q are left", got)
	}
}

// TestJournalStays for the next daemon if a socket could not be removed.
func TestJournalStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.shares")
	var j journal
	if err := j.open(path, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if err := j.add("/s"); err != nil {
		t.Fatal(err)
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
	if got, err := readJournal(path); err != nil || !slices.Equal(got, []string{"/s"}) {
		t.Errorf("%q, %v", got, err)
	}
}

// TestJournalCleans what a daemon that was killed left behind, wherever that was.
func TestJournalCleans(t *testing.T) {
	for _, tt := range []struct {
		name    string
		journal string // with DIR for the directory; "" is none
		log     string // "" if nothing is to be said
		stay    []string
	}{
		{"no journal", "", "", []string{"dead", "dead.pid", "file", "foreign", "half", "half.pid", "held", "held.pid"}},
		{"garbage", `["DIR/dead`, "sockets of an earlier daemon may be left", []string{"dead", "dead.pid", "file", "foreign", "half", "half.pid", "held", "held.pid"}},
		{"another type", `{"a": 1}`, "sockets of an earlier daemon may be left", []string{"dead", "dead.pid", "file", "foreign", "half", "half.pid", "held", "held.pid"}},
		{"dead", `["DIR/dead"]`, "", []string{"file", "foreign", "half", "half.pid", "held", "held.pid"}},
		{"killed before the socket was there", `["DIR/half"]`, "", []string{"dead", "dead.pid", "file", "foreign", "held", "held.pid"}},
		{"killed before anything was", `["DIR/nothing"]`, "", []string{"dead", "dead.pid", "file", "foreign", "half", "half.pid", "held", "held.pid"}},
		{"its directory is gone", `["DIR/none/s"]`, "", []string{"dead", "dead.pid", "file", "foreign", "half", "half.pid", "held", "held.pid"}},
		{"no socket", `["DIR/file"]`, "is not a socket", []string{"dead", "dead.pid", "file", "foreign", "half", "half.pid", "held", "held.pid"}},
		{"another daemon's", `["DIR/held", "DIR/dead"]`, "one socket path serves one daemon", []string{"file", "foreign", "half", "half.pid", "held", "held.pid"}},
		{"another program's", `["DIR/foreign"]`, "somebody else listens", []string{"dead", "dead.pid", "file", "foreign", "half", "half.pid", "held", "held.pid"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			leave(t, filepath.Join(dir, "dead"))
			foreign, err := net.Listen("unix", filepath.Join(dir, "foreign"))
			if err != nil {
				t.Fatal(err)
			}
			defer foreign.Close()
			held, err := listen.Path(filepath.Join(dir, "held"), "")
			if err != nil {
				t.Fatal(err)
			}
			defer held.Close()
			for _, name := range []string{"dead.pid", "half.pid", "file", "c.shares.half-123"} {
				if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			leave(t, filepath.Join(dir, "half"))
			if tt.name == "killed before the socket was there" {
				if err := os.Remove(filepath.Join(dir, "half")); err != nil {
					t.Fatal(err)
				}
			}
			path := filepath.Join(dir, "c.shares")
			if tt.journal != "" {
				if err := os.WriteFile(path, []byte(strings.ReplaceAll(tt.journal, "DIR", dir)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var said strings.Builder
			var j journal
			if err := j.open(path, slog.New(slog.NewTextHandler(&said, nil))); err != nil {
				t.Fatal(err)
			}
			if tt.log == "" && said.Len() > 0 || !strings.Contains(said.String(), tt.log) {
				t.Errorf("it said %q, expected %q", said.String(), tt.log)
			}
			if err := j.close(); err != nil {
				t.Error(err)
			}
			if got := entries(t, dir); !slices.Equal(got, tt.stay) {
				t.Errorf("%q are left, expected\n%q", got, tt.stay)
			}
		})
	}
}
