package testguest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Kit is the directory that `make setup` fills with what guests are made of.
type Kit struct{ Dir string }

// Busybox is the static program that guests have for a user land.
func (k Kit) Busybox() string { return filepath.Join(k.Dir, "busybox") }

// FindKit returns the kit in $SLUICE_GUEST_KIT, or else in build/guest-kit of the module that the working directory belongs to.
// The error for a kit that is not complete says how to get one.
func FindKit() (Kit, error) {
	kit, err := kitDir()
	if err != nil {
		return Kit{}, err
	}
	parts := []string{kit.uml(), kit.vmlinuz(), kit.Busybox(), kit.vsock()}
	for _, part := range slices.Concat(parts, kit.modules(UML), kit.modules(QEMU)) {
		if _, err := os.Stat(part); err != nil {
			return Kit{}, fmt.Errorf("the guest kit is not complete, run `make setup`: %w", err)
		}
	}
	if _, err := exec.LookPath(qemuProgram); err != nil {
		return Kit{}, fmt.Errorf("QEMU is not installed, run `make setup`: %w", err)
	}
	return kit, nil
}

// FindPeer returns a server that others have written, virtiofsd or virtiofsd-c, of the kit that FindKit would return.
func FindPeer(name string) (string, error) {
	kit, err := kitDir()
	if err != nil {
		return "", err
	}
	program := filepath.Join(kit.Dir, name)
	if _, err := os.Stat(program); err != nil {
		return "", fmt.Errorf("a server to compare with is missing, run `make peers`: %w", err)
	}
	return program, nil
}

// kitDir returns the kit that FindKit is about, with whatever is in it.
func kitDir() (Kit, error) {
	if dir := os.Getenv("SLUICE_GUEST_KIT"); dir != "" {
		return Kit{dir}, nil
	}
	root, err := ModuleRoot()
	if err != nil {
		return Kit{}, err
	}
	return Kit{filepath.Join(root, "build", "guest-kit")}, nil
}

const qemuProgram = "qemu-system-x86_64"

func (k Kit) uml() string     { return filepath.Join(k.Dir, "linux-uml") }
func (k Kit) vmlinuz() string { return filepath.Join(k.Dir, "vmlinuz") }

func (k Kit) vsock() string { return filepath.Join(k.Dir, "vhost-device-vsock") }

// modules returns the drivers that the kernel does not have built in, in the order in which they can be loaded.
func (k Kit) modules(kind Kind) []string {
	names := []string{"vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"}
	if kind == UML {
		names = append([]string{"fuse", "virtiofs", "overlay"}, names...)
	}
	for i, name := range names {
		names[i] = filepath.Join(k.Dir, "modules-"+string(kind), name+".ko")
	}
	return names
}

// ModuleRoot returns the directory of the go.mod above the working directory.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("find go.mod: the working directory is not inside the module")
		}
		dir = parent
	}
}

// runGo runs the go command in a directory of the module; under sudo as the user who called it, so that the build cache stays theirs.
func runGo(dir string, cgo bool, args ...string) error {
	root, err := ModuleRoot()
	if err != nil {
		return err
	}
	cmd := exec.Command("go", args...)
	cmd.Dir = filepath.Join(root, dir)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if cgo {
		cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	}
	uid, uidErr := strconv.ParseUint(os.Getenv("SUDO_UID"), 10, 32)
	gid, gidErr := strconv.ParseUint(os.Getenv("SUDO_GID"), 10, 32)
	if os.Geteuid() == 0 && uidErr == nil && gidErr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// BuildProgram compiles a static program, given by its import path, and returns the file; remove deletes it.
func BuildProgram(pkg string) (program string, remove func(), err error) {
	return build(".", pkg, false, "build", "-trimpath")
}

// BuildDaemon compiles a program that links libseccomp, as `make build` does.
func BuildDaemon(pkg string) (program string, remove func(), err error) {
	return buildDaemon(".", pkg)
}

// BuildExample is BuildDaemon for a program in the module of the examples, given by its directory there.
func BuildExample(name string) (program string, remove func(), err error) {
	return buildDaemon("examples", "./"+name)
}

func buildDaemon(dir, pkg string) (string, func(), error) {
	return build(dir, pkg, true, "build", "-trimpath", "-tags", "osusergo,netgo", "-ldflags", `-linkmode external -extldflags "-static"`)
}

// BuildTest compiles the static test program of a package, as BuildProgram does for a program.
func BuildTest(pkg string) (program string, remove func(), err error) {
	return build(".", pkg, false, "test", "-c")
}

// build compiles pkg, as it is named in the module's directory dir.
func build(dir, pkg string, cgo bool, args ...string) (string, func(), error) {
	out, err := os.MkdirTemp("", "sluice-build-")
	if err != nil {
		return "", nil, err
	}
	remove := func() { os.RemoveAll(out) }
	program := filepath.Join(out, filepath.Base(pkg))
	// runGo may be another user than this process is.
	if err := errors.Join(os.Chmod(out, 0o777), runGo(dir, cgo, append(args, "-o", program, pkg)...)); err != nil {
		remove()
		return "", nil, err
	}
	return program, remove, nil
}
