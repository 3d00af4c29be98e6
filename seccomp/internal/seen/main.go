// Seen puts the reports of many traced daemons together: which rules of the daemon's own were needed, and in which
// surroundings. See `make seccomp-seen`.
package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: seen DIR FILE")
		os.Exit(2)
	}
	if err := merge(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "seen:", err)
		os.Exit(1)
	}
}

// merge writes to file what the reports in dir have in common: SURROUNDINGS.*.txt each.
func merge(dir, file string) error {
	paths, err := filepath.Glob(filepath.Join(dir, "*.txt"))
	if err != nil {
		return err
	}
	seen := make(map[string]map[string]bool) // surroundings by row
	reports := 0
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if len(text) == 0 {
			continue // the daemon was killed, which some tests do
		}
		reports++
		surroundings, _, _ := strings.Cut(filepath.Base(path), ".")
		rows, err := needed(string(text))
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, row := range rows {
			if seen[row] == nil {
				seen[row] = make(map[string]bool)
			}
			seen[row][surroundings] = true
		}
	}
	if reports == 0 {
		return fmt.Errorf("no report in %s: expected those of a traced test run", dir)
	}
	fmt.Printf("%d rules from %d reports of %d daemons\n", len(seen), reports, len(paths))
	var b bytes.Buffer
	b.WriteString("# Which rules the guest and escape tests have needed, and where: `make seccomp-seen`. TestBaseIsWhatWasSeen reads it.\n")
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, row := range slices.Sorted(maps.Keys(seen)) {
		fmt.Fprintf(t, "%s\t%s\n", row, strings.Join(slices.Sorted(maps.Keys(seen[row])), ","))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return os.WriteFile(file, b.Bytes(), 0o644)
}

var (
	columns = regexp.MustCompile(` {2,}`)
	// aProcess is the condition on the daemon's own process id, which differs from run to run.
	aProcess = regexp.MustCompile(`^arg0 & 0xffffffff == 0x[0-9a-f]+$`)
)

// needed returns the rows of a report for what was refused and for the daemon's own clauses that were needed: owner, system
// call and conditions, with tabs between.
func needed(report string) ([]string, error) {
	var rows []string
	for line := range strings.Lines(report) {
		f := columns.Split(strings.TrimSuffix(line, "\n"), -1)
		switch {
		case len(f) == 4 && f[0] == "refuse":
			// Extensions are tried with calls that they do not declare.
			if f[2] == "(none)" {
				rows = append(rows, "refused\t"+f[1]+"\t"+f[2])
			}
		case len(f) == 5 && f[0] == "allow":
			if f[4] == "0" || f[3] != "base" && f[3] != "passthrough" {
				continue
			}
			if f[1] == "kill" || f[1] == "tgkill" {
				f[2] = aProcess.ReplaceAllString(f[2], "arg0 & 0xffffffff == PID")
			}
			rows = append(rows, f[3]+"\t"+f[1]+"\t"+f[2])
		default:
			return nil, fmt.Errorf("line %q: expected one of --seccomp-report", line)
		}
	}
	return rows, nil
}
