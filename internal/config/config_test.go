package config

import (
	"log/slog"
	"strings"
	"testing"
)

// served returns the smallest configuration that is valid.
func served() Config {
	c := Default()
	c.Share.Dir = "/srv"
	c.SocketPath = "/run/s"
	return c
}

func TestValidate(t *testing.T) {
	c := served()
	if err := c.Validate(); err != nil {
		t.Fatalf("a minimal configuration: %v", err)
	}
	for _, tt := range []struct {
		name   string
		change func(*Config)
		want   string // "" is no error
	}{
		{"inherited socket", func(c *Config) { c.SocketPath, c.FD = "", 3 }, ""},
		{"no socket", func(c *Config) { c.SocketPath = "" }, ""},
		{"longest socket path", func(c *Config) { c.SocketPath = strings.Repeat("s", MaxSocketPath) }, ""},
		{"longest tag", func(c *Config) { c.Share.Tag = strings.Repeat("t", MaxTag) }, ""},
		{"most queues", func(c *Config) { c.RequestQueues = MaxRequestQueues }, ""},
		{"limit left alone", func(c *Config) { c.RlimitNofile = 0 }, ""},

		{"two sockets", func(c *Config) { c.FD = 3 }, "--fd and --socket-path"},
		{"group of an fd", func(c *Config) { c.SocketPath, c.FD, c.SocketGroup = "", 3, "kvm" }, "--fd and --socket-group"},
		{"group of nothing", func(c *Config) { c.SocketPath, c.SocketGroup = "", "kvm" }, "--socket-group needs"},
		{"negative fd", func(c *Config) { c.SocketPath, c.FD = "", -2 }, "--fd: -2"},
		{"standard error", func(c *Config) { c.SocketPath, c.FD = "", 2 }, "--fd: 2"},
		{"long socket path", func(c *Config) { c.SocketPath = strings.Repeat("s", MaxSocketPath+1) }, "--socket-path: 108 bytes"},
		{"no queue", func(c *Config) { c.RequestQueues = 0 }, "--num-request-queues: 0"},
		{"too many queues", func(c *Config) { c.RequestQueues = MaxRequestQueues + 1 }, "--num-request-queues: 256"},
		{"negative limit", func(c *Config) { c.RlimitNofile = -2 }, "--rlimit-nofile: -2"},
		{"report", func(c *Config) { c.Seccomp, c.SeccompReport = SeccompLog, "r" }, ""},
		{"trace", func(c *Config) { c.Seccomp, c.SeccompReport = SeccompTrace, "r" }, ""},
		{"trace without a report", func(c *Config) { c.Seccomp = SeccompTrace }, "--seccomp trace needs"},
		{"report of nothing", func(c *Config) { c.SeccompReport = "r" }, "--seccomp-report needs"},
		{"bundle", func(c *Config) { c.Share.Dir, c.Bundle = "", "/b" }, ""},
		{"spec", func(c *Config) { c.Share.Dir, c.Spec = "", "/b/config.json" }, ""},
		{"id maps", func(c *Config) { c.UIDMap = []string{":0:1000:1:"} }, ""},
		{"two sources", func(c *Config) { c.Bundle = "/b" }, "--shared-dir and --bundle exclude"},
		{"id maps without a namespace", func(c *Config) { c.GIDMap, c.Sandbox = []string{":0:1000:1:"}, SandboxNone }, "--uid-map and --gid-map"},
		{"no directory", func(c *Config) { c.Share.Dir = "" }, "--shared-dir is needed"},
		{"long tag", func(c *Config) { c.Share.Tag = strings.Repeat("t", MaxTag+1) }, "--tag: 37 bytes"},
		{"tag not UTF-8", func(c *Config) { c.Share.Tag = "\xff" }, "--tag: not UTF-8"},
		{"no open", func(c *Config) { c.Share.NoOpen, c.Share.ReadOnly, c.Share.Cache = true, true, CacheAlways }, ""},
		{"no open, and changes", func(c *Config) { c.Share.NoOpen, c.Share.Cache = true, CacheAlways }, "--no-open needs"},
		{"no open, and others change", func(c *Config) { c.Share.NoOpen, c.Share.ReadOnly = true, true }, "--no-open needs"},
		{"no open, and locks", func(c *Config) {
			c.Share.NoOpen, c.Share.ReadOnly, c.Share.Cache, c.Share.Flock = true, true, CacheAlways, true
		}, "--no-open excludes"},
		{"no open, and orders", func(c *Config) {
			c.Share.NoOpen, c.Share.ReadOnly, c.Share.Cache, c.ControlSocket = true, true, CacheAlways, "/run/c"
		}, "--no-open is for"},
		{"negative fds", func(c *Config) { c.Share.MaxFDs = -1 }, "--max-fds: -1"},
		{"negative inodes", func(c *Config) { c.Share.MaxInodes = -1 }, "--max-inodes: -1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := served()
			tt.change(&c)
			err := c.Validate()
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tt.want != "" && err == nil:
				t.Error("accepted")
			case tt.want != "" && !strings.Contains(err.Error(), tt.want):
				t.Errorf("%q does not contain %q", err, tt.want)
			}
		})
	}
}

func TestEnums(t *testing.T) {
	type value interface {
		String() string
		Set(string) error
		Choices() []string
	}
	for _, tt := range []struct {
		v       value
		bad     string
		badText string
	}{
		{new(CachePolicy), "foo", `"foo" is not a cache policy; expected one of never, metadata, auto, always`},
		{new(Sandbox), "foo", `"foo" is not a sandbox; expected one of namespace, chroot, none`},
		{new(Seccomp), "foo", `"foo" is not a seccomp action; expected one of kill, trap, log, trace, none, dump`},
		{new(LogLevel), "", `"" is not a log level; expected one of error, warn, info, debug, trace, off`},
	} {
		for _, name := range tt.v.Choices() {
			if err := tt.v.Set(strings.ToUpper(name)); err != nil {
				t.Errorf("%T: %v", tt.v, err)
			} else if got := tt.v.String(); got != name {
				t.Errorf("%T: set to %s, reads %s", tt.v, name, got)
			}
		}
		before := tt.v.String()
		if err := tt.v.Set(tt.bad); err == nil || err.Error() != tt.badText {
			t.Errorf("%T.Set(%q) = %v, want %s", tt.v, tt.bad, err, tt.badText)
		}
		if tt.v.String() != before {
			t.Errorf("%T: a refused value changed it to %s", tt.v, tt.v)
		}
	}
}

func TestLogLevels(t *testing.T) {
	var zero LogLevel
	if zero.String() != "info" || zero.Level() != slog.LevelInfo {
		t.Errorf("the zero level is %s (%d), want info", zero, zero.Level())
	}
	if LevelTrace >= slog.LevelDebug {
		t.Errorf("trace (%d) is not below debug (%d)", LevelTrace, slog.LevelDebug)
	}
}
