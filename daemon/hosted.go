package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/share"
)

// Grafts of extensions in two halves, in the server. outside.go is the keeper's side.

// hostedInside is the half of a graft that is inside.
type hostedInside struct {
	backend string
	tell    func(method string, arg json.RawMessage, files []*os.File) (any, error)
	gone    chan struct{} // closed when the backend is
}

// tellOrder is something that the half outside says to the one inside.
type tellOrder struct {
	ID     uint64
	Method string
	Arg    json.RawMessage
}

// unpackGiven puts together what packGiven has taken apart, and returns the files that are left.
func unpackGiven(order *givenOrder, files []*os.File) (*extensions.Given, []*os.File, error) {
	if order.Files < 0 || order.Files > len(files) {
		return nil, files, fmt.Errorf("%d descriptors for a graft: expected %d more", len(files), order.Files)
	}
	g := &extensions.Given{Data: order.Data, Files: files[:order.Files:order.Files]}
	files = files[order.Files:]
	for i := range order.Parts {
		p := &order.Parts[i]
		given, left, err := unpackGiven(&p.Given, files)
		if err != nil {
			return nil, files, err
		}
		files = left
		g.Parts = append(g.Parts, extensions.Part{Mount: p.Mount, Given: given})
	}
	return g, files, nil
}

// openHosted makes g the half inside of a graft. It takes files over.
func (in *inside) openHosted(o *opener, g *share.Graft, order *hostedOrder, files []*os.File) error {
	given, left, err := unpackGiven(&order.Given, files)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("%d descriptors too many for a graft", len(left))
	}
	if err != nil {
		closeFiles(files)
		return err
	}
	h := &hostedInside{backend: order.Mount.Backend, gone: make(chan struct{})}
	// An error message of a part names what holds it, so each has its own.
	i := &extensions.Inside{
		Log: o.log, ProcFD: o.procFD, NoFileHandles: o.noFileHandles, MaxFDs: o.share.MaxFDs, MaxInodes: o.share.MaxInodes,
		OnTell: func(f func(string, json.RawMessage, []*os.File) (any, error)) { h.tell = f },
	}
	i.Open = func(p extensions.Part) (fsbackend.Backend, extensions.Options, error) {
		part := *i
		part.OnTell = func(func(string, json.RawMessage, []*os.File) (any, error)) {}
		return o.openPart(&part, p)
	}
	choice, err := o.registry.Inside(i, order.Mount, given)
	switch {
	case err != nil:
		return err
	case choice.Backend == nil:
		return fmt.Errorf("extension %s has made no backend", order.Mount.Backend)
	}
	if err := o.claim(g, choice); err != nil {
		return err
	}
	in.mu.Lock()
	in.hosted[order.ID] = h
	in.mu.Unlock()
	g.OnClose = func() {
		in.mu.Lock()
		defer in.mu.Unlock()
		delete(in.hosted, order.ID)
		close(h.gone)
	}
	return nil
}

// openPart makes the backend of a part. It takes its files over.
func (o *opener) openPart(i *extensions.Inside, p extensions.Part) (fsbackend.Backend, extensions.Options, error) {
	stock := extensions.Options{Stock: true}
	switch p.Mount.Backend {
	case extensions.Mem:
		p.Given.Close()
		b, err := mem.New(mem.Config{Mode: 0o755})
		return b, stock, err
	case extensions.Passthrough:
		defer p.Given.Close()
		if len(p.Given.Files) != 1 {
			return nil, stock, fmt.Errorf("%d descriptors for a directory: expected one", len(p.Given.Files))
		}
		b, err := passthrough.New(passthrough.Config{
			Dir: p.Mount.Source, DirFD: int(p.Given.Files[0].Fd()), MaxFDs: i.MaxFDs, MaxInodes: i.MaxInodes, ProcFD: i.ProcFD, Log: i.Log,
			NoFileHandles: i.NoFileHandles,
		})
		return b, stock, err
	}
	choice, err := o.registry.Inside(i, p.Mount, p.Given)
	if err == nil && choice.Backend == nil {
		err = fmt.Errorf("extension %s has made no backend", p.Mount.Backend)
	}
	return choice.Backend, choice.Options, err
}

// findHosted returns the half inside of a graft.
func (in *inside) findHosted(id uint64) (*hostedInside, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	h := in.hosted[id]
	if h == nil {
		return nil, errors.New("the graft is not known")
	}
	return h, nil
}

// tell passes on what the half outside says. It takes files over.
func (in *inside) tell(o tellOrder, files []*os.File) (any, error) {
	h, err := in.findHosted(o.ID)
	if err == nil && h.tell == nil {
		err = errors.New("the graft does not listen")
	}
	if err != nil {
		closeFiles(files)
		return nil, err
	}
	var v any
	err = extensions.Call(h.backend, "Tell "+o.Method, func() (err error) {
		v, err = h.tell(o.Method, o.Arg, files)
		return err
	})
	if v == nil {
		v = struct{}{} // an answer, in JSON, too
	}
	return v, err
}

// awaitGone returns when a graft in two halves is gone for good, as one is that is not known.
func (in *inside) awaitGone(id uint64) (any, error) {
	if h, err := in.findHosted(id); err == nil {
		<-h.gone
	}
	return nil, nil
}
