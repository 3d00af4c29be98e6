package link

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/sluicefs/sluice/control/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair starts a server with handle and returns who asks it, and what Serve returned once the link is closed.
func pair(t *testing.T, handle Handler) (*Keeper, func() error) {
	t.Helper()
	a, b, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	k, err := NewKeeper(a)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- Serve(b, handle) }()
	end := sync.OnceValue(func() error {
		_ = k.Close()
		return <-served
	})
	t.Cleanup(func() { _ = end() })
	return k, end
}

func TestCall(t *testing.T) {
	k, end := pair(t, func(method string, body json.RawMessage, files []*os.File) (any, error) {
		defer closeAll(files)
		var text string
		if err := json.Unmarshal(body, &text); err != nil {
			return nil, err
		}
		switch method {
		case "repeat":
			for _, f := range files {
				more, err := io.ReadAll(f)
				if err != nil {
					return nil, err
				}
				text += string(more)
			}
			return text, nil
		case "refuse":
			return nil, &api.Error{Code: api.CodeBusy, Message: text, Hint: "wait"}
		}
		return nil, errors.New("what?")
	})
	var got string
	if err := k.Call(t.Context(), "repeat", "a", &got); err != nil || got != "a" {
		t.Errorf("repeat: %q, %v", got, err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.WriteString("b"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := k.Call(t.Context(), "repeat", "a", &got, r); err != nil || got != "ab" {
		t.Errorf("repeat with a descriptor: %q, %v", got, err)
	}
	long := strings.Repeat("long", 1<<20)
	if err := k.Call(t.Context(), "repeat", long, &got); err != nil || got != long {
		t.Errorf("repeat of %d bytes: %d bytes, %v", len(long), len(got), err)
	}
	var refused *api.Error
	if err := k.Call(t.Context(), "refuse", "no", nil); !errors.As(err, &refused) || *refused != (api.Error{Code: api.CodeBusy, Message: "no", Hint: "wait"}) {
		t.Errorf("refuse: %v", err)
	}
	if err := k.Call(t.Context(), "other", "", nil); !errors.As(err, &refused) || refused.Code != api.CodeInternal || refused.Message != "what?" {
		t.Errorf("another method: %v", err)
	}
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			var got int
			text, _ := json.Marshal(i)
			if err := k.Call(t.Context(), "repeat", string(text), &got); err == nil {
				t.Error("a number was decoded from a string")
			}
		})
	}
	all.Wait()
	if err := end(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if err := k.Call(t.Context(), "repeat", "", nil); !errors.Is(err, ErrClosed) {
		t.Errorf("call after the end: %v", err)
	}
}

// TestCallGivesUp does not wait longer than it may, and the answer that comes later is nobody's.
func TestCallGivesUp(t *testing.T) {
	release := make(chan struct{})
	k, _ := pair(t, func(method string, _ json.RawMessage, _ []*os.File) (any, error) {
		if method == "slow" {
			<-release
		}
		return method, nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- k.Call(ctx, "slow", nil, nil) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("slow: %v", err)
	}
	close(release)
	var got string
	if err := k.Call(t.Context(), "quick", nil, &got); err != nil || got != "quick" {
		t.Errorf("quick: %q, %v", got, err)
	}
}

// TestServeEnds with the keeper, whatever is still being done.
func TestServeEnds(t *testing.T) {
	begun, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	k, end := pair(t, func(string, json.RawMessage, []*os.File) (any, error) {
		close(begun)
		<-release
		return nil, nil
	})
	asked := make(chan error, 1)
	go func() { asked <- k.Call(t.Context(), "hang", nil, nil) }()
	<-begun
	if err := end(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if err := <-asked; !errors.Is(err, ErrClosed) {
		t.Errorf("Call: %v", err)
	}
}

// TestGone ends the server while it is asked.
func TestGone(t *testing.T) {
	a, b, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	k, err := NewKeeper(a)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	asked := make(chan error, 1)
	go func() { asked <- k.Call(t.Context(), "anything", 1, nil) }()
	if _, err := b.Read(make([]byte, headerSize)); err != nil {
		t.Fatal(err)
	}
	b.Close()
	if err := <-asked; !errors.Is(err, ErrClosed) {
		t.Errorf("Call: %v", err)
	}
}

// FuzzKeeper has the keeper read what a server that was taken over may send.
func FuzzKeeper(f *testing.F) {
	frameOf := func(text string) []byte {
		return append(binary.NativeEndian.AppendUint32(nil, uint32(len(text))), text...)
	}
	f.Add(frameOf(`{"id":1,"body":"x"}`))
	f.Add(frameOf(`{"id":1,"error":{"code":"busy","message":"m"}}`))
	f.Add(frameOf(`{"id":7}`))
	f.Add(frameOf(`[`))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{4, 0, 0, 0, '1'})
	f.Fuzz(func(t *testing.T, sent []byte) {
		a, b, err := Pair()
		if err != nil {
			t.Fatal(err)
		}
		k, err := NewKeeper(a)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, _ = b.Write(sent)
			_, _ = b.Read(make([]byte, headerSize))
			_ = b.Close()
		}()
		var result string
		_ = k.Call(t.Context(), "m", 1, &result) // it returns
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
