package report

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"
)

// WriteBenchmark writes Go benchmark text, a line for each slice, for benchstat: `benchstat -col /server` compares the servers.
func (r *Report) WriteBenchmark(w io.Writer) error {
	b := bufio.NewWriter(w)
	for _, m := range r.Machine {
		fmt.Fprintf(b, "%s: %s\n", m.Name, m.Text)
	}
	fmt.Fprintln(b)
	shown := r.shownMetrics()
	for _, s := range r.Samples {
		fmt.Fprintf(b, "Benchmark%s/condition=%s/server=%s %d", camel(s.Workload), s.Condition, s.Server, max(s.Ops, 1))
		for _, m := range shown {
			if v, ok := s.Values[m.unit]; ok {
				fmt.Fprintf(b, " %g %s", v, m.unit)
			}
		}
		fmt.Fprintln(b)
	}
	return b.Flush()
}

// camel makes a workload's name a benchmark's, which begins with a capital and has no dash that could be one of GOMAXPROCS.
func camel(name string) string {
	var b strings.Builder
	for part := range strings.FieldsFuncSeq(name, func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) }) {
		b.WriteString(strings.ToUpper(part[:1]) + part[1:])
	}
	return b.String()
}

// WriteMarkdown writes the report for people. charts are files to show, which lie beside it.
func (r *Report) WriteMarkdown(w io.Writer, charts []Chart) error {
	b := bufio.NewWriter(w)
	fmt.Fprint(b, "# Benchmark\n\n")
	list(b, r.Machine)
	fmt.Fprint(b, "\nServers:\n\n")
	list(b, r.Servers)
	fmt.Fprintf(b, `
A value is the median of its rounds, ± how far the %.0f %% interval of the median reaches from it. A ratio is the median of the
ratios of single rounds, with its interval in brackets; below 1 is better for %s. ≈ is before a ratio that may as well be 1.
`, Confidence*100, r.subject())
	if len(r.Failures) > 0 {
		fmt.Fprint(b, "\n## What failed\n\n")
		for _, f := range r.Failures {
			fmt.Fprintf(b, "* %s\n", strings.ReplaceAll(strings.TrimSpace(f), "\n", "\n  "))
		}
	}
	r.writeLimits(b)
	for _, condition := range r.Conditions {
		fmt.Fprintf(b, "\n## %s: %s\n", condition.Name, condition.Text)
		for _, c := range charts {
			if c.condition == condition.Name {
				fmt.Fprintf(b, "\n![%s](%s)\n", c.title, c.File)
			}
		}
		for _, m := range r.shownMetrics() {
			r.writeTable(b, condition.Name, m)
		}
	}
	fmt.Fprint(b, "\n## Workloads\n\n")
	list(b, r.Workloads)
	return b.Flush()
}

func list(w io.Writer, subjects []Subject) {
	for _, s := range subjects {
		fmt.Fprintf(w, "* `%s`: %s\n", s.Name, s.Text)
	}
}

// writeTable writes the values of all servers in one metric, and what the subject's are to the others'.
func (r *Report) writeTable(w io.Writer, condition string, m metric) {
	shown := r.workloadsOf(key{condition: condition, metric: m.unit})
	if len(shown) == 0 {
		return
	}
	columns := slices.Concat([]string{r.subject()}, r.peers())
	columns = slices.DeleteFunc(columns, func(n string) bool { return !r.has(key{condition: condition, server: n, metric: m.unit}) })
	ratios := slices.Clone(columns[min(1, len(columns)):])
	if !m.less {
		// A rate's floor is another quantity: a loop's, at depth 1.
		ratios = nil
	}
	title := m.title
	if m.shown != "" {
		title += ", " + m.shown
	}
	fmt.Fprintf(w, "\n### %s\n\n| |", title)
	for _, c := range columns {
		fmt.Fprintf(w, " %s |", c)
	}
	for _, c := range ratios {
		fmt.Fprintf(w, " ÷ %s |", c)
	}
	fmt.Fprintf(w, "\n|---|%s\n", strings.Repeat("---|", len(columns)+len(ratios)))
	for _, workload := range shown {
		fmt.Fprintf(w, "| %s |", workload)
		for _, c := range columns {
			fmt.Fprintf(w, " %s |", r.valueCell(key{workload, condition, c, m.unit}, m))
		}
		for _, c := range ratios {
			fmt.Fprintf(w, " %s |", r.ratioCell(key{workload, condition, r.subject(), m.unit}, c))
		}
		fmt.Fprintln(w)
	}
}

func (r *Report) valueCell(k key, m metric) string {
	s, ok := r.value(k)
	if !ok {
		return "–"
	}
	cell := number(s.Median / m.scale)
	if s.interval() != "" && s.Median > 0 {
		cell += fmt.Sprintf(" ±%.0f %%", 100*max(s.High-s.Median, s.Median-s.Low)/s.Median)
	}
	return cell
}

func (r *Report) ratioCell(k key, than string) string {
	s, ok := r.ratio(k, than)
	if !ok {
		return "–"
	}
	return ratioText(s)
}

func ratioText(s Summary) string {
	cell := number(s.Median)
	if s.noise() {
		cell = "≈" + cell
	}
	if i := s.interval(); i != "" {
		cell += " (" + i + ")"
	}
	return cell
}

// writeLimits writes a table for each group of limits, with a row for each workload and a column for each comparison.
func (r *Report) writeLimits(w io.Writer) {
	if len(r.Limits) == 0 {
		return
	}
	fmt.Fprint(w, "\n## What must hold\n")
	type column struct{ condition, metric, server, than string }
	columnOf := func(l Limit) column { return column{l.Condition, l.Metric, l.Server, l.Than} }
	var groups, shown []string
	for _, l := range r.Limits {
		if !slices.Contains(groups, l.Group) {
			groups = append(groups, l.Group)
		}
	}
	var met, unsure, missed, unmeasured int
	for _, group := range groups {
		var columns []column
		shown = shown[:0]
		for _, l := range r.Limits {
			if l.Group != group {
				continue
			}
			if !slices.Contains(columns, columnOf(l)) {
				columns = append(columns, columnOf(l))
			}
			if !slices.Contains(shown, l.Workload) {
				shown = append(shown, l.Workload)
			}
		}
		fmt.Fprintf(w, "\n%s\n\n| |", group)
		for _, c := range columns {
			server := ""
			if c.server != "" {
				server = c.server + " "
			}
			fmt.Fprintf(w, " %s %s %s÷ %s |", c.condition, c.metric, server, c.than)
		}
		fmt.Fprintf(w, "\n|---|%s\n", strings.Repeat("---|", len(columns)))
		for _, workload := range shown {
			fmt.Fprintf(w, "| %s |", workload)
			for _, c := range columns {
				i := slices.IndexFunc(r.Limits, func(l Limit) bool { return l.Group == group && l.Workload == workload && columnOf(l) == c })
				if i < 0 {
					fmt.Fprint(w, " |")
					continue
				}
				v := r.verdict(r.Limits[i])
				switch {
				case !v.Measured:
					unmeasured++
					fmt.Fprintf(w, " ≤ %s: %s |", number(v.Max), v)
					continue
				case v.met():
					met++
				default:
					missed++
				}
				if !v.sure() {
					unsure++
				}
				fmt.Fprintf(w, " %s ≤ %s: %s |", ratioText(v.Value), number(v.Max), v)
			}
			fmt.Fprintln(w)
		}
	}
	fmt.Fprintf(w, "\n%d met, %d not met (of both, %d within noise: the interval reaches over the limit), %d not measured.\n", met, missed, unsure, unmeasured)
}
