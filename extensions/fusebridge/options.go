package fusebridge

import (
	"cmp"
	"errors"
	"fmt"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend/fusebridge"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/program"
)

// mnt is what stands for the mount point in a command.
const mnt = "{mnt}"

// options are a mount's.
type options struct {
	args        []string // with mnt in them
	env         []string
	dir         string
	credential  *program.Credential
	owner       *fuseproto.Caller
	network     bool
	private     bool
	unconfined  bool
	noSeccomp   bool
	writable    []string
	timeout     time.Duration
	restartWait time.Duration
	maxWrite    int
	lookups     string // "parallel", "announced", or ""
}

// expected names all options, for errors.
const expected = "expected command, user, group, network, timeout, restart, mount, env, write, dir, ids, lookups, max-write, sandbox or seccomp"

// parseOptions takes a mount's options apart.
func parseOptions(m extensions.Mount) (*options, error) {
	o := new(options)
	var who, group string
	for _, option := range m.Options {
		name, value, hasValue := strings.Cut(option, "=")
		var err error
		switch name {
		case "command":
			o.args, err = split(value)
		case "user":
			who = value
		case "group":
			group = value
		case "network":
			o.network, err = !hasValue || value == "host", oneOf(cmp.Or(value, "host"), "host", "none")
		case "timeout":
			o.timeout, err = seconds(value)
		case "restart":
			o.restartWait, err = seconds(value)
		case "mount":
			o.private, err = value == "private", oneOf(value, "private", "none")
		case "env":
			if key, _, ok := strings.Cut(value, "="); !ok || key == "" {
				err = errors.New("expected NAME=VALUE")
			}
			o.env = append(o.env, value)
		case "write":
			if !filepath.IsAbs(value) {
				err = errors.New("expected an absolute path")
			}
			o.writable = append(o.writable, filepath.Clean(value))
		case "dir":
			if !filepath.IsAbs(value) {
				err = errors.New("expected an absolute path")
			}
			o.dir = value
		case "ids":
			o.owner, err = parseOwner(value)
		case "lookups":
			o.lookups, err = value, oneOf(value, "parallel", "announced")
		case "max-write":
			o.maxWrite, err = strconv.Atoi(value)
			if err == nil && (o.maxWrite < 4096 || o.maxWrite > fusebridge.LimitMaxWrite || o.maxWrite%4096 != 0) {
				err = fmt.Errorf("expected a multiple of 4096 up to %d", fusebridge.LimitMaxWrite)
			}
		case "sandbox":
			o.unconfined, err = value == "none", oneOf(value, "namespace", "none")
		case "seccomp":
			o.noSeccomp, err = value == "none", oneOf(value, "kill", "none")
		default:
			err = errors.New(expected)
		}
		if err != nil {
			return nil, fmt.Errorf("option %q of a FUSE program: %w", option, err)
		}
	}
	var err error
	if o.credential, err = credential(who, group); err != nil {
		return nil, err
	}
	return o, o.validate(m)
}

// looksUpInParallel are programs that take several lookups in a directory at a time though they do not say so, because their libfuse
// does not: the squashfuses and fuse-overlayfs do one thing after the other whatever is asked at once, and in sshfs, of libfuse's
// high level, a lookup is a getattr of a path, which a kernel never holds back.
var looksUpInParallel = map[string]bool{"squashfuse": true, "squashfuse_ll": true, "fuse-overlayfs": true, "sshfs": true}

// parallelLookups says whether the program may be sent several lookups in a directory at a time whatever its INIT says.
func (o *options) parallelLookups() bool {
	return o.lookups == "parallel" || o.lookups == "" && looksUpInParallel[filepath.Base(o.args[0])]
}

// validate checks what options say together.
func (o *options) validate(m extensions.Mount) error {
	placed := 0
	for _, a := range o.args {
		placed += strings.Count(a, mnt)
	}
	switch {
	case len(o.args) == 0:
		return errors.New(`FUSE program without a command: expected the option command, such as command=squashfuse -f IMAGE {mnt}`)
	case placed == 0:
		return fmt.Errorf("command %q: expected %s where the mount point goes", o.args, mnt)
	case m.Source != "" || len(m.Lowers) > 0:
		return fmt.Errorf("FUSE program with the source %q: expected none, what it serves is in its command", m.Source)
	case o.unconfined && (o.private || len(o.writable) > 0):
		return errors.New("sandbox=none with mount=private or write: expected one of the two, those take a mount namespace")
	case o.private && (o.owner != nil || o.maxWrite != 0):
		return errors.New("mount=private with ids or max-write: expected one of the two, the host's kernel speaks with the program then")
	}
	return nil
}

// at is the command with a mount point in its place.
func (o *options) at(point string) []string {
	args := make([]string, len(o.args))
	for i, a := range o.args {
		args[i] = strings.ReplaceAll(a, mnt, point)
	}
	return args
}

func oneOf(value string, values ...string) error {
	for _, v := range values {
		if value == v {
			return nil
		}
	}
	return fmt.Errorf("expected %s", strings.Join(values, " or "))
}

// seconds parses a time limit: a number of seconds, or as time.ParseDuration has it.
func seconds(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if n, bad := strconv.ParseUint(text, 10, 31); bad == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	if err != nil || d < time.Millisecond || d > 24*time.Hour {
		return 0, errors.New("expected a time from 1ms to 24h, such as 30s")
	}
	return d, nil
}

// parseOwner parses whose ids requests carry: nil is the guest's caller's.
func parseOwner(text string) (*fuseproto.Caller, error) {
	if text == "caller" {
		return nil, nil
	}
	if text == "root" {
		text = "0:0"
	}
	uid, gid, ok := strings.Cut(text, ":")
	u, err1 := strconv.ParseUint(uid, 10, 32)
	g, err2 := strconv.ParseUint(gid, 10, 32)
	if !ok || err1 != nil || err2 != nil || u == 1<<32-1 || g == 1<<32-1 {
		return nil, errors.New("expected caller, root, or UID:GID")
	}
	o := new(fuseproto.Caller)
	o.Uid, o.Gid = uint32(u), uint32(g)
	return o, nil
}

// credential finds a user and a group, by name or number. Without a user there is none.
func credential(who, group string) (*program.Credential, error) {
	if who == "" {
		if group != "" {
			return nil, fmt.Errorf("group %q without a user: expected both", group)
		}
		return nil, nil
	}
	c := new(program.Credential)
	u, err := user.Lookup(who)
	if err != nil {
		u, err = user.LookupId(who)
	}
	switch id, bad := strconv.ParseUint(who, 10, 32); {
	case err == nil:
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("user %q: %w", who, err)
		}
		c.UID, c.GID = uint32(uid), uint32(gid)
	case bad == nil && id < 1<<32-1:
		c.UID, c.GID = uint32(id), uint32(id)
	default:
		return nil, fmt.Errorf("user %q: %w: expected a name or number", who, err)
	}
	if group == "" {
		return c, nil
	}
	g, err := user.LookupGroup(group)
	id := group
	if err == nil {
		id = g.Gid
	}
	gid, bad := strconv.ParseUint(id, 10, 32)
	if bad != nil || gid == 1<<32-1 {
		return nil, fmt.Errorf("group %q: %w: expected a name or number", group, errors.Join(err, bad))
	}
	c.GID = uint32(gid)
	return c, nil
}
