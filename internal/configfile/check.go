package configfile

import (
	"fmt"
	"math"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/config"
)

// check reports what of f cannot work, and spells cache policies as the API does.
func (r *report) check(f *File) {
	r.checkProcess(f)
	sockets := make(map[string]string) // path → key of who is there
	if f.ControlSocket != "" {
		r.checkSocket("control-socket", f.ControlSocket, sockets)
	}
	ports := make(map[uint32]int)
	for i, v := range f.VSocks {
		at := fmt.Sprintf("vsock[%d]", i)
		r.checkPort(at, v.Port)
		if before, taken := ports[v.Port]; taken {
			r.add(at+".port", "%d is that of vsock[%d], too: expected one listener at each port", v.Port, before)
		} else {
			ports[v.Port] = i
		}
		if len(v.CIDs) == 0 {
			r.add(at+".cids", "nobody may connect: expected the context ids of guests, or %d for all", uint32(math.MaxUint32))
		}
		for j, cid := range v.CIDs {
			if cid == 0 {
				r.add(fmt.Sprintf("%s.cids[%d]", at, j), "0 is the hypervisor: expected the context id of a guest, or %d for all", uint32(math.MaxUint32))
			}
		}
		r.checkAllow(at, v.Allow, v.Shares)
	}
	for i := range f.HybridVSocks {
		h := &f.HybridVSocks[i]
		at := fmt.Sprintf("hybrid-vsock[%d]", i)
		r.checkPort(at, h.Port)
		if h.Path == "" {
			r.add(at+".path", "it is missing: expected that of the VMM's vsock socket")
		} else {
			r.checkSocket(at+".path", h.Listen(), sockets)
		}
		r.checkAllow(at, h.Allow, h.Shares)
	}
	tags := make(map[string]int)
	for i := range f.Shares {
		r.checkShare(f, i, tags, sockets)
	}
	if _, ok := tags[f.NydusShare]; f.NydusShare != "" && !ok {
		r.add("nydus-share", "there is no share %s in this file: expected the tag of one", quote(f.NydusShare))
	}
}

func (r *report) checkShare(f *File, i int, tags map[string]int, sockets map[string]string) {
	s := &f.Shares[i]
	at := fmt.Sprintf("share[%d]", i)
	spellCache(s)
	for _, e := range s.Problems() {
		r.add(at+"."+e.TOML(), "%s", e.Problem)
	}
	if before, taken := tags[s.Tag]; taken {
		r.add(at+".tag", "%s is that of share[%d], too: expected each share to have its own", quote(s.Tag), before)
	} else {
		tags[s.Tag] = i
	}
	switch {
	case s.Socket != "":
		r.checkSocket(at+".socket", s.Socket, sockets)
	case f.ControlSocket != "" && !r.knows(at+".tag"):
		r.checkSocket(at+".socket", DefaultSocket(f.ControlSocket, s.Tag), sockets)
	}
}

// spellCache brings cache policies, which the command line takes in any case, to that of the API.
func spellCache(s *api.ShareSpec) {
	all := []*string{&s.Cache}
	for i := range s.Grafts {
		all = append(all, &s.Grafts[i].Cache)
	}
	for _, text := range all {
		var p config.CachePolicy
		if *text != "" && p.Set(*text) == nil {
			*text = p.String()
		}
	}
}

// checkProcess is config.Config.Validate for what a file has of it.
func (r *report) checkProcess(f *File) {
	if f.ControlGroup != "" && f.ControlSocket == "" {
		r.add("control-group", "there is nothing to connect to: expected control-socket with it")
	}
	for i, name := range f.Extensions {
		if name == "" || strings.Contains(name, "/") || name == api.BackendMem || name == api.BackendPassthrough {
			r.add(fmt.Sprintf("extensions[%d]", i), "%s is no extension: expected a name that sluiced --list-extensions prints", quote(name))
		}
	}
	switch {
	case f.Seccomp == config.SeccompDump:
		r.add("seccomp", "dump serves nothing: expected it on the command line, or another action")
	case f.Seccomp == config.SeccompTrace && f.SeccompReport == "":
		r.add("seccomp", "trace writes nothing but a report: expected seccomp-report with it")
	case f.SeccompReport != "" && f.Seccomp != config.SeccompLog && f.Seccomp != config.SeccompTrace:
		r.add("seccomp-report", "no other action lets calls happen and counts them: expected seccomp to be log or trace")
	}
	if f.SeccompReport != "" && !filepath.IsAbs(f.SeccompReport) {
		r.add("seccomp-report", "%s is relative: expected an absolute path", quote(f.SeccompReport))
	}
	if r.tree.root.entries["rlimit-nofile"] != nil && f.RlimitNofile < 0 {
		r.add("rlimit-nofile", "%d is out of range: expected a number of files, or 0 to leave the limit alone", f.RlimitNofile)
	}
	if f.Sandbox == config.SandboxNamespace {
		return
	}
	for key, m := range map[string][]string{"uid-map": f.UIDMap, "gid-map": f.GIDMap} {
		if len(m) > 0 {
			r.add(key, "without a namespace of its own the daemon's ids are the host's: expected sandbox to be namespace with it")
		}
	}
}

// checkSocket reports a path that a socket cannot have, or that another has.
func (r *report) checkSocket(key, path string, sockets map[string]string) {
	s := api.ShareSpec{Tag: "t", Socket: path}
	for _, e := range s.Problems() {
		r.add(key, "%s", e.Problem)
	}
	path = filepath.Clean(path)
	if other := sockets[path]; other != "" {
		r.add(key, "%s is the socket of %s, too: expected each to have its own", quote(path), other)
		return
	}
	sockets[path] = strings.TrimSuffix(strings.TrimSuffix(key, ".socket"), ".path")
}

func (r *report) checkPort(at string, port uint32) {
	if port == 0 || port == math.MaxUint32 {
		r.add(at+".port", "%d is no port to listen on: expected 1 to %d", port, uint32(math.MaxUint32-1))
	}
}

// operationName is how the OpenAPI document names operations.
var operationName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z][A-Za-z0-9]{0,63}$`) })

// checkAllow is about what guests may do. Shares that do not exist are no mistake: they may be added later.
func (r *report) checkAllow(at string, allow, shares []string) {
	if len(allow) == 0 {
		r.add(at+".allow", "nothing is allowed: expected names of operations, such as getHealth")
	}
	for i, name := range allow {
		if !operationName().MatchString(name) {
			r.add(fmt.Sprintf("%s.allow[%d]", at, i), "%s is no operation: expected a name such as getHealth", quote(name))
		}
	}
	for i, tag := range shares {
		s := api.ShareSpec{Tag: tag}
		for _, e := range s.Problems() {
			r.add(fmt.Sprintf("%s.shares[%d]", at, i), "%s", e.Problem)
		}
	}
}
