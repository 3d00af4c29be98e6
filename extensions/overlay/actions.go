package overlay

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/upperdir"
)

// What the half outside tells the one inside.
const (
	tellFreeze  = "freeze"  // changes wait from now on, for overlay.MaxFreeze at most
	tellThaw    = "thaw"    // and go on; an error if they have done so by themselves
	tellReplace = "replace" // upper and work directory are these two files; no guest may be connected
)

// actions says what operators can ask of the overlay.
func (o *outside) actions() {
	for name, f := range map[string]func(context.Context, json.RawMessage) (any, error){
		api.ActCheckpoint:  with(o.checkpoint),
		api.ActCheckpoints: with(o.checkpoints),
		api.ActForget:      with(o.forget),
		api.ActDiff:        with(o.diff),
		api.ActRestore:     with(o.restore),
		api.ActApply:       with(o.apply),
	} {
		o.Action(name, f)
	}
}

// with decodes an action's argument.
func with[T any](f func(context.Context, T) (any, error)) func(context.Context, json.RawMessage) (any, error) {
	return func(ctx context.Context, arg json.RawMessage) (any, error) {
		var v T
		dec := json.NewDecoder(bytes.NewReader(arg))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&v); err != nil {
			return nil, &extensions.ActionError{Message: fmt.Sprintf("the argument: %v", err), Hint: "expected " + members[T]()}
		}
		return f(ctx, v)
	}
}

// members says what the JSON of a T may have.
func members[T any]() string {
	var names []string
	for _, f := range reflect.VisibleFields(reflect.TypeFor[T]()) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		names = append(names, name)
	}
	if len(names) == 0 {
		return "an empty JSON object"
	}
	return "a JSON object with no other members than " + strings.Join(names, ", ")
}

// frozen runs f while the guest's changes wait, and everything that it has changed so far is in the upper directory.
func (o *outside) frozen(ctx context.Context, f func() error) (err error) {
	// Whoever asked may have gone: then too what was frozen has to thaw, and nobody knows of a question that is given up whether it was heard.
	through := context.WithoutCancel(ctx)
	if _, err := o.Tell(through, tellFreeze, nil); err != nil {
		return err
	}
	defer func() {
		_, thawed := o.Tell(through, tellThaw, nil)
		err = errors.Join(err, thawed)
	}()
	if err := ctx.Err(); err != nil {
		return err
	}
	return f()
}

func (o *outside) checkpoint(ctx context.Context, arg api.OverlayName) (any, error) {
	var made upperdir.Checkpoint
	err := o.frozen(ctx, func() (err error) {
		made, err = o.store.Checkpoint(ctx, o.upper, arg.Name)
		return err
	})
	return show(made), err
}

func show(c upperdir.Checkpoint) api.Checkpoint {
	return api.Checkpoint{Name: c.Name, Time: c.Created, Files: uint64(c.Files), Bytes: uint64(c.Bytes)}
}

func (o *outside) checkpoints(ctx context.Context, _ struct{}) (any, error) {
	all, err := o.store.Checkpoints(ctx)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(all, func(a, b upperdir.Checkpoint) int { return a.Created.Compare(b.Created) })
	out := []api.Checkpoint{}
	for _, c := range all {
		out = append(out, show(c))
	}
	return out, nil
}

func (o *outside) forget(_ context.Context, arg api.OverlayName) (any, error) {
	return struct{}{}, o.store.Delete(arg.Name)
}

// at calls f with the upper as it is, or as it was at a checkpoint.
func (o *outside) at(ctx context.Context, checkpoint string, f func(u *upperdir.Upper) error) (err error) {
	if checkpoint == "" {
		return o.frozen(ctx, func() error { return f(o.upper) })
	}
	u, err := o.store.Restore(ctx, checkpoint, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, u.Close()) }()
	return f(u)
}

// below is what the upper is compared with.
func (o *outside) below() (upperdir.Tree, error) {
	if len(o.dirs) == 0 {
		return &tree{tell: o.Tell}, nil
	}
	return o.store.Lowers(o.dirs)
}

