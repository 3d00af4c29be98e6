package lazyimage

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/fuseproto"
)

const (
	// stateName is the state directory's, in the root. It is in no listing.
	stateName = ".stargz-snapshotter"
	// statusLimit is how long the fetcher is waited for.
	statusLimit = 5 * time.Second
)

// stateDir is the state directory. Its node follows those of the tree, and its files' follow it.
type stateDir struct {
	files []stateFile
	of    []int // by layer: its file's number
}

// stateFile says how far one layer has come.
type stateFile struct {
	layer  int
	name   string // of the file
	digest string
	size   int64

	mu      sync.Mutex
	err     string // what could last not be read
	fetched int64  // as the fetcher has last said
}

// stateText is a file's content.
type stateText struct {
	Error          string  `json:"error,omitempty"`
	Digest         string  `json:"digest"`
	Size           int64   `json:"size"`
	FetchedSize    int64   `json:"fetchedSize"`
	FetchedPercent float64 `json:"fetchedPercent"`
}

func (d *stateDir) init(layers []store.Layer, firstLayer int) {
	known := make(map[string]int) // an image may have a layer twice
	d.files = make([]stateFile, 0, len(layers))
	for i := range layers {
		l := &layers[i]
		number, ok := known[l.Digest]
		if !ok {
			number = len(d.files)
			known[l.Digest] = number
			d.files = append(d.files, stateFile{layer: firstLayer + i, name: l.Digest + ".json", digest: l.Digest, size: l.Size})
		}
		d.of = append(d.of, number)
	}
}

// stateRoot is the nodeid of the state directory.
func (f *FS) stateRoot() uint64 { return uint64(len(f.nodes)) + 1 }

// isState says whether the guest calls the state directory id, or one of its files.
func (f *FS) isState(id uint64) bool {
	return id >= f.stateRoot() && id <= f.stateRoot()+uint64(len(f.state.files))
}

// stateFile returns the file that the guest calls id, nil for the directory.
func (f *FS) stateFile(id uint64) *stateFile {
	if id == f.stateRoot() {
		return nil
	}
	return &f.state.files[id-f.stateRoot()-1]
}

// report keeps, for people, that node number could not be read.
func (f *FS) report(number uint32, err error) {
	layer, path := int(f.nodes[number].layer), f.path(number)
	f.log.Warn("file of an image could not be read; the guest gets EIO", "path", path, "layer", layer, "error", err)
	s := &f.state.files[f.state.of[layer-f.firstLayer]]
	s.mu.Lock()
	s.err = fmt.Sprintf("read %.512q: %v", path, err)
	s.mu.Unlock()
}

// progress is what a file holds now. It may sleep.
func (f *FS) progress(s *stateFile) string {
	ctx, cancel := context.WithTimeout(f.ctx, statusLimit)
	defer cancel()
	status, err := f.store.Status(ctx, s.layer)
	s.mu.Lock()
	defer s.mu.Unlock()
	t := stateText{Error: s.err, Digest: s.digest, Size: s.size}
	switch {
	case err != nil:
		status.Err = fmt.Sprintf("ask the fetcher: %v", err)
	default:
		s.fetched = min(max(status.Fetched, 0), s.size)
	}
	switch {
	case t.Error == "":
		t.Error = status.Err
	case status.Err != "":
		t.Error += ": " + status.Err
	}
	t.FetchedSize, t.FetchedPercent = s.fetched, 100
	if s.size > 0 {
		t.FetchedPercent = 100 * float64(s.fetched) / float64(s.size)
	}
	b, err := json.Marshal(t)
	if err != nil {
		return "" // it has no value that JSON has not
	}
	return string(b) + "\n"
}

// stateAttr fills out with the attributes of the state directory, or of a file of it that holds size bytes.
func (f *FS) stateAttr(id uint64, size int, out *fuseproto.Attr) {
	*out = fuseproto.Attr{Ino: id, Mode: unix.S_IFREG | 0o400, Nlink: 1, Size: uint64(size), Blocks: uint64(size+511) / 512, Blksize: blockSize}
	if id == f.stateRoot() {
		out.Mode, out.Nlink = unix.S_IFDIR|0o500, 2
	}
}

// lookupState is Lookup of the state directory, or in it.
func (f *FS) lookupState(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	id, size := f.stateRoot(), 0
	if parent != fuseproto.FUSE_ROOT_ID {
		if parent != f.stateRoot() {
			return unix.ENOTDIR
		}
		var s *stateFile
		for i := range f.state.files {
			if f.state.files[i].name == string(name) {
				s, id = &f.state.files[i], f.stateRoot()+1+uint64(i)
			}
		}
		switch {
		case s == nil:
			return unix.ENOENT
		case !c.MayBlock:
			return fsbackend.ErrMayBlock
		}
		size = len(f.progress(s))
	}
	out.NodeId, out.AttrValidNsec = id, fsbackend.Stale
	f.stateAttr(id, size, &out.Attr)
	return fsbackend.OK
}

