package vhosttest

import (
	"slices"

	vu "github.com/sluicefs/sluice/vhostuser"
)

// The sequences are those of a device with two queues, hiprio and one request queue. Each was seen on the wire or follows the
// front-end's source; the function names say what the guest or the operator does.

// qemuUser is where QEMU has guest memory in its own address space in these sequences.
const qemuUser = 0x7f12_4000_0000

// low and high are a PC's memory around the VGA hole, as QEMU describes it.
var (
	low  = vu.MemRegion{GuestPhysAddr: 0, Size: 0xa0000, UserAddr: qemuUser, MmapOffset: 0}
	high = vu.MemRegion{GuestPhysAddr: 0xc0000, Size: 0x1ff4_0000, UserAddr: qemuUser + 0xc0000, MmapOffset: 0xc0000}
)

const qemuMemory = 0x2000_0000

// queues is the number of rings that the sequences set up.
const queues = 2

func step(req vu.Request, payload []byte, files ...File) Step {
	return Step{Request: req, Payload: payload, Files: files}
}

// ack makes s ask for an acknowledgement.
func (s Step) ack() Step {
	s.NeedReply = true
	return s
}

// when makes s depend on negotiated protocol features.
func (s Step) when(features uint64) Step {
	s.If = features
	return s
}

// each makes one step for every queue.
func each(f func(i uint32) Step) []Step {
	steps := make([]Step, 0, queues)
	for i := range uint32(queues) {
		steps = append(steps, f(i))
	}
	return steps
}

func fdStep(req vu.Request, file File) func(i uint32) Step {
	return func(i uint32) Step { return step(req, U64(uint64(i)), file) }
}

func stateStep(req vu.Request, num uint32) func(i uint32) Step {
	return func(i uint32) Step { return step(req, State(i, num)) }
}

// acked makes every step of f ask for an acknowledgement.
func acked(f func(i uint32) Step) func(i uint32) Step {
	return func(i uint32) Step { return f(i).ack() }
}

// ringAddr places ring i, of at most 1024 descriptors, at user address base.
func ringAddr(i uint32, base, log uint64) []byte {
	base += uint64(i) * 0x10000
	return vu.Append(nil, vu.VringAddr{Index: i, Desc: base, Avail: base + 0x4000, Used: base + 0x5000, Log: log})
}

var (
	call    = fdStep(vu.VHOST_USER_SET_VRING_CALL, EventFile)
	kick    = fdStep(vu.VHOST_USER_SET_VRING_KICK, EventFile)
	errFD   = fdStep(vu.VHOST_USER_SET_VRING_ERR, EventFile)
	enable  = stateStep(vu.VHOST_USER_SET_VRING_ENABLE, 1)
	disable = stateStep(vu.VHOST_USER_SET_VRING_ENABLE, 0)
	getBase = stateStep(vu.VHOST_USER_GET_VRING_BASE, 0)
)

// qemu is one version of QEMU.
type qemu struct {
	name     string
	known    uint64 // protocol features that it acknowledges, also those it has no code for
	ackVring bool   // asks for acknowledgements of KICK, CALL, ERR and ENABLE (since 8.x)
	resets   int    // RESET_DEVICE messages at each guest reset, and one at realize
}

var (
	qemu72  = qemu{name: "QEMU 7.2", known: 0x1ffff}
	qemu10  = qemu{name: "QEMU 10", known: 0xfffff, ackVring: true, resets: 1}
	qemu111 = qemu{name: "QEMU 11.1", known: 0x6fffff, ackVring: true, resets: 3}
)

func (q qemu) vring(f func(i uint32) Step) func(i uint32) Step {
	if q.ackVring {
		return acked(f)
	}
	return f
}

func (q qemu) realize() []Step {
	steps := []Step{
		step(vu.VHOST_USER_GET_FEATURES, nil),
		step(vu.VHOST_USER_GET_PROTOCOL_FEATURES, nil),
		step(vu.VHOST_USER_SET_PROTOCOL_FEATURES, U64(q.known)),
		step(vu.VHOST_USER_GET_QUEUE_NUM, nil).when(vu.VHOST_USER_PROTOCOL_F_MQ),
		step(vu.VHOST_USER_GET_MAX_MEM_SLOTS, nil).when(vu.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS),
		step(vu.VHOST_USER_SET_BACKEND_REQ_FD, nil, SocketFile).ack().when(vu.VHOST_USER_PROTOCOL_F_BACKEND_REQ),
		step(vu.VHOST_USER_SET_OWNER, nil),
		step(vu.VHOST_USER_GET_FEATURES, nil),
	}
	for i := range uint32(queues) {
		steps = append(steps, q.vring(call)(i), q.vring(errFD)(i))
	}
	return append(steps, q.reset(min(q.resets, 1))...)
}

