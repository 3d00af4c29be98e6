package controltest_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/sluicefs/sluice/control"
	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/controltest"
)

var _ control.Daemon = (*controltest.Daemon)(nil)

func code(err error) string {
	var e *api.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func TestSharesAndGrafts(t *testing.T) {
	ctx := t.Context()
	d := controltest.New()
	if _, err := d.AddShare(ctx, api.ShareSpec{Tag: "data", Grafts: []api.GraftSpec{{Path: "/x", Source: "/srv/x"}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.AddShare(ctx, api.ShareSpec{Tag: "data"}); code(err) != api.CodeExists {
		t.Errorf("a second share of one tag: %v", err)
	}
	if _, err := d.AddGraft(ctx, "data", api.GraftSpec{Path: "/x", Source: "/srv/y"}, false); code(err) != api.CodeExists {
		t.Errorf("a second graft at one path: %v", err)
	}
	d.Open("data", "/x", 1)
	if _, err := d.AddGraft(ctx, "data", api.GraftSpec{Path: "/x", Source: "/srv/y"}, true); err != nil {
		t.Fatal(err)
	}
	paths := func() (out []string) {
		all, err := d.Grafts(ctx, "data")
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range all {
			p := g.Path
			if g.Leaving {
				p += " leaving"
			}
			out = append(out, p)
		}
		return out
	}
	if got, want := paths(), []string{"/", "/x", "/x leaving"}; !slices.Equal(got, want) {
		t.Errorf("grafts are %q, want %q", got, want)
	}
	d.Connect("data")
	if err := d.RemoveShare(ctx, "data", false); code(err) != api.CodeBusy {
		t.Errorf("removing a share in use: %v", err)
	}
	if err := d.RemoveShare(ctx, "data", true); err != nil {
		t.Error(err)
	}
	if _, err := d.Grafts(ctx, "data"); code(err) != api.CodeNotFound {
		t.Errorf("grafts of a removed share: %v", err)
	}
}

func TestEvents(t *testing.T) {
	d := controltest.New()
	if _, err := d.AddShare(t.Context(), api.ShareSpec{Tag: "data"}); err != nil {
		t.Fatal(err)
	}
	for range controltest.Keep + 2 {
		d.Emit("data", api.Event{Kind: api.EventModify, Path: "/f"})
	}
	for _, tt := range []struct {
		since uint64
		kind  string
		id    uint64
	}{
		{1, api.EventRescan, controltest.Keep + 2},
		{2, api.EventModify, 3},
		{controltest.Keep + 1, api.EventModify, controltest.Keep + 2},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		var got []api.Event
		err := d.Events(ctx, "data", tt.since, func(e api.Event) error {
			if got = append(got, e); len(got) == 2 {
				cancel()
				return ctx.Err()
			}
			return nil
		})
		if !errors.Is(err, context.Canceled) || got[0].Kind != api.EventHello || got[1].Kind != tt.kind || got[1].ID != tt.id {
			t.Errorf("since %d: %+v, %v", tt.since, got, err)
		}
	}
}
