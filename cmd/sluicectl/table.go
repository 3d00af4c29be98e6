package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// table is lines of cells, below a line of headings.
type table struct {
	head  []string
	lines [][]string
	// numbers are the columns that are aligned to the right.
	numbers map[int]bool
	// shrink has the first column cut before the last ones are.
	shrink bool
	// least is the width of numeric columns, for tables that follow each other.
	least int
}

func (t *table) add(cells ...string) { t.lines = append(t.lines, cells) }

const (
	gap = "  " // between columns
	// minShrunk is how wide the first column is left.
	minShrunk = 8
)

// prepend puts a column before the others, with one value in all lines.
func (t *table) prepend(head, cell string) {
	t.head = slices.Insert(t.head, 0, head)
	for i := range t.lines {
		t.lines[i] = slices.Insert(t.lines[i], 0, cell)
	}
	numbers := make(map[int]bool)
	for i := range t.numbers {
		numbers[i+1] = true
	}
	t.numbers = numbers
}

// write writes t with at most width columns of the terminal in a line; 0 is any number. Without head the headings are left out.
func (t *table) write(w io.Writer, width int, head bool) error {
	widths := make([]int, len(t.head))
	all := append([][]string{t.head}, t.lines...)
	for _, line := range all {
		for i, cell := range line {
			widths[i] = max(widths[i], cells(cell))
			if t.numbers[i] {
				widths[i] = max(widths[i], t.least)
			}
		}
	}
	if t.shrink && width > 0 {
		sum := 0
		for _, n := range widths {
			sum += n + len(gap)
		}
		widths[0] = min(widths[0], max(minShrunk, widths[0]-(sum-len(gap)-width)))
	}
	var b strings.Builder
	if !head {
		all = all[1:]
	}
	for _, line := range all {
		var l strings.Builder
		for i, cell := range line {
			if i == 0 {
				cell = fit(cell, widths[0])
			}
			pad := strings.Repeat(" ", widths[i]-cells(cell))
			if t.numbers[i] {
				l.WriteString(pad + cell)
			} else {
				l.WriteString(cell + pad)
			}
			l.WriteString(gap)
		}
		b.WriteString(fit(strings.TrimRight(l.String(), " "), width) + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// fit cuts s to width columns of a terminal; 0 is any number.
func fit(s string, width int) string {
	if width == 0 || cells(s) <= width {
		return s
	}
	n := 0
	for i, r := range s {
		if n += runeCells(r); n > width-1 {
			return s[:i] + "…"
		}
	}
	return s
}

// cells is how many columns of a terminal s takes.
func cells(s string) (n int) {
	for _, r := range s {
		n += runeCells(r)
	}
	return n
}

// runeCells is how many columns r takes, near enough not to wrap a line: two in the scripts of East Asia and for pictures.
func runeCells(r rune) int {
	switch {
	case unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf):
		return 0
	case r >= 0x1100 && r <= 0x115f, r >= 0x2e80 && r <= 0xa4cf, r >= 0xac00 && r <= 0xd7a3, r >= 0xf900 && r <= 0xfaff,
		r >= 0xfe30 && r <= 0xfe6f, r >= 0xff00 && r <= 0xff60, r >= 0xffe0 && r <= 0xffe6, r >= 0x1f300 && r <= 0x3fffd:
		return 2
	}
	return 1
}

// name is a name that a guest or the host has chosen, quoted if that could be taken for anything but itself.
func name(s string) string {
	if s == "" {
		return "-"
	}
	for _, r := range s {
		if r == utf8.RuneError || r == ' ' || r == '"' || !unicode.IsPrint(r) {
			return strconv.Quote(s)
		}
	}
	return s
}

// oneLine is text from elsewhere, without what moves the cursor of a terminal.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case !unicode.IsPrint(r):
			return utf8.RuneError
		}
		return r
	}, s)
}

// orDash is s, or a dash for nothing.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// bytesText is n bytes with three digits or so: 512, 1.2K, 34M.
func bytesText(n float64) string {
	unit := ""
	for i := 0; n >= 1000 && i < len(units); i++ {
		n, unit = n/1024, units[i:i+1]
	}
	return digits(n) + unit
}

// countText is a number with three digits or so: 512, 1.2k, 34M.
func countText(n float64) string {
	unit := ""
	for _, u := range []string{"k", "M", "G", "T"} {
		if n < 999.5 {
			break
		}
		n, unit = n/1000, u
	}
	return digits(n) + unit
}

// digits is n, less than 1024, with a fraction only where that says something.
func digits(n float64) string {
	if n >= 9.95 || n == float64(int(n)) {
		return strconv.FormatFloat(n, 'f', 0, 64)
	}
	return strconv.FormatFloat(n, 'f', 1, 64)
}

// latencyText is a latency with three digits or so: 0.9µs, 12µs, 1.2ms.
func latencyText(d time.Duration) string {
	switch {
	case d == 0:
		return "-"
	case d < 999500*time.Nanosecond:
		return digits(float64(d)/1e3) + "µs"
	case d < 999500*time.Microsecond:
		return digits(float64(d)/1e6) + "ms"
	}
	return digits(d.Seconds()) + "s"
}

// agoText is how long something has been, in its two largest units.
func agoText(d time.Duration) string {
	s := int64(max(d, 0) / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 60*60:
		return fmt.Sprintf("%dm%ds", s/60, s%60)
	case s < 24*60*60:
		return fmt.Sprintf("%dh%dm", s/3600, s/60%60)
	}
	return fmt.Sprintf("%dd%dh", s/86400, s/3600%24)
}