// getattrState is Getattr there. An open file is as long as what it was opened with.
func (f *FS) getattrState(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	size := 0
	if s := f.stateFile(in.NodeId); s != nil {
		var opened *string
		if in.Flags()&fuseproto.FUSE_GETATTR_FH != 0 {
			if h := f.handles.get(in.Fh(), in.NodeId); h != nil {
				opened = h.text.Load()
			}
		}
		switch {
		case opened != nil:
			size = len(*opened)
		case !c.MayBlock:
			return fsbackend.ErrMayBlock
		default:
			size = len(f.progress(s))
		}
	}
	out.AttrValidNsec = fsbackend.Stale
	f.stateAttr(in.NodeId, size, &out.Attr)
	return fsbackend.OK
}

// openState opens a file with what it holds now, for as long as it is open. The guest is to read it past its page cache, whatever
// size it remembers.
func (f *FS) openState(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) (errno fsbackend.Errno) {
	s := f.stateFile(in.NodeId)
	switch {
	case s == nil:
		return unix.EISDIR
	case fsbackend.OpensForWriting(in.Flags):
		return unix.EROFS
	case !c.MayBlock:
		return fsbackend.ErrMayBlock
	}
	text := f.progress(s)
	out.OpenFlags = fuseproto.FOPEN_DIRECT_IO | fuseproto.FOPEN_NOFLUSH
	out.Fh, errno = f.handles.insert(in.NodeId, &text)
	return errno
}

func readState(h *handle, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	text := h.text.Load()
	if text == nil {
		return unix.EISDIR
	}
	b := []byte((*text)[min(in.Offset, uint64(len(*text))):])
	b = b[:min(len(b), int(in.Size), dst.Len())]
	if dst.Write(b) < len(b) {
		return unix.EFAULT
	}
	return fsbackend.OK
}

// readdirState lists the state directory. Its files are left to be looked up: their sizes are not known without asking.
func (f *FS) readdirState(in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	if in.NodeId != f.stateRoot() {
		return unix.ENOTDIR
	}
	for off := in.Offset; off < uint64(len(f.state.files))+dots; off++ {
		if off < dots {
			ino := in.NodeId
			if off == 1 {
				ino = fuseproto.FUSE_ROOT_ID
			}
			if !addDot(off, ino, out) {
				break
			}
			continue
		}
		i := off - dots
		ino, name := f.stateRoot()+1+i, []byte(f.state.files[i].name)
		var added bool
		if out.Plus {
			var entry fuseproto.EntryOut
			entry.Ino, entry.Mode = ino, unix.S_IFREG
			added = out.AddPlus(&entry, ino, off+1, unix.DT_REG, name)
		} else {
			added = out.Add(ino, off+1, unix.DT_REG, name)
		}
		if !added {
			break
		}
	}
	return fsbackend.OK
}

// Progress is how far an image has come, for operators.
type Progress struct {
	// Prefetched says that what is fetched at once is here.
	Prefetched bool `json:"prefetched"`
	// Layers are as the files of the state directory have them.
	Layers []json.RawMessage `json:"layers"`
}

// Check waits, at most for limit, for what is fetched at once, and returns how far each layer has come. It is an error if the fetcher
// does not answer, if it has something to say against it, or if what is not here yet could not be had now, for which limit is given
// once more.
func (f *FS) Check(limit time.Duration) (*Progress, error) {
	ctx, cancel := context.WithTimeout(f.ctx, limit)
	defer cancel()
	err := f.store.Prefetched(ctx)
	if err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("check the image: %w", err)
	}
	p := &Progress{Prefetched: err == nil}
	ctx, cancel = context.WithTimeoutCause(f.ctx, limit, fmt.Errorf("no answer in %v", limit))
	defer cancel()
	if err := f.store.Reach(ctx); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("reach what has the rest of the image: %w", err)
	}
	for i := range f.state.files {
		s := &f.state.files[i]
		ctx, cancel := context.WithTimeout(f.ctx, statusLimit)
		_, err := f.store.Status(ctx, s.layer)
		cancel()
		if err != nil {
			return nil, fmt.Errorf("check layer %s: %w", s.digest, err)
		}
		p.Layers = append(p.Layers, json.RawMessage(f.progress(s)))
	}
	return p, nil
}
