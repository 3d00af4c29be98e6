package sharer

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestBindMounts is Kata's layout, seen from the directory that a daemon would serve.
func TestBindMounts(t *testing.T) {
	if !inPrivateMounts(t) {
		return
	}
	dir, host, kubelet := stage(t), t.TempDir(), t.TempDir()
	s := newTestSandbox(t, Config{
		Backend: BindMounts{}, HostDir: host, KubeletRoot: kubelet,
		SandboxBindMounts: []string{filepath.Join(dir, "certs"), filepath.Join(dir, "root") + ":rw"},
	}, linux{})
	prepare(t, s)
	served := filepath.Join(host, "pod1", "shared")
	if info, err := os.Stat(filepath.Join(host, "pod1", "mounts")); err != nil || info.Mode().Perm() != dirMode {
		t.Errorf("mounts: %v, %v", info, err)
	}
	writes := func(what, path string, want error) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
		if err == nil {
			f.Close()
		}
		if !errors.Is(err, want) {
			t.Errorf("write to %s: %v, want %v", what, err, want)
		}
	}
	writes("shared itself", filepath.Join(served, "new"), unix.EROFS)
	writes("a sandbox bind mount", filepath.Join(served, "sandbox-mounts/certs/ca"), unix.EROFS)
	writes("a writable sandbox bind mount", filepath.Join(served, "sandbox-mounts/root/new"), nil)

	source := filepath.Join(dir, "data")
	in, out := Mount{Source: source, Destination: "/in", ReadOnly: true}, Mount{Source: source, Destination: "/out"}
	inAt, outAt := mustShare(t, s, "a", &in).GuestPath, mustShare(t, s, "b", &out).GuestPath
	if want := filepath.Join(host, "pod1", "mounts", filepath.Base(inAt)); in.HostPath != want {
		t.Errorf("HostPath is %s, want %s", in.HostPath, want)
	}
	writes("what is read-only", filepath.Join(served, filepath.Base(inAt), "x"), unix.EROFS)
	writes("what is read-only, in mounts", filepath.Join(in.HostPath, "x"), unix.EROFS)
	writes("what is writable", filepath.Join(served, filepath.Base(outAt), "x"), nil)
	if left := mountsBelow(t, filepath.Join(host, "pod1", "private")); len(left) != 0 || strings.Contains(tree(t, filepath.Join(host, "pod1", "private")), "in") {
		t.Errorf("left in private: %v\n%s", left, tree(t, filepath.Join(host, "pod1", "private")))
	}
	file := Mount{Source: filepath.Join(dir, "hosts"), Destination: "/etc/hosts", Type: "bind"}
	at := mustShare(t, s, "a", &file).GuestPath
	if got, err := os.ReadFile(filepath.Join(served, filepath.Base(at))); err != nil || !strings.Contains(string(got), "localhost") {
		t.Errorf("a file is %q, %v", got, err)
	}
	c := &Container{ID: "a", RootFs: RootFs{Target: filepath.Join(dir, "root")}}
	if _, err := s.ShareRootFilesystem(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(served, "a/rootfs/bin/sh")); err != nil || string(got) != "sh" {
		t.Errorf("the root has %q, %v", got, err)
	}
	if _, err := s.ShareRootFilesystem(t.Context(), &Container{ID: "i", RootFs: RootFs{Source: "i", Backend: "estargz"}}); err == nil {
		t.Error("a backend without grafts passes")
	}

	// Mount points go; a file that somebody has put in the place of one stays.
	host1 := in.HostPath
	mustUnshare(t, s, "a", &in)
	if _, err := os.Lstat(host1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the mount point is there: %v", err)
	}
	host2 := file.HostPath
	if err := (linux{}).unmount(host2); err != nil {
		t.Fatal(err)
	}
	write(t, host2, "precious")
	mustUnshare(t, s, "a", &file)
	if got, err := os.ReadFile(host2); err != nil || string(got) != "precious" {
		t.Errorf("somebody's file: %q, %v", got, err)
	}
	if err := s.UnshareRootFilesystem(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(host, "pod1/mounts/a")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the container's directory is there: %v", err)
	}

	// Cleanup takes down what it does not know, too, and nothing of somebody's.
	strange := filepath.Join(host, "pod1/mounts/strange dir")
	if err := errors.Join(os.Mkdir(strange, 0o755), linux{}.mount(source, strange, unix.MS_BIND), linux{}.mount(source, strange, unix.MS_BIND)); err != nil {
		t.Fatal(err)
	}
	if err := s.Cleanup(t.Context()); err == nil || !strings.Contains(err.Error(), "not this package's") {
		t.Errorf("Cleanup with somebody's file: %v", err)
	}
	if err := os.Remove(host2); err != nil {
		t.Fatal(err)
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
	if left := mountsBelow(t, host); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if left := tree(t, host); strings.Contains(left, "pod1") {
		t.Errorf("left: %s", left)
	}
	if got := tree(t, source); !strings.Contains(got, "/x -rw-r--r-- x") {
		t.Errorf("what was shared has become\n%s", got)
	}
}

