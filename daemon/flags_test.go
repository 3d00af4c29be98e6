package daemon

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/extensions/builtin"
	"github.com/sluicefs/sluice/internal/config"
)

// virtiofsdOptions is everything that virtiofsd 1.14 --help lists; single letters are -o, -d and -f.
var virtiofsdOptions = []string{
	"shared-dir", "tag", "socket-path", "socket", "socket-group", "fd", "thread-pool-size", "xattr", "posix-acl", "xattrmap",
	"sandbox", "readonly", "seccomp", "announce-submounts", "no-announce-submounts", "inode-file-handles", "cache",
	"allow-mmap", "no-readdirplus", "writeback", "allow-direct-io", "print-capabilities", "modcaps", "log-level", "syslog",
	"rlimit-nofile", "killpriv-v2", "no-killpriv-v2", "security-label", "uid-map", "gid-map", "translate-uid",
	"translate-gid", "preserve-noatime", "migration-mode", "migration-on-error", "migration-verify-handles",
	"migration-confirm-paths", "o", "d", "f", "help", "version",
}

// ourOptions are those that virtiofsd does not have.
var ourOptions = []string{
	"bundle", "spec", "backend", "list-extensions", "persist", "num-request-queues", "max-fds", "max-inodes", "posix-lock", "flock",
	"no-open", "poll-us", "state-dir", "plugin",
	"seccomp-report", "cpu-profile", "config", "check-config", "share", "control-socket", "control-group", "allow-extension",
}

func TestVirtiofsdOptions(t *testing.T) {
	known := []string{"print-capabilities", "help", "version"}
	for _, o := range options {
		if !slices.Contains(ourOptions, o.name) {
			known = append(known, o.name)
		}
	}
	for i := range settledOptions {
		s := &settledOptions[i]
		known = append(known, s.name)
		if s.reason == "" {
			t.Errorf("%s has no reason", s.spelled())
		}
	}
	slices.Sort(known)
	want := slices.Clone(virtiofsdOptions)
	slices.Sort(want)
	if !slices.Equal(known, want) {
		t.Errorf("known options of virtiofsd:\n%q, want\n%q", known, want)
	}
}

// TestSettledOptions runs every option that sets nothing: it is refused in one line that names it, or means what happens
// anyway.
func TestSettledOptions(t *testing.T) {
	parse := func(args ...string) (parsed bool, err error) {
		cfg := config.Default()
		cmd := newCommand(&cfg, nil, func(*pflag.FlagSet) error { parsed = true; return nil })
		cmd.SetArgs(args)
		cmd.SetOut(io.Discard)
		return parsed, cmd.Execute()
	}
	for i := range settledOptions {
		s := &settledOptions[i]
		for _, args := range [][]string{{s.spelled()}, {s.spelled(), "value"}, {s.spelled() + "=value"}} {
			if s.same == bare && args[0] == s.spelled() {
				continue
			}
			parsed, err := parse(args...)
			if err == nil || parsed {
				t.Errorf("%q is accepted", args)
				continue
			}
			if text := err.Error(); !strings.HasPrefix(text, s.spelled()+" is not done yet: ") || strings.Contains(text, "\n") {
				t.Errorf("%q: %q does not say, in one line, that it is not done", args, text)
			}
			if _, ok := err.(usageError); !ok {
				t.Errorf("%q: a %T, want a usageError", args, err)
			}
		}
		if s.same != "" {
			arg := s.spelled()
			if s.same != bare {
				arg += "=" + s.same
			}
			if parsed, err := parse(arg); err != nil || !parsed {
				t.Errorf("%s: %v, want it accepted", arg, err)
			}
		}
	}
}

