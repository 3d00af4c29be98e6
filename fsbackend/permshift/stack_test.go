package permshift

import (
	"testing"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/casefold"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/overlay"
)

// newOverlay makes an overlay over an empty layer.
func newOverlay(t testing.TB, upper fsbackend.Backend) fsbackend.Backend {
	t.Helper()
	f, err := overlay.New(overlay.Config{Upper: upper, Lowers: []overlay.Layer{{Backend: newMem(t)}}, Volatile: true})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestStacked: the layer above and below others.
func TestStacked(t *testing.T) {
	cfg := Config{Format: ContainersOverride}
	for name, newBackend := range map[string]func(t *testing.T) fsbackend.Backend{
		"over an overlay":          func(t *testing.T) fsbackend.Backend { return over(t, newOverlay(t, newMem(t)), cfg) },
		"as an overlay's upper":    func(t *testing.T) fsbackend.Backend { return newOverlay(t, over(t, newMem(t), cfg)) },
		"with case folding on top": func(t *testing.T) fsbackend.Backend { return folded(t, over(t, newOverlay(t, newMem(t)), cfg)) },
	} {
		t.Run(name, func(t *testing.T) {
			fsbackendtest.Run(t, fsbackendtest.Config{New: newBackend, AsRoot: true, SparseBlock: 4096, NoWhiteout: true, NoLocks: true})
		})
	}
}

func folded(t *testing.T, b fsbackend.Backend) fsbackend.Backend {
	t.Helper()
	f, err := casefold.New(b, casefold.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// incomplete is a backend that does not say that its listings have all names.
type incomplete struct{ fsbackend.Backend }

// TestListsAll says what the backend below does.
func TestListsAll(t *testing.T) {
	for _, want := range []bool{false, true} {
		b := newMem(t)
		if !want {
			b = incomplete{b}
		}
		f, err := New(b, Config{Format: Off})
		if err != nil {
			t.Fatal(err)
		}
		if got := f.ListsAll(1, 0); got != want {
			t.Errorf("%v, expected %v", got, want)
		}
		_ = f.Close()
	}
}
