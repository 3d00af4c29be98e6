// Package virtiofs is the virtio file system device (virtio 1.3, 5.11): its configuration space, its hiprio and request
// queues, and the threads that serve them. It is the one room that knows vhostuser, virtqueue and fuseserver together.
//
//	front-end ──vhostuser.Serve──▶ Device ──StartQueue──▶ queue ◀─kick─ guest
//	                                                       │ worker: Pop ─▶ fuseserver.Handle ─▶ Push, Publish, call
//	                                                       └ pool: what may sleep, completed in any order, in a lane of
//	                                                         its own for each isolated part of the backend
//
// A worker is a locked thread that serves its queues inline, so a request costs no hand-over. What may sleep goes to the
// pool, so that no request waits behind a slow disk, and FORGETs never wait at all.
package virtiofs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/internal/ratelog"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/virtqueue"
)

const (
	// TagSize is the size of virtio_fs_config.tag in bytes (virtio 1.3, 5.11.4).
	TagSize = 36
	// MaxRequestQueues bounds Config.NumRequestQueues: vhost-user's kick and call messages carry 8 bits of queue index.
	MaxRequestQueues = 255

	defaultRequestQueues = 8
	defaultDrainTimeout  = 5 * time.Second
	defaultPoolThreads   = 16
)

// Config describes a device.
type Config struct {
	// Server answers the requests. The device closes it.
	Server *fuseserver.Server
	// Tag is what the guest mounts the file system by: 1 to 36 bytes. Left empty, the front-end has to know it, as QEMU and
	// Cloud Hypervisor do; a configuration space is not offered then, for QEMU refuses one.
	Tag string
	// NumRequestQueues is how many request queues the device has; 0 means one for each CPU, at most 8.
	NumRequestQueues int
	// DrainTimeout is how long a queue that is being stopped waits for requests in flight; 0 means 5 s.
	DrainTimeout time.Duration
	// PoolThreads is the most threads that run requests that may sleep, and the most of each isolated part of the backend;
	// 0 means 16.
	PoolThreads int
	// PollWindow is how long a worker that has nothing more to do looks at its rings before it sleeps: PollAuto, PollNever, or
	// always that long, at most MaxPollWindow.
	PollWindow time.Duration
	Log        *slog.Logger
}

// Validate says what is wrong with c.
func (c Config) Validate() error {
	if c.Server == nil {
		return errors.New("a virtio-fs device needs a server for its requests")
	}
	if c.NumRequestQueues < 0 || c.NumRequestQueues > MaxRequestQueues {
		return fmt.Errorf("%d request queues: expected 1 to %d", c.NumRequestQueues, MaxRequestQueues)
	}
	if c.PollWindow < PollNever || c.PollWindow > MaxPollWindow {
		return fmt.Errorf("poll window of %v: expected at most %v", c.PollWindow, MaxPollWindow)
	}
	if c.Tag != "" {
		return ValidateTag(c.Tag)
	}
	return nil
}

// ValidateTag says what keeps a guest from mounting by tag: Linux takes neither an empty one nor one with a newline
// (fs/fuse/virtio_fs.c, virtio_fs_read_tag).
func ValidateTag(tag string) error {
	if tag == "" || len(tag) > TagSize || !utf8.ValidString(tag) || strings.ContainsAny(tag, "\n\x00") {
		return fmt.Errorf("tag %q: expected 1 to %d bytes of UTF-8 without newline or NUL", tag, TagSize)
	}
	return nil
}

// Device serves one share to one front-end at a time.
type Device struct {
	cfg     Config
	log     *ratelog.Logger // a guest can cause what is logged here
	mem     *guestmem.Memory
	queues  []*queue // queues[0] is hiprio
	workers []*worker
	pool    *pool
	strays  strays
	slow    slowness
	stats   counters

	features uint64 // acknowledged; only the session's goroutine uses it

	closed sync.Once
}

// New makes a device. It has no threads until a front-end starts a queue.
func New(cfg Config) (*Device, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.NumRequestQueues == 0 {
		cfg.NumRequestQueues = min(runtime.NumCPU(), defaultRequestQueues)
	}
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = defaultDrainTimeout
	}
	if cfg.PoolThreads == 0 {
		cfg.PoolThreads = defaultPoolThreads
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	d := &Device{cfg: cfg, log: ratelog.New(cfg.Log, time.Second, 10), mem: guestmem.New()}
	d.strays.limit = cfg.PoolThreads
	d.pool = newPool(d, cfg.PoolThreads)
	cfg.Server.OnForgets(d.pool.forgets)
	cfg.Server.OnUnlock(d.pool.room.retryAll)
	cfg.Server.OnGone(d.pool.gone)
	for range min(cfg.NumRequestQueues, runtime.NumCPU()) {
		d.workers = append(d.workers, &worker{device: d, poller: poller{fixed: cfg.PollWindow}})
	}
	for i := range 1 + cfg.NumRequestQueues {
		// Hiprio lives beside the first request queue: on a thread of its own each FORGET would wake a second thread.
		w := d.workers[max(i-1, 0)%len(d.workers)]
		q := &queue{device: d, index: i, worker: w}
		d.queues = append(d.queues, q)
		w.queues = append(w.queues, q)
	}
	return d, nil
}

