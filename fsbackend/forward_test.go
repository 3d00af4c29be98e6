package fsbackend_test

import (
	"os"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// bare is what every backend has, and no more.
type bare struct{ fsbackend.Backend }

func newMem(t testing.TB) fsbackend.Backend {
	f, err := mem.New(mem.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestForwardConformance(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	for name, newBackend := range map[string]func(*testing.T) fsbackend.Backend{
		"mem": func(t *testing.T) fsbackend.Backend { return newMem(t) },
		"passthrough": func(t *testing.T) fsbackend.Backend {
			f, err := passthrough.New(passthrough.Config{Dir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			return f
		},
	} {
		t.Run(name, func(t *testing.T) {
			fsbackendtest.Run(t, fsbackendtest.Config{
				New: func(t *testing.T) fsbackend.Backend {
					return fsbackend.Forward{Inner: fsbackend.Resolve(newBackend(t))}
				},
				AsRoot:      name == "mem" || os.Getuid() == 0,
				SparseBlock: 4096,
			})
		})
	}
}

// TestForwardHasEverything fails when an interface joins Resolved that Forward does not pass on.
func TestForwardHasEverything(t *testing.T) {
	all := reflect.TypeFor[fsbackend.Resolved]()
	forward := reflect.TypeFor[fsbackend.Forward]()
	interfaces := 0
	for i := range all.NumField() {
		f := all.Field(i)
		if f.Type.Kind() != reflect.Interface {
			continue
		}
		interfaces++
		if !forward.Implements(f.Type) {
			t.Errorf("Forward does not pass on %v", f.Type)
		}
	}
	if interfaces < 30 {
		t.Errorf("%d interfaces found in Resolved, expected all of them", interfaces)
	}
}

// TestForwardAddsNothing holds Resolve to leaving out of a wrapper what the backend in it lacks, and Resolved to knowing all that
// passthrough and mem have.
func TestForwardAddsNothing(t *testing.T) {
	tree := newMem(t)
	defer func() { _ = tree.Close() }()
	none := fsbackend.Resolve(bare{tree})
	wrapped := fsbackend.Resolve(fsbackend.Forward{Inner: none})
	has, inner := reflect.ValueOf(*wrapped), reflect.ValueOf(*none)
	for i := range has.NumField() {
		if has.Field(i).Kind() != reflect.Interface {
			continue
		}
		switch name := has.Type().Field(i).Name; name {
		case "Initer", "Wanter", "Statser":
			if has.Field(i).IsNil() {
				t.Errorf("the wrapper has lost its own %s", name)
			}
		default:
			if has.Field(i).IsNil() != inner.Field(i).IsNil() {
				t.Errorf("the wrapper has %s: %v, the backend in it: %v", name, !has.Field(i).IsNil(), !inner.Field(i).IsNil())
			}
		}
	}
}

// TestForwardWithout calls each method where the backend has nothing to answer it: ENOSYS, or what the interface says.
func TestForwardWithout(t *testing.T) {
	tree := newMem(t)
	defer func() { _ = tree.Close() }()
	v := reflect.ValueOf(fsbackend.Forward{Inner: fsbackend.Resolve(bare{tree})})
	backend := reflect.TypeFor[fsbackend.Backend]()
	for i := range v.NumMethod() {
		name := v.Type().Method(i).Name
		if _, always := backend.MethodByName(name); always {
			continue
		}
		m := v.Method(i)
		args := make([]reflect.Value, m.Type().NumIn())
		for j := range args {
			if typ := m.Type().In(j); typ.Kind() == reflect.Pointer {
				args[j] = reflect.New(typ.Elem())
			} else {
				args[j] = reflect.Zero(typ)
			}
		}
		results := m.Call(args)
		if len(results) == 0 {
			continue
		}
		errno, ok := results[len(results)-1].Interface().(fsbackend.Errno)
		want := unix.ENOSYS
		if name == "Open" || name == "Statfs" {
			want = fsbackend.OK
		}
		if name == "FileOf" {
			want = unix.EOPNOTSUPP
		}
		if ok && errno != want {
			t.Errorf("%s without a backend that has it: %v, expected %v", name, errno, want)
		}
		if name == "Statfs" {
			if out := args[2].Interface().(*fuseproto.StatfsOut); out.Blocks != 0 || out.Bsize == 0 || out.NameLen != 255 {
				t.Errorf("Statfs: %+v, expected no blocks of a size, and names of 255 bytes", out)
			}
		}
	}
	if got := (fsbackend.Forward{Inner: fsbackend.Resolve(tree)}).WorkNode(); got == 0 || (fsbackend.Forward{Inner: fsbackend.Resolve(bare{tree})}).WorkNode() != 0 {
		t.Errorf("work directory %d, expected the backend's, and none without", got)
	}
	if got := (fsbackend.Forward{Inner: &fsbackend.Resolved{}}).WantFlags(5); got != 5 {
		t.Errorf("WantFlags(5) is %d without a Wanter, expected 5", got)
	}
}

// TestForwardSlow: the mark of a backend whose calls may sleep is passed on, too.
func TestForwardSlow(t *testing.T) {
	for _, slow := range []bool{false, true} {
		if got := fsbackend.Resolve(fsbackend.Forward{Inner: &fsbackend.Resolved{Slow: slow}}).Slow; got != slow {
			t.Errorf("wrapper of a backend that is slow %v: %v", slow, got)
		}
	}
}

// TestForwardAllocatesNothing makes the calls of the hot path through two wrappers.
func TestForwardAllocatesNothing(t *testing.T) {
	inner := fsbackend.Resolve(newMem(t))
	r := fsbackend.Resolve(fsbackend.Forward{Inner: fsbackend.Resolve(fsbackend.Forward{Inner: inner})})
	defer func() { _ = r.Close() }()
	client := &fsbackendtest.Client{R: r}
	f, errno := client.Create(fsbackendtest.Root, "f", unix.O_RDWR, 0o644)
	if errno != fsbackend.OK {
		t.Fatal(errno)
	}
	var (
		ctx   fsbackend.Context
		buf   = make([]byte, 64)
		iov   [1]unix.Iovec
		sink  fsbackend.Sink
		src   fsbackend.Source
		read  fuseproto.ReadIn
		write fuseproto.WriteIn
		get   fuseproto.GetattrIn
		attr  fuseproto.AttrOut
		entry fuseproto.EntryOut
		name  = fsbackend.MakeName("f")
	)
	read.NodeId, read.Fh, read.Size = f.NodeId, f.Fh, 64
	write.NodeId, write.Fh, write.Size = f.NodeId, f.Fh, 64
	get.NodeId = f.NodeId
	allocs := testing.AllocsPerRun(100, func() {
		iov[0] = sys.MakeIovec(buf)
		src.Reset(iov[:], 0, 64)
		if n, errno := r.Write(&ctx, &write, &src); n != 64 || errno != fsbackend.OK {
			t.Fatal(n, errno)
		}
		iov[0] = sys.MakeIovec(buf)
		sink.Reset(iov[:], 0, 64)
		if errno := r.Read(&ctx, &read, &sink); errno != fsbackend.OK || sink.Written() != 64 {
			t.Fatal(errno)
		}
		if errno := r.Getattr(&ctx, &get, &attr); errno != fsbackend.OK {
			t.Fatal(errno)
		}
		if errno := r.Lookup(&ctx, fsbackendtest.Root, name, &entry); errno != fsbackend.OK {
			t.Fatal(errno)
		}
		r.Forget(entry.NodeId, 1)
	})
	if allocs != 0 {
		t.Errorf("WRITE, READ, GETATTR, LOOKUP and FORGET through two wrappers allocate %v times, expected never", allocs)
	}
}
