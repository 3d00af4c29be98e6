package guest_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/internal/testguest"
)

// debianFiles are those of packages that this machine has, which is Debian's: a userland to chroot into.
func debianFiles(t *testing.T, packages ...string) (files []imagetest.File) {
	t.Helper()
	seen := make(map[string]bool)
	add := func(f imagetest.File) {
		if !seen[strings.TrimSuffix(f.Name, "/")] {
			seen[strings.TrimSuffix(f.Name, "/")] = true
			files = append(files, f)
		}
	}
	for _, name := range []string{"bin", "lib", "lib64", "sbin"} {
		add(imagetest.File{Name: name, Type: '2', Mode: 0o777, Link: "usr/" + name})
	}
	for _, name := range []string{"dev/", "etc/", "proc/", "tmp/", "root/"} {
		add(imagetest.File{Name: name})
	}
	for _, pkg := range packages {
		out, err := exec.Command("dpkg", "-L", pkg).Output()
		if err != nil {
			t.Fatalf("files of package %s: %v", pkg, err)
		}
		for lines := bufio.NewScanner(strings.NewReader(string(out))); lines.Scan(); {
			path, err := filepath.EvalSymlinks(filepath.Dir(lines.Text()))
			if err != nil {
				continue // it was left out at the installation
			}
			path = filepath.Join(path, filepath.Base(lines.Text()))
			name := strings.TrimPrefix(path, "/")
			st, err := os.Lstat(path)
			switch {
			case err != nil || name == "" || name == ".":
			case st.IsDir():
				add(imagetest.File{Name: name + "/"})
			case st.Mode()&os.ModeSymlink != 0:
				link, err := os.Readlink(path)
				if err != nil {
					t.Fatal(err)
				}
				add(imagetest.File{Name: name, Type: '2', Mode: 0o777, Link: link})
			case st.Mode().IsRegular():
				data, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				add(imagetest.File{Name: name, Mode: int64(st.Mode().Perm()), Data: data})
			}
		}
	}
	return files
}

// treeFiles are those of a directory: one that debootstrap(8) has made, for one.
func treeFiles(t *testing.T, dir string) (files []imagetest.File) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(dir, path)
		if err != nil || name == "." {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		f := imagetest.File{Name: name, Mode: int64(st.Mode & 0o7777), UID: int(st.Uid), GID: int(st.Gid)}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			f.Name += "/"
		case unix.S_IFLNK:
			f.Type = '2'
			f.Link, err = os.Readlink(path)
		case unix.S_IFREG:
			f.Data, err = os.ReadFile(path)
		default:
			return nil
		}
		files = append(files, f)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return files
}

// userland is what the image has: of SLUICE_TREE, a directory, or else some packages of this machine.
func userland(t *testing.T) []imagetest.File {
	if dir := os.Getenv("SLUICE_TREE"); dir != "" {
		return treeFiles(t, dir)
	}
	return debianFiles(t, "libc6", "bash", "coreutils", "libtinfo6", "libselinux1", "libpcre2-8-0", "libattr1", "libacl1", "libgmp10")
}

// pull fetches and unpacks an image as it is done without laziness, and says how long that took.
func (s *steered) pull(image *imagetest.Image) time.Duration {
	s.t.Helper()
	dir := filepath.Join(s.scratch, "pulled")
	s.check(os.Mkdir(dir, 0o755))
	defer os.RemoveAll(dir)
	start := time.Now()
	repo, _, _ := strings.Cut(image.Ref, "@")
	_, repo, _ = strings.Cut(repo, "/")
	for _, l := range image.Layers {
		r, err := http.Get(image.Server.URL + "/v2/" + repo + "/blobs/" + l.Digest)
		s.check(err)
		unpack := exec.Command("tar", "xz", "-C", dir)
		unpack.Stdin = r.Body
		out, err := unpack.CombinedOutput()
		_ = r.Body.Close()
		if err != nil {
			s.t.Fatalf("unpack a layer: %v\n%s", err, out)
		}
	}
	return time.Since(start)
}

