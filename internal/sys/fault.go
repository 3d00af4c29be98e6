package sys

import "runtime"

// Guard, deferred, turns a memory fault of the goroutine into *faulted = true; every other panic goes on. The front-end can
// shrink the file behind guest memory at any time, and then a plain load raises SIGBUS: debug.SetPanicOnFault(true), which
// each goroutine that touches guest memory sets, makes that a panic instead of the end of the process.
func Guard(faulted *bool) {
	r := recover()
	if r == nil {
		return
	}
	if e, ok := r.(runtime.Error); ok {
		if _, ok := e.(interface{ Addr() uintptr }); ok {
			*faulted = true
			return
		}
	}
	panic(r)
}

// Copy copies from src to dst, one of which is guest memory, and returns how many bytes that were: 0 if it faulted.
func Copy(dst, src []byte) (n int) {
	faulted := false
	defer func() {
		if faulted {
			n = 0
		}
	}()
	defer Guard(&faulted)
	return copy(dst, src)
}