func (q qemu) reset(n int) []Step {
	return slices.Repeat([]Step{step(vu.VHOST_USER_RESET_DEVICE, nil).when(vu.VHOST_USER_PROTOCOL_F_RESET_DEVICE)}, n)
}

// memory is what only the first driver start sends.
func (q qemu) memory() []Step {
	table := step(vu.VHOST_USER_SET_MEM_TABLE, MemTable(low, high), MemoryFile, MemoryFile).ack()
	table.Unless = vu.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
	slots := vu.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
	return []Step{
		step(vu.VHOST_USER_ADD_MEM_REG, MemReg(low), MemoryFile).ack().when(slots),
		step(vu.VHOST_USER_ADD_MEM_REG, MemReg(high), MemoryFile).ack().when(slots),
		table,
	}
}

// start is DRIVER_OK, or a virtual machine that goes on from base.
func (q qemu) start(memory []Step, base Step) []Step {
	steps := each(q.vring(call))
	steps = append(steps,
		step(vu.VHOST_USER_SET_FEATURES, U64(0x101_7000_0000)),
		step(vu.VHOST_USER_GET_STATUS, nil).when(vu.VHOST_USER_PROTOCOL_F_STATUS),
		step(vu.VHOST_USER_SET_STATUS, U64(8)).when(vu.VHOST_USER_PROTOCOL_F_STATUS),
	)
	steps = append(steps, memory...)
	for i := range uint32(queues) {
		b := base
		b.Payload = State(i, vu.Decode[vu.VringState](base.Payload).Num)
		steps = append(steps,
			step(vu.VHOST_USER_SET_VRING_NUM, State(i, 1024)),
			b,
			step(vu.VHOST_USER_SET_VRING_ADDR, ringAddr(i, qemuUser+0x100_0000, 0)),
			q.vring(kick)(i),
		)
	}
	steps = append(steps, each(q.vring(enable))...)
	return append(steps, each(q.vring(call))...)
}

func (q qemu) stop() []Step {
	return slices.Concat(each(q.vring(disable)), each(getBase), each(q.vring(call)))
}

var (
	freshBase = step(vu.VHOST_USER_SET_VRING_BASE, State(0, 0))
	savedBase = Step{Request: vu.VHOST_USER_SET_VRING_BASE, Payload: State(0, 0), SavedBase: true}
)

func (q qemu) sequence(what string, steps ...[]Step) Sequence {
	return Sequence{Name: q.name + " " + what, MemorySize: qemuMemory, Steps: slices.Concat(steps...)}
}

func (q qemu) boot() Sequence {
	return q.sequence("boot", q.realize(), q.start(q.memory(), freshBase))
}

func (q qemu) reboot() Sequence {
	return q.sequence("reboot", q.boot().Steps, q.stop(), q.reset(q.resets), q.start(nil, freshBase))
}

func (q qemu) pause() Sequence {
	return q.sequence("stop and cont", q.boot().Steps, q.stop(), q.start(nil, savedBase))
}

// hotplug is memory added and taken away while the rings run.
func (q qemu) hotplug() Sequence {
	dimm := vu.MemRegion{GuestPhysAddr: 0x1_0000_0000, Size: 0x100_0000, UserAddr: qemuUser + 0x1_0000_0000}
	slots := vu.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
	return q.sequence("memory hotplug", q.boot().Steps, []Step{
		step(vu.VHOST_USER_ADD_MEM_REG, MemReg(dimm), MemoryFile).ack().when(slots),
		step(vu.VHOST_USER_REM_MEM_REG, MemReg(dimm)).ack().when(slots),
	})
}

const chvUser = 0x7fab_0000_0000

