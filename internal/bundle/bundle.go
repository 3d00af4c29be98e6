// Package bundle reads the configuration of an OCI container (runtime-spec) and plans a share from it: what is served
// where, from what, to whom. It looks at the files of the host, but opens none for writing and changes none.
//
// What the configuration says about the host is the operator's and is believed. What is in the root filesystem may come
// from anybody: a symbolic link there leads somewhere in it, and nowhere else.
package bundle

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"unicode/utf8"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// ConfigFile is the name of the configuration in a bundle.
	ConfigFile = "config.json"
	// MaxConfig is the most that a configuration can be, in bytes.
	MaxConfig = 16 << 20
)

// versionShape is semantic versioning's, of the major version that this package knows.
var versionShape = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^1\.[0-9]+\.[0-9]+([-+][0-9A-Za-z.+-]+)?$`) })

// Bundle is a configuration and the directory that its relative paths start from.
type Bundle struct {
	// Dir is absolute, or "" if there is no bundle.
	Dir  string
	Spec *specs.Spec
}

// Load reads the configuration of the bundle bundleDir, or the file specFile, whose directory is then the bundle's. One of
// the two is "".
func Load(bundleDir, specFile string) (*Bundle, error) {
	switch {
	case bundleDir != "" && specFile != "":
		return nil, errors.New("a bundle and a spec exclude each other: give one")
	case bundleDir == "" && specFile == "":
		return nil, errors.New("neither a bundle nor a spec: give one")
	case bundleDir != "":
		specFile = filepath.Join(bundleDir, ConfigFile)
	}
	file, err := filepath.Abs(specFile)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", specFile, err)
	}
	data, err := readConfig(file)
	if err != nil {
		return nil, err
	}
	spec, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s:%w", file, err)
	}
	return &Bundle{Dir: filepath.Dir(file), Spec: spec}, nil
}

// FromDir returns the bundle that a plain directory is: a root and nothing else.
func FromDir(dir string, readonly bool) *Bundle {
	return &Bundle{Spec: &specs.Spec{Version: specs.Version, Root: &specs.Root{Path: dir, Readonly: readonly}}}
}

func readConfig(file string) ([]byte, error) {
	// O_NONBLOCK: a FIFO must not hold us up. It could not be read a second time in the sandbox either.
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file: expected the JSON of an OCI runtime configuration", file)
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxConfig+1))
	if err != nil {
		return nil, err
	}
	if len(data) > MaxConfig {
		return nil, fmt.Errorf("%s is larger than %d MiB: expected the JSON of an OCI runtime configuration", file, MaxConfig>>20)
	}
	return data, nil
}

// parse returns errors that start with line and column, for a file's name to be put before them.
func parse(data []byte) (*specs.Spec, error) {
	// The JSON decoder would put U+FFFD for what is not UTF-8, in paths too.
	if !utf8.Valid(data) {
		valid := 0
		for r, n := rune(0), 0; ; valid += n {
			if r, n = utf8.DecodeRune(data[valid:]); r == utf8.RuneError && n <= 1 {
				break
			}
		}
		return nil, fmt.Errorf("%s: not UTF-8", position(data, valid))
	}
	var spec specs.Spec
	var (
		syntaxError *json.SyntaxError
		typeError   *json.UnmarshalTypeError
	)
	switch err := json.Unmarshal(data, &spec); {
	case errors.As(err, &syntaxError):
		return nil, fmt.Errorf("%s: %w", position(data, int(syntaxError.Offset)-1), err)
	case errors.As(err, &typeError):
		return nil, fmt.Errorf("%s: %s is a JSON %s, which does not fit %v", position(data, int(typeError.Offset)-1), cmp.Or(typeError.Field, "it"), typeError.Value, typeError.Type)
	case err != nil:
		return nil, fmt.Errorf("1:1: %w", err)
	case spec.Version == "":
		return nil, errors.New("1:1: ociVersion is missing: expected the JSON of an OCI runtime configuration, with a version of 1.0.0 or later")
	case !versionShape().MatchString(spec.Version):
		return nil, fmt.Errorf("1:1: ociVersion %q: expected 1.0.0 or later, below 2", spec.Version)
	}
	return &spec, nil
}

// position is the line and column of data[offset], counted from 1 and in bytes.
func position(data []byte, offset int) string {
	before := data[:min(max(offset, 0), len(data))]
	return fmt.Sprintf("%d:%d", bytes.Count(before, []byte("\n"))+1, len(before)-bytes.LastIndexByte(before, '\n'))
}
