// Package virtqueue is the device side of a virtqueue in a guest's memory.
//
//	driver ──avail ring──▶ Pop ──▶ Chain (iovecs) ──▶ the device works ──▶ Push … Push ──▶ Publish ──used ring──▶ driver
//	driver ──kick────────▶ (Arm asked for it)                                           └──▶ notify? ──call──▶ driver
//
// The driver is hostile: it writes the rings, the descriptors and the indirect tables, and changes them while they are read.
// Each value is taken from guest memory once, checked, and only then used; each walk has a bound. What the driver can break is
// told apart by type: a *ChainError is one bad chain, which the device completes with Push(Head, 0) before it goes on; a
// *RingError is the end of the ring until it is bound again. See virtio 1.3, section 2.7.
//
// The memory itself can go away too, when the front-end truncates the file behind it. Every method turns such a fault into a
// *RingError, but only on goroutines that called debug.SetPanicOnFault(true); on others it ends the process.
//
// Files: queue.go is what the device calls, whatever the ring's format; split.go is the split ring; chain.go walks
// descriptors; queue_unsafe.go has the atomic accesses; vqtest is the driver side, for tests and benchmarks.
package virtqueue
