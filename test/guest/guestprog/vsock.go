package main

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// vsock connects to a port of AF_VSOCK, writes text, and prints what comes back.
func vsock(cid, port int64, text string) error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a vsock socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "vsock")
	defer f.Close()
	for err = unix.EINTR; err == unix.EINTR; { // the Go runtime sends itself signals
		err = unix.Connect(fd, &unix.SockaddrVM{CID: uint32(cid), Port: uint32(port)})
	}
	if err != nil {
		return fmt.Errorf("connect to port %d of %d: %w", port, cid, err)
	}
	if _, err := io.WriteString(f, text); err != nil {
		return err
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return err
	}
	_, err = io.Copy(os.Stdout, f)
	return err
}

// vsockEcho listens on a port of AF_VSOCK, says so, and sends what one connection says back to it.
func vsockEcho(port int64) error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a vsock socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: uint32(port)}); err != nil {
		return fmt.Errorf("bind port %d: %w", port, err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		return err
	}
	conn, _, err := unix.Accept(fd)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(conn), "vsock")
	defer f.Close()
	_, err = io.Copy(f, io.LimitReader(f, 5))
	return err
}
