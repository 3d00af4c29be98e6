package configfile

import (
	"reflect"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/sluicefs/sluice/control/api"
)

// field is a key of a table and the field for it.
type field struct {
	key   string
	index int
}

// fields lists the keys that a struct has for a table.
func fields(t reflect.Type) []field {
	var all []field
	for i := range t.NumField() {
		if key := t.Field(i).Tag.Get("toml"); key != "" && key != "-" {
			all = append(all, field{key, i})
		}
	}
	return all
}

func keys(t reflect.Type) []string {
	var all []string
	for _, f := range fields(t) {
		all = append(all, f.key)
	}
	return all
}

// tableNames are how tables are headed whose keys one may look for elsewhere.
var tableNames = []struct {
	name string
	typ  reflect.Type
}{
	{"[[share.graft]]", reflect.TypeFor[api.GraftSpec]()},
	{"[[share.graft.lower]]", reflect.TypeFor[api.LowerSpec]()},
	{"[[share]]", reflect.TypeFor[api.ShareSpec]()},
	{"[[vsock]]", reflect.TypeFor[VSock]()},
	{"[[hybrid-vsock]]", reflect.TypeFor[HybridVSock]()},
	{"the beginning of the file, before the first [[", reflect.TypeFor[File]()},
}

// setter is a value that has a text for each of its values.
type setter interface{ Set(text string) error }

// table fills the struct v from n, which is at key; header is how its kind of table is headed.
func (r *report) table(n *node, v reflect.Value, key, header string) {
	known := fields(v.Type())
	index := make(map[string]int, len(known))
	for _, f := range known {
		index[f.key] = f.index
	}
	for _, name := range n.names {
		at, e := join(key, name), n.entries[name]
		i, ok := index[name]
		if !ok {
			r.at(e.line, at, "there is no such key: %s", expectedKey(name, v.Type()))
			continue
		}
		r.value(e, v.Field(i), at, strings.TrimPrefix(header+"."+name, "."))
	}
}

// expectedKey is what may have been meant by name in a table for t.
func expectedKey(name string, t reflect.Type) string {
	if near := nearest(name, keys(t)); near != "" {
		return "did you mean " + near + "?"
	}
	for _, table := range tableNames {
		for _, key := range keys(table.typ) {
			if key == name {
				return "expected it in " + table.name
			}
		}
	}
	return "expected one of " + strings.Join(keys(t), ", ")
}

// value sets v to n.
func (r *report) value(n *node, v reflect.Value, at, header string) {
	if s, ok := v.Addr().Interface().(setter); ok {
		if r.want(n, unstable.String, "a string", at) {
			if err := s.Set(n.text); err != nil {
				r.at(n.line, at, "%s", err)
			}
		}
		return
	}
	switch v.Kind() {
	case reflect.String:
		if r.want(n, unstable.String, "a string", at) {
			v.SetString(n.text)
		}
	case reflect.Bool:
		if r.want(n, unstable.Bool, "true or false", at) {
			v.SetBool(n.text == "true")
		}
	case reflect.Int, reflect.Int64, reflect.Uint32, reflect.Uint64:
		if r.want(n, unstable.Integer, "a whole number", at) {
			r.number(n, v, at)
		}
	case reflect.Slice:
		r.slice(n, v, at, header)
	case reflect.Struct:
		if r.want(n, unstable.InlineTable, "a table", at) {
			r.table(n, v, at, header)
		}
	}
}

func (r *report) slice(n *node, v reflect.Value, at, header string) {
	elem := v.Type().Elem()
	expected := "an array of numbers"
	switch {
	case elem == reflect.TypeFor[api.IDRange]():
		expected = "an array of tables {guest = N, host = N, count = N}"
	case elem.Kind() == reflect.Struct:
		expected = "[[" + header + "]], in double brackets because there can be several"
	case elem.Kind() == reflect.String:
		expected = "an array of strings"
	}
	if !r.want(n, unstable.Array, expected, at) {
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.items), len(n.items)))
	for i, item := range n.items {
		r.value(item, v.Index(i), at+"["+strconv.Itoa(i)+"]", header)
	}
}

// number sets v, of which only the range can be wrong.
func (r *report) number(n *node, v reflect.Value, at string) {
	i, err := strconv.ParseInt(n.text, 0, 64)
	switch {
	case err != nil:
		r.at(n.line, at, "%s: expected a whole number of 64 bits", err)
	case v.CanInt():
		v.SetInt(i)
	case i < 0 || v.OverflowUint(uint64(i)):
		most := uint64(1)<<63 - 1
		if v.Kind() == reflect.Uint32 {
			most = 1<<32 - 1
		}
		r.at(n.line, at, "%d is out of range: expected 0 to %d", i, most)
	default:
		v.SetUint(uint64(i))
	}
}

// want says whether n is of the kind.
func (r *report) want(n *node, kind unstable.Kind, expected, at string) bool {
	if n.kind == kind {
		return true
	}
	is := "a date or time"
	switch n.kind {
	case unstable.String:
		is = "a string"
	case unstable.Bool:
		is = n.text
	case unstable.Integer:
		is = "a whole number"
	case unstable.Float:
		is = "a number with a fraction"
	case unstable.Array:
		is = "an array"
	case unstable.InlineTable:
		is = "a table"
	}
	r.at(n.line, at, "it is %s: expected %s", is, expected)
	return false
}

// nearest returns which of names is so like name that it may have been meant, "" for none.
func nearest(name string, names []string) string {
	best, least := "", 3
	for _, other := range names {
		if d := distance(name, other); d < least && 3*d <= len(other) {
			best, least = other, d
		}
	}
	return best
}

// distance is how many characters have to be changed, put in, taken out or swapped with the next to make b of a.
func distance(a, b string) int {
	if len(a) > len(b)+2 {
		return len(a) - len(b)
	}
	// rows[i][j] is that of the first i of a and the first j of b.
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		for j := range rows[i] {
			switch {
			case i == 0 || j == 0:
				rows[i][j] = i + j
				continue
			case a[i-1] == b[j-1]:
				rows[i][j] = rows[i-1][j-1]
			default:
				rows[i][j] = 1 + min(rows[i-1][j-1], rows[i-1][j], rows[i][j-1])
			}
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], 1+rows[i-2][j-2])
			}
		}
	}
	return rows[len(a)][len(b)]
}
