package overlay

import (
	"errors"

	"github.com/sluicefs/sluice/fsbackend"
)

// ErrSession says that a guest uses the overlay.
var ErrSession = errors.New("a guest is connected, which has files of the overlay in its memory")

// ReplaceUpper exchanges the upper layer for another one, with a work directory as in Config.Work 0, and closes the one that there was.
// It is for between sessions: ErrSession says that there is one. It takes upper over; after an error the overlay is as it was.
func (fs *FS) ReplaceUpper(upper fsbackend.Backend) error {
	fs.turn.Lock()
	defer fs.turn.Unlock()
	var err error
	switch {
	case fs.inSession:
		err = ErrSession
	case fs.upper == nil:
		err = errors.New("replace the upper layer of an overlay: it has none")
	}
	if err != nil {
		return errors.Join(err, upper.Close())
	}
	old, layer, work, root := fs.cfg.Upper, fs.upper, fs.cfg.Work, fs.root
	fs.cfg.Upper, fs.cfg.Work = upper, 0
	fs.setUpper(newLayer(fsbackend.Resolve(upper), 0, "upper"))
	if err = fs.openUpper(); err == nil {
		err = fs.numberLayers()
	}
	if err == nil {
		err = fs.openRoot()
	}
	if err != nil {
		fs.cfg.Upper, fs.cfg.Work, fs.root = old, work, root
		fs.setUpper(layer)
		fs.work = 0
		return errors.Join(err, fs.openUpper(), fs.numberLayers(), upper.Close())
	}
	return old.Close()
}

// setUpper makes l the uppermost layer.
func (fs *FS) setUpper(l *layer) {
	fs.upper, fs.layers[0] = l, l
	l.bottom = len(fs.layers) == 1
}