// TestImage gives guests a root file system out of a registry, in one line, loaded as it is read. What one has fetched the next finds.
func TestImage(t *testing.T) {
	forRoot(t)
	t.Parallel()
	s := &steered{machine: newScratch(t)}
	// The second layer takes away and replaces.
	image := imagetest.New(t, userland(t),
		[]imagetest.File{{Name: "etc/os-release", Data: []byte("ID=of-the-image\n")}, {Name: "usr/share/.wh.doc"}, {Name: "secret", Mode: 0o600, UID: 0, Data: []byte("s\n")}})
	whole := int64(0)
	for _, l := range image.Layers {
		whole += int64(len(l.Blob))
	}
	image.Server.Reset()
	var shares []string
	for _, tag := range []string{"one", "two"} {
		shares = append(shares, "--share", fmt.Sprintf("tag=%s,socket=%s/%s.sock,image=%s,option=background=off,option=prefetch=off,overlay=discard", tag, s.scratch, tag, image.Ref))
	}
	s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: append([]string{"--lazyimage-fetcher", fetch, "--state-dir", filepath.Join(s.scratch, "state")}, shares...)})
	const prompt = `cat /etc/os-release; echo $((6*7)) >/root/answer; cat /root/answer; ls /usr/share/doc 2>/dev/null; ls -l /usr/bin/bash >/dev/null; id -u`
	start := time.Now()
	g := s.on("one")
	image.Server.Reset()
	g.sh("ls -lRa /mnt/one >/dev/null")
	if n := len(image.Server.Requests()); n > 0 {
		t.Errorf("listing all of it took %d requests", n)
	}
	g.says("ID=of-the-image\n42\n0", "chroot /mnt/one /bin/bash -c '%s'", prompt)
	took := time.Since(start)
	gets, bytes := image.Server.Blobs()
	t.Logf("first prompt after %v with the guest's boot: %d requests, %d bytes; a full pull has %d bytes, and takes %v before anything boots",
		took.Round(time.Millisecond), gets, bytes, whole, s.pull(image).Round(time.Millisecond))
	if bytes >= whole/2 {
		t.Errorf("%d bytes of %d were fetched for a prompt", bytes, whole)
	}
	image.Server.Reset()
	g = s.on("two")
	g.says("ID=of-the-image\n42\n0", "chroot /mnt/two /bin/bash -c '%s'", prompt)
	if gets, bytes := image.Server.Blobs(); gets > 0 {
		t.Errorf("the second guest has had %d requests and %d bytes fetched", gets, bytes)
	}
	g.denies(noEntry, "ls /mnt/two/root/answer-of-one")

	stats, err := s.c.Stats(s.ctx)
	s.check(err)
	if n := stats.Images; len(n) != 2 || n[0].Tag != "one" || n[0].Path != "/" || n[0].Misses == 0 || n[0].Verified < n[0].Misses || n[0].Size != uint64(whole) ||
		n[1].Tag != "two" || n[1].Misses > 0 || n[1].Hits == 0 || n[1].Bytes > 0 || n[1].CacheBytes == 0 {
		t.Errorf("of the two guests' images the daemon counts %+v", n)
	}
}

