package testguest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// WriteInitramfs writes, to the file path, the initial file system that both kinds of guest start from: busybox, this package's init,
// the drivers of each, and programs, a map from the name in the guest's /bin to a static program of the host. A name that is an absolute
// path is a file there, of any kind.
func WriteInitramfs(path string, kit Kit, programs map[string]string) (err error) {
	init, remove, err := BuildProgram("github.com/sluicefs/sluice/internal/testguest/guestinit")
	if err != nil {
		return err
	}
	defer remove()
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			err = fmt.Errorf("write initramfs: %w", err)
		}
	}()
	files := map[string]string{"/init": init, "/bin/busybox": kit.Busybox()}
	for name, source := range programs {
		if !filepath.IsAbs(name) {
			name = "/bin/" + name
		}
		files[name] = source
	}
	orders := make(map[Kind]string)
	for _, kind := range []Kind{UML, QEMU} {
		for _, module := range kit.modules(kind) {
			files[modulesDir(kind)+"/"+filepath.Base(module)] = module
			orders[kind] += filepath.Base(module) + "\n"
		}
	}
	c := newCPIOWriter(f)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := c.hostFile(name, 0o755, files[name]); err != nil {
			return err
		}
	}
	for _, f := range []struct{ name, content string }{
		{modulesDir(UML) + "/order", orders[UML]},
		{modulesDir(QEMU) + "/order", orders[QEMU]},
		{"/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n"},
		{"/etc/group", "root:x:0:\nuser:x:1000:\nteam:x:2000:user\n"},
	} {
		if err := c.file(f.name, 0o644, int64(len(f.content)), strings.NewReader(f.content)); err != nil {
			return err
		}
	}
	// The kernel opens the console for init before init can mount a /dev.
	if err := c.device("/dev/console", 0o600, 5, 1); err != nil {
		return err
	}
	return c.close()
}

// modulesDir is where a guest of this kind has its drivers.
func modulesDir(kind Kind) string { return "/modules/" + string(kind) }
