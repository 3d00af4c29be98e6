package daemon

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"sync"

	"github.com/sluicefs/sluice/internal/config"
)

// newLogger logs to stderr, or to syslog, as cfg asks. The function it returns gives up the connection to syslog.
func newLogger(cfg config.Config, stderr io.Writer) (*slog.Logger, func(), error) {
	if !cfg.Syslog {
		return slog.New(slog.NewTextHandler(stderr, handlerOptions(cfg))), func() {}, nil
	}
	w, err := syslog.New(syslog.LOG_USER|syslog.LOG_INFO, "sluiced")
	if err != nil {
		return nil, nil, fmt.Errorf("--syslog: connect to the syslog socket: %w", err)
	}
	return slog.New(newSyslogHandler(w, handlerOptions(cfg))), func() { _ = w.Close() }, nil
}

// handlerOptions sets the level, and gives trace the name that slog does not have.
func handlerOptions(cfg config.Config) *slog.HandlerOptions {
	return &slog.HandlerOptions{
		Level: cfg.LogLevel,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.LevelKey && a.Value.Any() == config.LevelTrace {
				a.Value = slog.StringValue("TRACE")
			}
			return a
		},
	}
}

// syslogWriter is the part of *syslog.Writer that a record needs: one method for each severity.
type syslogWriter interface {
	Debug(string) error
	Info(string) error
	Warning(string) error
	Err(string) error
}

// syslogHandler formats with a slog.TextHandler, less what syslog adds itself, and sends each record with its severity.
type syslogHandler struct {
	text slog.Handler // writes to line.buf
	line *syslogLine
}

// syslogLine is the record being formatted, shared by every handler made from one.
type syslogLine struct {
	mu  sync.Mutex
	buf bytes.Buffer // protected by mu
	to  syslogWriter
}

func newSyslogHandler(w syslogWriter, opts *slog.HandlerOptions) slog.Handler {
	line := &syslogLine{to: w}
	opts.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{}
		}
		return a
	}
	return syslogHandler{text: slog.NewTextHandler(&line.buf, opts), line: line}
}

// Enabled implements slog.Handler.
func (h syslogHandler) Enabled(ctx context.Context, l slog.Level) bool { return h.text.Enabled(ctx, l) }

// WithAttrs implements slog.Handler.
func (h syslogHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return syslogHandler{text: h.text.WithAttrs(attrs), line: h.line}
}

// WithGroup implements slog.Handler.
func (h syslogHandler) WithGroup(name string) slog.Handler {
	return syslogHandler{text: h.text.WithGroup(name), line: h.line}
}

// Handle implements slog.Handler.
func (h syslogHandler) Handle(ctx context.Context, r slog.Record) error {
	h.line.mu.Lock()
	defer h.line.mu.Unlock()
	h.line.buf.Reset()
	if err := h.text.Handle(ctx, r); err != nil {
		return err
	}
	text := h.line.buf.String()
	switch {
	case r.Level >= slog.LevelError:
		return h.line.to.Err(text)
	case r.Level >= slog.LevelWarn:
		return h.line.to.Warning(text)
	case r.Level >= slog.LevelInfo:
		return h.line.to.Info(text)
	default:
		return h.line.to.Debug(text)
	}
}
