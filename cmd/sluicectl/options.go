package main

import (
	"fmt"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/cli"
)

// option is an option and the field of T that it sets.
type option[T any] struct {
	name string
	// usage names its argument in back quotes.
	usage string
	// files has a shell complete the argument with names of files.
	files bool
	field func(*T) any
}

// shareOptions are what can be said of a share besides its tag and grafts. A field without a row fails TestOptions.
var shareOptions = []option[api.ShareSpec]{
	{name: "share-socket", usage: "`PATH` of the socket for the virtual machine monitor; by default TAG.sock beside the control socket", files: true, field: func(s *api.ShareSpec) any { return &s.Socket }},
	{name: "socket-group", usage: "`GROUP` that may connect to that socket", field: func(s *api.ShareSpec) any { return &s.SocketGroup }},
	{name: "cache", usage: "cache `POLICY` of the guest: never, metadata, auto or always", field: func(s *api.ShareSpec) any { return (*policy)(&s.Cache) }},
	{name: "readonly", usage: "refuse every change", field: func(s *api.ShareSpec) any { return &s.ReadOnly }},
	{name: "writeback", usage: "let the guest gather writes in its page cache", field: func(s *api.ShareSpec) any { return &s.Writeback }},
	{name: "xattr", usage: "serve extended attributes", field: func(s *api.ShareSpec) any { return &s.Xattr }},
	{name: "allow-mmap", usage: "allow shared mappings with --cache never and metadata", field: func(s *api.ShareSpec) any { return &s.AllowMmap }},
	{name: "allow-direct-io", usage: "pass O_DIRECT on to the host instead of dropping it", field: func(s *api.ShareSpec) any { return &s.AllowDirectIO }},
	{name: "posix-lock", usage: "share fcntl(2) locks with the host and other guests", field: func(s *api.ShareSpec) any { return &s.PosixLock }},
	{name: "flock", usage: "share flock(2) locks with the host and other guests", field: func(s *api.ShareSpec) any { return &s.Flock }},
	{name: "no-readdirplus", usage: "list directories without the attributes of their entries", field: func(s *api.ShareSpec) any { return &s.NoReaddirplus }},
	{name: "num-request-queues", usage: "offer `N` request queues", field: func(s *api.ShareSpec) any { return &s.RequestQueues }},
	{name: "max-fds", usage: "keep at most `N` descriptors for inodes, in each graft", field: func(s *api.ShareSpec) any { return &s.MaxFDs }},
	{name: "max-inodes", usage: "let the guest know at most `N` inodes, in each graft", field: func(s *api.ShareSpec) any { return &s.MaxInodes }},
	{name: "poll-us", usage: "look for requests for `TIME` before sleeping: 0 (never) to 1000 microseconds, or auto, which polls where it pays", field: func(s *api.ShareSpec) any { return &s.PollUS }},
}

// graftOption is an option of a graft: of graft add, in the text of share add --graft, and if change is set of graft set.
type graftOption struct {
	option[api.GraftSpec]
	// change says that this field is to be changed.
	change func(*api.GraftChange, *api.GraftSpec)
}

