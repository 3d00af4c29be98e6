package imagefetch

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
)

var sumA = "sha256:" + strings.Repeat("a", 64)

// reg is the entry of a regular file of one chunk.
func reg(name string, size, off int, more string) string {
	return fmt.Sprintf(`{"name":%q,"type":"reg","size":%d,"offset":%d,"chunkDigest":%q%s}`, name, size, off, sumA, more)
}

func toc(entries ...string) string {
	return `{"version":1,"other":{"a":[1]},"entries":[` + strings.Join(entries, ",") + `]}`
}

// TestBadTOC is of tables of contents that would lead to wrong bytes, or out of the layer.
func TestBadTOC(t *testing.T) {
	const end = 1000
	good := toc(`{"name":"./","type":"dir","mode":511}`, reg("/a/./b", 10, 0, ""), reg("c", 10, 500, `,"innerOffset":0`), reg("c2", 10, 500, `,"innerOffset":10`))
	c, err := readTOC(strings.NewReader(good), end)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.entries) != 4 || c.entries[0].Path != "" || c.entries[1].Path != "a/b" || len(c.streams) != 2 || c.streams[0].end != 500 || c.streams[1].end != end ||
		c.streams[1].hi-c.streams[1].lo != 2 || c.landmark != -1 {
		t.Errorf("it is read as %+v", c)
	}
	for _, tt := range []struct{ toc, says string }{
		{``, ""},
		{`[]`, "should be"},
		{`{"entries":{}}`, "should be"},
		{`{"entries":[{"type":"reg"`, ""},
		{toc(`{"name":"../x","type":"dir"}`), `".."`},
		{toc(`{"name":"a/../../x","type":"dir"}`), `".."`},
		{toc(`{"name":"a\u0000b","type":"dir"}`), "NUL"},
		{toc(fmt.Sprintf(`{"name":%q,"type":"dir"}`, strings.Repeat("n", 256))), "255"},
		{toc(fmt.Sprintf(`{"name":%q,"type":"dir"}`, strings.Repeat("n/", 2100))), "longer than"},
		{toc(`{"name":"x","type":"door"}`), "type"},
		{toc(`{"name":"","type":"fifo"}`), "root"},
		{toc(`{"name":"x","type":"dir","uid":-1}`), "uid"},
		{toc(`{"name":"x","type":"dir","gid":4294967296}`), "gid"},
		{toc(`{"name":"x","type":"char","devMajor":4096}`), "device"},
		{toc(`{"name":"x","type":"dir","modtime":"yesterday"}`), "time"},
		{toc(`{"name":"x","type":"symlink"}`), "target"},
		{toc(fmt.Sprintf(`{"name":"x","type":"symlink","linkName":%q}`, strings.Repeat("x", 4096))), "target"},
		{toc(`{"name":"x","type":"hardlink","linkName":"y"}`), "not there"},
		{toc(`{"name":"x","type":"hardlink","linkName":"x"}`), "not there"},
		{toc(`{"name":"d","type":"dir"}`, `{"name":"x","type":"hardlink","linkName":"d"}`), "directory"},
		{toc(fmt.Sprintf(`{"name":"x","type":"dir","xattrs":{%q:""}}`, strings.Repeat("x", 256))), "attribute"},
		{toc(`{"name":"x","type":"chunk","chunkOffset":0}`), "no file"},
		{toc(`{"name":"d","type":"dir"}`, `{"name":"x","type":"chunk"}`), "no file"},
		{toc(`{"name":"x","type":"reg","size":-1}`), "size"},
		{toc(`{"name":"x","type":"reg","size":10,"offset":5}`), "digest"},
		{toc(`{"name":"x","type":"reg","size":10,"offset":5,"chunkDigest":"sha256:zz"}`), "digest"},
		{toc(`{"name":"x","type":"reg","size":10,"offset":5,"chunkSize":5,"digest":"` + sumA + `"}`), "digest"},
		{toc(reg("x", 10, 1000, "")), "not in the blob"},
		{toc(reg("x", 10, -1, "")), "not in the blob"},
		{toc(reg("x", 10, 5, `,"endOffset":1001`)), "not in the blob"},
		{toc(reg("x", 10, 5, `,"endOffset":5`)), "not in the blob"},
		{toc(reg("x", 10, 5, `,"innerOffset":-1`)), "not in the blob"},
		{toc(reg("x", 10, 5, `,"innerOffset":99999999999`)), "not in the blob"},
		{toc(reg("x", 10, 5, `,"chunkSize":11`)), "a chunk of 11"},
		{toc(reg("x", 10, 5, `,"chunkSize":5`)), "end at 5 of 10"},
		{toc(reg("x", 10, 5, `,"chunkSize":5`), `{"name":"y","type":"dir"}`), "end at 5 of 10"},
		{toc(reg("x", 10, 5, `,"chunkOffset":5`)), "offset 0"},
		{toc(reg("x", 10, 5, `,"chunkSize":5`), fmt.Sprintf(`{"type":"chunk","chunkOffset":6,"offset":50,"chunkDigest":%q}`, sumA)), "ends at 5"},
		{toc(reg("x", 1<<40, 5, "")), "a chunk of"},
		{toc(reg("x", 10, 5, ""), reg("y", 10, 5, `,"innerOffset":9`)), "overlap"},
		{toc(reg("x", 10, 5, `,"endOffset":20`), reg("y", 10, 15, "")), "overlap"},
		{toc(reg("x", 10, 5, `,"chunkSize":5,"endOffset":50`), fmt.Sprintf(`{"type":"chunk","chunkOffset":5,"offset":50,"chunkDigest":%q}`, sumA)), "not in the blob"},
		{toc(fmt.Sprintf(`{"name":%q,"type":"reg","size":1,"offset":5000}`, ".prefetch.landmark")), "landmark"},
	} {
		c, err := readTOC(strings.NewReader(tt.toc), end)
		if err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%.200s\nis read as %+v, %v; expected %q", tt.toc, c, err, tt.says)
		}
	}
}

