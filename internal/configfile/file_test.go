package configfile

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/config"
)

// everything is a file with every key.
const everything = `control-socket = "/run/sluice/control.sock"
control-group = "sluice"
nydus-share = "src"
extensions = ["hello"]
sandbox = "Namespace"
uid-map = [":0:100000:65536:"]
gid-map = [":0:100000:65536:"]
modcaps = "+sys_admin"
seccomp = "log"
seccomp-report = "/var/log/sluice/calls.json"
rlimit-nofile = 0x1_0000
log-level = "debug"
syslog = true

[[vsock]]
port = 1024
cids = [3, 4294967295]
allow = ["getHealth", "getEvents"]
shares = ["src", "later"]

[[hybrid-vsock]]
path = "/run/vm1/vsock.sock"
port = 1024
allow = ["getHealth"]
shares = ["src"]

[[share]]
tag = "src"
socket = "/run/sluice/src.sock"
socket-group = "kvm"
cache = "Always"
read-only = true
writeback = true
xattr = true
allow-mmap = true
allow-direct-io = true
posix-lock = true
flock = true
no-readdirplus = true
num-request-queues = 4
max-fds = 100
max-inodes = 1000

[[share.graft]]
path = "/"
source = "/srv/src"
watch = true
follow-mounts = true

[[share.graft]]
path = "/x"
backend = "hello"
type = "hello"
options = ["a", "b"]
read-only = true
cache = "NEVER"
nosuid = true
nodev = true
noexec = true
nosymfollow = true
uid-map = [
  {guest = 0, host = 1000, count = 1},
  {guest = 1, host = 100000, count = +65_535},
]
gid-map = [{guest = 0, host = 1000, count = 1}]
max-bytes = 1073741824
max-inodes = 10000

[[share]]
tag = "empty"
`

func TestParse(t *testing.T) {
	f, err := Parse("f", []byte(everything))
	if err != nil {
		t.Fatal(err)
	}
	want := &File{
		Name: "f", ControlSocket: "/run/sluice/control.sock", ControlGroup: "sluice", NydusShare: "src", Extensions: []string{"hello"},
		UIDMap: []string{":0:100000:65536:"}, GIDMap: []string{":0:100000:65536:"}, ModCaps: "+sys_admin",
		Seccomp: config.SeccompLog, SeccompReport: "/var/log/sluice/calls.json", RlimitNofile: 65536, Syslog: true,
		VSocks:       []VSock{{Port: 1024, CIDs: []uint32{3, 4294967295}, Allow: []string{"getHealth", "getEvents"}, Shares: []string{"src", "later"}}},
		HybridVSocks: []HybridVSock{{Path: "/run/vm1/vsock.sock", Port: 1024, Allow: []string{"getHealth"}, Shares: []string{"src"}}},
		Shares: []api.ShareSpec{
			{
				Tag: "src", Socket: "/run/sluice/src.sock", SocketGroup: "kvm", Cache: "always", ReadOnly: true, Writeback: true, Xattr: true,
				AllowMmap: true, AllowDirectIO: true, PosixLock: true, Flock: true, NoReaddirplus: true, RequestQueues: 4, MaxFDs: 100, MaxInodes: 1000,
				Grafts: []api.GraftSpec{
					{Path: "/", Source: "/srv/src", Watch: true, FollowMounts: true},
					{
						Path: "/x", Backend: "hello", Type: "hello", Options: []string{"a", "b"}, ReadOnly: true, Cache: "never",
						NoSUID: true, NoDev: true, NoExec: true, NoSymfollow: true,
						UIDMap: []api.IDRange{{Guest: 0, Host: 1000, Count: 1}, {Guest: 1, Host: 100000, Count: 65535}}, GIDMap: []api.IDRange{{Guest: 0, Host: 1000, Count: 1}},
						MaxBytes: 1 << 30, MaxInodes: 10000,
					},
				},
			},
			{Tag: "empty"},
		},
		tree: f.tree,
	}
	if err := want.LogLevel.Set("debug"); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(f, want) {
		t.Errorf("got  %+v\nwant %+v", f, want)
	}
	if err := f.Wrong("vsock[0].allow[1]", "no such operation"); err.Error() != "f:18: vsock[0].allow[1]: no such operation" {
		t.Error(err)
	}
	if err := f.Wrong("share[1].socket", "in use"); err.Error() != "f:69: share[1].socket: in use" {
		t.Errorf("of a key that is not there: %v", err)
	}
}

