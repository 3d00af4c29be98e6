package fsbackendtest_test

import (
	"testing"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fuseproto"
)

// reluctant is a backend that does nothing where it may not sleep.
type reluctant struct {
	*mem.FS
}

func (r reluctant) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	return r.FS.Lookup(c, parent, name, out)
}

func (r reluctant) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	return r.FS.Mkdir(c, in, name, out)
}

func (r reluctant) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	return r.FS.Create(c, in, name, out)
}

func (r reluctant) Unlink(c *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	return r.FS.Unlink(c, parent, name)
}

func (r reluctant) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	return r.FS.Read(c, in, dst)
}

func (r reluctant) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, fsbackend.Errno) {
	if !c.MayBlock {
		return 0, fsbackend.ErrMayBlock
	}
	return r.FS.Write(c, in, src)
}

// TestReluctant has the suite meet ErrMayBlock, which an in-memory tree never answers.
func TestReluctant(t *testing.T) {
	fsbackendtest.Run(t, fsbackendtest.Config{
		New: func(t *testing.T) fsbackend.Backend {
			f, err := mem.New(mem.Config{})
			if err != nil {
				t.Fatal(err)
			}
			return reluctant{f}
		},
		AsRoot:      true,
		SparseBlock: 4096,
	})
}

// bare is a backend with no more interfaces than the suite needs.
type bare struct {
	fsbackend.Backend
	fsbackend.Maker
	fsbackend.Creater
	fsbackend.Opener
	fsbackend.Reader
	fsbackend.Writer
	fsbackend.Remover
	fsbackend.Renamer
	fsbackend.Setattrer
	fsbackend.DirReader
}

// TestBare has the suite leave out what a backend leaves out.
func TestBare(t *testing.T) {
	fsbackendtest.Run(t, fsbackendtest.Config{
		New: func(t *testing.T) fsbackend.Backend {
			f, err := mem.New(mem.Config{})
			if err != nil {
				t.Fatal(err)
			}
			return bare{f, f, f, f, f, f, f, f, f, f}
		},
		SparseBlock: 4096,
	})
}