func (o *outside) diff(ctx context.Context, arg api.OverlayDiff) (any, error) {
	below, err := o.below()
	if err != nil {
		return nil, err
	}
	changes := []api.OverlayChange{}
	err = o.at(ctx, arg.Checkpoint, func(u *upperdir.Upper) error {
		if err := u.Diff(ctx, below, gather(&changes)); err != nil {
			return err
		}
		if arg.Tar == "" {
			return nil
		}
		return writeTar(ctx, u, below, arg.Tar)
	})
	return changes, err
}

// maxChanges bounds what is answered.
const maxChanges = 200_000

// gather adds changes to all.
func gather(all *[]api.OverlayChange) func(*upperdir.Change) error {
	return func(c *upperdir.Change) error {
		if len(*all) == maxChanges {
			return &extensions.ActionError{
				Message: fmt.Sprintf("more than %d files are changed", maxChanges), Hint: "take the changes as a tar file: overlay diff --tar",
			}
		}
		change := api.OverlayChange{Kind: string(c.Kind), Type: c.Type, Was: c.Was, Size: uint64(c.Size)}
		change.Path, change.RawPath = absolute(c.Path)
		if c.From != "" {
			change.From, change.RawFrom = absolute(c.From)
		}
		*all = append(*all, change)
		return nil
	}
}

// absolute is a path of package upperdir as the control API has it: JSON has no other strings than UTF-8.
func absolute(path string) (text string, raw []byte) {
	if path == "." {
		return "/", nil
	}
	path = "/" + path
	if utf8.ValidString(path) {
		return path, nil
	}
	return strings.ToValidUTF8(path, "\uFFFD"), []byte(path)
}

// maxTar bounds the data of a layer in bytes: a sparse file takes a terabyte in a tar archive that takes nothing on the disk.
const maxTar = 64 << 30

// writeTar writes u as a layer of an OCI image to the new file path, which is there when it is whole.
func writeTar(ctx context.Context, u *upperdir.Upper, below upperdir.Tree, path string) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%w: expected the name of a new file", err)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			_ = os.Remove(path)
		}
	}()
	if _, err := u.Export(ctx, f, below, maxTar); err != nil {
		return err
	}
	return f.Sync()
}

// restoreTime is how long the half inside may take for a new upper directory.
const restoreTime = 30 * time.Second

func (o *outside) restore(ctx context.Context, arg api.OverlayName) (any, error) {
	if o.o.UpperKind == UpperDir {
		return nil, &extensions.ActionError{
			Message: "the upper directory is one that was given: what is in it is not the daemon's to throw away",
			Hint:    "use upper=keep or upper=discard; or begin anew with from=" + arg.Name,
		}
	}
	// A kept one is exchanged only when nobody has it.
	next, err := o.store.Restore(ctx, arg.Name, "")
	if err != nil {
		return nil, err
	}
	files, err := upperFiles(next)
	if err != nil {
		return nil, errors.Join(err, next.Close())
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), restoreTime)
	defer cancel()
	_, err = o.Tell(ctx, tellReplace, nil, files...)
	for _, f := range files {
		_ = f.Close()
	}
	if err != nil {
		return nil, errors.Join(err, next.Close())
	}
	old := o.upper
	o.upper = next
	if o.o.UpperKind == UpperKeep {
		err = next.TakeOver(old)
	}
	return struct{}{}, errors.Join(err, old.Close())
}

func (o *outside) apply(ctx context.Context, arg api.OverlayApply) (any, error) {
	below, err := o.below()
	if err != nil {
		return nil, err
	}
	changes := []api.OverlayChange{}
	err = o.at(ctx, arg.Checkpoint, func(u *upperdir.Upper) error {
		return u.Apply(ctx, arg.Target, upperdir.ApplyOptions{Below: below, DryRun: arg.DryRun, Devices: arg.Devices}, gather(&changes))
	})
	if arg.Checkpoint != "" && !arg.DryRun {
		// What the guest is shown of a lower layer may be known from before: after a freeze it is looked at anew.
		err = errors.Join(err, o.frozen(ctx, func() error { return nil }))
	}
	var conflict *upperdir.ConflictError
	if errors.As(err, &conflict) {
		err = &extensions.ActionError{Message: conflict.Error(), Hint: "put the target back to what the overlay began with, or take the changes over by hand: diff --tar writes them to a file"}
	}
	return changes, err
}