func TestParseEmpty(t *testing.T) {
	f, err := Parse("f", nil)
	if err != nil || !reflect.DeepEqual(f, &File{Name: "f", RlimitNofile: config.DefaultNofile, tree: f.tree}) {
		t.Errorf("%+v, %v", f, err)
	}
}

func TestParseProblems(t *testing.T) {
	const share = "[[share]]\ntag = \"a\"\n"
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"syntax", "syslog = true\n\n[[share]]\ntag = \n", []string{"f:4: share[0].tag: it is not TOML: "}},
		{"syntax without a key", "\n?", []string{"f:2: it is not TOML: invalid character"}},
		{"syntax in a header", share + "[[share.graft]\n", []string{"f:3: share[0]: it is not TOML: "}},
		{"twice", "syslog = true\nsyslog = true\n", []string{"f:2: syslog: it is not TOML: key syslog is already defined"}},
		{"newline in a key", "'a' = 1\n\"a\\u0009\\n\" = 2\n\"a\\u0009\\n\" = 2", []string{"f:3: it is not TOML: key a\uFFFD\uFFFD is already defined"}},
		{"number of 65 bits", share + "max-fds = 99999999999999999999", []string{"f:3: share[0].max-fds: it is not TOML: decimal number is too large"}},
		{"table instead of an array", "[share]\ntag = 'a'", []string{"f:1: share: it is a table: expected [[share]], in double brackets"}},
		{"graft instead of an array", share + "[share.graft]\npath = '/'", []string{"f:3: share[0].graft: it is a table: expected [[share.graft]], in double brackets"}},

		{"near key", share + "\nsokcet = '/s'", []string{"f:4: share[0].sokcet: there is no such key: did you mean socket?"}},
		{"letters swapped", "[[share]]\ntga = 'a'\n", []string{"f:1: share[0].tag: it is empty", "f:2: share[0].tga: there is no such key: did you mean tag?"}},
		{"key of the command line", share + "readonly = true", []string{"f:3: share[0].readonly: there is no such key: did you mean read-only?"}},
		{"key of JSON", share + "read_only = true", []string{"f:3: share[0].read_only: there is no such key: did you mean read-only?"}},
		{"key of another table", share + "source = '/s'", []string{"f:3: share[0].source: there is no such key: expected it in [[share.graft]]"}},
		{"key after a header", share + "sandbox = 'none'", []string{"f:3: share[0].sandbox: there is no such key: expected it in the beginning of the file"}},
		{"unknown key", "[[vsock]]\nport = 1\ncids = [3]\nallow = ['x']\n\"a b\" = 1\n", []string{`f:5: vsock[0]."a b": there is no such key: expected one of port, cids, allow, shares`}},
		{"unknown table", "[log]\nlevel = 'debug'", []string{"f:1: log: there is no such key: expected one of control-socket, "}},

		{"string", "control-socket = 1", []string{"f:1: control-socket: it is a whole number: expected a string"}},
		{"enum", "sandbox = true", []string{"f:1: sandbox: it is true: expected a string"}},
		{"spelling of an enum", "sandbox = 'jail'", []string{`f:1: sandbox: "jail" is not a sandbox; expected one of namespace, chroot, none`}},
		{"bool", "syslog = 'yes'", []string{"f:1: syslog: it is a string: expected true or false"}},
		{"number", "rlimit-nofile = 1e3", []string{"f:1: rlimit-nofile: it is a number with a fraction: expected a whole number"}},
		{"date", "rlimit-nofile = 1979-05-27", []string{"f:1: rlimit-nofile: it is a date or time: expected a whole number"}},
		{"strings", "extensions = 'hello'", []string{"f:1: extensions: it is a string: expected an array of strings"}},
		{"string of several", "extensions = [\n  'hello',\n  1]", []string{"f:3: extensions[1]: it is a whole number: expected a string"}},
		{"numbers", "[[vsock]]\nport = 1\ncids = 3\nallow = ['x']", []string{"f:3: vsock[0].cids: it is a whole number: expected an array of numbers"}},
		{"tables", share + "[[share.graft]]\npath = '/'\nuid-map = ['0:0:1']", []string{"f:5: share[0].graft[0].uid-map[0]: it is a string: expected a table"}},
		{"no array of tables", share + "[[share.graft]]\npath = '/'\nuid-map = {guest = 1}", []string{"f:5: share[0].graft[0].uid-map: it is a table: expected an array of tables {guest"}},
		{"tables in lines", share + "[[share.graft]]\npath = '/'\nuid-map = [\n{guest = 1, host = 1, count = 1},\n{guest = 1,\n host = 2, count = 1}]", []string{
			"f:7: share[0].graft[0].uid-map[1].guest: 1 is in two ranges",
		}},
		{"negative", "[[vsock]]\nport = -1\ncids = [3]\nallow = ['x']", []string{"f:2: vsock[0].port: -1 is out of range: expected 0 to 4294967295"}},
		{"33 bits", "[[vsock]]\nport = 1\ncids = [4294967296]\nallow = ['x']", []string{"f:3: vsock[0].cids[0]: 4294967296 is out of range"}},
		{"negative of 64 bits", share + "[[share.graft]]\npath = '/'\nmax-bytes = -1", []string{"f:5: share[0].graft[0].max-bytes: -1 is out of range: expected 0 to 9223372036854775807"}},

		{"relative control socket", "control-socket = 'c'", []string{`f:1: control-socket: "c" is relative`}},
		{"group of nothing", "control-group = 'c'", []string{"f:1: control-group: there is nothing to connect to"}},
		{"extension", "extensions = ['mem']", []string{`f:1: extensions[0]: "mem" is no extension`}},
		{"dump", "seccomp = 'dump'", []string{"f:1: seccomp: dump serves nothing"}},
		{"trace without a report", "seccomp = 'trace'", []string{"f:1: seccomp: trace writes nothing but a report"}},
		{"report of nothing", "seccomp-report = '/r'", []string{"f:1: seccomp-report: no other action"}},
		{"relative report", "seccomp = 'log'\nseccomp-report = 'r'", []string{`f:2: seccomp-report: "r" is relative`}},
		{"limit", "rlimit-nofile = -1", []string{"f:1: rlimit-nofile: -1 is out of range"}},
		{"ids of the host", "sandbox = 'none'\nuid-map = [':0:0:1:']\ngid-map = [':0:0:1:']", []string{"f:2: uid-map: without a namespace", "f:3: gid-map: without a namespace"}},

		{"vsock", "[[vsock]]\n[[vsock]]\nport = 4294967295\ncids = [0]\nallow = ['a b']\nshares = ['']", []string{
			"f:1: vsock[0].port: 0 is no port", "f:1: vsock[0].cids: nobody may connect", "f:1: vsock[0].allow: nothing is allowed",
			"f:3: vsock[1].port: 4294967295 is no port", "f:4: vsock[1].cids[0]: 0 is the hypervisor",
			`f:5: vsock[1].allow[0]: "a b" is no operation`, "f:6: vsock[1].shares[0]: it is empty",
		}},
		{"two of a port", "[[vsock]]\nport = 1\ncids = [3]\nallow = ['x']\n[[vsock]]\nport = 1\ncids = [3]\nallow = ['x']", []string{"f:6: vsock[1].port: 1 is that of vsock[0]"}},
		{"hybrid vsock", "[[hybrid-vsock]]\nport = 1\nallow = ['x']\n[[hybrid-vsock]]\npath = 'x'\nport = 1\nallow = ['x']", []string{
			"f:1: hybrid-vsock[0].path: it is missing", `f:5: hybrid-vsock[1].path: "x_1" is relative`,
		}},
		{"two hybrids", "[[hybrid-vsock]]\npath = '/x'\nport = 1\nallow = ['x']\n[[hybrid-vsock]]\npath = '/x'\nport = 1\nallow = ['x']", []string{
			`f:6: hybrid-vsock[1].path: "/x_1" is the socket of hybrid-vsock[0], too`,
		}},

		{"what the API checks", share + "cache = 'maybe'\n[[share.graft]]\npath = 'x'\nwatch = true\nfollow-mounts = true\n", []string{
			`f:3: share[0].cache: "maybe" is not a cache policy`, `f:5: share[0].graft[0].path: "x" is relative`,
			"f:6: share[0].graft[0].watch: ", "f:7: share[0].graft[0].follow-mounts: ",
		}},
		{"second of two", share + share[:10] + "[[share.graft]]\npath = '/'\n", []string{"f:3: share[1].tag: it is empty"}},
		{"two of a tag", share + share, []string{`f:4: share[1].tag: "a" is that of share[0], too`}},
		{"two of a socket", share + "socket = '/s/a'\n[[share]]\ntag = 'b'\nsocket = '/s//a'", []string{`f:6: share[1].socket: "/s/a" is the socket of share[0], too`}},
		{"default socket", "control-socket = '/s/c'\n" + share + "[[share]]\ntag = 'b'\nsocket = '/s/a.sock'", []string{`f:6: share[1].socket: "/s/a.sock" is the socket of share[0], too`}},
		{"default socket of no tag", "control-socket = '/s/c'\n[[share]]\ntag = \"a\\u0000\"", []string{`f:3: share[0].tag: "a\x00" has a control character`}},
		{"long default socket", "control-socket = '/" + strings.Repeat("s", 100) + "/c'\n" + share, []string{"f:2: share[0].socket: 108 bytes are too long"}},
		{"socket that is control's", "control-socket = '/s/c'\n" + share + "socket = '/s/c'", []string{`f:4: share[0].socket: "/s/c" is the socket of control-socket, too`}},
		{"nydus' share", "nydus-share = 'b'\n" + share, []string{`f:1: nydus-share: there is no share "b"`}},

		{"told once", "[[share]]\ntag = 1\nsocket = 2\n", []string{"f:2: share[0].tag: it is a whole number", "f:3: share[0].socket: it is a whole number"}},
		{"in the order of lines", "nydus-share = 'b'\n[[share]]\ntag = 1\n[[vsock]]\nport = 'x'\ncids = [3]\nallow = ['x']", []string{
			"f:1: nydus-share: ", "f:3: share[0].tag: ", "f:5: vsock[0].port: it is a string",
		}},
		{"large", strings.Repeat(" ", MaxSize+1), []string{"f:1: the file has more than 1048576 bytes"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := Parse("f", []byte(tt.text))
			if err == nil {
				t.Fatalf("accepted: %+v", f)
			}
			lines := strings.Split(err.Error(), "\n")
			ok := len(lines) == len(tt.want)
			for i := range min(len(lines), len(tt.want)) {
				ok = ok && strings.HasPrefix(lines[i], tt.want[i])
			}
			if !ok {
				t.Errorf("found\n%s\nwant\n%s", err, strings.Join(tt.want, "\n"))
			}
		})
	}
}

