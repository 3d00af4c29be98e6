// Command guestinit is init in a test guest: it prepares the machine, then runs the host's commands, or a shell.
//
// As process 1 it only reaps orphans; the work is done by a child (the same program with the argument "agent" or "shell"),
// so that waiting for any process cannot steal the status of a command. When the child ends, the machine is switched off.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest/agentproto"
)

func main() {
	var err error
	switch {
	case os.Getpid() == 1:
		err = initMain()
	case len(os.Args) == 3 && os.Args[1] == "agent":
		err = agentMain(os.Args[2])
	case len(os.Args) == 3 && os.Args[1] == "shell":
		err = shellMain(os.Args[2])
	default:
		err = errors.New("started other than as process 1")
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "guestinit: %v\n", err)
		os.Exit(1)
	}
}

// initMain is process 1. It never returns without an attempt to switch the machine off: the end of process 1 is a kernel panic.
func initMain() error {
	defer powerOff(unix.LINUX_REBOOT_CMD_POWER_OFF)
	if err := prepare(); err != nil {
		fmt.Fprintf(os.Stderr, "guestinit: %v\n", err)
		return err
	}
	args := []string{"guestinit", "agent", param(agentproto.ParamPort)}
	if tag := param(agentproto.ParamShell); tag != "" {
		args = []string{"guestinit", "shell", tag}
	}
	child, err := os.StartProcess("/init", args, &os.ProcAttr{
		Env:   []string{"PATH=/bin", "HOME=/root", "TERM=linux", "TMPDIR=/tmp"},
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "guestinit: %v\n", err)
		return fmt.Errorf("start the agent: %w", err)
	}
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		if pid == child.Pid || errors.Is(err, unix.ECHILD) {
			return nil
		}
	}
}

// powerOff ends the machine in the way cmd says. Reboot needs no process 1 to have agreed.
func powerOff(cmd int) {
	unix.Sync()
	if err := unix.Reboot(cmd); err != nil {
		fmt.Fprintf(os.Stderr, "guestinit: reboot: %v\n", err)
	}
}

// prepare mounts what programs expect, installs busybox's names, and loads the drivers that the kernel does not have built in.
func prepare() error {
	for _, m := range []struct{ source, target, options string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"tmpfs", "/tmp", "mode=1777,size=90%"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.source, 0, m.options); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for _, dir := range []string{"/mnt", "/root", "/etc"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if out, err := exec.Command("/bin/busybox", "--install", "-s", "/bin").CombinedOutput(); err != nil {
		return fmt.Errorf("install busybox: %w: %s", err, out)
	}
	return loadModules(param(agentproto.ParamModules))
}

// loadModules loads the modules that dir/order lists.
func loadModules(dir string) error {
	order, err := os.Open(filepath.Join(dir, "order"))
	if err != nil {
		return err
	}
	defer order.Close()
	for names := bufio.NewScanner(order); names.Scan(); {
		module, err := os.Open(filepath.Join(dir, names.Text()))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(module.Fd()), "", 0)
		module.Close()
		if err != nil {
			return fmt.Errorf("load %s: %w", names.Text(), err)
		}
	}
	return nil
}

// param returns a parameter of the kernel's command line, or "".
func param(name string) string {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return ""
	}
	for word := range strings.FieldsSeq(string(line)) {
		if value, ok := strings.CutPrefix(word, name+"="); ok {
			return value
		}
	}
	return ""
}

// shellMain mounts the share and runs a shell on the console.
func shellMain(tag string) error {
	if err := unix.Mount(tag, "/mnt", "virtiofs", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", tag, err)
	}
	shell := exec.Command("/bin/cttyhack", "sh", "-l")
	shell.Dir = "/mnt"
	shell.Env = append(os.Environ(), `PS1=guest:\w# `)
	// cttyhack takes the console as the controlling terminal only of a session that it leads.
	shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	shell.Stdin, shell.Stdout, shell.Stderr = os.Stdin, os.Stdout, os.Stderr
	// What the last command of the shell returned is not an error of the guest.
	if err := shell.Run(); err != nil && shell.ProcessState == nil {
		return fmt.Errorf("start the shell: %w", err)
	}
	unix.Sync()
	return nil
}

// agentMain runs the host's commands, as many at a time as it asks for, until the port closes.
func agentMain(path string) error {
	port, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer port.Close()
	if err := makeRaw(int(port.Fd())); err != nil {
		return fmt.Errorf("make %s raw: %w", path, err)
	}
	replies := agentproto.NewWriter(port)
	if err := replies.Send(agentproto.Reply{Hello: true}); err != nil {
		return err
	}
	for requests := agentproto.NewReader(port); ; {
		var request agentproto.Request
		if err := requests.Receive(&request); err != nil {
			return err
		}
		switch {
		case request.Exec != nil:
			go run(replies, request.Seq, request.Exec)
		case request.Power == "reboot":
			powerOff(unix.LINUX_REBOOT_CMD_RESTART)
		default:
			return nil
		}
	}
}

// makeRaw switches a terminal's line discipline off; a port that is no terminal has none.
func makeRaw(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
		return nil
	} else if err != nil {
		return err
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = t.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8 | unix.CREAD | unix.CLOCAL
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
}

// run runs one command and sends its output as it comes. A failure to send means that the host is gone, and agentMain sees it too.
func run(replies *agentproto.Writer, seq uint64, x *agentproto.Exec) {
	cmd := exec.Command(x.Args[0], x.Args[1:]...)
	cmd.Dir = x.Dir
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.Env = append(os.Environ(), x.Env...)
	cmd.Stdout = chunks(func(b []byte) error { return replies.Send(agentproto.Reply{Seq: seq, Stdout: b}) })
	cmd.Stderr = chunks(func(b []byte) error { return replies.Send(agentproto.Reply{Seq: seq, Stderr: b}) })
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: x.UID, Gid: x.GID, Groups: x.Groups}}
	last := agentproto.Reply{Seq: seq, Done: true}
	err := cmd.Run()
	switch state := cmd.ProcessState; {
	case state == nil:
		last.Error = err.Error()
	case state.ExitCode() >= 0:
		last.Status = state.ExitCode()
	default:
		last.Status = 128 + int(state.Sys().(syscall.WaitStatus).Signal())
	}
	_ = replies.Send(last)
}

// chunks is a writer that hands on at most agentproto.MaxChunk bytes at a time.
type chunks func([]byte) error

var _ io.Writer = chunks(nil)

func (c chunks) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		n := min(len(rest), agentproto.MaxChunk)
		if err := c(rest[:n]); err != nil {
			return 0, err
		}
		rest = rest[n:]
	}
	return len(b), nil
}
