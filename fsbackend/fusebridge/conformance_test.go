package fusebridge

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

// check says what of the tables of a bridge at rest is wrong.
func check(backend fsbackend.Backend) error {
	b := backend.(*served).Bridge
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.current.Load()
	pins := map[*node]int{}
	for fh, h := range b.handles {
		if h.pins != 0 || h.closed {
			return fmt.Errorf("handle %d: %d pins, closed %v", fh, h.pins, h.closed)
		}
		pins[h.node]++
	}
	for id, n := range b.nodes {
		if n.id != id || n != b.root && (n.count == 0 || n.at.conn == c && n.held == 0) {
			return fmt.Errorf("node %d is under %d with %d lookups, %d of the program's", n.id, id, n.count, n.held)
		}
		if n.pins != pins[n] {
			return fmt.Errorf("node %d has %d pins, %d handles", id, n.pins, pins[n])
		}
	}
	for raw, n := range c.byRaw {
		if n.at.conn != c || n.at.raw != raw {
			return fmt.Errorf("node %d is under the program's %d", n.id, raw)
		}
	}
	for c.drain(); ; runtime.Gosched() { // its watcher may be looking for messages just now
		c.mu.Lock()
		if !c.leading {
			break
		}
		c.mu.Unlock()
	}
	defer c.mu.Unlock()
	if len(c.pending) != 0 || c.leading || len(c.forgets) != 0 || len(c.posts) != 0 || c.unsolicited != 0 {
		return fmt.Errorf("%d requests pending, led %v, %d forgets, %d releases, %d replies to nothing", len(c.pending), c.leading, len(c.forgets), len(c.posts), c.unsolicited)
	}
	return nil
}

func TestGocryptfs(t *testing.T) {
	if !long {
		t.Skip("set FUSEBRIDGE_TEST_LONG: it starts gocryptfs 40 times. TestGocryptfsTree is in its place")
	}
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fsbackendtest.Run(t, fsbackendtest.Config{
		New: func(t *testing.T) fsbackend.Backend {
			cipher := t.TempDir()
			run(t, "gocryptfs", "-init", "-q", "-passfile", password, "-scryptn", "10", cipher)
			return serve(t, command("gocryptfs", "-fg", "-q", "-passfile", password, "-allow_other", cipher, mnt), Config{})
		},
		Check:         check,
		AsRoot:        os.Getuid() == 0,
		MaxSymlink:    3000, // they are longer encrypted
		NoUnlinked:    true, // it works with paths
		NoSetgid:      true,
		NoAppend:      true,
		NoTmpfile:     true,
		NoTmpfileLink: true,
		NoPunch:       true,
		NoCopy:        true,
		NoXattr:       true, // it takes names outside of any name space
		NoLocks:       true,
		NoStatx:       true,
	})
}

func TestFuseOverlayfs(t *testing.T) {
	fsbackendtest.Run(t, fsbackendtest.Config{
		New: func(t *testing.T) fsbackend.Backend {
			dir := t.TempDir()
			for _, d := range []string{"lower", "upper", "work"} {
				if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			options := fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)
			return serve(t, command("fuse-overlayfs", "-f", "-o", options, mnt), Config{})
		},
		Check:         check,
		AsRoot:        os.Getuid() == 0,
		MaxName:       251, // it may put .wh. before them
		NoSetgid:      true,
		NoWhiteout:    true,
		NoRaces:       true, // directories are EXDEV sometimes
		NoTmpfile:     true,
		NoTmpfileLink: true,
		NoLocks:       true,
		NoStatx:       true,
	})
}

// long has all programs run the whole suite.
var long = os.Getenv("FUSEBRIDGE_TEST_LONG") != ""

func TestLoopback(t *testing.T) {
	for i, tt := range []struct {
		name string
		cfg  Config
	}{{"defaults", Config{}}, {"no cache, large", Config{NoCache: true, MaxWrite: LimitMaxWrite}}} {
		if i > 0 && !long {
			break
		}
		t.Run(tt.name, func(t *testing.T) {
			fsbackendtest.Run(t, fsbackendtest.Config{
				New:    func(t *testing.T) fsbackend.Backend { return serve(t, loopbackOn(t.TempDir()), tt.cfg) },
				Check:  check,
				AsRoot: os.Getuid() == 0,
				// As TestLoopback of package gofuse.
				SparseBlock:     4096,
				NoSetgid:        true,
				NoTmpfileLink:   true,
				NoAppend:        true,
				NoUnlinked:      true,
				NoRaces:         true,
				NewNodeOnCreate: true,
				NoStatx:         true,
			})
		})
	}
}