func TestProblemsAreBounded(t *testing.T) {
	_, err := Parse("f", []byte(strings.Repeat("[[share]]\n", 150)))
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != maxProblems+1 || lines[maxProblems] != "f:100: and more: expected these 100 to be mended first" {
		t.Errorf("%d lines, the last %q", len(lines), lines[len(lines)-1])
	}
	var p *Problem
	if !errors.As(err, &p) || *p != (Problem{"f", 1, "share[0].tag", "it is empty: expected 1 to 36 bytes"}) {
		t.Errorf("the first is %+v", p)
	}
}

// TestParseTakesItsTime has files that are dear for who is careless. Each takes less than half a second.
func TestParseTakesItsTime(t *testing.T) {
	fill := func(before, text, after string) string {
		return before + strings.Repeat(text, (MaxSize/4-len(before)-len(after))/len(text)) + after
	}
	for name, text := range map[string]string{
		"deep key":     fill("", "a.", "a=1"),
		"deep header":  fill("[", "a.", "a]"),
		"deep headers": fill("", "[["+strings.Repeat("a.", 500)+"a]]\n", ""),
		"deep value":   "a=" + strings.Repeat("[", 9999) + strings.Repeat("]", 9999),
		"shares":       fill("", "[[share]]\n", ""),
		"ids":          fill("[[share]]\ntag='a'\ngraft=[{path='/',uid-map=[", "{},", "]}]"),
		"allowed":      fill("[[vsock]]\nport=1\ncids=[3]\nallow=['x']\nshares=[", "'a',", "]"),
		"long key":     fill("", "a", "=1"),
		"syntax":       fill("", "\n", "?"),
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			_, err := Parse("f", []byte(text))
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("took %v (%.100v)", took, err)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sluiced.toml")
	if err := os.WriteFile(path, []byte("syslog = true\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := Load(path)
	if err != nil || !f.Syslog || f.Name != path || len(f.Notes) != 0 {
		t.Fatalf("%+v, %v", f, err)
	}
	for _, mode := range []os.FileMode{0o664, 0o646} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if f, err = Load(path); err != nil || len(f.Notes) != 1 || !strings.HasPrefix(f.Notes[0], path+": others than its owner can write") {
			t.Errorf("mode %v: %+v, %v", mode, f, err)
		}
	}
	if _, err := Load(dir); err == nil || err.Error() != dir+": it is no regular file: expected a file in TOML" {
		t.Errorf("a directory: %v", err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(fifo); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("a pipe: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := os.Truncate(path, 1<<40); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "more than 1048576 bytes") {
		t.Errorf("a large file: %v", err)
	}
}
