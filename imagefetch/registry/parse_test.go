package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseReference(t *testing.T) {
	sum := DigestOf(nil)
	for _, tt := range []struct{ in, want string }{
		{"registry.example:5000/a/b@" + sum, "registry.example:5000/a/b@" + sum},
		{"registry.example/a:v1", "registry.example/a:v1"},
		{"debian", "index.docker.io/library/debian:latest"},
		{"https://files.example/x/layer?sig=secret", "https://files.example/x/layer"},
		{"file=/a/b", "file=/a/b"},
		{"file=", ""},
		{"http://", ""},
		{"https://me:pw@files.example/x", ""},
		{"registry.example/A B", ""},
		{"", ""},
	} {
		ref, err := ParseReference(tt.in)
		if tt.want == "" {
			if err == nil || strings.Contains(err.Error(), "pw") {
				t.Errorf("%q: %v", tt.in, err)
			}
			continue
		}
		if err != nil || ref.String() != tt.want {
			t.Errorf("%q is %v, %v; expected %s", tt.in, ref, err, tt.want)
		}
	}
}

func TestContentRange(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want Range
		size int64
	}{
		{"bytes 0-0/1", Range{0, 1}, 1},
		{"bytes 5-9/10", Range{5, 5}, 10},
		{"bytes 5-9/*", Range{5, 5}, -1},
	} {
		if r, size, err := parseContentRange(tt.in); err != nil || r != tt.want || size != tt.size {
			t.Errorf("%q is %v of %d, %v", tt.in, r, size, err)
		}
	}
	for _, in := range []string{"", "bytes", "bytes 5-9", "bytes 9-5/10", "bytes 5-10/10", "bytes -5/10", "bytes */10", "items 0-1/2", "bytes 0-99999999999999999999/*", "bytes 0--1/5"} {
		if r, size, err := parseContentRange(in); err == nil {
			t.Errorf("%q is %v of %d", in, r, size)
		}
	}
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-0/1", "bytes 5-9/*", "bytes 9-5/10", "bytes 4611686018427387903-4611686018427387903/*"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, size, err := parseContentRange(s)
		if err == nil && (r.Off < 0 || r.Len <= 0 || r.end() <= r.Off || size >= 0 && r.end() > size) {
			t.Errorf("%q is %v of %d", s, r, size)
		}
	})
}

func TestChallenge(t *testing.T) {
	for _, tt := range []struct {
		in     []string
		scheme string
		params map[string]string
	}{
		{[]string{`Bearer realm="https://a/t",service="x y",scope="repository:a/b:pull,push"`}, "Bearer", map[string]string{"realm": "https://a/t", "service": "x y", "scope": "repository:a/b:pull,push"}},
		{[]string{`Negotiate`, `basic realm=here`}, "basic", map[string]string{"realm": "here"}},
		{[]string{`Basic realm="a\"b" , charset = utf-8`}, "Basic", map[string]string{"realm": `a"b`, "charset": "utf-8"}},
		{[]string{`Basic`}, "Basic", map[string]string{}},
		{[]string{`Basic realm="open`}, "Basic", map[string]string{"realm": "open"}},
		{[]string{`Digest realm=x`}, "", nil},
		{nil, "", nil},
	} {
		ch, ok := challengeOf(http.Header{"Www-Authenticate": tt.in}, false)
		if ok != (tt.scheme != "") || ok && (ch.Scheme != tt.scheme || !maps.Equal(ch.Parameters, tt.params)) {
			t.Errorf("%q is %+v, %v", tt.in, ch, ok)
		}
	}
}

func FuzzChallenge(f *testing.F) {
	for _, s := range []string{`Bearer realm="https://a/t",service="x"`, `Basic realm=x, a="\\\"`, `Basic =,=,`, `Bearer a="`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if ch, ok := challengeOf(http.Header{"Www-Authenticate": {s}}, false); ok && ch.Parameters == nil {
			t.Errorf("%q is %+v", s, ch)
		}
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	for in, want := range map[string]time.Duration{
		"": 0, "0": 0, "120": 2 * time.Minute, "-1": 0, "99999999999": 0, "soon": 0,
		now.Add(time.Minute).Format(http.TimeFormat):  time.Minute,
		now.Add(-time.Minute).Format(http.TimeFormat): 0,
	} {
		if got := retryAfter(in, now); got != want {
			t.Errorf("%q is %v, expected %v", in, got, want)
		}
	}
}

// FuzzAnswer has a server answer as it likes. What is handed on is of the range that was asked for, as far as it says, and no longer.
func FuzzAnswer(f *testing.F) {
	const size = 100
	multi := "--b\r\nContent-Range: bytes 10-19/100\r\n\r\n0123456789\r\n--b\r\nContent-Range: bytes 50-59/100\r\n\r\nabcdefghij\r\n--b--\r\n"
	f.Add(206, "", "bytes 10-19/100", int64(10), []byte("0123456789"))
	f.Add(206, "", "bytes 0-99/100", int64(100), make([]byte, 100))
	f.Add(206, "multipart/byteranges; boundary=b", "", int64(len(multi)), []byte(multi))
	f.Add(206, "multipart/byteranges", "", int64(-1), []byte(multi))
	f.Add(200, "", "", int64(-1), make([]byte, 200))
	f.Fuzz(func(t *testing.T, status int, kind, span string, length int64, answer []byte) {
		if status != 200 {
			status = 206
		}
		c, err := New(Config{MaxSkip: 60})
		if err != nil {
			t.Fatal(err)
		}
		ranges := []Range{{10, 10}, {50, 10}}
		var got [2]int64
		fe := &fetch{b: c.newRemote(nil, "", size, nil), ranges: ranges, f: func(i int, r io.Reader) error {
			n, err := io.Copy(io.Discard, r)
			if got[i] = n; n > ranges[i].Len {
				t.Errorf("range %d has %d bytes", i, n)
			}
			return err
		}}
		w, ctx := newWatchdog(context.Background(), time.Minute)
		defer w.stop()
		resp := &http.Response{StatusCode: status, Header: http.Header{"Content-Type": {kind}, "Content-Range": {span}}, ContentLength: length}
		in := &body{r: bytes.NewReader(answer), w: w, count: func(int) {}}
		err = fe.take(ctx, &host{name: "h"}, resp, in)
		for i := range fe.done {
			if got[i] != ranges[i].Len {
				t.Errorf("range %d of %d is done with %d bytes: %v", i, fe.done, got[i], err)
			}
		}
	})
}

func TestPick(t *testing.T) {
	ref, err := ParseReference("registry.example/a:b")
	if err != nil {
		t.Fatal(err)
	}
	sum := func(n int) string { return fmt.Sprintf("sha256:%064x", n) }
	index := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[
		{"digest":%q,"size":1,"mediaType":"x"},
		{"digest":%q,"size":1,"platform":{"os":"linux","architecture":"amd64"}},
		{"digest":%q,"size":1,"platform":{"os":"linux","architecture":"arm64","variant":"v8"}}]}`, sum(1), sum(2), sum(3))
	for platform, want := range map[string]string{"linux/amd64": sum(2), "linux/arm64": sum(3), "linux/arm64/v8": sum(3), "linux/s390x": "", "linux": ""} {
		_, next, err := Pick(ref, []byte(index), platform)
		if want == "" && platform != "linux" {
			if err == nil || !strings.Contains(err.Error(), "linux/arm64") {
				t.Errorf("%s: %v", platform, err)
			}
		} else if want != "" && (err != nil || next.Image.Identifier() != want) {
			t.Errorf("%s is %v, %v", platform, next, err)
		}
	}
	layer := fmt.Sprintf(`{"digest":%q,"size":5,"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip"}`, sum(9))
	manifest := func(layers string) string {
		return `{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{},"layers":[` + layers + `]}`
	}
	if layers, _, err := Pick(ref, []byte(manifest(layer)), "linux/amd64"); err != nil || len(layers) != 1 || layers[0].Size != 5 {
		t.Errorf("the layers are %v, %v", layers, err)
	}
	for _, bad := range []string{
		``, `[]`, `{}`, manifest(``), manifest(`{"digest":"sha512:00","size":5}`), manifest(`{"digest":"x","size":5}`),
		manifest(strings.Replace(layer, `"size":5`, `"size":-5`, 1)), manifest(strings.Repeat(layer+",", MaxLayers) + layer),
		`{"mediaType":"application/vnd.docker.distribution.manifest.v1+json","layers":[{}]}`,
	} {
		if layers, next, err := Pick(ref, []byte(bad), "linux/amd64"); err == nil {
			t.Errorf("%.100s is %v, %v", bad, layers, next)
		}
	}
}
