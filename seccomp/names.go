package seccomp

import (
	"cmp"
	"runtime"
	"slices"
	"strings"
)

//go:generate go run ./internal/gen names_table.go

// syscallNumbers is a row of the table: one number for each of arches.
type syscallNumbers struct {
	name    string
	numbers [2]int16
}

// Number returns the number of a system call on this architecture, and false if it has none of that name. libseccomp knows
// fewer names than the kernel has calls, so that filters are better made with these numbers than with its own.
func Number(name string) (int, bool) {
	return number(runtime.GOARCH, name)
}

// nameOf returns the name of a system call on this architecture, "" if it has none.
func nameOf(nr int) string {
	if column := slices.Index(arches, runtime.GOARCH); column >= 0 && nr >= 0 {
		for _, s := range syscalls {
			if int(s.numbers[column]) == nr {
				return s.name
			}
		}
	}
	return ""
}

func number(arch, name string) (int, bool) {
	column := slices.Index(arches, arch)
	row, known := lookup(name)
	if column < 0 || !known || syscalls[row].numbers[column] < 0 {
		return 0, false
	}
	return int(syscalls[row].numbers[column]), true
}

// lookup finds name in the table, whichever architecture has it.
func lookup(name string) (row int, known bool) {
	return slices.BinarySearchFunc(syscalls, name, func(s syscallNumbers, name string) int { return cmp.Compare(s.name, name) })
}

// similar returns the name that was probably meant by one that no architecture has, "" if there is none.
func similar(name string) string {
	plain := strings.ToLower(name)
	for _, prefix := range []string{"__nr_", "sys_"} {
		plain = strings.TrimPrefix(plain, prefix)
	}
	best, least := "", 3 // more typing errors than two make another word
	for _, s := range syscalls {
		// Half of a short name is not an error in typing.
		if d := distance(plain, s.name); d < least && 2*d < len(s.name) {
			best, least = s.name, d
		}
	}
	return best
}

// distance is how many letters have to be put in, taken out or replaced to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