// cloudHypervisor is what Cloud Hypervisor sends up to a running device. Once REPLY_ACK is negotiated everything is acknowledged.
func cloudHypervisor() []Step {
	steps := []Step{
		step(vu.VHOST_USER_SET_OWNER, nil).ack(),
		step(vu.VHOST_USER_GET_FEATURES, nil),
		step(vu.VHOST_USER_GET_PROTOCOL_FEATURES, nil),
		step(vu.VHOST_USER_SET_PROTOCOL_FEATURES, U64(vu.VHOST_USER_PROTOCOL_F_MQ|vu.VHOST_USER_PROTOCOL_F_REPLY_ACK|vu.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)),
		step(vu.VHOST_USER_GET_QUEUE_NUM, nil).when(vu.VHOST_USER_PROTOCOL_F_MQ),
		step(vu.VHOST_USER_SET_FEATURES, U64(vu.VIRTIO_F_VERSION_1|vu.VIRTIO_F_INDIRECT_DESC|vu.VIRTIO_F_EVENT_IDX|vu.VHOST_USER_F_PROTOCOL_FEATURES)).ack(),
	}
	return append(steps, cloudHypervisorRings(freshBase)...)
}

func cloudHypervisorRings(base Step) []Step {
	// Its first table comes so even with CONFIGURE_MEM_SLOTS.
	memory := vu.MemRegion{GuestPhysAddr: 0, Size: 0x800_0000, UserAddr: chvUser}
	steps := []Step{step(vu.VHOST_USER_SET_MEM_TABLE, MemTable(memory), MemoryFile).ack()}
	steps = append(steps, each(acked(stateStep(vu.VHOST_USER_SET_VRING_NUM, 512)))...)
	for i := range uint32(queues) {
		b := base
		b.Payload = State(i, 0)
		steps = append(steps,
			step(vu.VHOST_USER_SET_VRING_ADDR, ringAddr(i, chvUser+0x100_0000, 0)).ack(),
			b.ack(),
			call(i).ack(),
			kick(i).ack(),
		)
	}
	return append(steps, each(acked(enable))...)
}

func cloudHypervisorSequences() []Sequence {
	sequence := func(what string, steps ...[]Step) Sequence {
		return Sequence{Name: "Cloud Hypervisor " + what, MemorySize: 0x1000_0000, Steps: slices.Concat(steps...)}
	}
	added := vu.MemRegion{GuestPhysAddr: 0x800_0000, Size: 0x800_0000, UserAddr: chvUser + 0x800_0000, MmapOffset: 0x800_0000}
	boot := cloudHypervisor()
	return []Sequence{
		sequence("boot", boot),
		sequence("pause and resume", boot, each(acked(disable)), each(acked(enable))),
		sequence("snapshot and resume", boot, each(acked(disable)), each(getBase), cloudHypervisorRings(savedBase)),
		sequence("memory hotplug", boot, []Step{step(vu.VHOST_USER_ADD_MEM_REG, MemReg(added), MemoryFile).ack()}),
		sequence("reset", boot, each(acked(disable)), each(getBase)),
	}
}

const crosvmUser = 0x7fcd_0000_0000

func crosvmSequences() []Sequence {
	realize := []Step{
		step(vu.VHOST_USER_SET_OWNER, nil),
		step(vu.VHOST_USER_GET_FEATURES, nil),
		step(vu.VHOST_USER_GET_PROTOCOL_FEATURES, nil),
		step(vu.VHOST_USER_SET_PROTOCOL_FEATURES, U64(vu.VHOST_USER_PROTOCOL_F_CONFIG|vu.VHOST_USER_PROTOCOL_F_MQ|vu.VHOST_USER_PROTOCOL_F_BACKEND_REQ|vu.VHOST_USER_PROTOCOL_F_DEVICE_STATE|vu.VHOST_USER_PROTOCOL_F_SHMEM)),
		step(vu.VHOST_USER_SET_BACKEND_REQ_FD, nil, SocketFile).when(vu.VHOST_USER_PROTOCOL_F_BACKEND_REQ),
		step(vu.VHOST_USER_GET_QUEUE_NUM, nil).when(vu.VHOST_USER_PROTOCOL_F_MQ),
		step(vu.VHOST_USER_GET_CONFIG, Config(0, 40, 1)).when(vu.VHOST_USER_PROTOCOL_F_CONFIG),
		step(vu.VHOST_USER_SET_FEATURES, U64(vu.VIRTIO_F_VERSION_1|vu.VIRTIO_F_EVENT_IDX|vu.VHOST_USER_F_PROTOCOL_FEATURES)),
	}
	activate := []Step{
		step(vu.VHOST_USER_SET_MEM_TABLE, MemTable(vu.MemRegion{GuestPhysAddr: 0, Size: 0x1000_0000, UserAddr: crosvmUser}), MemoryFile),
	}
	for i := range uint32(queues) {
		activate = append(activate,
			step(vu.VHOST_USER_SET_VRING_NUM, State(i, 1024)),
			step(vu.VHOST_USER_SET_VRING_ADDR, ringAddr(i, crosvmUser+0x100_0000, 0)),
			step(vu.VHOST_USER_SET_VRING_BASE, State(i, 0)),
			call(i),
			kick(i),
			enable(i),
		)
	}
	var sleep []Step
	for i := range uint32(queues) {
		sleep = append(sleep, disable(i), getBase(i))
	}
	// The front-end sends nothing that the back-end answers at the end: without this the sequence's end would not be heard.
	sync := []Step{step(vu.VHOST_USER_GET_FEATURES, nil)}
	return []Sequence{
		{Name: "crosvm boot", MemorySize: 0x1000_0000, Steps: slices.Concat(realize, activate, sync)},
		{Name: "crosvm reset", MemorySize: 0x1000_0000, Steps: slices.Concat(realize, activate, sleep, activate, sync)},
	}
}

