package sharer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Agent copies to the guest. Paths of targets are the guest's; what is above them may have to be made.
type Agent interface {
	// CopyFile copies a regular file, with its content, or a directory, without. Mode and owner are to be the source's. What is at
	// target is replaced, but a directory stays with what is in it.
	CopyFile(ctx context.Context, source, target string) error
	// Symlink makes target a symbolic link to a path. One that is there is replaced in one step, as by rename(2).
	Symlink(ctx context.Context, to, target string) error
	// RemoveFile removes target and all that is in it. That it is not there is no error. An agent that cannot remove says
	// errors.ErrUnsupported; what was shared then stays in the guest.
	RemoveFile(ctx context.Context, target string) error
}

// Copy shares by copying through an agent in the guest, where no file system can be shared. Regular files, directories and
// symbolic links are copied, others left out.
type Copy struct {
	Agent Agent
}

func (c Copy) validate() error {
	if c.Agent == nil {
		return errors.New("copy without an agent")
	}
	return nil
}

func (c Copy) open(s *Sandbox) backend {
	return &copies{s: s, agent: c.Agent, volumes: make(map[string]*volume)}
}

type copies struct {
	s     *Sandbox
	agent Agent
	// volumes are what the guest has of those that are watched, by shared.Path. They are used under the sandbox's lock.
	volumes map[string]*volume
}

// A copy belongs to the guest: whether a container may write to its copy is for the guest to see to.
func (c *copies) canChange() bool { return true }

func (c *copies) setReadOnly(context.Context, *shared, bool) error { return nil }
func (c *copies) hostPath(*shared) string                          { return "" }

func (c *copies) prepare(context.Context) (func(context.Context) error, error) {
	return func(context.Context) error { return nil }, nil
}

// cleanup leaves the guest alone: its copies end with it, and most often it has ended.
func (c *copies) cleanup(context.Context, []*shared) error {
	clear(c.volumes)
	return nil
}

func (c *copies) guest(sh *shared) string { return path.Join(c.s.config.GuestDir, sh.Path) }

func (c *copies) add(ctx context.Context, sh *shared) error {
	info, err := os.Lstat(sh.Source)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() && !info.IsDir() {
		return errIgnored
	}
	if sh.Watch {
		err = c.sync(ctx, sh)
	} else {
		err = c.tree(ctx, sh.Source, c.guest(sh))
	}
	if err != nil {
		c.s.undo(ctx, func(ctx context.Context) error { return c.remove(ctx, sh) })
	}
	return err
}

func (c *copies) remove(ctx context.Context, sh *shared) error {
	if err := c.agent.RemoveFile(ctx, c.guest(sh)); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	delete(c.volumes, sh.Path)
	return nil
}

// tree copies a file, or a directory with all that is in it.
func (c *copies) tree(ctx context.Context, source, target string) error {
	return filepath.WalkDir(source, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := path.Join(target, strings.TrimPrefix(p, source))
		switch kind := d.Type(); {
		case kind.IsRegular() || kind.IsDir():
			err = c.agent.CopyFile(ctx, p, to)
		case kind&fs.ModeSymlink != 0:
			var link string
			if link, err = os.Readlink(p); err == nil {
				err = c.agent.Symlink(ctx, link, to)
			}
		default:
			c.s.log.Debug("copy: left out what is no file, directory or symbolic link", "source", p)
			return nil
		}
		if err == nil {
			c.s.copied.Add(1)
		}
		return err
	})
}

// volume is what the guest has of a volume that kubelet's atomic writer updates: a link ..data to a directory with a time as its
// name, that has the content, and links to ..data/KEY.
type volume struct {
	made bool
	data string            // what ..data says
	old  map[string]bool   // directories that ..data has named before
	keys map[string]string // by name what a link says, "" for what is no link
}

const dataLink = "..data"

// errChanging says that a volume was updated again while it was copied.
var errChanging = errors.New("it changes while it is copied")

// sync makes the guest's copy of a volume what the host has. The guest never sees ..data before what it names is complete; keys
// that are gone from the host go. It may fail in the middle, and be called again.
func (c *copies) sync(ctx context.Context, sh *shared) error {
	v := c.volumes[sh.Path]
	if v == nil {
		v = &volume{old: make(map[string]bool), keys: make(map[string]string)}
		c.volumes[sh.Path] = v
	}
	guest := c.guest(sh)
	if !v.made {
		if err := c.agent.CopyFile(ctx, sh.Source, guest); err != nil {
			return err
		}
		c.s.copied.Add(1)
		v.made = true
	}
	if err := c.syncData(ctx, sh.Source, guest, v); err != nil {
		return err
	}
	entries, err := os.ReadDir(sh.Source)
	if err != nil {
		return err
	}
	gone := maps.Clone(v.keys)
	for _, e := range entries {
		name := e.Name()
		// What begins so is the writer's own.
		if strings.HasPrefix(name, "..") {
			continue
		}
		delete(gone, name)
		link := ""
		if e.Type()&fs.ModeSymlink != 0 {
			if link, err = os.Readlink(filepath.Join(sh.Source, name)); err != nil {
				return err
			}
		}
		if had, ok := v.keys[name]; ok && had == link {
			continue
		}
		if err := c.tree(ctx, filepath.Join(sh.Source, name), path.Join(guest, name)); err != nil {
			return err
		}
		v.keys[name] = link
	}
	for name := range gone {
		if err := c.drop(ctx, path.Join(guest, name)); err != nil {
			return err
		}
		delete(v.keys, name)
	}
	for name := range v.old {
		if err := c.drop(ctx, path.Join(guest, name)); err != nil {
			return err
		}
		delete(v.old, name)
	}
	return nil
}

