package escape_test

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

const (
	// A race ends after raceTime or raceRounds, whichever is first, but not before it was one.
	raceRounds = 400
	leastRaces = 10 // of each outcome
)

// raceTime is longer with SLUICE_FULL.
var raceTime = 300 * time.Millisecond

// TestRenameRace has the host swap names in the share, as fast as it can, for what leads out or must not be opened, while the guest does
// to them whatever it can do.
func TestRenameRace(t *testing.T) {
	for name, make := range map[string]func(s *scene, other string){
		"directory and relative symlink": func(s *scene, other string) { s.check(os.Symlink("../../outside/dir", other)) },
		"directory and absolute symlink": func(s *scene, other string) { s.check(os.Symlink(s.path("outside/dir"), other)) },
		"directory and magic link":       func(s *scene, other string) { s.check(os.Symlink("/proc/self/cwd/dir", other)) },
		"directory and FIFO":             func(s *scene, other string) { s.check(unix.Mkfifo(other, 0o666)) },
	} {
		t.Run(name, func(t *testing.T) {
			attack(t, func(s *scene) {
				s.check(os.MkdirAll(s.path("share/race/swapped"), 0o755))
				make(s, s.path("share/race/other"))
				s.check(s.giveAway(s.path("share/race")))
				s.race(func() error {
					return unix.Renameat2(unix.AT_FDCWD, s.path("share/race/swapped"), unix.AT_FDCWD, s.path("share/race/other"), unix.RENAME_EXCHANGE)
				}, s.useDir)
			})
		})
	}
	for name, make := range map[string]func(s *scene, other string) error{
		"file and symlink": func(_ *scene, other string) error { return os.Symlink("../../outside/secret", other) },
		"file and FIFO":    func(_ *scene, other string) error { return unix.Mkfifo(other, 0o666) },
		"file and device": func(_ *scene, other string) error {
			return unix.Mknod(other, unix.S_IFCHR|0o666, int(unix.Mkdev(4000, 1)))
		},
		"file and directory": func(_ *scene, other string) error { return os.Mkdir(other, 0o777) },
	} {
		t.Run(name, func(t *testing.T) {
			attack(t, func(s *scene) {
				s.check(os.Mkdir(s.path("share/race"), 0o755))
				s.put("share/race/swapped", "of the share")
				s.check(make(s, s.path("share/race/other")))
				s.check(s.giveAway(s.path("share/race")))
				s.race(func() error {
					return unix.Renameat2(unix.AT_FDCWD, s.path("share/race/swapped"), unix.AT_FDCWD, s.path("share/race/other"), unix.RENAME_EXCHANGE)
				}, s.useFile)
			})
		})
	}
}

// TestMoveRace has the host move a directory out of the share and back while the guest is in it.
func TestMoveRace(t *testing.T) {
	attack(t, func(s *scene) {
		s.check(os.MkdirAll(s.path("share/race/swapped/dir"), 0o755))
		s.check(s.giveAway(s.path("share/race")))
		s.check(os.Mkdir(s.path("parked"), 0o777))
		s.put("parked/secret", secretMark)
		s.put("parked/inner", secretMark)
		s.check(s.giveAway(s.path("parked")))
		s.rebase()
		in, out := s.path("share/race/swapped"), s.path("parked/swapped")
		away := false
		s.race(func() error {
			if away = !away; away {
				return os.Rename(in, out)
			}
			return os.Rename(out, in)
		}, s.useDir)
		// A directory that names come and go in is another one, and nothing else is.
		s.excuse("parked")
		s.before = s.before.without("parked")
		got, err := os.ReadDir(s.path("parked"))
		s.check(err)
		for _, e := range got {
			if name := e.Name(); name != "secret" && name != "inner" && name != "swapped" {
				s.t.Errorf("outside the share: parked/%s is new", name)
			}
		}
		for _, name := range []string{"parked/secret", "parked/inner"} {
			if got := s.content(name); got != secretMark {
				s.t.Errorf("outside the share: %s holds %q", name, got)
			}
		}
	})
}

