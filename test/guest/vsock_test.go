package guest_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/sluicefs/sluice/internal/testguest"
)

// TestVsock has the guest connect to a Unix socket of the host, and the host to a port of the guest.
func TestVsock(t *testing.T) {
	eachKind(t, func(t *testing.T, kind testguest.Kind) {
		m := newMachine(t)
		v := m.vsock()
		m.boot(testguest.Config{Kind: kind, Vsock: v})

		const hostPort, guestPort = 1025, 1026
		l, err := net.Listen("unix", fmt.Sprintf("%s_%d", v.Path(), hostPort))
		m.check(err)
		defer l.Close()
		heard := make(chan string, 1)
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			line, _ := bufio.NewReader(conn).ReadString('\n')
			heard <- line
			_, _ = io.WriteString(conn, "to the guest")
		}()
		if got := m.sh("guestprog vsock %d %d 'to the host\n'", testguest.VsockHost, hostPort); got != "to the guest" {
			t.Errorf("the guest heard %q", got)
		}
		if got := <-heard; got != "to the host\n" {
			t.Errorf("the host heard %q", got)
		}

		echo := make(chan error, 1)
		go func() {
			_, err := m.trySh(fmt.Sprintf("guestprog vsockecho %d", guestPort))
			echo <- err
		}()
		// The device closes a connection to a port where nobody listens yet.
		var got string
		for !strings.HasSuffix(got, "hello") {
			got, err = connectGuest(m.ctx, v.Path(), guestPort, "hello")
			if m.ctx.Err() != nil {
				t.Fatalf("port %d of the guest: %q, %v", guestPort, got, err)
			}
		}
		if !strings.HasPrefix(got, "OK ") {
			t.Errorf("the device says %q, expected OK and a port first", got)
		}
		m.check(<-echo)
	})
}

// connectGuest sends text to a port of the guest, and returns what the device and the guest say.
func connectGuest(ctx context.Context, path string, port int, text string) (string, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return "", err
	}
	r := bufio.NewReader(conn)
	ok, err := r.ReadString('\n')
	if err != nil {
		return ok, err
	}
	if _, err := io.WriteString(conn, text); err != nil {
		return ok, err
	}
	answer := make([]byte, len(text))
	n, err := io.ReadFull(r, answer)
	return ok + string(answer[:n]), err
}

// vsock starts what a guest of this machine has for a vsock device.
func (m *machine) vsock() *testguest.Vsock {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.ctx, time.Minute)
	defer cancel()
	v, err := testguest.StartVsock(ctx, kit, m.scratch)
	m.check(err)
	m.t.Cleanup(func() {
		if m.t.Failed() {
			m.t.Logf("vsock device:\n%s", v.Log())
		}
		v.Close()
	})
	return v
}
