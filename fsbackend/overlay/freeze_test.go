package overlay

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func newMemOverlay(t *testing.T) *ourTree {
	t.Helper()
	lower := newMem(t)
	if err := lower.WriteFile("d/f", []byte("lower")); err != nil {
		t.Fatal(err)
	}
	o := newOurTree(newOverlay(t, Config{Upper: newMem(t), Lowers: []Layer{{Backend: lower}}}))
	t.Cleanup(func() { _ = o.fs.Close() })
	return o
}

// TestFreeze has a change wait while the tree can be read, and go on when the freeze ends.
func TestFreeze(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newMemOverlay(t)
		if err := o.fs.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := o.fs.Freeze(t.Context()); err == nil {
			t.Error("it could be frozen twice")
		}
		var out fuseproto.EntryOut
		in := fuseproto.MkdirIn{InHeader: header(root), Mode: 0o755}
		if e := o.fs.Mkdir(&fsbackend.Context{}, &in, fsbackend.MakeName("new"), &out); e != fsbackend.ErrMayBlock {
			t.Errorf("MKDIR that may not sleep: %v, expected ErrMayBlock", e)
		}
		done := make(chan error, 1)
		go func() { done <- o.write("d/f", 0, "upper") }()
		synctest.Wait()
		select {
		case err := <-done:
			t.Errorf("a write went through: %v", err)
		default:
		}
		f, err := o.walk("d/f")
		if err != nil || f.Size != 5 {
			t.Errorf("LOOKUP while frozen: size %d, %v", f.Size, err)
		}
		if err := o.fs.Thaw(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Errorf("the write that waited: %v", err)
		}
		if err := o.fs.Thaw(); !errors.Is(err, ErrFreezeLost) {
			t.Errorf("Thaw of what is not frozen: %v", err)
		}
	})
}

// TestFreezeEnds has a freeze end by itself, and one give up that a change holds up.
func TestFreezeEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newMemOverlay(t)
		if err := o.fs.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := o.write("d/f", 0, "upper"); err != nil || time.Since(start) != MaxFreeze {
			t.Errorf("a write took %v, %v, expected %v", time.Since(start), err, MaxFreeze)
		}
		if err := o.fs.Thaw(); !errors.Is(err, ErrFreezeLost) {
			t.Errorf("Thaw after that: %v, expected ErrFreezeLost", err)
		}

		c := &fsbackend.Context{MayBlock: true}
		if e := o.fs.begin(c); e != 0 {
			t.Fatal(e)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := o.fs.Freeze(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Freeze while a change hangs: %v, expected that its time is up", err)
		}
		go func() {
			time.Sleep(time.Second)
			o.fs.end(c)
		}()
		if err := o.fs.Freeze(t.Context()); err != nil {
			t.Error(err)
		}
		cancelled := make(chan struct{})
		close(cancelled)
		if e := o.fs.begin(&fsbackend.Context{MayBlock: true, Cancel: cancelled}); e != unix.EINTR {
			t.Errorf("a change that nobody waits for: %v, expected EINTR", e)
		}
		if err := o.fs.Thaw(); err != nil {
			t.Error(err)
		}
	})
}