// TestImageLayers serves the layers of an image one by one, for the guest's own overlayfs to merge, and compares that with the kernel's on
// the host over what tar(1) has unpacked. It also reads what the daemon says of each layer. The layers are as podman makes them.
func TestImageLayers(t *testing.T) {
	forRoot(t)
	t.Parallel()
	s := &steered{machine: newScratch(t)}
	lowest := []imagetest.File{
		{Name: "etc/"},
		{Name: "etc/a", Data: []byte("lowest\n")},
		{Name: "etc/b", Data: []byte("lowest\n"), Mode: 0o4755, UID: 3, GID: 4},
		{Name: "gone", Data: []byte("x\n")},
		{Name: "dir/"},
		{Name: "dir/x", Data: []byte("x\n")},
		{Name: "dir/y", Type: '2', Mode: 0o777, Link: "x"},
		{Name: "same", Data: []byte("s\n")},
		{Name: "other", Type: '1', Link: "same"},
		{Name: "null", Type: '3', Major: 1, Minor: 3},
		{Name: "fifo", Type: '6'},
	}
	middle := []imagetest.File{{Name: ".wh.gone"}, {Name: "dir/"}, {Name: "dir/.wh..wh..opq"}, {Name: "dir/z", Data: []byte("only this\n")}}
	top := []imagetest.File{{Name: "etc/"}, {Name: "etc/.wh.b"}, {Name: "etc/a", Data: []byte("top\n")}}
	// A file of several chunks, with a hole.
	noise := make([]byte, 200<<10)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	lowest = append(lowest, imagetest.File{Name: "big", Data: slices.Concat(noise, make([]byte, 200<<10), noise[:50<<10])})
	image := imagetest.New(t, lowest, middle, top).Skopeo(t, imagetest.NewServer(t).Host()+"/test/image:latest", "--dest-compress-format=zstd:chunked")
	args := []string{"--lazyimage-fetcher", fetch, "--state-dir", filepath.Join(s.scratch, "state")}
	var tags, mounts []string
	for i, l := range image.Layers {
		tag := fmt.Sprint("l", i)
		args = append(args, "--share", fmt.Sprintf("tag=%s,socket=%s/%s.sock,xattr,image=%s,option=layer=%s", tag, s.scratch, tag, image.Ref, l.Digest))
		tags, mounts = append(tags, tag), append([]string{"/mnt/" + tag}, mounts...)
	}
	s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: args})
	g := s.on(tags...)
	g.sh("mkdir /mnt/all; mount -t overlay -o ro,lowerdir=%s all /mnt/all", strings.Join(mounts, ":"))

	// The same on the host, of tar archives, with the whiteouts of the kernel's.
	var dirs []string
	for i, files := range [][]imagetest.File{lowest, middle, top} {
		dir := filepath.Join(s.scratch, fmt.Sprint("unpacked", i))
		s.check(os.Mkdir(dir, 0o755))
		unpack := exec.Command("tar", "x", "-p", "-C", dir)
		unpack.Stdin = bytes.NewReader(imagetest.Tar(t, files))
		if out, err := unpack.CombinedOutput(); err != nil {
			t.Fatalf("unpack: %v\n%s", err, out)
		}
		dirs = append([]string{dir}, dirs...)
	}
	hostSh(t, fmt.Sprintf("cd %[1]s/unpacked1; rm .wh.gone dir/.wh..wh..opq; mknod gone c 0 0; cd %[1]s/unpacked2; rm etc/.wh.b; mknod etc/b c 0 0", s.scratch))
	s.check(unix.Setxattr(filepath.Join(s.scratch, "unpacked1/dir"), "trusted.overlay.opaque", []byte("y"), 0))
	merged := filepath.Join(s.scratch, "merged")
	s.mountOverlay(merged, "lowerdir="+strings.Join(dirs, ":"))
	if want, got := hostSh(t, fmt.Sprintf(walkScript, merged)), g.sh(walkScript, "/mnt/all"); want != got {
		t.Errorf("the guest's overlayfs of lazy layers is not the host's of unpacked ones:\n%s", difference(want, got))
	}

	const state = "/mnt/l0/.stargz-snapshotter"
	g.says("", "ls -a /mnt/l0 | grep stargz || true")
	g.says("500 0", "stat -c '%%a %%u' %s", state)
	var said struct {
		Digest         string  `json:"digest"`
		Size           int64   `json:"size"`
		FetchedSize    int64   `json:"fetchedSize"`
		FetchedPercent float64 `json:"fetchedPercent"`
	}
	file := state + "/" + image.Layers[0].Digest + ".json"
	s.check(json.Unmarshal([]byte(g.sh("cat %s", file)), &said))
	if said.Digest != image.Layers[0].Digest || said.Size != int64(len(image.Layers[0].Blob)) || said.FetchedPercent > 100 {
		t.Errorf("of its layer the daemon says %+v", said)
	}
	g.says("400", "stat -c %%a %s", file)
	g.denies("Permission denied", "su user -c 'cat %s'", file)
}
