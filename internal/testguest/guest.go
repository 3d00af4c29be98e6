// Package testguest boots real Linux guests in front of a virtio-fs server, runs commands in them, and leaves nothing behind.
//
// There are two kinds of guest. User-Mode Linux is a process and needs no virtualisation; QEMU runs Debian's kernel, by emulation where
// the machine has no KVM. Both start from one initramfs (WriteInitramfs), whose init takes requests over a port of the machine.
package testguest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest/agentproto"
)

// Kind is the kind of a guest.
type Kind string

// The kinds of guests.
const (
	UML  Kind = "uml"
	QEMU Kind = "qemu"
)

// Device is a virtio-fs device: the server's socket and the share's tag.
type Device struct {
	Socket string
	Tag    string
	// Queues is the number of request queues; 0 means 1. User-Mode Linux takes what the server's configuration space says.
	Queues int
}

// Config says what guest to boot.
type Config struct {
	Kind    Kind
	Kit     Kit
	Initrd  string // made by WriteInitramfs
	Scratch string // a directory of the caller for sockets and the like; its path must be short
	Devices []Device
	Vsock   *Vsock // nil: none
	MemMiB  int    // 0 means 512
	CPUs    int    // 0 means 1; User-Mode Linux has only one
	// Serial, if set, is the host's side of the guest's SerialDevice; it stays the caller's.
	Serial *os.File
	// Params are more parameters for the kernel.
	Params []string
	// Shell is the tag of a share to run an interactive shell on, with the terminal of this process, instead of the agent.
	Shell string
}

// Guest is a running guest.
type Guest struct {
	p        *process
	port     *os.File
	requests *agentproto.Writer
	hello    chan struct{}
	served   chan struct{} // closed when the port has ended

	mu      sync.Mutex
	seq     uint64
	calls   map[uint64]*call
	booting bool
	err     error // why no call can be answered any more
}

// call is a command whose last reply has not come.
type call struct {
	stdout, stderr []byte
	done           chan agentproto.Reply
}

// Boot starts a guest and waits until it takes commands. The caller closes it.
func Boot(ctx context.Context, cfg Config) (*Guest, error) {
	g, err := start(cfg)
	if err != nil {
		return nil, fmt.Errorf("boot %s guest: %w", cfg.Kind, err)
	}
	if err := g.awaitHello(ctx); err != nil {
		g.Close()
		return nil, fmt.Errorf("boot %s guest: %w", cfg.Kind, err)
	}
	return g, nil
}

// Shell boots a guest with a shell on the terminal of this process, and returns when it has ended.
func Shell(ctx context.Context, cfg Config) error {
	g, err := start(cfg)
	if err != nil {
		return fmt.Errorf("boot %s guest: %w", cfg.Kind, err)
	}
	defer g.Close()
	return g.p.wait(ctx)
}

func start(cfg Config) (*Guest, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make the guest's port: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "guest port")
	defer theirs.Close()
	// Only a non-blocking descriptor lets Close end a Read.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, fmt.Errorf("make the guest's port: %w", err)
	}
	g := &Guest{
		port: os.NewFile(uintptr(fds[0]), "guest port"), hello: make(chan struct{}, 1), served: make(chan struct{}),
		calls: make(map[uint64]*call), booting: true,
	}
	g.requests = agentproto.NewWriter(g.port)
	cmd, err := command(cfg)
	if err != nil {
		g.port.Close()
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{theirs} // portFD
	if cfg.Serial != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, cfg.Serial) // serialFD
	}
	if cfg.Shell != "" {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	}
	if g.p, err = startProcess(string(cfg.Kind)+" guest", cmd, cfg.Shell == ""); err != nil {
		g.port.Close()
		return nil, err
	}
	go g.serve()
	return g, nil
}

// portFD is the number that the first of exec.Cmd.ExtraFiles has in the child.
const portFD = 3

// serialFD is that of the second.
const serialFD = portFD + 1

// SerialDevice is what Config.Serial is in a guest.
func SerialDevice(kind Kind) string {
	if kind == UML {
		return "/dev/ttyS1"
	}
	return "/dev/vport0p2"
}

func command(cfg Config) (*exec.Cmd, error) {
	if cfg.MemMiB == 0 {
		cfg.MemMiB = 512
	}
	cfg.CPUs = max(cfg.CPUs, 1)
	switch cfg.Kind {
	case UML:
		return umlCommand(cfg)
	case QEMU:
		return qemuCommand(cfg), nil
	default:
		return nil, fmt.Errorf("unknown kind of guest %q, want %q or %q", cfg.Kind, UML, QEMU)
	}
}