// umlUser is User-Mode Linux's only region: its guest-physical and user addresses are the same, and so is the offset.
const umlUser = 0xc4f000

func umlSequences() []Sequence {
	probe := []Step{
		step(vu.VHOST_USER_SET_OWNER, nil),
		step(vu.VHOST_USER_GET_FEATURES, nil),
		step(vu.VHOST_USER_GET_PROTOCOL_FEATURES, nil),
		step(vu.VHOST_USER_SET_PROTOCOL_FEATURES, U64(vu.VHOST_USER_PROTOCOL_F_MQ|vu.VHOST_USER_PROTOCOL_F_REPLY_ACK|vu.VHOST_USER_PROTOCOL_F_BACKEND_REQ|vu.VHOST_USER_PROTOCOL_F_CONFIG|vu.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)).ack(),
		step(vu.VHOST_USER_SET_BACKEND_REQ_FD, nil, PipeWriter).ack().when(vu.VHOST_USER_PROTOCOL_F_BACKEND_REQ),
		step(vu.VHOST_USER_GET_QUEUE_NUM, nil).when(vu.VHOST_USER_PROTOCOL_F_MQ),
		step(vu.VHOST_USER_SET_FEATURES, U64(0x5d_7000_0000)).ack(),
	}
	for size := uint32(1); size <= 36; size++ {
		probe = append(probe, step(vu.VHOST_USER_GET_CONFIG, Config(0, size, 0)).when(vu.VHOST_USER_PROTOCOL_F_CONFIG))
	}
	probe = append(probe, step(vu.VHOST_USER_GET_CONFIG, Config(0, 40, 0)).when(vu.VHOST_USER_PROTOCOL_F_CONFIG))

	memory := vu.MemRegion{GuestPhysAddr: umlUser, Size: 0xf3b_1000, UserAddr: umlUser, MmapOffset: umlUser}
	findVQs := []Step{step(vu.VHOST_USER_SET_MEM_TABLE, MemTable(memory), MemoryFile).ack()}
	for i := range uint32(queues) {
		findVQs = append(findVQs,
			fdStep(vu.VHOST_USER_SET_VRING_CALL, PipeWriter)(i).ack(),
			step(vu.VHOST_USER_SET_VRING_NUM, State(i, 1024)).ack(),
			step(vu.VHOST_USER_SET_VRING_BASE, State(i, 0)).ack(),
			step(vu.VHOST_USER_SET_VRING_ADDR, ringAddr(i, 0x200_0000, ^uint64(0))).ack(),
		)
	}
	for i := range uint32(queues) {
		findVQs = append(findVQs, kick(i).ack(), enable(i).ack())
	}
	var delVQs []Step
	for i := range uint32(queues) {
		delVQs = append(delVQs, disable(queues-1-i).ack())
	}
	delVQs = append(delVQs, step(vu.VHOST_USER_GET_FEATURES, nil))
	return []Sequence{
		{Name: "User-Mode Linux boot", MemorySize: 0x1000_0000, Steps: slices.Concat(probe, findVQs)},
		{Name: "User-Mode Linux unbind", MemorySize: 0x1000_0000, Steps: slices.Concat(probe, findVQs, delVQs)},
		{Name: "User-Mode Linux rebind", MemorySize: 0x1000_0000, Steps: slices.Concat(probe, findVQs, delVQs, findVQs)},
	}
}

// Sequences returns those of every front-end.
func Sequences() []Sequence {
	var all []Sequence
	for _, q := range []qemu{qemu72, qemu10, qemu111} {
		all = append(all, q.boot(), q.reboot(), q.pause(), q.hotplug())
	}
	return slices.Concat(all, cloudHypervisorSequences(), crosvmSequences(), umlSequences())
}
