package testguest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// Vsock is a running vhost-user server of a guest's vsock device. Its host is Unix sockets, in the form of Firecracker and Cloud
// Hypervisor: what the guest connects to, as port N of VsockHost, is the socket Path() + "_N", which a test listens on; who connects to
// Path() and writes "CONNECT N\n" reaches the guest's port N.
type Vsock struct {
	p            *process
	socket, path string
}

// Context identifiers of virtio-vsock: the host's, and that of a guest with a Vsock.
const (
	VsockHost  = 2 // VMADDR_CID_HOST
	VsockGuest = 3
)

// StartVsock starts a server for one guest, with its sockets in the directory scratch, whose path must be short.
func StartVsock(ctx context.Context, kit Kit, scratch string) (*Vsock, error) {
	v := &Vsock{socket: filepath.Join(scratch, "vsock-device.sock"), path: filepath.Join(scratch, "vsock.sock")}
	cmd := exec.Command(kit.vsock(), "--guest-cid", fmt.Sprint(VsockGuest), "--socket", v.socket, "--uds-path", v.path)
	var err error
	if v.p, err = startProcess("vhost-device-vsock", cmd, true); err != nil {
		return nil, err
	}
	// It says nothing when it listens.
	for {
		if _, err := os.Stat(v.socket); err == nil {
			return v, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			v.Close()
			return nil, err
		}
		select {
		case <-v.p.exited:
			return nil, fmt.Errorf("vhost-device-vsock has ended: %w\n%s", v.p.err, v.p.log)
		case <-ctx.Done():
			v.Close()
			return nil, fmt.Errorf("vhost-device-vsock does not listen: %w\n%s", context.Cause(ctx), v.p.log)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Path is the Unix socket of the host's side, and the beginning of the names of others.
func (v *Vsock) Path() string { return v.path }

// Log is the end of what the server has written.
func (v *Vsock) Log() string { return v.p.log.String() }

// Close kills the server.
func (v *Vsock) Close() { v.p.kill() }
