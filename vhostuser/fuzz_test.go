package vhostuser_test

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
)

// The input of FuzzSession is a byte of fuzz* bits for the device, then pieces of the stream: a byte that says how many descriptors
// come with the piece (low 3 bits) and of which kind (the rest), two bytes of length, and the bytes themselves.
const (
	fuzzConfig = 1 << iota
	fuzzStartErr
	fuzzStopErr
	fuzzMemErr
	fuzzBusy
)

const fuzzKinds = 5 // memory, eventfd, both ends of a pipe, socket

// fuzzPiece appends one piece to an input.
func fuzzPiece(input, stream []byte, fds, kind int) []byte {
	input = append(input, byte(fds|kind<<3))
	input = binary.LittleEndian.AppendUint16(input, uint16(len(stream)))
	return append(input, stream...)
}

// fuzzSeed makes an input of a sequence, as it is sent to a back-end that offers what fakeDevice does.
func fuzzSeed(seq vhosttest.Sequence, device byte) []byte {
	input := []byte{device}
	for _, step := range seq.Steps {
		payload := step.Payload
		switch step.Request {
		case vhostuser.VHOST_USER_SET_FEATURES:
			payload = vhosttest.U64(vhostuser.Decode[uint64](payload) & allFeatures)
		case vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES:
			payload = vhosttest.U64(vhostuser.Decode[uint64](payload) & 0xa229)
		case vhostuser.VHOST_USER_GET_STATUS, vhostuser.VHOST_USER_SET_STATUS:
			continue
		}
		flags := vhostuser.Version
		if step.NeedReply {
			flags |= vhostuser.FlagNeedReply
		}
		kind := 1
		if len(step.Files) > 0 && step.Files[0] == vhosttest.MemoryFile {
			kind = 0
		}
		input = fuzzPiece(input, vhosttest.Message(step.Request, flags, payload), len(step.Files), kind)
	}
	return input
}

// FuzzSession sends any stream with any descriptors. The session must end by itself, keep to the device's contract (which
// fakeDevice checks), give everything back and leave no descriptor open.
func FuzzSession(f *testing.F) {
	for i, seq := range vhosttest.Sequences() {
		f.Add(fuzzSeed(seq, byte(i)))
		f.Add(fuzzSeed(seq, fuzzConfig))
	}
	for _, m := range samples {
		for _, flags := range []uint32{vhostuser.Version, vhostuser.Version | vhostuser.FlagNeedReply} {
			input := []byte{fuzzConfig}
			input = fuzzPiece(input, vhosttest.Message(vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES, vhostuser.Version, vhosttest.U64(0xa229)), 0, 0)
			f.Add(fuzzPiece(input, vhosttest.Message(m.req, flags, m.payload), m.fds, 0))
		}
	}

	mem, err := vhosttest.NewMemory(qemuSized)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(mem.Close)
	kinds := [fuzzKinds]int{mem.FD(), eventFD(f)}
	var pipe, sock [2]int
	if err := errors.Join(unix.Pipe2(pipe[:], unix.O_CLOEXEC), pair(&sock)); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { sys.CloseAll(append(pipe[:], sock[:]...)) })
	kinds[2], kinds[3], kinds[4] = pipe[0], pipe[1], sock[0]

	f.Fuzz(func(t *testing.T, input []byte) {
		before := openFDs(t)
		device := byte(0)
		if len(input) > 0 {
			device, input = input[0], input[1:]
		}
		s := serve(t, func(d *fakeDevice, c *vhostuser.Config) {
			c.DrainTimeout = time.Microsecond
			if device&fuzzConfig != 0 {
				d.config = []byte("tag")
			}
			if device&fuzzStartErr != 0 {
				d.startErr = errors.New("start")
			}
			if device&fuzzStopErr != 0 {
				d.stopErr = errors.New("stop")
			}
			if device&fuzzMemErr != 0 {
				d.memErr = errors.New("memory")
			}
			d.busy = device&fuzzBusy != 0
		})
		answers := make(chan struct{})
		go func() {
			defer close(answers)
			s.Discard()
		}()
		for len(input) >= 3 {
			n := min(int(binary.LittleEndian.Uint16(input[1:])), len(input)-3)
			var fds []int
			for range input[0] & 7 {
				fds = append(fds, kinds[int(input[0]>>3)%fuzzKinds])
			}
			piece := input[3 : 3+n]
			if len(piece) > 0 && s.Write(piece, fds...) != nil {
				break // the session has ended
			}
			input = input[3+n:]
		}
		_ = s.CloseWrite()
		_ = s.wait()
		<-answers
		if after := openFDs(t); after != before {
			t.Errorf("%d file descriptors are open, %d were before", after, before)
		}
	})
}

// qemuSized holds every sequence's memory; nothing of it is touched.
const qemuSized = 0x2000_0000

func pair(fds *[2]int) (err error) {
	*fds, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	return err
}
