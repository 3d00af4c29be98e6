package upperdir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// entries are the names in the directories of a store, "." aside.
func (s *Store) entries(t *testing.T) string {
	t.Helper()
	var all []string
	for _, dir := range []string{"uppers", "checkpoints", "trash"} {
		list, err := os.ReadDir(filepath.Join(s.path, dir))
		must(t, err)
		for _, e := range list {
			all = append(all, dir+"/"+e.Name())
		}
	}
	return strings.Join(all, " ")
}

func wantErr(t *testing.T, err error, say string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), say) {
		t.Errorf("error %v, expected one with %q", err, say)
	}
}

func TestDiscard(t *testing.T) {
	s := openStore(t)
	u, err := s.Discard(Attr{Mode: 0o711, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())})
	must(t, err)
	if st, err := os.Stat(u.Path()); err != nil || st.Mode().Perm() != 0o711 {
		t.Errorf("root of the upper: %v, %v, expected mode 0711", st, err)
	}
	for _, open := range []func() (*os.File, error){u.Dir, u.Work} {
		f, err := open()
		must(t, err)
		if _, err := unix.Openat(int(f.Fd()), "x", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600); err != nil {
			t.Error(err)
		}
		must(t, f.Close())
	}
	// Another daemon that starts now leaves it alone.
	other, err := Open(s.path, slog.New(slog.DiscardHandler))
	must(t, err)
	must(t, other.Close())
	if _, err := os.Stat(u.Path() + "/x"); err != nil {
		t.Error(err)
	}
	must(t, u.Close())
	if left := s.entries(t); left != "" {
		t.Errorf("after Close there are %s", left)
	}
}

func TestKeep(t *testing.T) {
	s := openStore(t)
	mine := Attr{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	u, created, err := s.Keep("vm1", mine)
	must(t, err)
	if !created {
		t.Error("the first upper was there before")
	}
	must(t, os.WriteFile(u.Path()+"/f", nil, 0o600))
	_, _, err = s.Keep("vm1", mine)
	wantErr(t, err, "in use by another overlay")
	must(t, u.Close())
	u, created, err = s.Keep("vm1", mine)
	must(t, err)
	if _, err := os.Stat(u.Path() + "/f"); err != nil || created {
		t.Errorf("the upper kept: %v, created %v", err, created)
	}
	_, err = s.Checkpoint(t.Context(), u, "c")
	must(t, err)
	must(t, os.Remove(u.Path()+"/f"))
	_, err = s.Restore(t.Context(), "c", "vm1")
	wantErr(t, err, "in use")
	must(t, u.Close())
	u, err = s.Restore(t.Context(), "c", "vm1")
	must(t, err)
	if _, err := os.Stat(u.Path() + "/f"); err != nil {
		t.Error(err)
	}
	must(t, u.Close())
	if got := s.entries(t); got != "uppers/keep-vm1 checkpoints/c" {
		t.Errorf("there are %s", got)
	}
	for _, name := range []string{"", ".", "..", "a/b", ".new-x", "a b", "ä", strings.Repeat("n", 129)} {
		_, _, err := s.Keep(name, mine)
		wantErr(t, err, "not usable")
	}
}

func TestGiven(t *testing.T) {
	s := openStore(t)
	dir := t.TempDir()
	must(t, os.Mkdir(dir+"/upper", 0o755))
	must(t, os.Mkdir(dir+"/work", 0o755))
	u, err := s.Given(dir+"/upper", dir+"/work")
	must(t, err)
	_, err = s.Given(dir+"/upper", dir+"/work")
	wantErr(t, err, "in use")
	// The same upper with a work directory of its own, and one's upper as another's work directory; as another daemon would.
	must(t, os.MkdirAll(dir+"/work2", 0o755))
	must(t, os.Symlink(dir+"/upper", dir+"/link"))
	other, err := Open(s.path, slog.New(slog.DiscardHandler))
	must(t, err)
	defer other.Close()
	_, err = other.Given(dir+"/link", dir+"/work2")
	wantErr(t, err, "in use")
	_, err = other.Given(dir+"/work2", dir+"/upper")
	wantErr(t, err, "in use")
	must(t, u.Close())
	u, err = other.Given(dir+"/link", dir+"/work2")
	must(t, err)
	must(t, u.Close())
	_, err = s.Given("upper", dir+"/work")
	wantErr(t, err, "absolute")
	_, err = s.Given(dir+"/none", dir+"/work")
	wantErr(t, err, "make it")
	_, err = s.Given("/proc", dir+"/work")
	wantErr(t, err, "another file system")
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o777))
	log := slog.New(slog.DiscardHandler)
	_, err := Open(dir, log)
	wantErr(t, err, "chmod go-w")
	_, err = Open(dir+"/not/there", log)
	wantErr(t, err, "no such file")
	_, err = Open("relative", log)
	wantErr(t, err, "absolute")
	must(t, os.Chmod(dir, 0o700))
	must(t, os.Symlink("/etc", dir+"/uppers"))
	if _, err = Open(dir, log); err == nil {
		t.Error("a symbolic link was followed to the uppers")
	}
}