// graftOptions are what can be said of a graft besides path and source. A field without a row fails TestOptions.
var graftOptions = []graftOption{
	{
		option[api.GraftSpec]{name: "ro", usage: "refuse every change in it", field: func(g *api.GraftSpec) any { return &g.ReadOnly }},
		func(c *api.GraftChange, g *api.GraftSpec) { c.ReadOnly = &g.ReadOnly },
	},
	{option[api.GraftSpec]{name: "backend", usage: "have `NAME` serve it: passthrough, mem or an extension; by default whoever claims it, or passthrough", field: func(g *api.GraftSpec) any { return &g.Backend }}, nil},
	{option[api.GraftSpec]{name: "type", usage: "`TYPE` of the mount, for extensions; SOURCE is then passed on as it is written", field: func(g *api.GraftSpec) any { return &g.Type }}, nil},
	{option[api.GraftSpec]{name: "option", usage: "`OPTION` of the mount, for extensions; may be repeated", field: func(g *api.GraftSpec) any { return &g.Options }}, nil},
	{option[api.GraftSpec]{name: "lower", usage: "`DIRECTORY` it is made of, or JSON of something else; may be repeated, the uppermost first", field: func(g *api.GraftSpec) any { return (*lowers)(&g.Lowers) }}, nil},
	{
		option[api.GraftSpec]{name: "cache", usage: "cache `POLICY` of the guest: never, metadata, auto or always; by default the share's", field: func(g *api.GraftSpec) any { return (*policy)(&g.Cache) }},
		func(c *api.GraftChange, g *api.GraftSpec) { c.Cache = &g.Cache },
	},
	{
		option[api.GraftSpec]{name: "nosuid", usage: "ignore set-user-ID bits and file capabilities", field: func(g *api.GraftSpec) any { return &g.NoSUID }},
		func(c *api.GraftChange, g *api.GraftSpec) { c.NoSUID = &g.NoSUID },
	},
	{
		option[api.GraftSpec]{name: "nodev", usage: "let no device be opened", field: func(g *api.GraftSpec) any { return &g.NoDev }},
		func(c *api.GraftChange, g *api.GraftSpec) { c.NoDev = &g.NoDev },
	},
	{
		option[api.GraftSpec]{name: "noexec", usage: "let no file be executed", field: func(g *api.GraftSpec) any { return &g.NoExec }},
		func(c *api.GraftChange, g *api.GraftSpec) { c.NoExec = &g.NoExec },
	},
	{
		option[api.GraftSpec]{name: "nosymfollow", usage: "let no symbolic link be followed", field: func(g *api.GraftSpec) any { return &g.NoSymfollow }},
		func(c *api.GraftChange, g *api.GraftSpec) { c.NoSymfollow = &g.NoSymfollow },
	},
	{option[api.GraftSpec]{name: "uid-map", usage: "translate user ids between guest and host: `GUEST:HOST:COUNT`; may be repeated", field: func(g *api.GraftSpec) any { return (*idRanges)(&g.UIDMap) }}, nil},
	{option[api.GraftSpec]{name: "gid-map", usage: "the same for group ids, `GUEST:HOST:COUNT`", field: func(g *api.GraftSpec) any { return (*idRanges)(&g.GIDMap) }}, nil},
	{
		option[api.GraftSpec]{name: "max-bytes", usage: "let it hold at most `SIZE`: bytes, or 512M, 10G; 0 is no limit", field: func(g *api.GraftSpec) any { return (*size)(&g.MaxBytes) }},
		func(c *api.GraftChange, g *api.GraftSpec) { c.MaxBytes = &g.MaxBytes },
	},
	{
		option[api.GraftSpec]{name: "max-inodes", usage: "let it hold at most `N` files; 0 is no limit", field: func(g *api.GraftSpec) any { return &g.MaxInodes }},
		func(c *api.GraftChange, g *api.GraftSpec) { c.MaxInodes = &g.MaxInodes },
	},
	{option[api.GraftSpec]{name: "watch", usage: "send the host's changes in it as events", field: func(g *api.GraftSpec) any { return &g.Watch }}, nil},
	{option[api.GraftSpec]{name: "watch-max-files", usage: "send events up to `N` files and directories; 0 is 131072", field: func(g *api.GraftSpec) any { return &g.WatchMaxFiles }}, nil},
	{option[api.GraftSpec]{name: "watch-max-bytes", usage: "send events up to `SIZE` in the files; 0 is any", field: func(g *api.GraftSpec) any { return (*size)(&g.WatchMaxBytes) }}, nil},
	{option[api.GraftSpec]{name: "follow-mounts", usage: "also show what the host mounts below SOURCE from now on", field: func(g *api.GraftSpec) any { return &g.FollowMounts }}, nil},
}

// addTo gives fs the flag of o, which sets its field of v.
func (o option[T]) addTo(fs *pflag.FlagSet, v *T) {
	cli.AddFlag(fs, o.name, o.usage, o.field(v))
}