// syncData copies what ..data names, and only then says so in the guest.
func (c *copies) syncData(ctx context.Context, source, guest string, v *volume) error {
	data, err := os.Readlink(filepath.Join(source, dataLink))
	if errors.Is(err, fs.ErrNotExist) || err == nil && data == v.data {
		return nil
	}
	if err != nil {
		return err
	}
	if !strings.HasPrefix(data, "..") || filepath.Base(data) != data || data == ".." || data == dataLink {
		return fmt.Errorf("%s of volume %s is a link to %q: expected the name of a directory beside it that begins with two dots", dataLink, source, data)
	}
	// It is in the guest, in part or whole, but nothing names it yet.
	v.old[data] = true
	if err := c.tree(ctx, filepath.Join(source, data), path.Join(guest, data)); err != nil {
		return err
	}
	// If it was taken away meanwhile, not all of it may have been seen.
	if now, err := os.Readlink(filepath.Join(source, dataLink)); err != nil || now != data {
		return errors.Join(errChanging, err)
	}
	if err := c.agent.Symlink(ctx, data, path.Join(guest, dataLink)); err != nil {
		return err
	}
	c.s.copied.Add(1)
	delete(v.old, data)
	if v.data != "" {
		v.old[v.data] = true
	}
	v.data = data
	return nil
}

// drop removes something from the guest, if the agent can.
func (c *copies) drop(ctx context.Context, target string) error {
	if err := c.agent.RemoveFile(ctx, target); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

// retryWait are how long until what has failed is tried again, at first and at most.
const (
	retryWait    = 50 * time.Millisecond
	retryWaitMax = 5 * time.Second
)

// follow copies what changes in watched volumes. What is watched is the volume's own directory: there the writer exchanges
// ..data once the content is complete.
func (c *copies) follow(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch volumes: %w", err)
	}
	defer watcher.Close()

	// all: anything may have changed, before there was a watch or because events were lost.
	all, changed := true, make(map[string]bool)
	wait := retryWait
	for {
		failed, err := c.pass(ctx, watcher, all, changed)
		if err != nil {
			return nil // ctx has ended
		}
		all = false
		clear(changed)
		var retry <-chan time.Time
		if len(failed) > 0 {
			retry = time.After(wait)
			wait = min(2*wait, retryWaitMax)
		} else {
			wait = retryWait
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.s.watch.more:
		case <-retry:
		case e, ok := <-watcher.Events:
			if !ok {
				return errors.New("watch volumes: the watcher has ended")
			}
			c.s.events.Add(1)
			changed[filepath.Dir(e.Name)] = true
			changed[e.Name] = true // the directory itself, when it goes
		case err := <-watcher.Errors:
			c.s.rescans.Add(1)
			c.s.log.Warn("watch volumes: looking through all of them", "error", err)
			all = true
		}
		for _, source := range failed {
			changed[source] = true
		}
	}
}

// pass watches what is not watched yet, brings what has changed up to date, and returns the sources that failed. The lock is
// given back between volumes, so that sharing does not wait for all of them.
func (c *copies) pass(ctx context.Context, watcher *fsnotify.Watcher, all bool, changed map[string]bool) (failed []string, err error) {
	if err := c.s.acquire(ctx); err != nil {
		return nil, err
	}
	var watched []*shared
	for _, sh := range c.s.shared {
		if sh.Watch {
			watched = append(watched, sh)
		}
	}
	c.s.release()

	known := make(map[string]bool)
	for _, source := range watcher.WatchList() {
		known[source] = true
	}
	for _, sh := range watched {
		fresh := !known[sh.Source]
		delete(known, sh.Source)
		if !fresh && !all && !changed[sh.Source] {
			continue
		}
		err := error(nil)
		if fresh {
			err = watcher.Add(sh.Source)
		}
		if err == nil {
			err = c.update(ctx, sh)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			level := slog.LevelWarn
			if errors.Is(err, fs.ErrNotExist) {
				level = slog.LevelDebug // it may be gone for good
			}
			c.s.log.Log(ctx, level, "copy what has changed in a volume: trying again", "source", sh.Source, "error", err)
			failed = append(failed, sh.Source)
		}
	}
	for source := range known {
		if err := watcher.Remove(source); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) {
			c.s.log.Warn("end the watch of a volume", "source", source, "error", err)
		}
	}
	return failed, nil
}

// update is sync, unless the volume is not shared any more.
func (c *copies) update(ctx context.Context, sh *shared) error {
	if err := c.s.acquire(ctx); err != nil {
		return err
	}
	defer c.s.release()
	if c.s.find(func(other *shared) bool { return other == sh }) == nil {
		return nil
	}
	return c.sync(ctx, sh)
}