func TestCheckpoints(t *testing.T) {
	s := openStore(t)
	u := s.given(t, t.TempDir())
	must(t, os.WriteFile(u.Path()+"/f", []byte("12345"), 0o600))
	f, err := os.Create(u.Path() + "/sparse")
	must(t, err)
	must(t, f.Truncate(1<<30))
	_, err = f.WriteAt([]byte("x"), 1<<29)
	must(t, errors.Join(err, f.Close()))
	c, err := s.Checkpoint(t.Context(), u, "b")
	must(t, err)
	if c.Name != "b" || c.Files != 2 || c.Bytes != 5+1<<30 || c.Created.IsZero() {
		t.Errorf("checkpoint %+v", c)
	}
	var st unix.Stat_t
	must(t, unix.Stat(s.path+"/checkpoints/b/upper/sparse", &st))
	if st.Size != 1<<30 || st.Blocks > 1024 {
		t.Errorf("the copy of a sparse file has %d bytes in %d blocks", st.Size, st.Blocks)
	}
	_, err = s.Checkpoint(t.Context(), u, "b")
	wantErr(t, err, "exists already")
	_, err = s.Checkpoint(t.Context(), u, "../b")
	wantErr(t, err, "not usable")
	_, err = s.Checkpoint(t.Context(), u, "a")
	must(t, err)
	list, err := s.Checkpoints(t.Context())
	must(t, err)
	if len(list) != 2 || list[0].Name != "a" || list[1] != c {
		t.Errorf("checkpoints %+v, expected a and %+v", list, c)
	}
	_, err = s.Restore(t.Context(), "none", "")
	wantErr(t, err, "no checkpoint none")
	wantErr(t, s.Delete("none"), "no checkpoint none")
	must(t, s.Delete("a"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = s.Checkpoint(ctx, u, "d"); !errors.Is(err, context.Canceled) {
		t.Errorf("Checkpoint, cancelled: %v", err)
	}
	if _, err := s.Restore(ctx, "b", ""); !errors.Is(err, context.Canceled) {
		t.Errorf("Restore, cancelled: %v", err)
	}
	if got := s.entries(t); got != "checkpoints/b" {
		t.Errorf("there are %s", got)
	}
}

const (
	victimEnv = "SLUICE_TEST_UPPERDIR_VICTIM"
	ready     = "ready\n"
)

// TestVictim is not a test: TestKilled has it run in a process of its own, and kills that.
func TestVictim(t *testing.T) {
	dir := os.Getenv(victimEnv)
	if dir == "" {
		return
	}
	s, err := Open(dir+"/base", slog.New(slog.DiscardHandler))
	must(t, err)
	_, err = s.Discard(Attr{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())})
	must(t, err)
	u, err := s.Given(dir+"/upper", dir+"/work")
	must(t, err)
	_, _ = os.Stdout.WriteString(ready)
	for i := range 1000 { // until it is killed
		_, err := s.Checkpoint(t.Context(), u, fmt.Sprint("c", i))
		must(t, err)
		must(t, s.Delete(fmt.Sprint("c", i)))
	}
}

// TestKilled kills a daemon in the middle: what is whole is whole, and the rest is swept.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"/upper", "/work", "/upper/d"} {
		must(t, os.Mkdir(dir+d, 0o755))
	}
	for i := range 300 {
		must(t, os.WriteFile(fmt.Sprintf("%s/upper/d/f%d", dir, i), bytes.Repeat([]byte("x"), 5000), 0o600))
	}
	want := snapshot(t, dir+"/upper", true, true)
	for round := range 4 {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestVictim$")
		cmd.Env = append(os.Environ(), victimEnv+"="+dir)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		line := make([]byte, len(ready))
		_, err = io.ReadFull(out, line)
		must(t, err)
		if string(line) != ready {
			t.Fatalf("the process said %q", line)
		}
		// It is somewhere in the first or second checkpoint, wherever the scheduler has it.
		for range 200 * round {
			_, _ = os.ReadDir(dir + "/base/checkpoints")
		}
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()

		s, err := Open(dir+"/base", slog.New(slog.DiscardHandler))
		must(t, err)
		s.sweeps.Wait()
		list, err := s.Checkpoints(t.Context())
		must(t, err)
		expected := ""
		for _, c := range list {
			sameTrees(t, "checkpoint "+c.Name, snapshot(t, s.path+"/checkpoints/"+c.Name+"/upper", true, true), want)
			expected = "checkpoints/" + c.Name
			if len(list) > 1 {
				t.Errorf("checkpoints %+v, expected at most the last one", list)
			}
		}
		if got := s.entries(t); got != expected {
			t.Errorf("a dead daemon has left %s, expected %q", got, expected)
		}
		for _, c := range list {
			must(t, s.Delete(c.Name))
		}
		must(t, s.Close())
	}
}

