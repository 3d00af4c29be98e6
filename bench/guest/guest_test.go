package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/bench/report"
	"github.com/sluicefs/sluice/bench/server"
	"github.com/sluicefs/sluice/vhostuser"
)

func TestParseFio(t *testing.T) {
	const read = `{"fio version": "fio-3.33", "jobs": [{"jobname": "job", "error": 0,
		"read": {"io_bytes": 16384000, "bw_bytes": 8192000, "total_ios": 4000}, "write": {"io_bytes": 0, "bw_bytes": 0, "total_ios": 0}}]}`
	got, err := parseFio([]byte(read))
	if want := (fioResult{16384000, 4000, 2 * time.Second}); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	write := strings.NewReplacer(`"read"`, `"write"`, `"write"`, `"read"`).Replace(read)
	if got, err := parseFio([]byte(write)); err != nil || got.ios != 4000 {
		t.Errorf("written: %+v, %v", got, err)
	}
	for text, want := range map[string]string{
		`fio: failed`:                            "read fio's report",
		`{"jobs": []}`:                           "0 jobs",
		`{"jobs": [{"error": 5}]}`:               "error 5",
		`{"jobs": [{}]}`:                         "0 bytes",
		`{"jobs": [{}, {}]}`:                     "2 jobs",
		strings.Replace(read, "8192000", "0", 1): "at 0 bytes",
	} {
		if got, err := parseFio([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v, want %q", text, got, err, want)
		}
	}
}

func TestFioArgs(t *testing.T) {
	// Sixteen threads have a sixteenth of the file and of the blocks each.
	args := fioJob{rw: "randread", block: 4096, depth: 16}.args("/f", 1<<20, 160)
	for _, want := range []string{"--numjobs=16", "--number_ios=10", "--size=65536", "--offset_increment=65536", "--ioengine=psync"} {
		if !slices.Contains(args, want) {
			t.Errorf("buffered: no %s in %q", want, args)
		}
	}
	args = fioJob{rw: "read", block: 4096, depth: 16, direct: true}.args("/f", 1<<20, 160)
	for _, want := range []string{"--numjobs=1", "--number_ios=160", "--size=1048576", "--iodepth=16", "--ioengine=libaio", "--direct=1"} {
		if !slices.Contains(args, want) {
			t.Errorf("direct: no %s in %q", want, args)
		}
	}
}

func TestLibraries(t *testing.T) {
	const text = "\tlinux-vdso.so.1 (0x00007f01)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f00)\n" +
		"\tlibgone.so.1 => not found\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f02)\n"
	if got, want := libraries(text), []string{"/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestRequestLog has lines come in pieces, as they do from a pipe.
func TestRequestLog(t *testing.T) {
	l := newRequestLog()
	write := func(text string) {
		for len(text) > 0 {
			n := min(7, len(text))
			if _, err := io.WriteString(l, text[:n]); err != nil {
				t.Fatal(err)
			}
			text = text[n:]
		}
	}
	write("[2026 DEBUG virtiofsd::server] Received request: opcode=Init (26), inode=0, unique=2, pid=0\n" +
		"[2026 DEBUG virtiofsd::server] Received request: opcode=Batchforget (42), inode=1, unique=4, pid=0\n" +
		"[2026 DEBUG virtiofsd::server] Replying OK, header: OutHeader { len: 120, error: 0, unique: 35128 }\n" +
		"unique: 6, opcode: LOOKUP (1), nodeid: 1, insize: 46, pid: 7\nunique: 8, opcode: LOOKUP (1), nodeid: 1, insize: 46, pid: 7\n")
	// The mount has not ended: the counts are not whole.
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	if counts, err := l.settled(ctx); !errors.Is(err, gone) {
		t.Errorf("%v, %v, want an error", counts, err)
	}
	type answer struct {
		counts map[string]int
		err    error
	}
	done := make(chan answer, 1)
	go func() {
		counts, err := l.settled(t.Context())
		done <- answer{counts, err}
	}()
	write("[2026 DEBUG virtiofsd::server] Received request: opcode=Destroy (38), inode=0, unique=10, pid=0\n")
	got := <-done
	want := map[string]int{"INIT": 1, "BATCH_FORGET": 1, "LOOKUP": 2, "DESTROY": 1}
	if got.err != nil || !maps.Equal(got.counts, want) {
		t.Errorf("%v, %v, want %v", got.counts, got.err, want)
	}
	if got, want := difference(want, map[string]int{"LOOKUP": 1, "BATCH_FORGET": 1}), map[string]int{"LOOKUP": 1}; !maps.Equal(got, want) {
		t.Errorf("the difference is %v, want %v", got, want)
	}
}

func TestParseStats(t *testing.T) {
	const text = `{"stats": {"shares": [{"tag": "t", "ops": [{"op": "LOOKUP", "count": 3}, {"op": "INIT", "count": 1}],
		"queues": [{"kicks": 1, "notifications": 2}, {"kicks": 10, "notifications": 20}]}]}}`
	got, err := parseStats([]byte(text))
	if want := map[string]int{"LOOKUP": 3, "INIT": 1, kicks: 11, notifications: 22}; err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	for _, text := range []string{"", "{}", `{"stats": {"shares": [{}, {}]}}`} {
		if got, err := parseStats([]byte(text)); err == nil {
			t.Errorf("%q is taken for %v", text, got)
		}
	}
}

func TestParse(t *testing.T) {
	for args, want := range map[string]string{
		"-servers=":                              "no server",
		"-servers=d":                             "unknown kind",
		"-servers=sluice@/bin/true":              "short name",
		"-servers=a=c@/bin/true a=c@/bin/false":  "the name is taken",
		"-servers=a=sluice@/bin/true|-cache=all": "expected auto or never",
		"-rounds=0":                              "0 rounds",
		"-nothing":                               "usage",
		"find":                                   "unexpected argument",
	} {
		if _, err := parse(strings.Split(args, "|"), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
	if _, err := choose(workloads(fixtures{}, usualSizes), []string{"find", "found"}); err == nil || !strings.Contains(err.Error(), "there are find, find-size") {
		t.Errorf("%v, want the workloads there are", err)
	}
}

// TestReport makes a report of one workload that is twice as fast as with Rust virtiofsd.
func TestReport(t *testing.T) {
	list, err := choose(workloads(fixtures{}, usualSizes), []string{"go-build", "stat"})
	if err != nil {
		t.Fatal(err)
	}
	p := &plan{
		policies: []string{auto, never},
		servers:  []server.Spec{{Name: "sluice", Kind: server.Sluice, Program: "/bin/true"}, {Name: "rust", Kind: server.Rust, Program: "/bin/true"}},
	}
	sampleOf := func(server string, elapsed time.Duration) sample {
		return sample{server: server, policy: auto, workload: "stat", elapsed: elapsed, serverCPU: elapsed / 2, guestCPU: elapsed / 4, ops: 10}
	}
	counted := sampleOf("sluice", time.Second)
	counted.counts = map[string]int{"LOOKUP": 10, "GETATTR": 5, kicks: 20}
	r := p.report(t.Context(), list, []sample{sampleOf("sluice", time.Second), sampleOf("rust", 2*time.Second)}, []sample{counted})
	if want := map[string]float64{report.Requests: 1.5, report.Kicks: 2}; len(r.Samples) != 3 || !maps.Equal(r.Samples[2].Values, want) {
		t.Errorf("samples %+v, want %v in the third", r.Samples, want)
	}
	want := map[string]float64{report.Time: 1e8, report.CPU: 5e7, report.GuestCPU: 2.5e7}
	if !maps.Equal(r.Samples[0].Values, want) {
		t.Errorf("%v, want %v", r.Samples[0].Values, want)
	}
	// The module is built with one policy only.
	var limits []string
	for _, l := range r.Limits {
		limits = append(limits, l.Workload+" "+l.Condition)
	}
	if want := []string{"go-build cache-auto", "stat cache-auto", "stat cache-never"}; !slices.Equal(limits, want) {
		t.Errorf("limits %q, want %q", limits, want)
	}
	var text bytes.Buffer
	if err := r.WriteMarkdown(&text, nil); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(text.String(), "0.500 ≤ 0.714: met, within noise") {
		t.Errorf("the report does not say that the limit is met:\n%s", text.String())
	}

	file := filepath.Join(t.TempDir(), "requests.md")
	if err := writeRequests(file, []sample{counted}); err != nil {
		t.Fatal(err)
	}
	table, err := os.ReadFile(file)
	if row := "| stat | auto | sluice | 1.50 | LOOKUP 1.00, GETATTR 0.50 |\n"; err != nil || !strings.Contains(string(table), row) {
		t.Errorf("%v: no %q in\n%s", err, row, table)
	}
}

func TestCacheArgs(t *testing.T) {
	for _, tt := range []struct {
		kind   server.Kind
		policy string
		want   []string
	}{
		{server.Sluice, never, []string{"--cache=never"}},
		{server.Rust, auto, []string{"--cache=auto"}},
		{server.C, never, []string{"-o", "cache=none"}},
	} {
		if got := cacheArgs(tt.kind, tt.policy); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s %s: %q, want %q", tt.kind, tt.policy, got, tt.want)
		}
	}
}

// TestTagger has a server without a configuration space get one, and all else pass.
func TestTagger(t *testing.T) {
	dir := t.TempDir()
	server, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "server"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	tagged, err := startTagger(filepath.Join(dir, "front"), filepath.Join(dir, "server"), "rust-auto")
	if err != nil {
		t.Fatal(err)
	}
	front, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(dir, "front"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	back, err := server.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	pass := func(from, to *net.UnixConn, request vhostuser.Request, payload []byte, fds ...int) *message {
		t.Helper()
		sent := message{header: vhostuser.Header{Request: request, Flags: vhostuser.Version}, payload: payload, fds: fds}
		if err := sent.write(from); err != nil {
			t.Fatal(err)
		}
		got, err := readMessage(to)
		if err != nil {
			t.Fatal(err)
		}
		if got.header.Request != request {
			t.Errorf("%v has become %v", request, got.header.Request)
		}
		return got
	}
	const other = vhostuser.VHOST_USER_PROTOCOL_F_REPLY_ACK
	if got := pass(back, front, vhostuser.VHOST_USER_GET_PROTOCOL_FEATURES, vhostuser.Append(nil, other)); !bytes.Equal(got.payload, vhostuser.Append(nil, other|vhostuser.VHOST_USER_PROTOCOL_F_CONFIG)) {
		t.Errorf("the front-end is told of features %x", got.payload)
	}
	if got := pass(front, back, vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES, vhostuser.Append(nil, other|vhostuser.VHOST_USER_PROTOCOL_F_CONFIG)); !bytes.Equal(got.payload, vhostuser.Append(nil, other)) {
		t.Errorf("the server is told of features %x", got.payload)
	}
	window := vhostuser.Append(nil, vhostuser.ConfigWindow{Size: 40})
	got := pass(front, front, vhostuser.VHOST_USER_GET_CONFIG, append(window, make([]byte, 40)...))
	want := slices.Concat(window, []byte("rust-auto"), make([]byte, 27), []byte{1, 0, 0, 0})
	if got.header.Flags != vhostuser.ReplyFlags || !bytes.Equal(got.payload, want) {
		t.Errorf("the configuration space is %q, want %q", got.payload, want)
	}
	if got := pass(front, front, vhostuser.VHOST_USER_GET_CONFIG, nil); len(got.payload) != 0 {
		t.Errorf("a request without a window is answered with %q", got.payload)
	}
	file, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	passed := pass(front, back, vhostuser.VHOST_USER_SET_MEM_TABLE, []byte("table"), int(file.Fd()))
	if len(passed.fds) != 1 || string(passed.payload) != "table" {
		t.Fatalf("it came as %+v", passed)
	}
	var sent, received unix.Stat_t
	if err := errors.Join(unix.Fstat(int(file.Fd()), &sent), unix.Fstat(passed.fds[0], &received), unix.Close(passed.fds[0])); err != nil || sent.Ino != received.Ino {
		t.Errorf("another file came: %v", err)
	}
	// When the front-end ends, so does the server's connection.
	front.Close()
	if m, err := readMessage(back); err == nil {
		t.Errorf("after the end came %+v", m)
	}
	if err := tagged.Close(); err != nil {
		t.Error(err)
	}
}