// umlCommand is User-Mode Linux: con0 is the console, ssl0 (ttyS0 in the guest) our port.
func umlCommand(cfg Config) (*exec.Cmd, error) {
	console := "con0=null,fd:1"
	if cfg.Shell != "" {
		console = "con0=fd:0,fd:1"
	}
	args := []string{
		fmt.Sprintf("mem=%dM", cfg.MemMiB), "initrd=" + cfg.Initrd, "root=/dev/ram0", "rdinit=/init", "quiet", "panic=-1", "oops=panic",
		"con=null", console, "ssl=null", fmt.Sprintf("ssl0=fd:%d,fd:%d", portFD, portFD),
		"uml_dir=" + cfg.Scratch + "/", "umid=uml",
		agentproto.ParamPort + "=/dev/ttyS0", agentproto.ParamShell + "=" + cfg.Shell, agentproto.ParamModules + "=" + modulesDir(UML),
	}
	if cfg.Serial != nil {
		args = append(args, fmt.Sprintf("ssl1=fd:%d,fd:%d", serialFD, serialFD))
	}
	for _, d := range cfg.Devices {
		args = append(args, "virtio_uml.device="+d.Socket+":26") // 26: virtio's device id of a file system
	}
	if cfg.Vsock != nil {
		args = append(args, "virtio_uml.device="+cfg.Vsock.socket+":19") // 19: of a socket device
	}
	cmd := exec.Command(cfg.Kit.uml(), append(args, cfg.Params...)...)
	// The guest's memory is a file there; one that is too small shows as SIGBUS much later.
	memory, err := roomFor(int64(cfg.MemMiB)<<20, "/dev/shm", os.TempDir())
	if err != nil {
		return nil, err
	}
	cmd.Env = append(os.Environ(), "TMPDIR="+memory)
	return cmd, nil
}

// roomFor returns the first of the directories that has so many free bytes.
func roomFor(bytes int64, dirs ...string) (string, error) {
	for _, dir := range dirs {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err == nil && int64(st.Bavail)*st.Bsize >= bytes {
			return dir, nil
		}
	}
	return "", fmt.Errorf("find room for the guest's memory: none of %v has %d MiB free", dirs, bytes>>20)
}

// qemuCommand is QEMU: ttyS0 is the console, a virtio console port ours.
func qemuCommand(cfg Config) *exec.Cmd {
	accel := "tcg"
	if kvmWorks() {
		accel = "kvm"
	}
	console := "file,path=/dev/stdout"
	if cfg.Shell != "" {
		console = "stdio,signal=off" // Ctrl-C is the shell's
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none",
		"-M", "q35,accel=" + accel, "-cpu", "max", "-smp", strconv.Itoa(cfg.CPUs), "-m", fmt.Sprintf("%dM", cfg.MemMiB),
		"-object", fmt.Sprintf("memory-backend-memfd,id=mem,size=%dM,share=on", cfg.MemMiB), "-numa", "node,memdev=mem",
		"-kernel", cfg.Kit.vmlinuz(), "-initrd", cfg.Initrd,
		"-append", fmt.Sprintf("console=ttyS0 quiet panic=-1 oops=panic %s=/dev/vport0p1 %s=%s %s=%s %s",
			agentproto.ParamPort, agentproto.ParamShell, cfg.Shell, agentproto.ParamModules, modulesDir(QEMU), strings.Join(cfg.Params, " ")),
		"-chardev", console + ",id=console", "-serial", "chardev:console",
		"-device", "virtio-serial-pci", "-chardev", fmt.Sprintf("socket,id=port,fd=%d", portFD), "-device", "virtserialport,chardev=port",
	}
	if cfg.Serial != nil {
		args = append(args, "-chardev", fmt.Sprintf("socket,id=serial,fd=%d", serialFD), "-device", "virtserialport,chardev=serial,nr=2")
	}
	for i, d := range cfg.Devices {
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=fs%d,path=%s", i, d.Socket),
			"-device", fmt.Sprintf("vhost-user-fs-pci,queue-size=1024,num-request-queues=%d,chardev=fs%d,tag=%s", max(d.Queues, 1), i, d.Tag))
	}
	if cfg.Vsock != nil {
		args = append(args, "-chardev", "socket,id=vsock,path="+cfg.Vsock.socket, "-device", "vhost-user-vsock-pci,chardev=vsock")
	}
	return exec.Command(qemuProgram, args...)
}

// kvmWorks says whether KVM can be used. That /dev/kvm opens is not enough: without vmx or svm a nested hypervisor may offer
// a KVM that cannot run a stock kernel.
func kvmWorks() bool {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !strings.Contains(string(info), " vmx ") && !strings.Contains(string(info), " svm ") {
		return false
	}
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	kvm.Close()
	return true
}

