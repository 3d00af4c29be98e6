package escape_test

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// TestMemoryEdges has the daemon write to a file from, and read into, memory at the edge of the guest's and beyond: what is beyond is the
// daemon's own, or another's, and must be neither read nor written.
func TestMemoryEdges(t *testing.T) {
	attack(t, func(s *scene) {
		regions := s.mem.Regions()
		low, high, top := regions[0], regions[1], regions[2]
		gap, end := low.GuestPhysAddr+low.Size, top.GuestPhysAddr+top.Size
		seam := high.GuestPhysAddr + high.Size // of two regions that lie apart in the daemon
		for _, addr := range []uint64{gap, seam, end} {
			s.mem.Write(addr-64, []byte("last bytes before the edge, sixty-four of them, as many as there are"[:64]))
		}
		s.put("share/target", "")
		node := s.node("target")
		fh := s.mustOpen(node, unix.O_RDWR)
		for _, tt := range []struct {
			name string
			addr uint64
			size uint32
			ok   bool
		}{
			{"up to the gap", gap - 64, 64, true},
			{"up to the end", end - 64, 64, true},
			{"last byte", end - 1, 1, true},
			{"over the seam", seam - 64, 128, true},
			{"into the gap", gap - 64, 65, false},
			{"over the gap", gap - 64, uint32(high.GuestPhysAddr-gap) + 128, false},
			{"in the gap", gap, 64, false},
			{"past the end", end - 64, 65, false},
			{"behind the end", end, 64, false},
			{"far behind the end", end << 8, 64, false},
			{"an address of the front-end", low.UserAddr, 64, false},
			{"an address that a program may have", 0x7fff_0000_0000, 64, false},
			{"at the top of the address space", ^uint64(0) - 32, 64, false},
			{"4 GiB", gap - 64, ^uint32(0), false},
		} {
			// A WRITE whose data is there.
			s.check(unix.Truncate(s.path("share/target"), 0))
			in := fuseproto.WriteIn{Fh: fh, Size: tt.size}
			chain := s.request(call{op: fuseproto.FUSE_WRITE, node: node, args: args(in), outArgs: 8})
			chain = append(append(append(vqtest.Chain{}, chain[:2]...), vqtest.Buffer{Addr: tt.addr, Len: tt.size}), chain[2:]...)
			s.setLength(chain, inHeaderSize+40+tt.size)
			_, errno := s.send(chain)
			s.mem.Reset(s.mark)
			want := ""
			if tt.ok {
				b := make([]byte, tt.size)
				s.mem.Read(tt.addr, b)
				want = string(b)
			}
			if got := s.content("share/target"); got != want || (errno == 0) != tt.ok {
				s.t.Errorf("WRITE from memory %s: %v, and the file has %d bytes, expected %d", tt.name, errno, len(got), len(want))
			}

			// A READ into it.
			s.check(unix.Truncate(s.path("share/target"), 0))
			s.wants(s.write(node, fh, "what was read"), 0, "WRITE")
			read := fuseproto.ReadIn{Fh: fh, Size: tt.size}
			chain = s.request(call{op: fuseproto.FUSE_READ, node: node, args: args(read)})
			chain = append(chain, vqtest.Buffer{Addr: tt.addr, Len: tt.size, Write: true})
			_, errno = s.send(chain)
			s.mem.Reset(s.mark)
			if (errno == 0) != tt.ok {
				s.t.Errorf("READ into memory %s: %v", tt.name, errno)
			}
		}
		s.release(node, fh)
	})
}

// setLength sets what the header of a request says of its length.
func (g *guest) setLength(chain vqtest.Chain, length uint32) {
	g.mem.Write(chain[0].Addr, binary.NativeEndian.AppendUint32(nil, length))
}

// TestLyingSizes sends requests whose parts are longer or shorter than they say.
func TestLyingSizes(t *testing.T) {
	attack(t, func(s *scene) {
		s.put("share/target", "")
		node := s.node("target")
		fh := s.mustOpen(node, unix.O_RDWR)
		for _, size := range []uint32{0, 1, 4, 4096, 1 << 20, 1<<31 - 1, 1 << 31, ^uint32(0)} {
			// WRITE of 4 bytes that says size.
			in := fuseproto.WriteIn{Fh: fh, Size: size}
			s.do(call{op: fuseproto.FUSE_WRITE, node: node, args: args(in), data: []byte("four"), outArgs: 8})
			if got := s.content("share/target"); len(got) > 4 || got != "four"[:len(got)] {
				s.t.Errorf("WRITE of 4 bytes that says %d: the file has %d", size, len(got))
			}
			// READ of size into 4096 bytes; the same of the others that say a size.
			s.do(call{op: fuseproto.FUSE_READ, node: node, args: args(fuseproto.ReadIn{Fh: fh, Size: size}), outData: 4096})
			s.do(call{op: fuseproto.FUSE_GETXATTR, node: node, args: args(fuseproto.GetxattrIn{Size: size}, "user.none"), outData: 64})
			s.do(call{op: fuseproto.FUSE_LISTXATTR, node: node, args: args(fuseproto.GetxattrIn{Size: size}), outData: 64})
			s.do(call{op: fuseproto.FUSE_SETXATTR, node: node, args: args(fuseproto.SetxattrIn{Size: size}, "user.lie", []byte("four"))})
			for _, op := range []fuseproto.Opcode{fuseproto.FUSE_LOOKUP, fuseproto.FUSE_CREATE, fuseproto.FUSE_WRITE, fuseproto.FUSE_RENAME2, fuseproto.FUSE_READ} {
				chain := s.request(call{op: op, node: root, args: args(fuseproto.WriteIn{Fh: fh}, "../outside/secret"), outArgs: 256})
				s.setLength(chain, size)
				_, errno := s.send(chain)
				s.mem.Reset(s.mark)
				if errno == 0 && op != fuseproto.FUSE_READ && op != fuseproto.FUSE_WRITE {
					s.t.Errorf("%v whose header says %d bytes was granted", op, size)
				}
			}
		}
		s.release(node, fh)
	})
}
