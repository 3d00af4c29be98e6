package passthrough

import "unsafe"

// A chunk of more than 8 KiB does not build; see chunkSize.
const _ = 8192 - unsafe.Sizeof(chunk{})

// A handle and a slot for a descriptor that do not fill a cache line do not build: threads use neighbours.
var (
	_ [64]byte = [unsafe.Sizeof(handle{})]byte{}
	_ [64]byte = [unsafe.Sizeof(fdSlot{})]byte{}
)
