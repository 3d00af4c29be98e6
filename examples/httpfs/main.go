// Command httpfs is sluiced with a read-only tree that comes from a web server.
//
//	httpfs --httpfs-url https://example.org/tree --socket-path /run/fs.sock --shared-dir /var/empty
//
// Package webtree says what the server has to have.
package main

import (
	"net"
	"net/http"
	"os"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/daemon"
	"github.com/sluicefs/sluice/examples/httpfs/webtree"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/iofs"
	"github.com/sluicefs/sluice/seccomp"
)

func main() { os.Exit(daemon.Main(new(extension))) }

type extension struct{ url string }

func (*extension) Name() string { return "httpfs" }

func (e *extension) SetFlags(flags *pflag.FlagSet) {
	flags.StringVar(&e.url, "httpfs-url", "", "serve the files that `URL`/index.txt lists")
}

func (e *extension) SandboxNeeds(*specs.Spec) extensions.Needs {
	return extensions.Needs{Network: e.url != ""}
}

// TryHandleMount claims the root if there is a URL, and nothing else.
func (e *extension) TryHandleMount(_ *specs.Spec, mount *specs.Mount, _ string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	options := extensions.Options{ReadOnly: true}
	if e.url == "" || mount != nil {
		return nil, options, nil
	}
	// glibc's resolver would load libraries, of which there are none in the sandbox.
	dialer := &net.Dialer{Resolver: &net.Resolver{PreferGo: true}}
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: dialer.DialContext, Proxy: http.ProxyFromEnvironment, MaxIdleConnsPerHost: 16}}
	tree, err := webtree.New(client, e.url)
	if err != nil {
		return nil, options, err
	}
	backend, err := iofs.New(iofs.Config{FS: tree})
	if err != nil {
		return nil, options, err
	}
	return backend, options, nil
}

// SeccompRules are what net/http needs to connect anew when the server has hung up: TCP and, for names, UDP. The name is
// looked up again then, and resolv.conf and its like are looked at, and read if they have changed.
func (*extension) SeccompRules() seccomp.Rules {
	path := seccomp.Int32(unix.AT_FDCWD)
	readOnly := seccomp.MaskedEqual{Mask: unix.O_ACCMODE | unix.O_CREAT | unix.O_TRUNC}
	rules := seccomp.Rules{
		"socket":     seccomp.Or{seccomp.PerArg{seccomp.Int32(unix.AF_INET)}, seccomp.PerArg{seccomp.Int32(unix.AF_INET6)}},
		"newfstatat": seccomp.PerArg{path},
		"openat":     seccomp.PerArg{0: path, 2: readOnly},
		"fcntl":      seccomp.PerArg{1: seccomp.Int32(unix.F_GETFL)},
	}
	for _, name := range []string{"connect", "getsockopt", "setsockopt", "getpeername", "uname"} {
		rules[name] = seccomp.MatchAll{}
	}
	return rules
}
