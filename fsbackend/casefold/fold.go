package casefold

import (
	"fmt"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

// Normalize says whether names are the same that Unicode says look the same: "é" can be one character, or an "e" and an accent.
type Normalize int

// Ways to normalize.
const (
	// NormalizeNone is NTFS' way: they are different names.
	NormalizeNone Normalize = iota
	// NormalizeNFC has names be the same whose canonical composition is. None is changed: what is listed is what was made.
	NormalizeNFC
)

var normalizeNames = [...]string{NormalizeNone: "none", NormalizeNFC: "nfc"}

// ParseNormalize returns the way called name: none or nfc.
func ParseNormalize(name string) (Normalize, error) {
	for n := range normalizeNames {
		if name == normalizeNames[n] {
			return Normalize(n), nil
		}
	}
	return 0, fmt.Errorf("normalize %q: expected none or nfc", name)
}

// String returns the way's name.
func (n Normalize) String() string {
	if n < 0 || int(n) >= len(normalizeNames) {
		return fmt.Sprintf("Normalize(%d)", int(n))
	}
	return normalizeNames[n]
}

// foldRune returns what all characters have in common that differ in case alone, by Unicode's simple case folding
// (CaseFolding.txt, status C and S): the first of them.
func foldRune(r rune) rune {
	least := r
	for other := unicode.SimpleFold(r); other != r; other = unicode.SimpleFold(other) {
		least = min(least, other)
	}
	return least
}

// appendKey appends to buf what the names have in common that are the same as name. Names that are not UTF-8 are the same as
// themselves alone.
func (n Normalize) appendKey(buf, name []byte) []byte {
	ascii := true
	for _, c := range name {
		ascii = ascii && c < utf8.RuneSelf
	}
	switch {
	case ascii:
		for _, c := range name {
			if 'a' <= c && c <= 'z' {
				c -= 'a' - 'A'
			}
			buf = append(buf, c)
		}
		return buf
	case !utf8.Valid(name):
		return append(buf, name...)
	case n == NormalizeNFC:
		// Decomposed, an accent does not hide the letter's case; and a letter that folding makes of an accent may have another place.
		return norm.NFD.Append(buf, appendFolded(nil, norm.NFD.Bytes(name))...)
	}
	return appendFolded(buf, name)
}

func appendFolded(buf, name []byte) []byte {
	for len(name) > 0 {
		r, size := utf8.DecodeRune(name)
		buf = utf8.AppendRune(buf, foldRune(r))
		name = name[size:]
	}
	return buf
}

// alone says whether no other name can be the same as name: it has no letter with a case, and nothing to compose.
func (n Normalize) alone(name []byte) bool {
	for i := 0; i < len(name); {
		r, size := rune(name[i]), 1
		if r >= utf8.RuneSelf {
			if n != NormalizeNone {
				return !utf8.Valid(name)
			}
			if r, size = utf8.DecodeRune(name[i:]); r == utf8.RuneError && size == 1 {
				return true
			}
		}
		if unicode.SimpleFold(r) != r {
			return !utf8.Valid(name[i:])
		}
		i += size
	}
	return true
}
