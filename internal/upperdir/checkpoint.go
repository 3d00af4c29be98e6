package upperdir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// Checkpoint describes one.
type Checkpoint struct {
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	Stats
}

const infoFile = "info.json"

// maxInfo bounds what is read of an info.json, in bytes.
const maxInfo = 4096

// Checkpoint copies the upper u to the store under name, which must be new. It is there when it is whole and on the medium, or not
// at all. Blocks are shared where the file system can do that. The guest may go on; whoever wants one moment of it has to hold it up.
func (s *Store) Checkpoint(ctx context.Context, u *Upper, name string) (Checkpoint, error) {
	if err := checkName(name); err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint: %w", err)
	}
	if c, err := s.checkpoints.child(name); err == nil {
		c.close()
		return Checkpoint{}, s.exists(name)
	}
	temp := randomName(newPrefix)
	var d *node
	var l *sys.FD
	err := s.locked(func() (err error) {
		if d, err = s.h.subdir(s.checkpoints, temp); err != nil {
			return err
		}
		l, err = lock(d, unix.LOCK_EX|unix.LOCK_NB)
		return err
	})
	defer func() {
		d.close()
		_ = l.Close()
	}()
	info := Checkpoint{Name: name, Created: time.Now().UTC().Truncate(time.Second)}
	if err == nil {
		info.Stats, err = s.fill(ctx, d, u.dir)
	}
	if err == nil {
		err = writeInfo(d, info)
	}
	if err == nil {
		err = syncfs(d)
	}
	if err == nil {
		err = unix.Renameat2(s.checkpoints.fd, temp, s.checkpoints.fd, name, unix.RENAME_NOREPLACE)
	}
	if err == nil {
		return info, fsyncDir(s.checkpoints)
	}
	if d != nil {
		_ = s.discard(s.checkpoints, temp)
		s.clear()
	}
	if errors.Is(err, unix.EEXIST) {
		return Checkpoint{}, s.exists(name)
	}
	return Checkpoint{}, fmt.Errorf("checkpoint %s of %s: %w", name, u.path, err)
}

func (s *Store) exists(name string) error {
	return fmt.Errorf("checkpoint %s exists already in %s; forget it first, or choose another name", name, s.path)
}

// fill makes d/upper a copy of the directory from.
func (s *Store) fill(ctx context.Context, d, from *node) (Stats, error) {
	to, err := s.h.subdir(d, "upper")
	if err != nil {
		return Stats{}, explain("make", "upper", err)
	}
	defer to.close()
	return s.copyTree(ctx, d, from, to)
}

// copyTree makes the empty directory to a copy of from; d is its parent, for what is needed meanwhile.
func (s *Store) copyTree(ctx context.Context, d, from, to *node) (Stats, error) {
	links, err := s.h.subdir(d, "links")
	if err != nil {
		return Stats{}, explain("make", "links", err)
	}
	defer links.close()
	c := &copier{h: s.h, ctx: ctx, links: links.fd, linked: make(map[fileID]string), rename: keepXattr}
	if err := c.tree(from, to, "", 0); err != nil {
		return c.stats, err
	}
	// The root as it is by now.
	root, err := s.h.at(from.fd, ".")
	if err != nil {
		return c.stats, explain("look at", "", err)
	}
	defer root.close()
	if err := c.attributes(root, to); err != nil {
		return c.stats, explain("copy attributes of", "", err)
	}
	if err := s.h.empty(ctx, links); err != nil {
		return c.stats, err
	}
	return c.stats, explain("remove", "links", unix.Unlinkat(d.fd, "links", unix.AT_REMOVEDIR))
}

func writeInfo(d *node, info Checkpoint) error {
	text, err := json.Marshal(info)
	if err != nil {
		return err
	}
	fd, err := unix.Openat(d.fd, infoFile, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return explain("write", infoFile, err)
	}
	f := os.NewFile(uintptr(fd), infoFile)
	_, err = f.Write(append(text, '\n'))
	return errors.Join(err, f.Close())
}