func TestFullDisk(t *testing.T) {
	needRoot(t)
	small := t.TempDir()
	must(t, unix.Mount("tmpfs", small, "tmpfs", 0, "size=2m"))
	t.Cleanup(func() { must(t, unix.Unmount(small, 0)) })
	s, err := Open(small+"/base", slog.New(slog.DiscardHandler))
	must(t, err)
	defer s.Close()
	u := s.given(t, t.TempDir())
	must(t, os.WriteFile(u.Path()+"/big", bytes.Repeat([]byte("x"), 3<<20), 0o600))
	for range 2 {
		_, err = s.Checkpoint(t.Context(), u, "c")
		if !errors.Is(err, unix.ENOSPC) {
			t.Errorf("Checkpoint on a full disk: %v", err)
		}
		wantErr(t, err, "free space there")
		if left := s.entries(t); left != "" {
			t.Errorf("a checkpoint that failed has left %s", left)
		}
	}
	must(t, os.Truncate(u.Path()+"/big", 600<<10))
	_, err = s.Checkpoint(t.Context(), u, "c")
	must(t, err)

	// A target that is full is finished when there is room.
	target := small + "/target"
	must(t, os.Mkdir(target, 0o755))
	must(t, os.WriteFile(target+"/big", []byte("before"), 0o644))
	must(t, os.WriteFile(target+"/other", nil, 0o644))
	must(t, os.WriteFile(u.Path()+"/zero", bytes.Repeat([]byte("x"), 1000<<10), 0o600))
	err = u.Apply(t.Context(), target, ApplyOptions{}, nil)
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("Apply to a full disk: %v", err)
	}
	if data, err := os.ReadFile(target + "/big"); err != nil || len(data) != 6 && len(data) != 600<<10 {
		t.Errorf("a file half applied: %d bytes, %v", len(data), err)
	}
	must(t, s.Delete("c"))
	must(t, u.Apply(t.Context(), target, ApplyOptions{}, nil))
	want := snapshot(t, u.Path(), true, true)
	got := snapshot(t, target, true, true)
	delete(got, "other")
	sameTrees(t, "target", got, want)
}

// TestOrdinaryUser has a user without privileges make an upper for somebody else's directory: it is the user's own.
func TestOrdinaryUser(t *testing.T) {
	if os.Geteuid() == 0 {
		const user = 65534
		dir := t.TempDir()
		must(t, os.Chown(dir, user, user))
		cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run", "^TestOrdinaryUser$")
		cmd.Dir, cmd.Env = "/", []string{"TMPDIR=" + dir}
		for parent := dir; parent != os.TempDir() && parent != "/"; parent = filepath.Dir(parent) {
			must(t, os.Chmod(parent, 0o755))
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestOrdinaryUser") {
			t.Errorf("as an ordinary user: %v\n%s", err, out)
		}
		return
	}
	u, err := openStore(t).Discard(Attr{Mode: 0o750, UID: 0, GID: 0})
	must(t, err)
	defer func() { must(t, u.Close()) }()
	info, err := os.Stat(u.Path())
	must(t, err)
	if info.Mode().Perm() != 0o750 || int(info.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() {
		t.Errorf("the upper directory is %v", info.Mode())
	}
}