// addGraftFlags gives cmd the options of grafts, or only those of graft set.
func (p *program) addGraftFlags(cmd *cobra.Command, g *api.GraftSpec, changeable bool) {
	for _, o := range graftOptions {
		if changeable && o.change == nil {
			continue
		}
		o.addTo(cmd.Flags(), g)
		if o.name == "backend" {
			must(cmd.RegisterFlagCompletionFunc(o.name, p.completeBackend))
		} else {
			cli.CompleteFlag(cmd, o.name, o.files)
		}
	}
}

// placeGraft sets path and source of g as they were typed: what it is the daemon finds, relative to our directory.
func placeGraft(g *api.GraftSpec, at, source string) error {
	if !strings.HasPrefix(at, "/") {
		return fmt.Errorf("path %q in the share is relative: expected an absolute one, such as %s", at, path.Join("/", at))
	}
	g.Path = path.Clean(at)
	if err := api.CheckPath(g.Path); err != nil {
		return err
	}
	g.Source = source
	if source == "" || g.Type != "" {
		return nil
	}
	var err error
	g.Source, err = filepath.Abs(source)
	return err
}

// parseGraft parses the text of share add --graft: PATH=SOURCE[:ro][,OPTION[=VALUE]]... The options are those of graft add.
// A backslash takes from the character behind it what it means here.
func parseGraft(text string) (g api.GraftSpec, err error) {
	const form = "expected PATH=SOURCE[:ro][,OPTION]..., such as /data=/srv/data:ro,nosuid"
	parts := cut(text, ',', -1)
	place := cut(parts[0], '=', 2)
	if len(place) < 2 {
		return g, fmt.Errorf("%q has no source; %s", text, form)
	}
	fs := pflag.NewFlagSet("graft", pflag.ContinueOnError)
	for _, o := range graftOptions {
		o.addTo(fs, &g)
	}
	source := place[1]
	if fields := cut(source, ':', -1); len(fields) > 1 {
		if mode := fields[len(fields)-1]; mode == "ro" || mode == "rw" {
			source, g.ReadOnly = strings.TrimSuffix(source, ":"+mode), mode == "ro"
		}
	}
	for _, part := range parts[1:] {
		pair := cut(part, '=', 2)
		f := fs.Lookup(plain(pair[0]))
		switch {
		case f == nil && plain(part) == "rw":
			g.ReadOnly = false
		case f == nil:
			return g, fmt.Errorf("%q: unknown option %q; %s", text, plain(pair[0]), form)
		case len(pair) == 1 && f.NoOptDefVal == "":
			return g, fmt.Errorf("%q: option %s needs a value; expected %s=…", text, f.Name, f.Name)
		case len(pair) == 1:
			err = f.Value.Set(f.NoOptDefVal)
		default:
			if err = f.Value.Set(plain(pair[1])); err != nil {
				err = cli.InvalidValue(f.Name, f, plain(pair[1]), err)
			}
		}
		if err != nil {
			return g, err
		}
	}
	return g, placeGraft(&g, plain(place[0]), plain(source))
}

// cut splits s at each sep that no backslash is before, into at most n parts if n is positive.
func cut(s string, sep byte, n int) (parts []string) {
	from := 0
	for i := 0; i < len(s) && len(parts)+1 != n; i++ {
		switch s[i] {
		case '\\':
			i++
		case sep:
			parts, from = append(parts, s[from:i]), i+1
		}
	}
	return append(parts, s[from:])
}

// plain takes away the backslashes that cut respects.
func plain(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// describe names what is set of v, in the words of these options.
func describe[T any](options []option[T], v *T) string {
	unset, is := pflag.NewFlagSet("", pflag.ContinueOnError), pflag.NewFlagSet("", pflag.ContinueOnError)
	var all []string
	for _, o := range options {
		o.addTo(unset, new(T))
		o.addTo(is, v)
		switch value := is.Lookup(o.name).Value.String(); {
		case value == unset.Lookup(o.name).Value.String():
		case value == "true":
			all = append(all, o.name)
		default:
			all = append(all, o.name+"="+value)
		}
	}
	return strings.Join(all, ",")
}
