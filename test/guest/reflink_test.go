package guest_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/testguest"
)

// TestReflink has a guest add a byte to a large file of a file system that can share blocks: no copy of it, upwards, to a checkpoint and
// back, takes space. With SLUICE_FULL alone, for it takes such file systems, in loop devices.
func TestReflink(t *testing.T) {
	if !full() {
		t.Skip("file systems that share blocks are made with SLUICE_FULL=1")
	}
	forRoot(t)
	for _, kind := range []string{"btrfs", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			const size = 100 << 20
			s := &steered{machine: newScratch(t)}
			disk := s.loop(kind, 1<<30)
			base := filepath.Join(disk, "base")
			s.check(os.Mkdir(base, 0o755))
			hostSh(t, fmt.Sprintf("head -c %d /dev/urandom >%s/big", size, base))
			s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
				"--state-dir", filepath.Join(disk, "state"), "--share", fmt.Sprintf("tag=box,socket=%s/box.sock,dir=%s,overlay=keep", s.scratch, base),
			}})
			g := s.on("box")
			before := s.used(disk)
			for _, step := range []struct {
				name string
				do   func()
			}{
				{"copy-up", func() { g.sh("echo x >>/mnt/box/big") }},
				{"checkpoint", func() { act[api.Checkpoint](s, "box", api.ActCheckpoint, api.OverlayName{Name: "one"}) }},
				{"apply", func() { act[[]api.OverlayChange](s, "box", api.ActApply, api.OverlayApply{Target: base}) }},
			} {
				start := time.Now()
				step.do()
				took, more := time.Since(start), s.used(disk)-before
				t.Logf("%s of %d MiB: %v, %d KiB more are in use", step.name, size>>20, took, more>>10)
				if more > size/10 {
					t.Errorf("after %s, %d bytes more are in use: the blocks were not shared", step.name, more)
				}
			}
			if info, err := os.Stat(filepath.Join(base, "big")); err != nil || info.Size() != size+2 {
				t.Errorf("made real, it is %v, %v", info, err)
			}
		})
	}
}

// loop mounts a new file system of the host, of a kind that mkfs(8) knows.
func (s *steered) loop(kind string, size int64) (dir string) {
	s.t.Helper()
	image, dir := filepath.Join(s.scratch, "image"), filepath.Join(s.scratch, "disk")
	s.check(os.WriteFile(image, nil, 0o600))
	s.check(os.Truncate(image, size))
	s.check(os.Mkdir(dir, 0o755))
	for _, args := range [][]string{{"mkfs." + kind, "-q", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			s.t.Fatalf("%q: %v: expected scripts/setup.sh --full to have been run, and a kernel with %s\n%s", args, err, kind, out)
		}
	}
	s.t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// used is how much of the file system at dir is in use, in bytes, with all that is to be written written.
func (s *steered) used(dir string) int64 {
	s.t.Helper()
	f, err := os.Open(dir)
	s.check(err)
	defer f.Close()
	s.check(unix.Syncfs(int(f.Fd())))
	var st unix.Statfs_t
	s.check(unix.Fstatfs(int(f.Fd()), &st))
	return int64(st.Blocks-st.Bfree) * st.Bsize
}
