package config

import (
	"fmt"
	"log/slog"
	"strings"
)

// CachePolicy says how long the guest may trust what it has cached of a share. The timeouts are those of virtiofsd.
type CachePolicy uint8

const (
	// CacheAuto lets attributes and names be trusted for a second, and data until the file is opened again.
	CacheAuto CachePolicy = iota
	// CacheNever has the guest ask every time and never keep data.
	CacheNever
	// CacheMetadata keeps attributes, names and listings for a day, and data never.
	CacheMetadata
	// CacheAlways keeps everything for a day: nobody but this guest changes the files.
	CacheAlways
)

// Sandbox is what the daemon locks itself into.
type Sandbox uint8

const (
	// SandboxNamespace serves from namespaces in which there is nothing but what is shared.
	SandboxNamespace Sandbox = iota
	// SandboxChroot serves with the shared directory as the root directory.
	SandboxChroot
	// SandboxNone serves from the daemon's own surroundings.
	SandboxNone
)

// Seccomp is what happens to a system call that the daemon does not need.
type Seccomp uint8

const (
	// SeccompKill logs the call and ends the process before it is made.
	SeccompKill Seccomp = iota
	// SeccompTrap is SeccompKill with a traceback.
	SeccompTrap
	// SeccompLog logs, counts and lets it pass.
	SeccompLog
	// SeccompTrace is SeccompLog that counts what is allowed as well, and reports instead of logging.
	SeccompTrace
	// SeccompNone installs no filter.
	SeccompNone
	// SeccompDump prints the filter instead of serving.
	SeccompDump
)

// LogLevel is the least severe level that is logged; the zero value is info.
type LogLevel slog.Level

const (
	// LevelTrace is below debug: each request.
	LevelTrace = slog.LevelDebug - 4
	// levelOff is above everything that is logged.
	levelOff = slog.Level(1 << 10)
)

// Level implements slog.Leveler.
func (l LogLevel) Level() slog.Level { return slog.Level(l) }

// choice is one spelling of an enumeration.
type choice[T comparable] struct {
	name  string
	value T
}

// An enum is the set of spellings of an option's values, in the order they are shown in.
type enum[T comparable] struct {
	// noun finishes the sentence `"foo" is not …`.
	noun    string
	choices []choice[T]
}

var (
	cachePolicies = enum[CachePolicy]{"a cache policy", []choice[CachePolicy]{
		{name: "never", value: CacheNever},
		{name: "metadata", value: CacheMetadata},
		{name: "auto", value: CacheAuto},
		{name: "always", value: CacheAlways},
	}}
	sandboxes = enum[Sandbox]{"a sandbox", []choice[Sandbox]{
		{name: "namespace", value: SandboxNamespace},
		{name: "chroot", value: SandboxChroot},
		{name: "none", value: SandboxNone},
	}}
	seccomps = enum[Seccomp]{"a seccomp action", []choice[Seccomp]{
		{name: "kill", value: SeccompKill},
		{name: "trap", value: SeccompTrap},
		{name: "log", value: SeccompLog},
		{name: "trace", value: SeccompTrace},
		{name: "none", value: SeccompNone},
		{name: "dump", value: SeccompDump},
	}}
	logLevels = enum[LogLevel]{"a log level", []choice[LogLevel]{
		{name: "error", value: LogLevel(slog.LevelError)},
		{name: "warn", value: LogLevel(slog.LevelWarn)},
		{name: "info", value: LogLevel(slog.LevelInfo)},
		{name: "debug", value: LogLevel(slog.LevelDebug)},
		{name: "trace", value: LogLevel(LevelTrace)},
		{name: "off", value: LogLevel(levelOff)},
	}}
)

// parse finds the choice spelled s, in any case.
func (e enum[T]) parse(s string) (T, error) {
	for _, c := range e.choices {
		if strings.EqualFold(s, c.name) {
			return c.value, nil
		}
	}
	var zero T
	return zero, fmt.Errorf("%q is not %s; expected one of %s", s, e.noun, strings.Join(e.names(), ", "))
}

// names lists the spellings.
func (e enum[T]) names() []string {
	var names []string
	for _, c := range e.choices {
		names = append(names, c.name)
	}
	return names
}

// name returns the spelling of v, "" for a value without one.
func (e enum[T]) name(v T) string {
	for _, c := range e.choices {
		if c.value == v {
			return c.name
		}
	}
	return ""
}

// set is parse for the Set method of a flag: a value that is refused changes nothing.
func (e enum[T]) set(to *T, s string) error {
	v, err := e.parse(s)
	if err == nil {
		*to = v
	}
	return err
}

// String, Set and Type make each enumeration a flag value (pflag.Value); Choices lists what Set takes.

func (c CachePolicy) String() string      { return cachePolicies.name(c) }
func (c *CachePolicy) Set(s string) error { return cachePolicies.set(c, s) }

// Type implements pflag.Value.
func (CachePolicy) Type() string { return "policy" }

// Choices lists what Set takes.
func (CachePolicy) Choices() []string { return cachePolicies.names() }

func (s Sandbox) String() string      { return sandboxes.name(s) }
func (s *Sandbox) Set(v string) error { return sandboxes.set(s, v) }

// Type implements pflag.Value.
func (Sandbox) Type() string { return "mode" }

// Choices lists what Set takes.
func (Sandbox) Choices() []string { return sandboxes.names() }

func (s Seccomp) String() string      { return seccomps.name(s) }
func (s *Seccomp) Set(v string) error { return seccomps.set(s, v) }

// Type implements pflag.Value.
func (Seccomp) Type() string { return "action" }

// Choices lists what Set takes.
func (Seccomp) Choices() []string { return seccomps.names() }

func (l LogLevel) String() string      { return logLevels.name(l) }
func (l *LogLevel) Set(v string) error { return logLevels.set(l, v) }

// Type implements pflag.Value.
func (LogLevel) Type() string { return "level" }

// Choices lists what Set takes.
func (LogLevel) Choices() []string { return logLevels.names() }