// Serve speaks vhost-user on conn until the front-end goes, breaks the protocol, or ctx ends; see vhostuser.Serve for the
// errors. Afterwards the file system session is over and the device ready for another front-end.
func (d *Device) Serve(ctx context.Context, conn *net.UnixConn) error {
	// Stopping a queue publishes completions, in guest memory.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	d.stats.frontEnds.Add(1)
	d.stats.connected.Add(1)
	defer d.stats.connected.Add(-1)
	defer d.rest()
	defer d.cfg.Server.Reset()
	return vhostuser.Serve(ctx, conn, vhostuser.Config{Device: d, Memory: d.mem, Log: d.cfg.Log, DrainTimeout: d.cfg.DrainTimeout})
}

// rest has a device without a front-end keep no threads.
func (d *Device) rest() {
	if err := d.endWorkers(); err != nil {
		d.log.Warn("front-end has gone", "error", err)
	}
}

// Close ends the threads and the server. No Serve may be running.
func (d *Device) Close() error {
	err := error(nil)
	d.closed.Do(func() {
		for i := range d.queues {
			if _, e := d.StopQueue(i); e != nil {
				err = e
			}
			d.SetCall(i, nil)
			d.SetErr(i, nil)
		}
		left := d.endWorkers()
		if left == nil && !d.strays.wait(d.cfg.DrainTimeout) {
			left = errStuck
		}
		left = errors.Join(left, d.pool.close(d.cfg.DrainTimeout))
		if left != nil { // it may still use the backend
			err = left
			return
		}
		err = errors.Join(err, d.cfg.Server.Close())
	})
	return err
}

var errStuck = errors.New("a request is stuck in the backend: its thread was left behind")

// endWorkers ends the workers' threads, once every queue is stopped.
func (d *Device) endWorkers() error {
	deadline := time.Now().Add(d.cfg.DrainTimeout)
	for _, w := range d.workers {
		if !w.end(time.Until(deadline)) {
			return errStuck
		}
	}
	return nil
}

// Features returns the virtio feature bits on offer.
func (d *Device) Features() uint64 {
	return vhostuser.VIRTIO_F_VERSION_1 | virtqueue.VIRTIO_RING_F_INDIRECT_DESC | virtqueue.VIRTIO_RING_F_EVENT_IDX
}

// NumQueues returns the number of virtqueues: hiprio and the request queues.
func (d *Device) NumQueues() int {
	return len(d.queues)
}

// ConfigSpace returns virtio_fs_config (virtio 1.3, 5.11.4) without notify_buf_size, which needs
// VIRTIO_FS_F_NOTIFICATION; nil without a tag.
func (d *Device) ConfigSpace() []byte {
	if d.cfg.Tag == "" {
		return nil
	}
	space := make([]byte, TagSize, TagSize+4)
	copy(space, d.cfg.Tag)
	return binary.LittleEndian.AppendUint32(space, uint32(d.cfg.NumRequestQueues))
}

// SetFeatures keeps the feature bits that the front-end has acknowledged, for the queues started from now on.
func (d *Device) SetFeatures(features uint64) {
	d.features = features
}

// StartQueue begins to serve a queue, from next available index q.Base on, once it is enabled.
func (d *Device) StartQueue(index int, cfg vhostuser.QueueConfig) error {
	vq, err := virtqueue.New(virtqueue.Config{
		Num:           cfg.Num,
		Features:      d.features,
		DescUserAddr:  cfg.DescUserAddr,
		AvailUserAddr: cfg.AvailUserAddr,
		UsedUserAddr:  cfg.UsedUserAddr,
		Base:          uint16(cfg.Base), // split rings: the next available index
	})
	if err != nil {
		return err
	}
	return d.queues[index].start(vq, int(cfg.Num), cfg.Kick)
}

// EnableQueue lets a started queue fetch requests, or stops it fetching; requests in flight go on.
func (d *Device) EnableQueue(index int, enabled bool) {
	d.queues[index].enable(enabled)
}

// StopQueue stops a queue, waits for its requests in flight, and returns its next available index. Requests that outlast
// the deadline are given up: they are never completed, and the error says how many they were.
func (d *Device) StopQueue(index int) (uint32, error) {
	return d.queues[index].stop(d.cfg.DrainTimeout)
}

// SetCall makes fd, which the device now owns, what the guest is notified by; nil is none.
func (d *Device) SetCall(index int, fd *sys.FD) {
	d.queues[index].setNotifier(&d.queues[index].call, fd)
}

// SetErr makes fd, which the device now owns, what the front-end is told of a broken ring by; nil is none.
func (d *Device) SetErr(index int, fd *sys.FD) {
	d.queues[index].setNotifier(&d.queues[index].err, fd)
}

// MemoryChanged moves every started queue to the present memory map. A queue whose ring has lost its memory is broken, and
// only it.
func (d *Device) MemoryChanged() error {
	for _, q := range d.queues {
		q.rebind()
	}
	return nil
}

// Reset ends the file system session and drops the acknowledged features (VHOST_USER_RESET_DEVICE).
func (d *Device) Reset() {
	d.features = 0
	d.cfg.Server.Reset()
}
