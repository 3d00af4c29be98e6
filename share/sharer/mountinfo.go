package sharer

import (
	"fmt"
	"strings"
)

// mountPoint is a line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
type mountPoint struct {
	path     string
	readOnly bool // of the mount, not the file system
	shared   bool // it propagates what is mounted below it
}

// parseMountinfo reads the file, which has later mounts after earlier ones.
func parseMountinfo(content []byte) ([]mountPoint, error) {
	var mounts []mountPoint
	for line := range strings.Lines(string(content)) {
		// ID parent major:minor root mount-point options [tag[:value]...] - type source super-options
		fields := strings.Fields(line)
		if len(fields) < 6 {
			return nil, fmt.Errorf("read mountinfo: line %q has %d fields, expected 6 at least", line, len(fields))
		}
		m := mountPoint{path: unescapeOctal(fields[4])}
		for option := range strings.SplitSeq(fields[5], ",") {
			m.readOnly = m.readOnly || option == "ro"
		}
		for _, tag := range fields[6:] {
			if tag == "-" {
				break
			}
			m.shared = m.shared || strings.HasPrefix(tag, "shared:")
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

// unescapeOctal reads \ooo, which mountinfo has for blanks and backslashes.
func unescapeOctal(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && octal(s[i+1]) && octal(s[i+2]) && octal(s[i+3]) {
			b.WriteByte(s[i+1]<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func octal(c byte) bool { return '0' <= c && c <= '7' }

// below says whether path is dir or in it.
func below(dir, path string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}
