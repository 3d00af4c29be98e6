package sandbox

import (
	"slices"
	"strings"
	"testing"
)

func TestParseIDMap(t *testing.T) {
	for text, want := range map[string]IDMap{
		":0:100000:65536:":          {0, 100000, 65536},
		",1000,1000,1,":             {1000, 1000, 1},
		"/0/0/4294967295/":          {0, 0, 4294967295},
		":4294967294:4294967294:1:": {4294967294, 4294967294, 1},
		"|00|1|2|":                  {0, 1, 2},
	} {
		if got, err := ParseIDMap(text); err != nil || got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"":                    "expected :INSIDE:OUTSIDE:COUNT:",
		"0:1:2":               "expected :INSIDE:OUTSIDE:COUNT:",
		":0:1:2":              "expected :INSIDE:OUTSIDE:COUNT:",
		":0:1:":               "expected :INSIDE:OUTSIDE:COUNT:",
		":0:1:2:3:":           "expected :INSIDE:OUTSIDE:COUNT:",
		":0:1:2::":            "expected :INSIDE:OUTSIDE:COUNT:",
		":0:1:x:":             "each from 0 to 4294967294",
		":0:1:-2:":            "each from 0 to 4294967294",
		"-0-1--2-":            "expected :INSIDE:OUTSIDE:COUNT:",
		":0:4294967296:1:":    "each from 0 to 4294967294",
		":0:4294967295:1:":    "beyond the last id",
		":4294967295:0:1:":    "beyond the last id",
		":1:0:4294967295:":    "beyond the last id",
		":0:1:0:":             "at least 1",
		"\xff0\xff1\xff2\xff": "expected :INSIDE:OUTSIDE:COUNT:",
	} {
		if got, err := ParseIDMap(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v; want an error with %q", text, got, err, want)
		}
	}
}

func TestCheckIDMaps(t *testing.T) {
	const own = 1000
	for _, tt := range []struct {
		maps []IDMap
		err  string
	}{
		{[]IDMap{{1000, 1000, 1}}, ""},
		{[]IDMap{{0, 1000, 1}}, ""},
		{[]IDMap{{0, 100000, 65536}}, ""},
		{[]IDMap{{0, 1000, 1}, {1, 100000, 65535}}, ""},
		{[]IDMap{{5, 990, 20}}, ""},
		{[]IDMap{{5, 990, 10}}, "for the daemon itself"},
		{[]IDMap{{1, 1001, 1}}, "for the daemon itself"},
		{[]IDMap{{0, 100000, 10}, {9, 200000, 10}}, "overlap"},
		{[]IDMap{{9, 100000, 10}, {0, 200000, 10}}, "overlap"},
		{[]IDMap{{0, 100000, 100}, {200, 100050, 1}}, "overlap"},
		{[]IDMap{{0, 100000, 0}}, "at least 1"},
		{slices.Repeat([]IDMap{{0, 0, 1}}, maxIDMaps+1), "at most 340"},
	} {
		err := checkIDMaps(tt.maps, own)
		if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%v: %v, want %q", tt.maps, err, tt.err)
		}
	}
}

func FuzzIDMap(f *testing.F) {
	for _, s := range []string{"", ":0:100000:65536:", ",1,2,3,", ":0:4294967295:1:", "::::", ":0:1:2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		m, err := ParseIDMap(text)
		if err != nil {
			return
		}
		if m.Count == 0 || uint64(m.Inside)+uint64(m.Count) > 1<<32-1 || uint64(m.Outside)+uint64(m.Count) > 1<<32-1 {
			t.Fatalf("%q: %+v", text, m)
		}
		if again, err := ParseIDMap(m.String()); err != nil || again != m {
			t.Fatalf("%q: %+v, again %+v, %v", text, m, again, err)
		}
	})
}
