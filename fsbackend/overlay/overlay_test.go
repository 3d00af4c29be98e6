package overlay

import (
	"os"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
)

func TestMain(m *testing.M) {
	unix.Umask(0) // as the daemon does
	if os.Getenv(callsEnv) != "" {
		countedMain()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// newPassthrough serves dir, with work as its work directory unless that is "".
func newPassthrough(t testing.TB, dir, work string) *passthrough.FS {
	t.Helper()
	cfg := passthrough.Config{Dir: dir, MaxFDs: 64} // many are made
	if work != "" {
		fd, err := unix.Open(work, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		cfg.WorkDirFD = fd
	}
	fs, err := passthrough.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

func newMem(t testing.TB) *mem.FS {
	t.Helper()
	fs, err := mem.New(mem.Config{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())})
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

func newOverlay(t testing.TB, cfg Config) *FS {
	t.Helper()
	fs, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

// atRest says what of the bookkeeping of an overlay is wrong that nothing uses.
func atRest(b fsbackend.Backend) error {
	return b.(*FS).check()
}

func TestConformance(t *testing.T) {
	for _, kind := range []struct {
		name  string
		upper func(t *testing.T) fsbackend.Backend
		lower func(t *testing.T) fsbackend.Backend
	}{
		{
			"passthrough",
			func(t *testing.T) fsbackend.Backend { return newPassthrough(t, t.TempDir(), t.TempDir()) },
			func(t *testing.T) fsbackend.Backend { return newPassthrough(t, t.TempDir(), "") },
		},
		{
			"mem",
			func(t *testing.T) fsbackend.Backend { return newMem(t) },
			func(t *testing.T) fsbackend.Backend { return newMem(t) },
		},
	} {
		t.Run(kind.name, func(t *testing.T) {
			fsbackendtest.Run(t, fsbackendtest.Config{
				New: func(t *testing.T) fsbackend.Backend {
					return newOverlay(t, Config{Upper: kind.upper(t), Lowers: []Layer{{Backend: kind.lower(t)}}, Volatile: true})
				},
				Check:       atRest,
				AsRoot:      os.Getuid() == 0,
				SparseBlock: 4096,
				NoWhiteout:  true, // EINVAL, as the kernel's
				NoLocks:     kind.name == "mem",
			})
		})
	}
}