// TestOptionsMatchConfig holds each field of the configuration against exactly one option.
func TestOptionsMatchConfig(t *testing.T) {
	var cfg config.Config
	fields := make(map[any]string)
	var walk func(v reflect.Value, name string)
	walk = func(v reflect.Value, name string) {
		if v.Kind() == reflect.Struct {
			for i := range v.NumField() {
				walk(v.Field(i), name+"."+v.Type().Field(i).Name)
			}
			return
		}
		fields[v.Addr().Interface()] = name
	}
	walk(reflect.ValueOf(&cfg).Elem(), "Config")
	delete(fields, &cfg.Keeper) // set by the daemon itself
	if len(fields) == 0 {
		t.Fatal("the configuration has no fields")
	}
	for _, o := range options {
		p := o.field(&cfg)
		if fields[p] == "" {
			t.Errorf("--%s sets no field, or one that another option sets", o.name)
		}
		delete(fields, p)
	}
	for _, name := range fields {
		t.Errorf("no option sets %s", name)
	}
}

// TestOptionsSet gives every option a value other than the default and looks for the change.
func TestOptionsSet(t *testing.T) {
	values := map[string]string{"cache": "always", "sandbox": "none", "seccomp": "none", "log-level": "trace", "poll-us": "50"}
	for _, o := range options {
		cfg, def := config.Default(), config.Default()
		arg := "--" + o.name
		switch o.field(&cfg).(type) {
		case *bool:
		case *string, *[]string:
			arg += "=text"
		case *int, *int64:
			arg += "=77"
		default:
			arg += "=" + values[o.name]
		}
		cmd := newCommand(&cfg, nil, func(*pflag.FlagSet) error { return nil })
		cmd.SetArgs([]string{arg})
		if err := cmd.Execute(); err != nil {
			t.Errorf("%s: %v", arg, err)
		}
		if reflect.DeepEqual(cfg, def) {
			t.Errorf("%s changes nothing", arg)
		}
	}
}

// TestGenerated compares what go generate makes with what is checked in.
func TestGenerated(t *testing.T) {
	for _, tt := range []struct {
		path string
		args []string
	}{
		{"../docs/man/sluiced.1", []string{"man"}},
		{"../contrib/completions/sluiced.bash", []string{"completion", "bash"}},
		{"../contrib/completions/_sluiced", []string{"completion", "zsh"}},
		{"../contrib/completions/sluiced.fish", []string{"completion", "fish"}},
	} {
		want, err := os.ReadFile(tt.path)
		if err != nil {
			t.Error(err)
			continue
		}
		var out, errOut bytes.Buffer
		registry, err := extensions.NewRegistry(builtin.All()...)
		if err != nil {
			t.Fatal(err)
		}
		p := program{stdio: stdio{out: &out, err: &errOut}, registry: registry}
		if status := p.run(t.Context(), tt.args); status != exitOK {
			t.Errorf("%q: exit status %d: %s", tt.args, status, errOut.String())
		}
		if !bytes.Equal(out.Bytes(), want) {
			t.Errorf("%s is not what the options say: run go generate ./cmd/sluiced", tt.path)
		}
	}
}

// TestDocumented looks for every option in the compatibility page.
func TestDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, o := range options {
		names = append(names, "--"+o.name)
	}
	for i := range settledOptions {
		names = append(names, settledOptions[i].spelled())
	}
	for _, name := range append(names, "--print-capabilities", "--help", "--version") {
		if !bytes.Contains(page, []byte("`"+name+"`")) && !bytes.Contains(page, []byte("`"+name+" ")) {
			t.Errorf("docs/compatibility.md does not mention %s", name)
		}
	}
}

// TestDiscoveryFile holds the promise of the discovery file against that of --print-capabilities.
func TestDiscoveryFile(t *testing.T) {
	text, err := os.ReadFile("../contrib/vhost-user/50-sluiced.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Type, Binary string
		Features     []string
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	if file.Type != "fs" || file.Binary != "/usr/bin/sluiced" || !slices.Equal(file.Features, capabilities) {
		t.Errorf("it says %+v, want features %q", file, capabilities)
	}
}
