package configfile

import (
	"bytes"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// tree is a file as it was written, with lines. Of a file that is not TOML it is what comes before the fault.
type tree struct {
	root    node
	headers []header
	lines   []int // offset of each line's first byte
}

// maxKeyShown keeps keys of a hundred thousand parts, which nobody wants to read, from costing the square of that.
const maxKeyShown = 200

// header is a line in brackets.
type header struct {
	line int
	key  string
}

// node is a value. It has entries if it is a table, items if it is an array, else text.
type node struct {
	kind unstable.Kind // InlineTable stands for tables of every form
	line int           // of its key, or in an array its own
	text string        // of a string its value, else as it is written

	names   []string // of entries, in their order
	entries map[string]*node
	items   []*node
}

// parseTree never fails; go-toml says better what is wrong.
func parseTree(data []byte) *tree {
	t := &tree{root: node{kind: unstable.InlineTable, line: 1}, lines: []int{0}}
	for i, c := range data {
		if c == '\n' {
			t.lines = append(t.lines, i+1)
		}
	}
	var p unstable.Parser
	p.Reset(data)
	table := &t.root
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = t.header(e)
		case unstable.KeyValue:
			t.keyValue(table, e)
		}
	}
	return t
}

// line is that of a place in the file.
func (t *tree) line(r unstable.Range) int {
	return sort.SearchInts(t.lines, int(r.Offset)+1)
}

// text is a line without its end.
func (t *tree) text(data []byte, line int) []byte {
	line = min(max(line, 1), len(t.lines))
	text, _, _ := bytes.Cut(data[t.lines[line-1]:], []byte("\n"))
	return text
}

// header goes to the table that [a.b] or [[a.b]] is about.
func (t *tree) header(e *unstable.Node) *node {
	at, key, line := &t.root, "", 0
	for it := e.Key(); it.Next(); {
		part := it.Node()
		name := string(part.Data)
		line = t.line(part.Raw)
		if len(key) < maxKeyShown {
			key = join(key, name)
		}
		at = at.entry(name, line)
		if it.IsLast() && e.Kind == unstable.ArrayTable {
			at.kind = unstable.Array
			at.items = append(at.items, &node{kind: unstable.InlineTable, line: line})
		}
		if n := len(at.items); n > 0 {
			at = at.items[n-1]
			key += "[" + strconv.Itoa(n-1) + "]"
		}
	}
	t.headers = append(t.headers, header{line, key})
	return at
}

func (t *tree) keyValue(table *node, e *unstable.Node) {
	for it := e.Key(); it.Next(); {
		part := it.Node()
		table = table.entry(string(part.Data), t.line(part.Raw))
	}
	t.fill(table, e.Value())
}

// fill makes n what v is. Its line is set.
func (t *tree) fill(n *node, v *unstable.Node) {
	n.kind = v.Kind
	switch v.Kind {
	case unstable.Array:
		for it := v.Children(); it.Next(); {
			child := it.Node()
			item := &node{line: n.line}
			if child.Raw.Length > 0 { // an array has none
				item.line = t.line(child.Raw)
			}
			t.fill(item, child)
			n.items = append(n.items, item)
		}
	case unstable.InlineTable:
		for it := v.Children(); it.Next(); {
			t.keyValue(n, it.Node())
		}
	default:
		n.text = string(v.Data)
	}
}

// entry returns the one called name of the table n, a new one if there is none.
func (n *node) entry(name string, line int) *node {
	if e := n.entries[name]; e != nil {
		return e
	}
	if n.entries == nil {
		n.entries = make(map[string]*node)
	}
	e := &node{kind: unstable.InlineTable, line: line}
	n.entries[name] = e
	n.names = append(n.names, name)
	return e
}

// lineOf is the line of key ("share[1].graft[0].path") or, if it is not there, of what it would be in.
func (t *tree) lineOf(key string) int {
	n := &t.root
	for part := range strings.FieldsFuncSeq(key, func(c rune) bool { return c == '.' || c == '[' || c == ']' }) {
		next := n.entries[part]
		if i, err := strconv.Atoi(part); err == nil && i >= 0 && i < len(n.items) {
			next = n.items[i]
		}
		if next == nil {
			break
		}
		n = next
	}
	return n.line
}

// tableAt is the key of the table that line is in, or heads.
func (t *tree) tableAt(line int) (key string, heads bool) {
	i, heads := slices.BinarySearchFunc(t.headers, line, func(h header, line int) int { return h.line - line })
	if heads {
		return t.headers[i].key, true
	}
	if i == 0 {
		return "", false
	}
	return t.headers[i-1].key, false
}

// join is the key of the entry name in the table with key table.
func join(table, name string) string {
	if name == "" || strings.ContainsFunc(name, func(c rune) bool {
		return (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_'
	}) {
		name = quote(name)
	}
	if table == "" {
		return name
	}
	return table + "." + name
}
