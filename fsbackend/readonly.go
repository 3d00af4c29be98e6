package fsbackend

import "golang.org/x/sys/unix"

// What a read-only tree refuses is decided above backends: by fuseserver for all of a tree, by share for a part of it.

// OpensForWriting says whether open(2) flags ask for what a read-only tree refuses; 3, which only asks for ioctl rights, is
// checked like O_RDWR.
func OpensForWriting(flags uint32) bool {
	return flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0
}

// IoctlMayChange says whether an ioctl may change something: all may but those that are declared to return something and
// take nothing (include/uapi/asm-generic/ioctl.h, the direction of the argument).
func IoctlMayChange(cmd uint32) bool {
	const dirShift, read = 30, 2
	return cmd>>dirShift != read
}
