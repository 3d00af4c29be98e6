// Package configfile reads what the daemon's command line is too short for: the file of --config, and the text of --share.
//
// It reports all that is wrong with a file, with line and key. What depends on the host or on other rooms (whether a group
// exists, what an operation or an extension is called, how capabilities and maps of ids are spelled) is for others to check;
// with File.Wrong they report it in the same form.
package configfile

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/config"
)

// MaxSize is the size of the largest file that is read, in bytes.
const MaxSize = 1 << 20

// File is a configuration file. What it does not say has the default of the option of the same name on the command line,
// which is the zero value, but for RlimitNofile.
type File struct {
	// Name is what the file is called in errors.
	Name string `toml:"-"`
	// Notes are what is questionable and no error, a line each.
	Notes []string `toml:"-"`

	// ControlSocket is where the control API is served; "" says nothing about it. ControlGroup names a group that may connect.
	ControlSocket string `toml:"control-socket"`
	ControlGroup  string `toml:"control-group"`
	// NydusShare is the tag of the share that /api/v1/mount acts on, one of Shares.
	NydusShare string `toml:"nydus-share"`
	// Extensions are those that grafts may name later, besides those that Shares name.
	Extensions []string `toml:"extensions"`

	// StateDir is where the daemon keeps what outlives it, Plugins are executables that serve layers; see config.Config.
	StateDir string   `toml:"state-dir"`
	Plugins  []string `toml:"plugins"`

	// See config.Config, which has the same fields. The texts of UIDMap, GIDMap and ModCaps have not been checked.
	Sandbox       config.Sandbox  `toml:"sandbox"`
	UIDMap        []string        `toml:"uid-map"`
	GIDMap        []string        `toml:"gid-map"`
	ModCaps       string          `toml:"modcaps"`
	Seccomp       config.Seccomp  `toml:"seccomp"`
	SeccompReport string          `toml:"seccomp-report"`
	RlimitNofile  int64           `toml:"rlimit-nofile"`
	LogLevel      config.LogLevel `toml:"log-level"`
	Syslog        bool            `toml:"syslog"`

	// VSocks and HybridVSocks are further listeners of the control API.
	VSocks       []VSock         `toml:"vsock"`
	HybridVSocks []HybridVSock   `toml:"hybrid-vsock"`
	Shares       []api.ShareSpec `toml:"share"`

	tree *tree
}

// VSock is an AF_VSOCK listener of the control API.
type VSock struct {
	// Port is from 1 to 4294967294.
	Port uint32 `toml:"port"`
	// CIDs are the guests that may connect, at least one; 4294967295 (VMADDR_CID_ANY) is all.
	CIDs []uint32 `toml:"cids"`
	// Allow are the operations that may be called, at least one. Their names have not been checked.
	Allow []string `toml:"allow"`
	// Shares are the tags of the shares there are for who connects. They need not exist yet.
	Shares []string `toml:"shares"`
}

// HybridVSock is a listener on a Unix socket beside that of a VMM, as Cloud Hypervisor and Firecracker have it.
type HybridVSock struct {
	// Path is that of the VMM's socket; the listener's is Listen.
	Path string `toml:"path"`
	// Port, Allow and Shares are as in VSock.
	Port   uint32   `toml:"port"`
	Allow  []string `toml:"allow"`
	Shares []string `toml:"shares"`
}

// Listen is the path of the Unix socket to which the VMM connects guests that ask for the port.
func (h *HybridVSock) Listen() string { return fmt.Sprintf("%s_%d", h.Path, h.Port) }

// DefaultSocket is where a share without a socket of its own is served: beside the control socket.
func DefaultSocket(controlSocket, tag string) string {
	return filepath.Join(filepath.Dir(controlSocket), tag+".sock")
}

// Load reads the file at path. See Parse.
func Load(path string) (*File, error) {
	// O_NONBLOCK, or a pipe would be waited for before it can be refused.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("read configuration: %w", err)
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s: it is no regular file: expected a file in TOML", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	file, err := Parse(path, data)
	if err == nil && st.Mode().Perm()&0o022 != 0 {
		file.Notes = append(file.Notes, fmt.Sprintf("%s: others than its owner can write to it (mode %#o) and so have any file of the host served: expected mode 0644 or less",
			path, st.Mode().Perm()))
	}
	return file, err
}

// Parse reads data, the content of a file that errors are to call name. The error is a *Problem or several joined
// (errors.Join), a line each, in the order of their lines.
func Parse(name string, data []byte) (*File, error) {
	r := report{file: name}
	if len(data) > MaxSize {
		r.at(1, "", "the file has more than %d bytes: expected fewer", MaxSize)
		return nil, r.err()
	}
	// The tree has the lines; what may be defined twice and what not is go-toml's to say.
	r.tree = parseTree(data)
	if err := toml.Unmarshal(data, new(map[string]any)); err != nil {
		r.syntax(data, err)
		return nil, r.err()
	}
	f := &File{Name: name, RlimitNofile: config.DefaultNofile, tree: r.tree}
	r.table(&r.tree.root, reflect.ValueOf(f).Elem(), "", "")
	r.check(f)
	if err := r.err(); err != nil {
		return nil, err
	}
	return f, nil
}

// Wrong is an error about the value of key, such as "vsock[0].allow[1]".
func (f *File) Wrong(key, problem string) error {
	r := report{file: f.Name, tree: f.tree}
	r.add(key, "%s", problem)
	return r.err()
}
