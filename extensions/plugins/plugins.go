// Package plugins finds the layer plug-ins that there are: programs named on the command line, or else those in a directory, and
// what is compiled in. What a program is called it says itself, so each is started once and heard.
//
// Nothing is passed over: a plug-in that cannot be used is an error, for a layer that is left out would be another tree.
package plugins

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/plugin"
)

// Config says where plug-ins are.
type Config struct {
	// Lists are programs, as --plugin has them: paths with ':' between them, "\:" being part of a path. A nil one was not given, and
	// then the programs in Dir are meant.
	Lists []string
	// Dir is a directory each of whose executable files is a plug-in. It need not exist; "" is none.
	Dir string
	// Compiled are plug-ins that are part of this program.
	Compiled []plugin.Plugin
	// Starter starts programs.
	Starter Starter
	// Timeout is how long a program's hello may take; 0 is DefaultTimeout.
	Timeout time.Duration
}

// DefaultTimeout is what Config.Timeout 0 means.
const DefaultTimeout = 30 * time.Second

// Starter starts a program with a socket as descriptor plugin.SocketFD.
type Starter interface {
	// Start returns this end of the socket, and what ends the program and returns when nothing of it is left.
	Start(ctx context.Context, path string) (socket *os.File, end func(), err error)
}

// Plugin is one that there is.
type Plugin struct {
	// Name is what lowerdir calls it.
	Name string
	// Path is the program's; "" for one that is compiled in.
	Path string
	// Needs are what the program says that it cannot do without.
	Needs plugin.Needs
	// Compiled is the plug-in itself where it is compiled in.
	Compiled plugin.Plugin
}

// where says what p is, for people.
func (p *Plugin) where() string {
	if p.Path == "" {
		return "the one that is compiled in"
	}
	return p.Path
}

// Set are plug-ins by name.
type Set map[string]Plugin

// Find returns the plug-in called name.
func (s Set) Find(name string) (Plugin, error) {
	p, ok := s[name]
	if !ok {
		known := "there are none: name its program with --plugin, or put it into " + DefaultDir()
		if len(s) > 0 {
			known = "expected one of " + strings.Join(slices.Sorted(maps.Keys(s)), ", ")
		}
		return p, fmt.Errorf("layer plug-in %q is not known: %s", name, known)
	}
	return p, nil
}

// Discover finds the plug-ins that cfg names, starts each program to hear its name, and ends it.
func Discover(ctx context.Context, cfg Config) (Set, error) {
	paths, err := cfg.paths()
	if err != nil {
		return nil, err
	}
	set := make(Set)
	for _, c := range cfg.Compiled {
		if err := set.add(Plugin{Name: c.Name(), Compiled: c}); err != nil {
			return nil, err
		}
	}
	for _, path := range paths {
		if err := usable(path); err != nil {
			return nil, fmt.Errorf("layer plug-in %s: %w", path, err)
		}
	}
	for _, path := range paths {
		hello, err := cfg.hear(ctx, path)
		if err != nil {
			return nil, fmt.Errorf("layer plug-in %s: %w", path, err)
		}
		if err := set.add(Plugin{Name: hello.Name, Path: path, Needs: hello.Needs}); err != nil {
			return nil, err
		}
	}
	return set, nil
}

func (s Set) add(p Plugin) error {
	if !plugin.ValidPluginName(p.Name) {
		return fmt.Errorf("layer plug-in %q: expected a name of 1 to 64 letters, digits, '.', '_' and '-'", p.Name)
	}
	if other, ok := s[p.Name]; ok {
		return fmt.Errorf("two layer plug-ins are called %s, %s and %s: leave one of them out", p.Name, other.where(), p.where())
	}
	s[p.Name] = p
	return nil
}

// paths returns the programs that are meant.
func (c *Config) paths() ([]string, error) {
	if c.Lists == nil {
		return inDir(c.Dir)
	}
	var all []string
	for _, list := range c.Lists {
		for _, path := range Split(list) {
			if path == "" {
				return nil, fmt.Errorf("layer plug-ins %q: expected paths of programs with ':' between them", list)
			}
			all = append(all, path)
		}
	}
	return all, nil
}

// Split takes a list with ':' between its parts apart, as lowerdir and --plugin are. In a part, "\:" is a colon and "\\" a backslash.
func Split(list string) []string {
	var parts []string
	var part strings.Builder
	for i := 0; i < len(list); i++ {
		switch {
		case list[i] == '\\' && i+1 < len(list) && (list[i+1] == ':' || list[i+1] == '\\'):
			i++
			part.WriteByte(list[i])
		case list[i] == ':':
			parts = append(parts, part.String())
			part.Reset()
		default:
			part.WriteByte(list[i])
		}
	}
	return append(parts, part.String())
}

// inDir returns the executable files in dir, by name.
func inDir(dir string) ([]string, error) {
	if dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for layer plug-ins: %w", err)
	}
	var paths []string
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("look for layer plug-ins: %w", err)
		}
		if !info.IsDir() && info.Mode()&0o111 != 0 {
			paths = append(paths, path)
		}
	}
	return paths, nil
}

// usable says what is wrong with a program before it is started.
func usable(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return errors.New("expected a program, it is no regular file")
	case info.Mode()&0o111 == 0:
		return errors.New("expected a program, it is not executable (chmod +x)")
	case info.Mode()&0o002 != 0:
		return errors.New("everybody may change it (chmod o-w)")
	}
	return nil
}

// hear starts the program at path for as long as it takes to hear its hello.
func (c *Config) hear(ctx context.Context, path string) (*plugin.Hello, error) {
	timeout := c.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	socket, end, err := c.Starter.Start(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	defer end()
	conn, err := plugin.NewConn(socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	hello, err := conn.Greet(ctx, &plugin.Hello{Proto: plugin.Proto, Name: "sluice", MaxRequests: plugin.MaxRequests})
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
		return nil, errors.New("it ended without a hello: expected a program that speaks the layer plug-ins' protocol on descriptor 3")
	}
	return hello, err
}
