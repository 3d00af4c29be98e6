package fusebridge

import (
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicefs/sluice/extensions"
)

func TestSplit(t *testing.T) {
	for _, tt := range []struct {
		command string
		want    []string
		err     string
	}{
		{`gocryptfs -fg -passfile P CIPHER {mnt}`, []string{"gocryptfs", "-fg", "-passfile", "P", "CIPHER", "{mnt}"}, ""},
		{"  a \t b\nc  ", []string{"a", "b", "c"}, ""},
		{`'a b' "c d" e\ f g'h'"i"`, []string{"a b", "c d", "e f", "ghi"}, ""},
		{`'\' "\"\\\x$" \'`, []string{`\`, `"\\x$`, `'`}, ""},
		{`'' ""`, []string{"", ""}, ""},
		{``, nil, ""},
		{`a 'b`, nil, "without its end"},
		{`a "b\"`, nil, "without its end"},
		{`a\`, nil, "backslash"},
		{`a | b`, nil, "no shell"},
		{`a $HOME`, nil, "no shell"},
		{"a\x00", nil, "NUL"},
		{"'a\x00'", nil, "NUL"},
	} {
		got, err := split(tt.command)
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) || !slices.Equal(got, tt.want) {
			t.Errorf("%q: %q, %v; expected %q, %q", tt.command, got, err, tt.want, tt.err)
		}
	}
}

func FuzzSplit(f *testing.F) {
	for _, s := range []string{`a 'b c' "d\"e" f\ g`, `'`, `\`, `""''`, "a\tb", `x|y`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, command string) {
		words, err := split(command)
		if err != nil {
			return
		}
		// Quoted again it is the same.
		var again []string
		for _, w := range words {
			if strings.ContainsRune(w, 0) {
				t.Fatalf("%q has a NUL", w)
			}
			again = append(again, "'"+strings.ReplaceAll(w, "'", `'\''`)+"'")
		}
		got, err := split(strings.Join(again, " "))
		if err != nil || !slices.Equal(got, words) {
			t.Fatalf("%q is %q, and quoted %q, %v", command, words, got, err)
		}
	})
}

func TestParseOptions(t *testing.T) {
	const command = "command=squashfuse -f 'an image' {mnt}"
	o, err := parseOptions(extensions.Mount{Options: []string{
		command, "user=nobody", "group=12", "network", "timeout=5", "restart=1m", "env=A=b=c", "env=D=", "write=/var/x/", "dir=/var", "ids=1:2", "max-write=1048576", "lookups=announced",
	}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(o.at("/dev/fd/3"), []string{"squashfuse", "-f", "an image", "/dev/fd/3"}) || o.credential.UID == 0 || o.credential.GID != 12 ||
		!o.network || o.timeout != 5*time.Second || o.restartWait != time.Minute || !slices.Equal(o.env, []string{"A=b=c", "D="}) ||
		!slices.Equal(o.writable, []string{"/var/x"}) || o.dir != "/var" || o.owner.Uid != 1 || o.owner.Gid != 2 || o.maxWrite != 1<<20 || o.parallelLookups() {
		t.Errorf("options are %+v", o)
	}
	plain, err := parseOptions(extensions.Mount{Options: []string{command, "network=none", "ids=caller", "mount=none"}})
	if err != nil || plain.network || plain.credential != nil || plain.owner != nil || plain.private || !plain.parallelLookups() {
		t.Errorf("%+v, %v", plain, err)
	}
	for _, tt := range []struct {
		mount extensions.Mount
		want  string
	}{
		{extensions.Mount{}, "without a command"},
		{extensions.Mount{Options: []string{"command=squashfuse -f image"}}, "{mnt}"},
		{extensions.Mount{Options: []string{"command=a | {mnt}"}}, "no shell"},
		{extensions.Mount{Options: []string{command, "timeout=0"}}, "1ms"},
		{extensions.Mount{Options: []string{command, "timeout=x"}}, "1ms"},
		{extensions.Mount{Options: []string{command, "user=no-such-user-here"}}, "name or number"},
		{extensions.Mount{Options: []string{command, "group=0"}}, "without a user"},
		{extensions.Mount{Options: []string{command, "user=0", "group=no-such-group-here"}}, "name or number"},
		{extensions.Mount{Options: []string{command, "network=some"}}, "host or none"},
		{extensions.Mount{Options: []string{command, "mount=public"}}, "private"},
		{extensions.Mount{Options: []string{command, "env=A"}}, "NAME=VALUE"},
		{extensions.Mount{Options: []string{command, "write=x"}}, "absolute"},
		{extensions.Mount{Options: []string{command, "ids=4294967295:0"}}, "UID:GID"},
		{extensions.Mount{Options: []string{command, "max-write=5000"}}, "multiple"},
		{extensions.Mount{Options: []string{command, "lookups=many"}}, "announced"},
		{extensions.Mount{Options: []string{command, "sandbox=none", "mount=private"}}, "mount namespace"},
		{extensions.Mount{Options: []string{command, "mount=private", "ids=root"}}, "kernel"},
		{extensions.Mount{Options: []string{command, "other"}}, "expected command"},
		{extensions.Mount{Options: []string{command}, Source: "/x"}, "source"},
	} {
		if _, err := parseOptions(tt.mount); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, expected %q", tt.mount.Options, err, tt.want)
		}
	}
}

// TestHiddenInTmp warns of an image in /tmp where the program is given an empty one.
func TestHiddenInTmp(t *testing.T) {
	f, err := os.CreateTemp("/tmp", "sluice-fusebridge-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	for _, tt := range []struct {
		name     string
		options  []string
		readOnly bool
		warned   bool
	}{
		{"read-only", nil, true, true},
		{"with write=", []string{"write=/var"}, false, true},
		{"with write= in /tmp", []string{"write=/tmp/x"}, true, false},
		{"writable", nil, false, false},
		{"unconfined", []string{"sandbox=none"}, true, false},
	} {
		o, err := parseOptions(extensions.Mount{Options: append([]string{"command=p -o image=" + f.Name() + ",x=/tmp/not/there {mnt}"}, tt.options...)})
		if err != nil {
			t.Fatal(err)
		}
		var log strings.Builder
		o.config(slog.New(slog.NewTextHandler(&log, nil)), tt.readOnly)
		if got := strings.Count(log.String(), "path="+f.Name()); got > 1 || got == 1 != tt.warned || strings.Contains(log.String(), "not/there") {
			t.Errorf("%s: the log says %q, expected a warning: %v", tt.name, log.String(), tt.warned)
		}
	}
}
