package configfile

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/pelletier/go-toml/v2"
)

// maxProblems is how many are reported; a file with more is no configuration.
const maxProblems = 100

// Problem is one thing that is wrong with a file.
type Problem struct {
	File string
	Line int // from 1
	// Key is the path of the key, elements of arrays counted from 0, "" where there is none: "share[1].graft[0].path".
	Key string
	// Text says what is wrong and what was expected, in one line.
	Text string
}

func (p *Problem) Error() string {
	if p.Key == "" {
		return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Text)
	}
	return fmt.Sprintf("%s:%d: %s: %s", p.File, p.Line, p.Key, p.Text)
}

// report gathers what is wrong with a file.
type report struct {
	file     string
	tree     *tree
	problems []*Problem
	more     bool
	told     map[string]bool // of keys
}

// at adds a problem of the line.
func (r *report) at(line int, key, format string, args ...any) {
	if len(r.problems) == maxProblems {
		r.more = true
		return
	}
	if r.told == nil {
		r.told = make(map[string]bool)
	}
	r.told[key] = true
	r.problems = append(r.problems, &Problem{r.file, line, key, oneLine(fmt.Sprintf(format, args...))})
}

// add adds a problem of what has been read, unless it may be due to one that was added before.
func (r *report) add(key, format string, args ...any) {
	if !r.knows(key) {
		r.at(r.tree.lineOf(key), key, format, args...)
	}
}

// knows says whether something was said of key, or of what it is in.
func (r *report) knows(key string) bool {
	for key != "" {
		if r.told[key] {
			return true
		}
		key = key[:max(strings.LastIndexAny(key, ".["), 0)]
	}
	return false
}

// err joins the problems.
func (r *report) err() error {
	slices.SortStableFunc(r.problems, func(a, b *Problem) int { return cmp.Compare(a.Line, b.Line) })
	var all []error
	for _, p := range r.problems {
		all = append(all, p)
	}
	if r.more {
		all = append(all, &Problem{File: r.file, Line: r.problems[maxProblems-1].Line, Text: fmt.Sprintf("and more: expected these %d to be mended first", maxProblems)})
	}
	if len(all) == 1 {
		return all[0]
	}
	return errors.Join(all...)
}

// keyAtStart finds the key of a line.
var keyAtStart = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^\s*([A-Za-z0-9_.-]{1,200})\s*=`) })

// syntax adds what go-toml cannot read. That seldom knows the key, and never the table.
func (r *report) syntax(data []byte, err error) {
	line := 1
	if e := new(toml.DecodeError); errors.As(err, &e) {
		line, _ = e.Position()
	}
	key, heads := r.tree.tableAt(line)
	if m := keyAtStart().FindSubmatch(r.tree.text(data, line)); m != nil && !heads {
		if key != "" {
			key += "."
		}
		key += string(m[1])
	}
	r.at(line, key, "it is not TOML: %s", strings.TrimPrefix(err.Error(), "toml: "))
}

// oneLine takes out of s what would make several of it: keys of others can be in it.
func oneLine(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f || c == '\u0085' || c == '\u2028' || c == '\u2029' {
			return '\uFFFD'
		}
		return c
	}, strings.ToValidUTF8(s, "\uFFFD"))
}

// quote shows the beginning of s.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		return strconv.Quote(s[:most]) + "…"
	}
	return strconv.Quote(s)
}