// TestRemoveTree removes nothing but empty directories and files, nor through a mount or a link.
func TestRemoveTree(t *testing.T) {
	dir := t.TempDir()
	keep := write(t, filepath.Join(dir, "keep", "file"), "")
	skeleton := filepath.Join(dir, "skeleton")
	write(t, filepath.Join(skeleton, "a", "b", "empty"), "")
	if err := (linux{}).removeTree(skeleton); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(skeleton); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	write(t, filepath.Join(skeleton, "a", "full"), "x")
	if err := (linux{}).removeTree(skeleton); err == nil {
		t.Error("a file with content is removed")
	}
	link := filepath.Join(dir, "links")
	if err := errors.Join(os.Mkdir(link, 0o755), os.Symlink(filepath.Dir(keep), filepath.Join(link, "l"))); err != nil {
		t.Fatal(err)
	}
	if err := (linux{}).removeTree(link); err == nil {
		t.Error("a link is removed")
	}
	if _, err := os.Stat(keep); err != nil {
		t.Error(err)
	}
}

func TestRemoveTreeAcrossMount(t *testing.T) {
	if !inPrivateMounts(t) {
		return
	}
	dir := t.TempDir()
	keep := write(t, filepath.Join(dir, "keep", "file"), "")
	inside := filepath.Join(dir, "skeleton", "mounted")
	if err := os.MkdirAll(inside, 0o755); err != nil {
		t.Fatal(err)
	}
	mountAt(t, filepath.Dir(keep), inside, "", unix.MS_BIND, "")
	if err := (linux{}).removeTree(filepath.Dir(inside)); !errors.Is(err, unix.EXDEV) {
		t.Errorf("error %v, want %v", err, unix.EXDEV)
	}
	if _, err := os.Stat(keep); err != nil {
		t.Error(err)
	}
}

// TestRestrictionsStay binds a mount with nosuid and its like read-only, without loosening them.
func TestRestrictionsStay(t *testing.T) {
	if !inPrivateMounts(t) {
		return
	}
	source := t.TempDir()
	mountAt(t, "none", source, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOATIME, "")
	s := newTestSandbox(t, Config{Backend: BindMounts{}}, linux{})
	prepare(t, s)
	m := Mount{Source: source, Destination: "/x", ReadOnly: true}
	mustShare(t, s, "c", &m)
	var stat unix.Statfs_t
	if err := unix.Statfs(m.HostPath, &stat); err != nil {
		t.Fatal(err)
	}
	const want = unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC | unix.ST_NOATIME
	if stat.Flags&want != want {
		t.Errorf("flags %#x, want %#x in them", stat.Flags, want)
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestWatchableBind is what Kata's agent is told of a volume that it is to poll.
func TestWatchableBind(t *testing.T) {
	if !inPrivateMounts(t) {
		return
	}
	root := t.TempDir()
	s := newTestSandbox(t, Config{Backend: BindMounts{}, KubeletRoot: root}, linux{})
	prepare(t, s)
	vol := newConfigMap(t, root, k8sConfigMap, "vol", map[string]string{"a": "1"})
	m := Mount{Source: vol.dir, Destination: "/etc/config", ReadOnly: true, Options: []string{"rbind", "ro"}}
	f := mustShare(t, s, "c", &m)
	name := filepath.Base(m.HostPath)
	want := &SharedFile{GuestPath: defaultGuestDir + "/watchable/" + name, VolumeStorages: []*Storage{{
		Driver: "watchable-bind", Source: defaultGuestDir + "/" + name, Fstype: "bind",
		Options: []string{"rbind", "ro"}, MountPoint: defaultGuestDir + "/watchable/" + name,
	}}}
	if !reflect.DeepEqual(f, want) {
		t.Errorf("shared %+v", f)
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
	if slices.ContainsFunc(mountsBelow(t, "/"), func(m string) bool { return strings.Contains(m, "pod1") }) {
		t.Error("mounts are left")
	}
}
