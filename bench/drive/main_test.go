package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/bench/command"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/virtiofs"
)

// serve serves dir to one front-end after the other, and returns the socket.
func serve(t *testing.T, dir string) string {
	t.Helper()
	fs, err := passthrough.New(passthrough.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	server, err := fuseserver.New(fuseserver.Config{Backend: fs})
	if err != nil {
		t.Fatal(err)
	}
	device, err := virtiofs.New(virtiofs.Config{Server: server, NumRequestQueues: 1})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			_ = device.Serve(context.Background(), conn)
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-ended
		_ = device.Close()
	})
	return socket
}

func TestRun(t *testing.T) {
	dir := t.TempDir()
	socket := serve(t, dir)
	args := []string{
		"-socket", socket, "-dir", dir, "-workload", "write4k", "-depth", "2", "-layout", "contiguous", "-wait", "sleep",
		"-ops", "500", "-warm", "1ms", "-cpus", "0", "-pid", strconv.Itoa(os.Getpid()),
	}
	var stdout, stderr bytes.Buffer
	if err := run(t.Context(), append(args, "-json"), &stdout, &stderr); err != nil {
		t.Fatal(err)
	}
	var r report
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		t.Fatalf("parse %q: %v", stdout.String(), err)
	}
	if r.Workload != "write4k" || r.Depth != 2 || r.Queues != 1 || r.Layout != "contiguous" || r.Wait != "sleep" {
		t.Errorf("it was another run: %+v", r)
	}
	if r.Ops != 500 || r.Requests != 500 || r.Bytes != 500*4096 || r.OpsPerSecond <= 0 || r.P50 <= 0 || r.P999 < r.P50 || r.Kicks <= 0 || r.Notifications <= 0 {
		t.Errorf("%+v does not have 500 operations", r)
	}
	if r.Server == nil || r.Server.CPU <= 0 || r.Server.RSS == 0 || r.Server.Voluntary <= 0 || r.Syscalls != nil {
		t.Errorf("the server used %+v and made %v system calls", r.Server, r.Syscalls)
	}

	stdout.Reset()
	if err := run(t.Context(), args, &stdout, &stderr); err != nil {
		t.Fatal(err)
	}
	if want := regexp.MustCompile(`^write4k depth=2 queues=1 layout=contiguous wait=sleep: \d+ ops/s \(\d+\.\d MiB/s\), p50 .*; per op: .* kicks, .*, server CPU .*\n$`); !want.Match(stdout.Bytes()) {
		t.Errorf("printed %q", stdout.String())
	}
	if stderr.Len() > 0 {
		t.Errorf("printed %q as errors", stderr.String())
	}

	if os.Getuid() != 0 {
		t.Skip("counting system calls takes root")
	}
	stdout.Reset()
	if err := run(t.Context(), append(args, "-json", "-syscalls"), &stdout, &stderr); err != nil {
		t.Fatal(err)
	}
	r = report{}
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil || r.Syscalls == nil || *r.Syscalls < 1 || *r.Syscalls > 1000 {
		t.Errorf("%+v with system calls %v, %v", r, r.Syscalls, err)
	}
}

func TestList(t *testing.T) {
	var stdout bytes.Buffer
	if err := run(t.Context(), []string{"-workload", "list"}, &stdout, nil); err != nil || strings.Count(stdout.String(), "\n") < 15 {
		t.Errorf("listed %q, %v", stdout.String(), err)
	}
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		args string
		want string
	}{
		{"", "-socket"},
		{"-socket /nowhere", "/nowhere"},
		{"-socket x -workload dance", "-workload list"},
		{"-socket x -layout round", "pages or contiguous"},
		{"-socket x -wait long", "poll or sleep"},
		{"-socket x -cpus one", "-cpus"},
		{"-socket x -cpus -1", "-cpus"},
		{"-socket x -syscalls", "-pid"},
		{"-socket x more", `"more"`},
		{"-socket x -depth -3", "depth -3"},
		{"-socket x -dir /dev/null", "/dev/null"},
	} {
		var stdout, stderr bytes.Buffer
		err := run(t.Context(), strings.Fields(tt.args), &stdout, &stderr)
		if err == nil || !strings.Contains(err.Error(), tt.want) || stdout.Len() > 0 {
			t.Errorf("%q: %v and %q, expected %q", tt.args, err, stdout.String(), tt.want)
		}
	}
	var stderr bytes.Buffer
	if err := run(t.Context(), []string{"-dephth"}, nil, &stderr); !errors.Is(err, command.ErrUsage) || !strings.Contains(stderr.String(), "-depth") {
		t.Errorf("%v, and printed %q", err, stderr.String())
	}
}
