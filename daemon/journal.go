package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/sluicefs/sluice/internal/listen"
)

// journal is a file beside the control socket with the paths of the sockets of all shares. A daemon that is killed leaves
// those behind, and the next one on the same control socket, which may have other shares, removes them. "" keeps none.
type journal string

// write notes that these sockets are there, or are about to be. It is there whole or not at all.
func (j journal) write(sockets []string) error {
	if j == "" {
		return nil
	}
	data, err := json.Marshal(sockets)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(string(j)), filepath.Base(string(j))+".*")
	if err != nil {
		return fmt.Errorf("note the sockets: %w", err)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), string(j))
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("note the sockets: %w", err)
	}
	return nil
}

// clean removes what a daemon that was killed has left behind. Sockets that somebody serves, and what is no socket, stay.
func (j journal) clean(log *slog.Logger) error {
	if j == "" {
		return nil
	}
	// Of one that was killed in the middle of write.
	half, err := filepath.Glob(string(j) + ".*")
	if err != nil {
		return err
	}
	for _, name := range half {
		_ = os.Remove(name)
	}
	data, err := os.ReadFile(string(j))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var sockets []string
	if err == nil {
		err = json.Unmarshal(data, &sockets)
	}
	if err != nil {
		log.Warn("sockets of an earlier daemon may be left", "error", err)
	}
	for _, path := range sockets {
		if _, err := os.Lstat(path); err != nil {
			_ = os.Remove(path + ".pid")
			continue
		}
		// To take its place and to leave it is what removes it, and fails where somebody else has it.
		ln, err := listen.Path(path, "")
		if err == nil {
			err = ln.Close()
		}
		if err != nil {
			log.Warn("a socket of an earlier daemon stays", "socket", path, "error", err)
		}
	}
	return j.remove()
}

func (j journal) remove() error {
	if j == "" {
		return nil
	}
	if err := os.Remove(string(j)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
