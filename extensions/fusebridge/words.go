package fusebridge

import (
	"errors"
	"fmt"
	"strings"
)

// split takes a command apart into words as a shell does, with quotes and backslashes, and nothing else of a shell: there are no
// variables, patterns or redirections, and characters that would be such are refused where they are not quoted, for somebody expects more.
func split(command string) ([]string, error) {
	if strings.ContainsRune(command, 0) {
		return nil, errors.New("a NUL: expected none")
	}
	var words []string
	var word strings.Builder
	in := false // a word has begun
	text := []byte(command)
	for i := 0; i < len(text); i++ {
		switch c := text[i]; c {
		case ' ', '\t', '\n':
			if in {
				words = append(words, word.String())
				word.Reset()
			}
			in = false
		case '\'', '"':
			in = true
			end, err := quoted(text[i+1:], c, &word)
			if err != nil {
				return nil, err
			}
			i += 1 + end
		case '\\':
			if i++; i == len(text) {
				return nil, errors.New("a backslash at the end: expected the character that it is for")
			}
			in = true
			word.WriteByte(text[i])
		case '$', '`', '|', '&', ';', '<', '>', '*', '?', '#':
			return nil, fmt.Errorf("%q outside of quotes: no shell runs the command, expected it in quotes, or sh -c", c)
		default:
			in = true
			word.WriteByte(c)
		}
	}
	if in {
		words = append(words, word.String())
	}
	return words, nil
}

// quoted takes up what is in quotes and returns where their end is. In double ones a backslash is for a quote or another backslash.
func quoted(rest []byte, quote byte, word *strings.Builder) (end int, err error) {
	for i := 0; i < len(rest); i++ {
		switch c := rest[i]; {
		case c == quote:
			return i, nil
		case c == '\\' && quote == '"' && i+1 < len(rest) && (rest[i+1] == '"' || rest[i+1] == '\\'):
			i++
			word.WriteByte(rest[i])
		default:
			word.WriteByte(c)
		}
	}
	return 0, fmt.Errorf("a quote %c without its end: expected another one", quote)
}
