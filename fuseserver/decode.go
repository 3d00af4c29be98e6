package fuseserver

import (
	"bytes"
	"encoding/binary"
	"syscall"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Limits of Linux (include/uapi/linux/limits.h, xattr.h).
const (
	nameMax      = 255
	pathMax      = 4096 // with its NUL
	xattrSizeMax = 64 << 10
)

// nameRule is what a string of a request may be.
type nameRule uint8

const (
	noName     nameRule = iota
	nameLookup          // a component that is looked up
	nameNew             // a component that is to exist after the call
	nameOld             // a component that is to be gone after it
	nameXattr           // an extended attribute's name
	nameTarget          // a symbolic link's target
)

// check returns the errno that Linux gives for such a name, OK for a good one. But for names too long, no Linux guest sends
// a bad one: its own VFS has taken the path apart.
func (rule nameRule) check(name fsbackend.Name) Errno {
	switch rule {
	case nameXattr:
		if len(name) == 0 || len(name) > nameMax {
			return syscall.ERANGE
		}
		return fsbackend.OK
	case nameTarget:
		if len(name) >= pathMax {
			return syscall.ENAMETOOLONG
		}
	default:
		if len(name) > nameMax {
			return syscall.ENAMETOOLONG
		}
		if bytes.IndexByte(name, '/') >= 0 {
			return syscall.EINVAL
		}
		if string(name) == "." || string(name) == ".." {
			return rule.dots()
		}
	}
	if len(name) == 0 {
		return syscall.ENOENT
	}
	return fsbackend.OK
}

// dots returns the errno for "." and "..".
func (rule nameRule) dots() Errno {
	switch rule {
	case nameNew:
		return syscall.EEXIST
	case nameOld:
		return syscall.EINVAL
	default:
		// Only an NFS server in the guest would ask, and only with FUSE_EXPORT_SUPPORT, which is never offered. Without it
		// Linux itself says ESTALE (fs/fuse/inode.c, fuse_get_dentry).
		return syscall.ESTALE
	}
}

// decode takes names and extensions out of the private copy.
func (r *Request) decode() Errno {
	if len(r.args) < inHeaderSize+r.inSize() {
		return syscall.EINVAL
	}
	rest := r.args[inHeaderSize+r.inSize():]
	if r.op.flags&extended != 0 {
		var errno Errno
		if rest, errno = r.extensions(rest); errno != fsbackend.OK {
			return errno
		}
	}
	for i, rule := range r.op.names {
		if rule == noName {
			break
		}
		end := bytes.IndexByte(rest, 0)
		if end < 0 {
			return syscall.EINVAL
		}
		name := fsbackend.Name(rest[:end])
		if errno := rule.check(name); errno != fsbackend.OK {
			return errno
		}
		r.names[i], rest = name, rest[end+1:]
	}
	r.tail = rest
	return fsbackend.OK
}

// inSize returns the size of the struct behind the header.
func (r *Request) inSize() int {
	if r.Opcode() == fuseproto.FUSE_SETXATTR && r.session.Has(fuseproto.FUSE_SETXATTR_EXT) {
		return 16
	}
	return int(r.op.in)
}

const (
	extHeaderSize  = 8 // fuse_ext_header; fuse_secctx_header has the same form
	secctxSize     = 8 // fuse_secctx
	suppGroupsSize = 4 // fuse_supp_groups
	maxGroups      = 32
	maxSecctx      = 1 // as virtiofsd; Linux sends one for each security module that labels files
)

// extensions takes the extensions off the end of rest and into r.ctx. Where neither has been agreed on, what is in
// total_extlen is the padding of older protocols.
func (r *Request) extensions(rest []byte) ([]byte, Errno) {
	const negotiable = fuseproto.FUSE_SECURITY_CTX | fuseproto.FUSE_CREATE_SUPP_GROUP
	size := int(r.header().TotalExtlen) * 8
	if size == 0 || r.session.Flags&negotiable == 0 {
		return rest, fsbackend.OK
	}
	if size > len(rest) {
		return nil, syscall.EINVAL
	}
	rest, area := rest[:len(rest)-size], rest[len(rest)-size:]
	r.ctx.SuppGroups, r.ctx.Secctx = nil, nil
	var seen uint64
	for len(area) > 0 {
		if len(area) < extHeaderSize {
			return nil, syscall.EINVAL
		}
		size := binary.NativeEndian.Uint32(area)
		typ := binary.NativeEndian.Uint32(area[4:])
		if size < extHeaderSize || size%8 != 0 || uint64(size) > uint64(len(area)) {
			return nil, syscall.EINVAL
		}
		ok := false
		var flag uint64
		switch body := area[extHeaderSize:size]; {
		case typ <= fuseproto.FUSE_MAX_NR_SECCTX:
			flag = fuseproto.FUSE_SECURITY_CTX
			ok = r.securityContexts(body, typ)
		case typ == fuseproto.FUSE_EXT_GROUPS:
			flag = fuseproto.FUSE_CREATE_SUPP_GROUP
			ok = r.suppGroups(body)
		}
		if !ok || seen&flag != 0 || !r.session.Has(flag) {
			return nil, syscall.EINVAL
		}
		seen |= flag
		area = area[size:]
	}
	return rest, fsbackend.OK
}

func (r *Request) securityContexts(body []byte, n uint32) bool {
	if n > maxSecctx {
		return false
	}
	for i := range n {
		if len(body) < secctxSize {
			return false
		}
		size := binary.NativeEndian.Uint32(body)
		body = body[secctxSize:]
		end := bytes.IndexByte(body, 0)
		if end < 0 {
			return false
		}
		name := fsbackend.Name(body[:end])
		body = body[end+1:]
		if nameXattr.check(name) != fsbackend.OK || uint64(size) > uint64(len(body)) {
			return false
		}
		r.secctx[i] = fsbackend.Secctx{Name: name, Value: body[:size]}
		body = body[min((end+1+int(size)+7)&^7-(end+1), len(body)):]
	}
	r.ctx.Secctx = r.secctx[:n]
	return true
}

func (r *Request) suppGroups(body []byte) bool {
	if len(body) < suppGroupsSize {
		return false
	}
	n := binary.NativeEndian.Uint32(body)
	body = body[suppGroupsSize:]
	if n > maxGroups || int(n)*4 > len(body) {
		return false
	}
	for i := range n {
		r.groups[i] = binary.NativeEndian.Uint32(body[i*4:])
	}
	r.ctx.SuppGroups = r.groups[:n]
	return true
}