// readInfo reads the description of the checkpoint d.
func readInfo(d *node) (Checkpoint, error) {
	text, err := readSmall(context.Background(), d, infoFile, maxInfo)
	if err != nil {
		return Checkpoint{}, err
	}
	var c Checkpoint
	return c, json.Unmarshal(text, &c)
}

// Checkpoints lists them by name.
func (s *Store) Checkpoints(ctx context.Context) ([]Checkpoint, error) {
	entries, err := s.checkpoints.list(ctx)
	if err != nil {
		return nil, fmt.Errorf("list checkpoints of %s: %w", s.path, err)
	}
	list := []Checkpoint{}
	for _, e := range entries {
		if strings.HasPrefix(e.name, ".") {
			continue
		}
		d, err := s.checkpoints.child(e.name)
		if gone(err) {
			continue
		}
		var c Checkpoint
		if err == nil {
			c, err = readInfo(d)
			d.close()
		}
		if err != nil {
			return nil, fmt.Errorf("read checkpoint %s of %s: %w; delete it", e.name, s.path, err)
		}
		c.Name = e.name
		list = append(list, c)
	}
	return list, nil
}

// checkpoint opens a checkpoint and takes its lock.
func (s *Store) checkpoint(name string, how int) (*node, *sys.FD, error) {
	if err := checkName(name); err != nil {
		return nil, nil, fmt.Errorf("checkpoint: %w", err)
	}
	d, err := s.checkpoints.child(name)
	if gone(err) {
		return nil, nil, fmt.Errorf("there is no checkpoint %s in %s; list them, or make it first", name, s.path)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open checkpoint %s: %w", name, err)
	}
	l, err := lock(d, how|unix.LOCK_NB)
	if err != nil {
		d.close()
		return nil, nil, fmt.Errorf("checkpoint %s: %w; wait until it has been restored elsewhere", name, err)
	}
	return d, l, nil
}

// Delete removes a checkpoint.
func (s *Store) Delete(name string) error {
	d, l, err := s.checkpoint(name, unix.LOCK_EX)
	if err != nil {
		return err
	}
	err = s.discard(s.checkpoints, name)
	d.close()
	_ = l.Close()
	s.clear()
	if err != nil {
		return fmt.Errorf("delete checkpoint %s: %w", name, err)
	}
	return nil
}

// Restore makes an upper of a checkpoint, which stays. With keep "", it is one as of Discard; otherwise one as of Keep, and an upper
// of that name, which nobody may be using, is replaced in one step.
func (s *Store) Restore(ctx context.Context, checkpoint, keep string) (*Upper, error) {
	c, l, err := s.checkpoint(checkpoint, unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	defer c.close()
	from, err := c.child("upper")
	if err != nil {
		return nil, fmt.Errorf("open checkpoint %s: %w; delete it", checkpoint, err)
	}
	defer from.close()

	name := randomName(discardPrefix)
	if keep != "" {
		if err := checkName(keep); err != nil {
			return nil, fmt.Errorf("upper directory: %w", err)
		}
		name = keepPrefix + keep
	}
	u, err := s.build(name, keep != "", func(d, dir *node) error {
		if _, err := s.copyTree(ctx, d, from, dir); err != nil {
			return err
		}
		return syncfs(dir)
	})
	if err != nil {
		return nil, fmt.Errorf("restore checkpoint %s: %w", checkpoint, err)
	}
	u.discard = keep == ""
	return u, nil
}

// TakeOver makes u, one of Discard, what the kept upper old is, in one step. old is discarded by its Close then.
func (u *Upper) TakeOver(old *Upper) error {
	if !u.discard || old.discard || u.name == "" || old.name == "" {
		return fmt.Errorf("upper directory %s cannot take the place of %s", u.path, old.path)
	}
	if err := unix.Renameat2(u.s.uppers.fd, u.name, old.s.uppers.fd, old.name, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("exchange upper directory %s for %s: %w", old.path, u.path, err)
	}
	u.name, old.name = old.name, u.name
	u.path, old.path = old.path, u.path
	u.discard, old.discard = false, true
	return fsyncDir(u.s.uppers)
}
