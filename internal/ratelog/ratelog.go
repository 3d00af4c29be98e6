// Package ratelog logs what a guest or a front-end can cause as often as it likes, without letting it fill the log.
package ratelog

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// Logger passes records on while it has tokens for them: burst at first, one more every interval. The next record that
// passes says in "suppressed" how many did not. It may be used from many goroutines.
type Logger struct {
	log   *slog.Logger
	every time.Duration
	burst int
	now   func() time.Time

	mu         sync.Mutex
	tokens     int
	filled     time.Time // when tokens last grew
	suppressed uint64    // records since the last one passed
}

// New returns a Logger that writes to log (nil: nowhere) at most burst records at once and one every interval after.
func New(log *slog.Logger, every time.Duration, burst int) *Logger {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Logger{log: log, every: every, burst: burst, now: time.Now, tokens: burst}
}

// Warn logs at slog.LevelWarn.
func (l *Logger) Warn(msg string, args ...any) {
	l.emit(slog.LevelWarn, msg, args)
}

// Error logs at slog.LevelError.
func (l *Logger) Error(msg string, args ...any) {
	l.emit(slog.LevelError, msg, args)
}

func (l *Logger) emit(level slog.Level, msg string, args []any) {
	suppressed, ok := l.take()
	if !ok {
		return
	}
	if suppressed > 0 {
		args = append(args[:len(args):len(args)], "suppressed", suppressed)
	}
	l.log.Log(context.Background(), level, msg, args...)
}

// take uses a token up and returns how many records went without one since the last that had it.
func (l *Logger) take() (suppressed uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if l.tokens == l.burst {
		l.filled = now
	} else if n := now.Sub(l.filled) / l.every; n > 0 {
		l.tokens = int(min(time.Duration(l.tokens)+n, time.Duration(l.burst)))
		l.filled = l.filled.Add(n * l.every)
	}
	if l.tokens == 0 {
		l.suppressed++
		return 0, false
	}
	l.tokens--
	suppressed, l.suppressed = l.suppressed, 0
	return suppressed, true
}
