package daemon

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sluicefs/sluice/internal/config"
)

func TestLogLevelsOnStderr(t *testing.T) {
	levels := []slog.Level{config.LevelTrace, slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError}
	for name, want := range map[string]string{
		"trace": "TRACE DEBUG INFO WARN ERROR",
		"debug": "DEBUG INFO WARN ERROR",
		"info":  "INFO WARN ERROR",
		"warn":  "WARN ERROR",
		"error": "ERROR",
		"off":   "",
	} {
		var cfg config.Config
		if err := cfg.LogLevel.Set(name); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		log, closeLog, err := newLogger(cfg, &out)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range levels {
			log.Log(context.Background(), l, "message")
		}
		closeLog()
		var got []string
		for line := range strings.Lines(out.String()) {
			_, rest, _ := strings.Cut(line, "level=")
			level, _, _ := strings.Cut(rest, " ")
			got = append(got, level)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("--log-level %s: logged %q, want %s", name, got, want)
		}
	}
}

// fakeSyslog notes what would be sent, with the severity before it.
type fakeSyslog struct{ lines []string }

func (f *fakeSyslog) add(severity, text string) error {
	f.lines = append(f.lines, severity+" "+text)
	return nil
}
func (f *fakeSyslog) Debug(s string) error   { return f.add("debug", s) }
func (f *fakeSyslog) Info(s string) error    { return f.add("info", s) }
func (f *fakeSyslog) Warning(s string) error { return f.add("warning", s) }
func (f *fakeSyslog) Err(s string) error     { return f.add("err", s) }

func TestSyslogHandler(t *testing.T) {
	var to fakeSyslog
	log := slog.New(newSyslogHandler(&to, handlerOptions(config.Config{LogLevel: config.LogLevel(config.LevelTrace)})))
	log.Log(context.Background(), config.LevelTrace, "a")
	log.Debug("b")
	log.With("k", 1).Info("c", "name", "two\nlines")
	log.WithGroup("g").Warn("d", "level", "kept")
	log.Error("e")
	want := []string{
		"debug msg=a\n", "debug msg=b\n", "info msg=c k=1 name=\"two\\nlines\"\n", "warning msg=d g.level=kept\n", "err msg=e\n",
	}
	if !slices.Equal(to.lines, want) {
		t.Errorf("sent %q, want %q", to.lines, want)
	}

	// Handlers made from one share its buffer: each record must still arrive whole.
	to.lines = nil
	var wg sync.WaitGroup
	for _, name := range []string{"x", "y"} {
		wg.Go(func() {
			l := log.With("from", name)
			for range 100 {
				l.Info(name)
			}
		})
	}
	wg.Wait()
	for _, line := range to.lines {
		if line != "info msg=x from=x\n" && line != "info msg=y from=y\n" {
			t.Fatalf("sent %q", line)
		}
	}
	if len(to.lines) != 200 {
		t.Errorf("sent %d records, want 200", len(to.lines))
	}
}
