package fsbackend

// Name is one component of a path, or a symbolic link's target. A NUL follows it in memory, so that a system call can take
// it as it is. It is only valid during the call that brought it: keep String().
type Name []byte

// MakeName returns s as a Name.
func MakeName(s string) Name {
	b := make([]byte, len(s)+1)
	copy(b, s)
	return Name(b[:len(s)])
}

// String returns a copy that may be kept.
func (n Name) String() string {
	return string(n)
}

// CString returns the address of the first byte, which len(n) further bytes and then a NUL follow.
func (n Name) CString() *byte {
	return &n[:len(n)+1][0]
}
