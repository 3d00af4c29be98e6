// Package archtest holds the rules of the house that a compiler does not: which room may import which, and where unsafe
// code, cgo and the end of the process may be. Its test applies them to the module.
package archtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Rules are what Check holds packages against. A room is a package's path inside the module; "dir/..." stands for dir and
// all below it, and "..." for every room. The longest key that fits a package is its row.
type Rules struct {
	// Module is the module's path.
	Module string
	// Imports says for each room which rooms it may import, tests apart. A package without a row is a violation.
	Imports map[string][]string
	// Libraries says for modules from outside, by the start of the import path, which rooms alone may import them.
	Libraries map[string][]string
	// Cgo are the rooms that may import "C".
	Cgo []string
}

// Package is a package of the module, as go list prints it.
type Package struct {
	ImportPath string
	Name       string
	Dir        string
}

// List returns the packages of the module in dir.
func List(dir string) ([]Package, error) {
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Name,Dir", "./...")
	cmd.Dir = dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list packages: %w: %s", err, stderr.String())
	}
	var pkgs []Package
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p Package
		switch err := dec.Decode(&p); {
		case errors.Is(err, io.EOF):
			return pkgs, nil
		case err != nil:
			return nil, fmt.Errorf("list packages: %w", err)
		}
		pkgs = append(pkgs, p)
	}
}

// Check returns the violations in pkgs, each a line that names the file and the rule. It reads every Go file there is,
// whatever its build constraints.
func (r *Rules) Check(pkgs []Package) ([]string, error) {
	var found []string
	for _, p := range pkgs {
		room := r.room(p.ImportPath)
		key, ok := r.row(room)
		if !ok {
			found = append(found, fmt.Sprintf("%s: is in no row of the import table", room))
		}
		files, err := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		if err != nil {
			return nil, fmt.Errorf("list files of %s: %w", room, err)
		}
		for _, name := range files {
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
			if err != nil {
				return nil, fmt.Errorf("parse: %w", err)
			}
			c := fileCheck{Rules: r, room: room, row: key, program: p.Name == "main", fset: fset, file: f, name: filepath.Base(name)}
			c.run()
			found = append(found, c.found...)
		}
	}
	return found, nil
}

// room is a package's path inside the module, "." for its root; other modules' paths stay as they are.
func (r *Rules) room(importPath string) string {
	if importPath == r.Module {
		return "."
	}
	return strings.TrimPrefix(importPath, r.Module+"/")
}

// row is the key of the import table for room.
func (r *Rules) row(room string) (key string, ok bool) {
	for _, k := range slices.SortedFunc(maps.Keys(r.Imports), func(a, b string) int { return len(b) - len(a) }) {
		if covers(k, room) {
			return k, true
		}
	}
	return "", false
}

// covers says whether pattern stands for room.
func covers(pattern, room string) bool {
	if pattern == "..." {
		return true
	}
	if dir, ok := strings.CutSuffix(pattern, "/..."); ok {
		return room == dir || strings.HasPrefix(room, dir+"/")
	}
	return pattern == room
}

func anyCovers(patterns []string, room string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return covers(p, room) })
}

// fileCheck is the check of one file.
type fileCheck struct {
	*Rules
	room, row string
	program   bool // package main
	fset      *token.FileSet
	file      *ast.File
	name      string
	found     []string
}

func (c *fileCheck) report(pos token.Pos, format string, args ...any) {
	where := fmt.Sprintf("%s:%d: ", path.Join(c.room, c.name), c.fset.Position(pos).Line)
	c.found = append(c.found, where+fmt.Sprintf(format, args...))
}

func (c *fileCheck) run() {
	test := strings.HasSuffix(c.name, "_test.go")
	for _, spec := range c.file.Imports {
		c.checkImport(spec, test)
	}
	if test || c.program {
		return // they may end the process, and are nobody's library
	}
	for _, decl := range c.file.Decls {
		if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
			c.report(f.Pos(), "func init: a library does nothing by being imported")
		}
	}
	ast.Inspect(c.file, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if x, ok := sel.X.(*ast.Ident); ok && x.Name == "os" && sel.Sel.Name == "Exit" {
			c.report(sel.Pos(), "os.Exit: only a program ends the process; return an error")
		}
		return true
	})
}

func (c *fileCheck) checkImport(spec *ast.ImportSpec, test bool) {
	imported, err := strconv.Unquote(spec.Path.Value)
	if err != nil {
		c.report(spec.Pos(), "import %s: %v", spec.Path.Value, err)
		return
	}
	switch {
	case imported == "unsafe":
		if !strings.HasSuffix(c.name, "_unsafe.go") && !strings.HasSuffix(c.name, "_unsafe_test.go") {
			c.report(spec.Pos(), "import unsafe: only in files named *_unsafe.go")
		}
	case imported == "C":
		if !anyCovers(c.Cgo, c.room) {
			c.report(spec.Pos(), "import C: cgo is only for %s", strings.Join(c.Cgo, ", "))
		}
	case test:
	case imported == "log" && !c.program:
		c.report(spec.Pos(), "import log: a library logs to the *slog.Logger it is given and does not end the process")
	case imported == c.Module || strings.HasPrefix(imported, c.Module+"/"):
		if to := c.Rules.room(imported); c.row != "" && !anyCovers(c.Imports[c.row], to) {
			c.report(spec.Pos(), "%s may not import %s: the import table does not say so", c.room, to)
		}
	default:
		for library, rooms := range c.Libraries {
			if (imported == library || strings.HasPrefix(imported, library+"/")) && !anyCovers(rooms, c.room) {
				c.report(spec.Pos(), "import %s: only %s may", imported, strings.Join(rooms, ", "))
			}
		}
	}
}
