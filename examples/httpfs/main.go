// Command httpfs is sluiced with a read-only tree that comes from a web server.
//
//	httpfs --httpfs-url https://example.org/tree --socket-path /run/fs.sock --shared-dir /var/empty
//
// Package webtree says what the server has to have.
package main

import (
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
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, MaxIdleConnsPerHost: 16}}
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

// SeccompRules are what net/http needs: TCP and, for names, UDP. bind is how Go finds out whether the host has IPv6, uname
// tells it the domain where resolv.conf has none, and it reads such files with fcntl.
func (*extension) SeccompRules() seccomp.Rules {
	inet := seccomp.Or{seccomp.PerArg{seccomp.Int32(unix.AF_INET)}, seccomp.PerArg{seccomp.Int32(unix.AF_INET6)}}
	rules := seccomp.Rules{"socket": inet}
	for _, name := range []string{"connect", "bind", "getsockopt", "setsockopt", "getsockname", "getpeername", "uname", "fcntl"} {
		rules[name] = seccomp.MatchAll{}
	}
	return rules
}
