package casefold

import (
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

func TestKey(t *testing.T) {
	const composed, decomposed = "\u00c9t\u00e9", "E\u0301te\u0301"
	for _, row := range []struct {
		a, b      string
		none, nfc bool
	}{
		{"Readme", "README", true, true},
		{"readme", "readme1", false, false},
		{"straße", "STRASSE", false, false},
		{"straße", "STRAẞE", true, true},
		{"ΣΊΣΥΦΟΣ", "σίσυφος", true, true}, // both kinds of sigma
		{"привет", "ПРИВЕТ", true, true},
		{"I", "i", true, true},
		{"ı", "i", false, false},
		{"İ", "i", false, false},
		{"İ", "i\u0307", false, true}, // it is composed of these
		{"K", "k", true, true},        // Kelvin sign
		{"ﬁ", "fi", false, false},
		{composed, strings.ToUpper(composed), true, true},
		{composed, decomposed, false, true},
		{"ﾊ", "ﾊ", true, true},
		{"a\u0345\u0301", "a\u0301\u0345", false, true}, // marks in another order
		{"Å", "\u212b", true, true},                     // Ångström sign folds alike
		{"a\xff", "a\xff", true, true},
		{"a\xff", "A\xff", false, false},
		{"\xc3", "\xe3", false, false},
		{"a", "A\x80", false, false},
	} {
		for n, want := range map[Normalize]bool{NormalizeNone: row.none, NormalizeNFC: row.nfc} {
			a, b := string(n.appendKey(nil, []byte(row.a))), string(n.appendKey(nil, []byte(row.b)))
			if (a == b) != want {
				t.Errorf("%v: %q and %q have keys %q and %q, expected the same: %v", n, row.a, row.b, a, b, want)
			}
			if n == NormalizeNone && utf8.ValidString(row.a) && utf8.ValidString(row.b) && strings.EqualFold(row.a, row.b) != want {
				t.Errorf("%q and %q: Go's own folding says otherwise", row.a, row.b)
			}
		}
	}
}

func TestAlone(t *testing.T) {
	for name, want := range map[string][2]bool{
		"123_-.":    {true, true},
		"12a":       {false, false},
		"漢字":        {true, false},
		"漢字.txt":    {false, false},
		"ß":         {false, false},
		"a\xff":     {true, true},
		"\xffa":     {true, true},
		"漢\xff":     {true, true},
		"":          {true, true},
		"\u0301":    {true, false},
		"e\u0301":   {false, false},
		"1\u20ac":   {true, false},
		"\ufffd":    {true, false},
		"\ufffda":   {false, false},
		"漢字a\xfffg": {true, true},
	} {
		for n, want := range want {
			if got := Normalize(n).alone([]byte(name)); got != want {
				t.Errorf("%v: %q is alone: %v, expected %v", Normalize(n), name, got, want)
			}
		}
	}
}

func TestParseNormalize(t *testing.T) {
	for n := range normalizeNames {
		if got, err := ParseNormalize(Normalize(n).String()); err != nil || got != Normalize(n) {
			t.Errorf("%v: %v, %v", Normalize(n), got, err)
		}
	}
	if _, err := ParseNormalize("nfd"); err == nil || !strings.Contains(err.Error(), "nfc") {
		t.Errorf("nfd: %v, expected an error that names what there is", err)
	}
	if got := Normalize(9).String(); got != "Normalize(9)" {
		t.Errorf("9 is called %q", got)
	}
}

// FuzzKey: a key is the same as its own key, whatever the name's case; names that are alone have no other.
func FuzzKey(f *testing.F) {
	for _, seed := range []string{"Readme", "straße", "ΣΊΣΥΦΟΣ", "E\u0301te\u0301", "a\xff", "\u0345\u0301", "İı", "漢字"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if len(name) > 255 {
			return
		}
		for _, n := range []Normalize{NormalizeNone, NormalizeNFC} {
			key := string(n.appendKey(nil, []byte(name)))
			if again := string(n.appendKey(nil, []byte(key))); again != key {
				t.Fatalf("%v: %q has key %q, and that %q", n, name, key, again)
			}
			if !utf8.ValidString(name) {
				if key != name || !n.alone([]byte(name)) {
					t.Fatalf("%v: %q, which is not UTF-8, has key %q", n, name, key)
				}
				continue
			}
			if n.alone([]byte(name)) && key != name {
				t.Fatalf("%v: %q is said to be alone, but has key %q", n, name, key)
			}
			if n == NormalizeNFC {
				if other := string(n.appendKey(nil, norm.NFD.Bytes([]byte(name)))); other != key {
					t.Fatalf("%q has key %q, decomposed %q", name, key, other)
				}
			} else if !strings.EqualFold(key, name) {
				t.Fatalf("%q has key %q, which is not the same", name, key)
			}
		}
	})
}
