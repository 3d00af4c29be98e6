package fsbackend

import "reflect"

// Resolved is a backend with each of its optional interfaces, nil where it lacks it. It is made once, so that a request
// costs no type assertion.
type Resolved struct {
	Backend
	Initer
	Wanter
	Readlinker
	Maker
	Linker
	Remover
	Renamer
	Setattrer
	Opener
	Creater
	Tmpfiler
	Reader
	Writer
	Flusher
	Fsyncer
	Syncfser
	DirReader
	DirPlusReader
	StatFSer
	XattrReader
	XattrWriter
	Accesser
	Fallocater
	Lseeker
	CopyFileRanger
	Filer
	Statxer
	Ioctler
	Locker
	Statser
	Slow bool // every call may sleep
}

// Resolve finds out what b can do.
func Resolve(b Backend) *Resolved {
	r := &Resolved{Backend: b}
	r.Initer, _ = b.(Initer)
	r.Wanter, _ = b.(Wanter)
	r.Readlinker, _ = b.(Readlinker)
	r.Maker, _ = b.(Maker)
	r.Linker, _ = b.(Linker)
	r.Remover, _ = b.(Remover)
	r.Renamer, _ = b.(Renamer)
	r.Setattrer, _ = b.(Setattrer)
	r.Opener, _ = b.(Opener)
	r.Creater, _ = b.(Creater)
	r.Tmpfiler, _ = b.(Tmpfiler)
	r.Reader, _ = b.(Reader)
	r.Writer, _ = b.(Writer)
	r.Flusher, _ = b.(Flusher)
	r.Fsyncer, _ = b.(Fsyncer)
	r.Syncfser, _ = b.(Syncfser)
	r.DirReader, _ = b.(DirReader)
	r.DirPlusReader, _ = b.(DirPlusReader)
	r.StatFSer, _ = b.(StatFSer)
	r.XattrReader, _ = b.(XattrReader)
	r.XattrWriter, _ = b.(XattrWriter)
	r.Accesser, _ = b.(Accesser)
	r.Fallocater, _ = b.(Fallocater)
	r.Lseeker, _ = b.(Lseeker)
	r.CopyFileRanger, _ = b.(CopyFileRanger)
	r.Filer, _ = b.(Filer)
	r.Statxer, _ = b.(Statxer)
	r.Ioctler, _ = b.(Ioctler)
	r.Locker, _ = b.(Locker)
	r.Statser, _ = b.(Statser)
	if s, ok := b.(Slow); ok {
		r.Slow = s.Slow()
	}
	if w, ok := b.(Wrapper); ok {
		r.narrow(w.Wraps())
	}
	return r
}

// narrow leaves out what inner lacks, of the interfaces that answer a guest: a wrapper may have an Init of its own.
func (r *Resolved) narrow(inner *Resolved) {
	own := *r
	to, from := reflect.ValueOf(r).Elem(), reflect.ValueOf(inner).Elem()
	for i := range to.NumField() {
		if f := to.Field(i); f.Kind() == reflect.Interface && from.Field(i).IsNil() {
			f.SetZero()
		}
	}
	r.Initer, r.Wanter, r.Statser = own.Initer, own.Wanter, own.Statser
}