// TestOddTOC is of tables of contents that others make, and that can be served.
func TestOddTOC(t *testing.T) {
	// A file's endOffset is that of its last chunk; zeros are packed as well.
	zeros := fmt.Sprintf(`{"name":"holes","type":"reg","size":30,"offset":5,"endOffset":20,"chunkSize":10,"chunkDigest":%q},`+
		`{"name":"holes","type":"chunk","chunkOffset":10,"chunkSize":10,"offset":9,"chunkType":"zeros"},`+
		`{"name":"holes","type":"chunk","chunkOffset":20,"chunkSize":10,"offset":12,"chunkDigest":%q}`, sumA, sumA)
	c, err := readTOC(strings.NewReader(toc(zeros)), 100)
	if err != nil {
		t.Fatal(err)
	}
	if e := c.entries[0]; len(e.Chunks) != 2 || e.Chunks[1].Off != 20 || e.Chunks[1].Len != 10 || c.streams[0].end != 9 || c.streams[1].off != 12 || c.streams[1].end != 20 {
		t.Errorf("a file with a hole is %+v, in %+v", e, c.streams)
	}
	// The last of several entries of one name counts, whatever the others were.
	c, err = readTOC(strings.NewReader(toc(`{"name":"x","type":"dir"}`, reg("x", 3, 5, ""), `{"name":"y","type":"hardlink","linkName":"x"}`, reg("x", 4, 50, ""))), 100)
	if err != nil || len(c.entries) != 2 || c.entries[0].Size != 4 || !c.entries[1].Hardlink {
		t.Errorf("entries of one name are %+v, %v", c, err)
	}
}

// FuzzTOC has what was read be servable: in the blob, apart, and as package store wants it.
func FuzzTOC(f *testing.F) {
	for _, s := range []string{
		toc(`{"name":"./","type":"dir"}`, reg("a", 10, 0, ""), reg("c", 10, 500, ""), reg("c2", 10, 500, `,"innerOffset":10`)),
		toc(`{"name":".prefetch.landmark","type":"reg","size":1,"offset":7}`, `{"name":"x","type":"symlink","linkName":"y","xattrs":{"user.a":"eA=="}}`),
		toc(reg("x", 10, 5, ""), `{"name":"y","type":"hardlink","linkName":"z"}`, `{"name":"z","type":"hardlink","linkName":"x"}`),
		toc(fmt.Sprintf(`{"name":"h","type":"reg","size":9,"offset":5,"endOffset":9,"chunkSize":4,"chunkDigest":%q},{"type":"chunk","chunkOffset":4,"chunkType":"zeros","offset":7}`, sumA)),
		`{"entries":[],"entries":[{"name":"a","type":"fifo","modtime":"2020-01-01T00:00:00.5Z"}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		const end = 1000
		c, err := readTOC(strings.NewReader(string(b)), end)
		if err != nil {
			return
		}
		at := int64(0)
		for i, s := range c.streams {
			if s.off < at || s.end <= s.off || s.end > end || s.lo >= s.hi || s.hi > uint32(len(c.order)) {
				t.Errorf("stream %d of %+v", i, c.streams)
			}
			at = s.end
			inner := int64(0)
			for _, n := range c.order[s.lo:s.hi] {
				if c.at[n].inner < inner || c.at[n].stream != uint32(i) {
					t.Errorf("chunk %d is at %+v", n, c.at[n])
				}
				inner = c.at[n].inner + int64(c.chunks[n].Size)
			}
		}
		if _, err := store.EncodeMeta([]store.Layer{{Digest: sumA, Size: end, Entries: c.entries, Chunks: c.chunks}}); err != nil {
			t.Error(err)
		}
	})
}
