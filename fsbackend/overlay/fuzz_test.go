package overlay

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzNextDirent takes apart what a layer says is in a directory: a plug-in's may say anything.
func FuzzNextDirent(f *testing.F) {
	entry := make([]byte, direntHead+8)
	entry[16], entry[direntHead] = 1, 'a'
	f.Add(entry, false)
	f.Add(append(entry, entry...), false)
	f.Add(append(make([]byte, entryHead), entry...), true)
	f.Add(entry[:20], false)
	f.Add([]byte(strings.Repeat("\xff", 200)), true)
	f.Fuzz(func(t *testing.T, reply []byte, plus bool) {
		for len(reply) > 0 {
			var d dirent
			rest, ok := nextDirent(reply, plus, &d)
			if !ok {
				return
			}
			if len(d.name) == 0 || len(d.name) > unix.NAME_MAX || len(rest) >= len(reply) {
				t.Fatalf("a name of %d bytes, %d of %d bytes left", len(d.name), len(rest), len(reply))
			}
			reply = rest
		}
	})
}

// FuzzRedirect has what a mark says lead nowhere but to names below a layer's root.
func FuzzRedirect(f *testing.F) {
	for _, s := range []string{"", "name", "/a/b", "/", "..", "/a/../b", "a/b", "/a//b", "/.", "\x00", strings.Repeat("x", 256)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, mark string) {
		if mark == "" || !validRedirect(mark) {
			return
		}
		for name := range strings.SplitSeq(strings.TrimPrefix(extend("", "name", mark), "/"), "/") {
			if !validComponent(name) || strings.ContainsAny(name, "/\x00") {
				t.Fatalf("%q leads to %q", mark, name)
			}
		}
	})
}
