package configfile

import (
	"bytes"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// FuzzParse holds every error to its form, and what is accepted to what the API would accept.
func FuzzParse(f *testing.F) {
	f.Add([]byte(everything))
	for _, text := range []string{
		"", "syslog = 1", "[share]\ntag = 'a'", "[[share]]\ntag = 1\n[[share]]\n[share.graft]\n", "a.b.c = 1\na.b = 2", "share = [{tag = 'a'}]",
		"[[share]]\ntag = 'a'\ngraft = [{path = '/', uid-map = [{guest = 4294967295, host = 1, count = 0}]}]", "\"a\\nb\" = 1", "a = [",
		"[[vsock]]\nport = 0b1\ncids = [[]]\nallow = [{}]", "rlimit-nofile = -9223372036854775808", "share = []\n[[share]]\n", "\xff",
	} {
		f.Add([]byte(text))
	}
	form := regexp.MustCompile(`^f:([0-9]+): .`)
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Parse("f", data)
		if (file == nil) != (err != nil) {
			t.Fatalf("%+v and %v", file, err)
		}
		if err != nil {
			for line := range strings.SplitSeq(err.Error(), "\n") {
				m := form.FindStringSubmatch(line)
				if m == nil {
					t.Fatalf("an error in no form: %q", line)
				}
				if n, err := strconv.Atoi(m[1]); err != nil || n < 1 || n > bytes.Count(data, []byte("\n"))+1 {
					t.Fatalf("of no line: %q", line)
				}
			}
			return
		}
		for i := range file.Shares {
			if err := file.Shares[i].Validate(); err != nil {
				t.Fatalf("accepted, but the API would not: %v", err)
			}
		}
	})
}

func FuzzParseShare(f *testing.F) {
	for _, text := range []string{"tag=src,socket=/run/src.sock,dir=/srv/src,cache=auto,ro", `tag=a\,b,dir=/\\`, "tag=a,max-fds=1,xattr", "graft", "=", ",", `\`} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseShare(text)
		if err == nil {
			err = s.Validate()
			if err != nil {
				t.Fatalf("accepted, but the API would not: %v", err)
			}
			return
		}
		if s.Tag != "" || !strings.Contains(err.Error(), ": ") || strings.ContainsAny(err.Error(), "\n\x00") {
			t.Fatalf("%+v, %q", s, err)
		}
	})
}
