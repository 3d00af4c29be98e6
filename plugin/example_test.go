package plugin_test

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/pluginlayer"
	"github.com/sluicefs/sluice/plugin"
)

// greeting is a plug-in whose layers have one file: //greeting/WORLD/ is a layer with a file that greets WORLD.
type greeting struct{}

func (greeting) Name() string { return "greeting" }

func (greeting) NumLayers(context.Context, string, string) (int, error) { return 1, nil }

func (greeting) Load(_ context.Context, data, _ string, _ int) (plugin.Layer, error) {
	text := "Hello, " + data + "\n"
	fd, err := unix.MemfdCreate("hello", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "hello")
	_, err = file.WriteString(text)
	return layer{file, uint64(len(text))}, err
}

type layer struct {
	file *os.File
	size uint64
}

func (layer) Info() plugin.Info { return plugin.Info{} }
func (l layer) Close() error    { return l.file.Close() }

func (l layer) Stat(_ context.Context, path string) (plugin.Attr, error) {
	switch path {
	case ".":
		return plugin.Attr{Mode: unix.S_IFDIR | 0o755, Nlink: 2}, nil
	case "hello":
		return plugin.Attr{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: l.size}, nil
	}
	return plugin.Attr{}, fs.ErrNotExist
}

func (layer) ReadDir(_ context.Context, path string) ([]plugin.DirEntry, error) {
	if path != "." {
		return nil, unix.ENOTDIR
	}
	return []plugin.DirEntry{{Name: "hello", Type: unix.DT_REG}}, nil
}

func (layer) Readlink(context.Context, string) (string, error) { return "", unix.EINVAL }

// Open hands out the same file again and again: all guests share its memory.
func (l layer) Open(context.Context, string) (*os.File, error) {
	fd, err := unix.FcntlInt(l.file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "hello"), nil
}

// TestGreeting has a guest read what the example serves.
func TestGreeting(t *testing.T) {
	source := plugin.NewLocal(greeting{}, nil)
	defer source.Close()
	conn, err := pluginlayer.Dial(t.Context(), pluginlayer.Config{Name: "greeting", Source: source})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	layers, err := conn.Layers(t.Context(), "World", "")
	if err != nil {
		t.Fatal(err)
	}
	l, err := layers.Open(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(l)}
	if names := c.List(t, fsbackendtest.Root, 1000); !slices.Equal(names, []string{"hello"}) {
		t.Errorf("the layer lists %q", names)
	}
	e, errno := c.Lookup(fsbackendtest.Root, "hello")
	if errno != 0 {
		t.Fatal(errno)
	}
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	if b, errno := c.Read(e.NodeId, fh, 0, 100); string(b) != "Hello, World\n" || errno != 0 {
		t.Errorf("READ: %q, %v", b, errno)
	}
}

// A program that is a plug-in: func main is no more than this, with os.Exit(1) where it fails.
func Example() {
	err := plugin.Main(greeting{})
	message, _, _ := strings.Cut(err.Error(), ":")
	fmt.Println(message)
	// Output: descriptor 3 is no SOCK_SEQPACKET socket
}
