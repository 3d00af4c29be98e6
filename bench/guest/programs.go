package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// guestPath is where programs is in the guest: those of the host, then busybox.
const guestPath = "/usr/bin:/bin"

// sourceArchive is the archive that tar unpacks. Like the programs it is in the guest's initramfs, so that only what is measured goes
// through the server that is measured.
const sourceArchive = "/bench/source.tar"

// guestFiles returns what the guest has beside its usual programs, by the path in the guest: the host's programs with their libraries,
// the Go toolchain with the packages that the module uses, and the archive.
func guestFiles(f fixtures) (map[string]string, error) {
	files := map[string]string{sourceArchive: filepath.Join(f.dir, archiveFile)}
	for _, name := range []string{"env", "find", "fio", "git", "rm", "tar"} {
		if err := addProgram(files, name); err != nil {
			return nil, err
		}
	}
	return files, addToolchain(files, f.goroot, filepath.Join(f.dir, moduleDir))
}

// addProgram adds a program of the host and the libraries it is linked to.
func addProgram(files map[string]string, name string) error {
	program, err := exec.LookPath(name)
	if err != nil {
		return fmt.Errorf("%s is not installed, run `make setup-bench`: %w", name, err)
	}
	files["/usr/bin/"+name] = program
	text, err := output("", "ldd", program)
	if err != nil {
		return err
	}
	for _, library := range libraries(text) {
		files[library] = library
	}
	return nil
}

// libraries returns the files that ldd names, the loader among them.
func libraries(ldd string) []string {
	var found []string
	for line := range strings.Lines(ldd) {
		if _, file, ok := strings.Cut(line, "=>"); ok {
			line = file
		}
		if fields := strings.Fields(line); len(fields) > 0 && filepath.IsAbs(fields[0]) {
			found = append(found, fields[0])
		}
	}
	return found
}

// addToolchain adds what it takes to build the module in dir.
func addToolchain(files map[string]string, goroot, dir string) error {
	dirs, err := output(dir, "go", "list", "-deps", "-f", "{{if .Standard}}{{.Dir}}{{end}}", ".")
	if err != nil {
		return err
	}
	for _, name := range append(strings.Fields(dirs), filepath.Join(goroot, "pkg", "include")) {
		entries, err := os.ReadDir(name)
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if path := filepath.Join(name, entry.Name()); entry.Type().IsRegular() && !strings.HasSuffix(path, "_test.go") {
				files[path] = path
			}
		}
	}
	tools, err := output(dir, "go", "env", "GOTOOLDIR")
	if err != nil {
		return err
	}
	for _, path := range []string{
		filepath.Join(goroot, "VERSION"), filepath.Join(goroot, "go.env"), filepath.Join(goroot, "bin", "go"),
		filepath.Join(tools, "compile"), filepath.Join(tools, "asm"), filepath.Join(tools, "link"),
	} {
		files[path] = path
	}
	return nil
}

// output returns what a program of the host prints.
func output(dir, program string, args ...string) (string, error) {
	cmd := exec.Command(program, args...)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w\n%s", err, exit.Stderr)
		}
		return "", fmt.Errorf("%s %q: %w", program, args, err)
	}
	return strings.TrimSpace(string(out)), nil
}