// serve takes the guest's replies until its port ends.
func (g *Guest) serve() {
	defer close(g.served)
	replies := agentproto.NewReader(g.port)
	for {
		var reply agentproto.Reply
		if err := replies.Receive(&reply); err != nil {
			g.fail(fmt.Errorf("the guest has ended: %w", err))
			return
		}
		g.mu.Lock()
		c := g.calls[reply.Seq]
		switch {
		case reply.Hello && g.booting:
			g.booting = false
			g.hello <- struct{}{}
		case reply.Hello:
			g.mu.Unlock()
			g.fail(errors.New("the guest has booted again, unasked"))
			return
		case c == nil:
		default:
			c.stdout = append(c.stdout, reply.Stdout...)
			c.stderr = append(c.stderr, reply.Stderr...)
			if reply.Done {
				delete(g.calls, reply.Seq)
				c.done <- reply
			}
		}
		g.mu.Unlock()
	}
}

// fail ends all calls, now and later, with an error.
func (g *Guest) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.err = err
	for _, c := range g.calls {
		close(c.done)
	}
	clear(g.calls)
}

// awaitHello waits for the guest's init.
func (g *Guest) awaitHello(ctx context.Context) error {
	select {
	case <-g.hello:
		return nil
	case <-g.p.exited:
		return fmt.Errorf("ended before its init was ready: %w\n%s", g.p.err, g.Console())
	case <-g.served:
		return fmt.Errorf("%w\n%s", g.err, g.Console())
	case <-ctx.Done():
		return fmt.Errorf("its init is not ready: %w\n%s", context.Cause(ctx), g.Console())
	}
}

// Command is a command to run in a guest, as root where UID and GID are not set.
type Command = agentproto.Exec

// Result is what a command has written and how it ended: its exit status, or 128 + the signal that killed it.
type Result struct {
	Stdout, Stderr string
	Status         int
}

// Run runs a command and waits for its end. An error means that there is no status, not that the status is not 0; the output is
// what has come so far even then.
func (g *Guest) Run(ctx context.Context, command Command) (Result, error) {
	c := &call{done: make(chan agentproto.Reply, 1)}
	g.mu.Lock()
	if g.err != nil {
		defer g.mu.Unlock()
		return Result{}, fmt.Errorf("run %q: %w", command.Args, g.err)
	}
	g.seq++
	seq := g.seq
	g.calls[seq] = c
	g.mu.Unlock()

	err := g.requests.Send(agentproto.Request{Seq: seq, Exec: &command})
	var last agentproto.Reply
	if err == nil {
		var ok bool
		select {
		case last, ok = <-c.done:
			if !ok {
				err = g.err
			} else if last.Error != "" {
				err = errors.New(last.Error)
			}
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.calls, seq)
	result := Result{Stdout: string(c.stdout), Stderr: string(c.stderr), Status: last.Status}
	if err != nil {
		return result, fmt.Errorf("run %q: %w", command.Args, err)
	}
	return result, nil
}

// Sh runs a shell script as root and returns its output; a status other than 0 is an error that shows it.
func (g *Guest) Sh(ctx context.Context, script string) (string, error) {
	r, err := g.Run(ctx, Command{Args: []string{"sh", "-euc", script}})
	if err == nil && r.Status != 0 {
		err = fmt.Errorf("status %d", r.Status)
	}
	if err != nil {
		return r.Stdout, fmt.Errorf("guest: %s: %w\n%s%s", script, err, r.Stdout, r.Stderr)
	}
	return r.Stdout, nil
}

// Reboot restarts the guest without its virtual machine, as a user's `reboot -f` does, and waits until it takes commands again.
// User-Mode Linux cannot: its machine is the process.
func (g *Guest) Reboot(ctx context.Context) error {
	g.mu.Lock()
	g.booting = true
	g.mu.Unlock()
	if err := g.requests.Send(agentproto.Request{Power: "reboot"}); err != nil {
		return fmt.Errorf("reboot the guest: %w", err)
	}
	if err := g.awaitHello(ctx); err != nil {
		return fmt.Errorf("reboot the guest: %w", err)
	}
	return nil
}

// PowerOff switches the guest off and waits for its end.
func (g *Guest) PowerOff(ctx context.Context) error {
	if err := g.requests.Send(agentproto.Request{Power: "off"}); err != nil {
		return fmt.Errorf("switch the guest off: %w", err)
	}
	if err := g.p.wait(ctx); err != nil {
		return fmt.Errorf("switch the guest off: %w", err)
	}
	return nil
}

// PID is the process id of the guest's virtual machine.
func (g *Guest) PID() int { return g.p.cmd.Process.Pid }

// Console is the end of what the guest's kernel and its virtual machine have written.
func (g *Guest) Console() string { return g.p.log.String() }

// Close kills the guest, if it has not ended, and waits for it.
func (g *Guest) Close() {
	g.p.kill()
	g.port.Close()
	<-g.served
}
