package passthrough

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

func TestConformance(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	each(t, func(t *testing.T, cfg Config) {
		fsbackendtest.Run(t, fsbackendtest.Config{
			New: func(t *testing.T) fsbackend.Backend {
				cfg := cfg
				cfg.Dir = t.TempDir()
				fs, err := New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				return fs
			},
			Check:       func(b fsbackend.Backend) error { return b.(*FS).check() },
			AsRoot:      os.Getuid() == 0,
			SparseBlock: 4096,
		})
	})
}
