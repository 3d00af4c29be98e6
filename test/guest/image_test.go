package guest_test

import (
	"bufio"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
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
	return debianFiles(t, "libc6", "bash", "coreutils", "libtinfo6", "libselinux1", "libpcre2-8-0", "libattr1", "libacl1", "libgmp10", "libssl3")
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
}
