package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/sluicefs/sluice/internal/listen"
)

// journal is a file beside the control socket with the paths of the sockets of all shares. A daemon that is killed leaves
// those behind, and the next one on the same control socket, which may have other shares, removes them. The control socket is
// the lock of the journal. The zero value keeps none.
type journal struct {
	mu      sync.Mutex
	path    string // "" until it is open
	sockets map[string]bool
}

// journalOf is where the journal of a daemon with this control socket is.
func journalOf(controlSocket string) string { return controlSocket + ".shares" }

// open removes what a daemon that was killed has left behind, and begins a journal at path.
func (j *journal) open(path string, log *slog.Logger) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := removeHalf(path); err != nil {
		return err
	}
	sockets, err := readJournal(path)
	if err != nil {
		log.Warn("sockets of an earlier daemon may be left", "error", err)
	}
	for _, socket := range sockets {
		if err := removeSocket(socket); err != nil {
			log.Warn("a socket of an earlier daemon stays", "socket", socket, "error", err)
		}
	}
	j.path, j.sockets = path, make(map[string]bool)
	return j.writeLocked()
}

// removeHalf removes what is left of writes that were cut off.
func removeHalf(path string) error {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasPrefix(e.Name(), filepath.Base(path)+halfSuffix) {
			if err := os.Remove(filepath.Join(filepath.Dir(path), e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// halfSuffix and a random number make the name of a journal that is being written.
const halfSuffix = ".half-"

func readJournal(path string) (sockets []string, err error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &sockets); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return sockets, nil
}

// removeSocket removes what a dead daemon has left of a socket. To take its place and to leave it is what removes it, and fails
// where somebody else has it.
func removeSocket(path string) error {
	if _, err := os.Lstat(filepath.Dir(path)); errors.Is(err, fs.ErrNotExist) {
		return nil // its directory has gone with it
	}
	ln, err := listen.Path(path, "")
	if err != nil {
		return err
	}
	return ln.Close()
}

// add notes that this socket is about to be made.
func (j *journal) add(socket string) error {
	return j.change(func(sockets map[string]bool) { sockets[socket] = true })
}

// drop notes that it is there no more.
func (j *journal) drop(socket string) error {
	return j.change(func(sockets map[string]bool) { delete(sockets, socket) })
}

// change changes what is noted by what f does, or by nothing.
func (j *journal) change(f func(sockets map[string]bool)) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.path == "" {
		return nil
	}
	was := maps.Clone(j.sockets)
	f(j.sockets)
	err := j.writeLocked()
	if err != nil {
		j.sockets = was
	}
	return err
}

// writeLocked writes the journal whole or not at all.
func (j *journal) writeLocked() (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("note the sockets of the shares: %w", err)
		}
	}()
	data, err := json.Marshal(slices.Sorted(maps.Keys(j.sockets)))
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(j.path), filepath.Base(j.path)+halfSuffix+"*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), j.path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// close removes the journal. Sockets that are still noted would be forgotten: then it stays, for the next daemon.
func (j *journal) close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.path == "" || len(j.sockets) > 0 {
		return nil
	}
	path := j.path
	j.path = ""
	return os.Remove(path)
}