// race runs use on race/swapped over and over, while change runs on another thread without a pause.
func (s *scene) race(change func() error, use func(dir uint64, name string) (found bool)) {
	s.t.Helper()
	var (
		stop    atomic.Bool
		changes atomic.Int64
		host    sync.WaitGroup
	)
	host.Go(func() {
		for !stop.Load() {
			if err := change(); err != nil {
				s.t.Errorf("change the share: %v", err)
				return
			}
			changes.Add(1)
		}
	})
	defer host.Wait()
	defer stop.Store(true)

	rounds, found := 0, 0
	start := time.Now()
	for ; ; rounds++ {
		raced := min(found, rounds-found) >= leastRaces
		if raced && (rounds >= raceRounds || time.Since(start) > raceTime) {
			return
		}
		if time.Since(start) > patience {
			s.t.Errorf("found what it looked for in %d of %d rounds, with %d changes: expected a race", found, rounds, changes.Load())
			return
		}
		if use(s.node("race"), "swapped") {
			found++
		}
		switch {
		case rounds%50 == 49:
			s.destroy()
			s.init()
		case rounds%10 == 9:
			s.pressure()
		}
	}
}

// useDir does to a directory, and to "inner" in it, all that a guest can, and reports whether it is one.
func (s *scene) useDir(parent uint64, name string) bool {
	s.t.Helper()
	e, errno := s.lookup(parent, name)
	found := errno == 0 && e.Mode&unix.S_IFMT == unix.S_IFDIR
	if errno != 0 {
		return false
	}
	dir := e.NodeId
	s.create(dir, "inner", unix.O_RDWR, 0o666)
	s.useFile(dir, "inner")
	created, errno := s.create(dir, "created", unix.O_RDWR|unix.O_TRUNC, 0o666)
	if errno == 0 {
		s.write(created.NodeId, created.Fh, "overwritten")
		s.release(created.NodeId, created.Fh)
	}
	s.mkdir(dir, "newdir")
	s.symlink(dir, "newlink", "target")
	s.mknod(dir, "newfifo", unix.S_IFIFO|0o666, 0)
	s.link(s.node("file"), dir, "newname")
	if tmp, errno := s.tmpfile(dir, "/"); errno == 0 {
		s.link(tmp.NodeId, dir, "newtmp")
		s.release(tmp.NodeId, tmp.Fh)
	}
	if fh, errno := s.opendir(dir); errno == 0 {
		s.list(dir, fh, true)
		s.list(dir, fh, false)
		s.releasedir(dir, fh)
	}
	for _, in := range setattrs() {
		if in.Valid&fuseproto.FATTR_MODE == 0 || found {
			in.Mode = 0o777
			in.Uid, in.Gid = s.cfg.uid, s.cfg.uid
			s.setattr(dir, in)
		}
	}
	s.setxattr(dir, "user.set", "value")
	s.getxattr(dir, "user.secret")
	s.rename(dir, "created", dir, "renamed")
	s.rename2(dir, "renamed", dir, "inner", unix.RENAME_EXCHANGE)
	s.rename(dir, secretMark, dir, "renamed")
	s.lookup(dir, "..")
	s.lookup(dir, "secret")
	s.lookup(dir, "../secret")
	for _, name := range []string{"inner", "newname", "newlink", "newfifo", "newtmp", "renamed", secretMark} {
		s.unlink(dir, name)
	}
	s.rmdir(dir, "newdir")
	s.rmdir(dir, "empty")
	return found
}

// useFile does to a file all that a guest can, and reports whether it is one.
func (s *scene) useFile(parent uint64, name string) bool {
	s.t.Helper()
	e, errno := s.lookup(parent, name)
	if errno != 0 {
		return false
	}
	node := e.NodeId
	for _, flags := range []uint32{unix.O_RDWR, unix.O_RDWR | unix.O_TRUNC, unix.O_WRONLY} {
		if fh, errno := s.open(node, flags); errno == 0 {
			s.read(node, fh)
			s.write(node, fh, "overwritten")
			s.release(node, fh)
		}
		if out, errno := s.create(parent, name, flags, 0o666); errno == 0 {
			s.read(out.NodeId, out.Fh)
			s.write(out.NodeId, out.Fh, "overwritten")
			s.release(out.NodeId, out.Fh)
		}
	}
	for _, in := range setattrs() {
		in.Mode, in.Uid, in.Gid = 0o666, s.cfg.uid, s.cfg.uid
		s.setattr(node, in)
	}
	s.setxattr(node, "user.set", "value")
	s.getxattr(node, "user.secret")
	s.readlink(node)
	s.lookup(node, "inner")
	return e.Mode&unix.S_IFMT == unix.S_IFREG
}
