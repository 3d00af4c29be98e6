package extensions

import (
	"fmt"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/fsbackend"
)

// MinTimeout is the least Options.Timeout. What is shorter is a number without its unit.
const MinTimeout = 10 * time.Millisecond

// Request is what a backend is looked for: the root or a mount.
type Request struct {
	// Spec is what the daemon serves. It is never nil.
	Spec *specs.Spec
	// Mount is nil for the root; an element of Spec.Mounts is handed out as one of the copy's.
	Mount *specs.Mount
	// MountPath and ReadOnly are as in TryHandleMount.
	MountPath string
	ReadOnly  bool
	// Backend is the name of the one asked for, "" for any.
	Backend string
}

// Choice is who serves it.
type Choice struct {
	// Extension is nil if no extension does. One of the daemon's own backends must then: the one that was asked for, or
	// passthrough.
	Extension Extension
	Backend   fsbackend.Backend
	// Options are the extension's. ReadOnly is also set where the request's is.
	Options Options
}

// Select asks the extensions in order until one claims the mount; its error, if it has one, is final. A request with a name
// asks only that extension, which must not decline; the names of the daemon's own backends ask nobody. Each extension gets
// copies of its own of spec and mount. The Backend chosen is the caller's to close.
func (r Registry) Select(req Request) (Choice, error) {
	where := req.where()
	if req.Spec == nil {
		return Choice{}, fmt.Errorf("select a backend for %s: there is no spec", where)
	}
	unclaimed := Choice{Options: Options{ReadOnly: req.ReadOnly}}
	asked := r.entries
	if req.Backend != "" {
		if reserved(req.Backend) {
			return unclaimed, nil
		}
		e, ok := r.lookup(req.Backend)
		if !ok {
			known := append([]string{Passthrough, Mem}, r.Names()...)
			return Choice{}, fmt.Errorf("select a backend for %s: there is none named %q, but %s", where, req.Backend, strings.Join(known, ", "))
		}
		asked = []entry{e}
	}
	for _, e := range asked {
		if _, hosted := e.Extension.(Hosted); hosted {
			continue // it is asked in another way, and only where it is named
		}
		choice, err := e.try(req)
		if err != nil {
			return Choice{}, err
		}
		if choice.Backend != nil {
			return choice, nil
		}
	}
	if req.Backend != "" {
		return Choice{}, fmt.Errorf("extension %s does not serve %s, for which it is named", req.Backend, where)
	}
	return unclaimed, nil
}

// try asks one extension. The Choice is without a backend if it declines.
func (e entry) try(req Request) (Choice, error) {
	spec, mount := req.copies()
	return e.choose("TryHandleMount", req.where(), req.ReadOnly, func() (fsbackend.Backend, Options, error) {
		return e.TryHandleMount(spec, mount, req.MountPath, req.ReadOnly)
	})
}

// choose has open, a call of the extension's method, make a backend, and checks what comes of it.
func (e entry) choose(method, where string, readOnly bool, open func() (fsbackend.Backend, Options, error)) (Choice, error) {
	c := Choice{Extension: e.Extension}
	var failed error
	if err := e.call(method, func() { c.Backend, c.Options, failed = open() }); err != nil {
		return Choice{}, fmt.Errorf("serve %s: %w", where, err)
	}
	typedNil := c.Backend != nil && isNil(c.Backend)
	timeout := c.Options.Timeout
	var err error
	switch {
	case failed != nil:
		err = fmt.Errorf("extension %s: serve %s: %w", e.name, where, failed)
	case typedNil:
		err = fmt.Errorf("extension %s: serve %s: it returned a nil %T as its backend: to decline, return a plain nil", e.name, where, c.Backend)
	case c.Backend == nil:
		return Choice{}, nil
	case timeout != 0 && timeout != NoTimeout && timeout < MinTimeout:
		err = fmt.Errorf("extension %s: serve %s: a timeout of %v: expected %v at least, 0 for %v, or NoTimeout", e.name, where, timeout, MinTimeout, DefaultTimeout)
	}
	if err != nil {
		if c.Backend != nil && !typedNil {
			if closeErr := e.close(c.Backend); closeErr != nil {
				err = fmt.Errorf("%w; then %w", err, closeErr)
			}
		}
		return Choice{}, err
	}
	c.Options.ReadOnly = c.Options.ReadOnly || readOnly
	return c, nil
}

func (e entry) close(b fsbackend.Backend) error {
	var failed error
	if err := e.call("Close", func() { failed = b.Close() }); err != nil {
		return err
	}
	if failed != nil {
		return fmt.Errorf("extension %s: close the backend: %w", e.name, failed)
	}
	return nil
}

// where names the mount in errors.
func (req Request) where() string {
	if req.Mount == nil {
		return "/"
	}
	return req.Mount.Destination
}

// copies returns a spec and a mount for an extension to do with as it likes.
func (req Request) copies() (*specs.Spec, *specs.Mount) {
	spec := deepCopy(req.Spec)
	if req.Mount == nil {
		return spec, nil
	}
	mounts := req.Spec.Mounts
	for i := range mounts {
		if &mounts[i] == req.Mount {
			return spec, &spec.Mounts[i]
		}
	}
	return spec, deepCopy(req.Mount)
}
