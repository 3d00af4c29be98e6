package passthrough

import "unsafe"

// A chunk of more than 8 KiB does not build; see chunkSize.
const _ = 8192 - unsafe.Sizeof(chunk{})
