// Package overlay serves layers of directories as one tree: what mount options ask for is read here.
package overlay

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

const (
	// MaxLowers is how many layers lie below an upper at most, as in the kernel (OVL_MAX_STACK).
	MaxLowers = 500
	// MaxIDRanges is how many ranges uidmapping= and gidmapping= have at most, as /proc/PID/uid_map.
	MaxIDRanges = 340
)

// Lower is one layer below: a directory of the host, or a tree that a plug-in serves.
type Lower struct {
	// Dir is the directory as it was written; "" where a plug-in is named.
	Dir string
	// Plugin, Data and Path are those of //NAME/DATA/PATH. Data and Path are the plug-in's own and may be empty.
	Plugin, Data, Path string
}

// Redirect is what becomes of a directory of a lower layer that is renamed. Without redirect_dir=, a given upper has RedirectFollow,
// as the kernel's default is, for whoever may mount it next; what the daemon makes has RedirectOn.
type Redirect int

const (
	// RedirectFollow finds directories that have been renamed, and renames none itself: EXDEV, so that mv(1) copies.
	RedirectFollow Redirect = iota
	// RedirectOn renames them: the upper layer notes where the rest of one is to be found (overlay.redirect).
	RedirectOn
	// RedirectNone neither renames nor finds them.
	RedirectNone
)

// XIno says how inode numbers of several layers are kept apart.
type XIno int

const (
	// XInoAuto puts the layer into the number where it fits.
	XInoAuto XIno = iota
	// XInoOff gives out numbers that only last as long as the mount.
	XInoOff
	// XInoOn refuses layers whose numbers leave no room.
	XInoOn
)

// UpperKind is where changes go.
type UpperKind int

const (
	// UpperNone has no upper layer: nothing can be changed.
	UpperNone UpperKind = iota
	// UpperDir is a directory that the operator has given.
	UpperDir
	// UpperDiscard is a new directory that is removed at the end.
	UpperDiscard
	// UpperKeep is a directory that is found again at the next start.
	UpperKeep
)

// IDRange shows Count ids from Stored on, which is what the layers have, as those from Shown on.
type IDRange struct {
	Stored, Shown, Count uint32
}

// Options are mount options, read. Their zero value is what a mount without any has, but for the lowers that it needs.
type Options struct {
	// Lowers are the layers below, the uppermost first.
	Lowers []Lower
	// UpperKind says where changes go; UpperDir takes them to Upper, with Work beside it for what is being made.
	UpperKind   UpperKind
	Upper, Work string
	// State is where UpperDiscard and UpperKeep make theirs and where checkpoints are; "" leaves it to the daemon.
	State string
	// From names the checkpoint that a new upper starts from; "" starts empty.
	From string

	Redirect Redirect
	XIno     XIno
	// UserXattr keeps marks in user.overlay. rather than trusted.overlay.
	UserXattr bool
	// NoFsync leaves out what fsync(2) and its like ask for: volatile, fsync=0.
	NoFsync bool
	// ReadOnly is ro.
	ReadOnly bool

	// UIDs and GIDs map what the layers have to what is shown; empty ones change nothing.
	UIDs, GIDs []IDRange
	// SquashUID and SquashGID are who everything belongs to, if not nil.
	SquashUID, SquashGID *uint32
	// StaticNlink shows every directory with one link.
	StaticNlink bool
	// NoACL leaves out POSIX ACLs.
	NoACL bool
	// Plugins are executables to be used instead of those in the default directory; nil leaves that to the daemon.
	Plugins []string

	// Notes say what was ignored, and why, for the log.
	Notes []string
}

// Split takes a list of options apart at its commas, but for those with a backslash before them, which goes. Other
// backslashes stay, for Parse.
func Split(list string) []string {
	var options []string
	var b strings.Builder
	for i := 0; i < len(list); i++ {
		switch {
		case list[i] == ',':
			options = append(options, b.String())
			b.Reset()
			continue
		case list[i] == '\\' && i+1 < len(list):
			if list[i+1] != ',' {
				b.WriteByte('\\')
			}
			i++
		}
		b.WriteByte(list[i])
	}
	if list != "" {
		options = append(options, b.String())
	}
	return options
}

// hasUpper says whether there is an upper directory, or has to be one: a new one that nothing can be written to would show nothing.
func (o *Options) hasUpper() bool {
	return o.UpperKind != UpperNone && !(o.ReadOnly && o.UpperKind == UpperDiscard && o.From == "")
}

// Parse reads options as they are written for fuse-overlayfs(1), for the kernel's overlayfs, and for this daemon. Every option
// that one of them knows is taken, ignored with a note, or refused with the reason; others are errors.
func Parse(options []string) (*Options, error) {
	p := parser{o: new(Options), seen: make(map[string]bool)}
	for _, option := range options {
		if option == "" {
			continue
		}
		if strings.IndexByte(option, 0) >= 0 {
			return nil, fmt.Errorf("mount option %q has a NUL in it", option)
		}
		name, value, hasValue := strings.Cut(option, "=")
		if err := p.option(name, value, hasValue); err != nil {
			return nil, err
		}
		p.seen[name] = true
	}
	if err := p.finish(); err != nil {
		return nil, err
	}
	return p.o, nil
}

type parser struct {
	o        *Options
	seen     map[string]bool
	volatile bool
	userRoot bool // squash_to_root
}

// handler reads one option. Flags have value "".
type handler struct {
	read func(p *parser, value string) error
	flag bool // takes no value
}

// known are the options that mean something here. Those that do not are in ignored and refused.
var known = map[string]handler{
	"lowerdir":       {read: (*parser).lowerdir},
	"lowerdir+":      {read: (*parser).lowerdirAdd},
	"upperdir":       {read: (*parser).upperdir},
	"workdir":        {read: func(p *parser, v string) error { return dir(&p.o.Work, "workdir", unescape(v)) }},
	"upper":          {read: (*parser).upper},
	"state":          {read: func(p *parser, v string) error { return dir(&p.o.State, "state", v) }},
	"from":           {read: (*parser).from},
	"redirect_dir":   {read: (*parser).redirectDir},
	"xino":           {read: (*parser).xino},
	"index":          {read: (*parser).index},
	"metacopy":       {read: (*parser).metacopy},
	"nfs_export":     {read: (*parser).nfsExport},
	"verity":         {read: (*parser).verity},
	"uuid":           {read: (*parser).uuid},
	"fsync":          {read: (*parser).fsync},
	"timeout":        {read: (*parser).timeout},
	"plugins":        {read: (*parser).plugins},
	"noxattrs":       {read: (*parser).noxattrs},
	"uidmapping":     {read: func(p *parser, v string) error { return idRanges(&p.o.UIDs, "uidmapping", v) }},
	"gidmapping":     {read: func(p *parser, v string) error { return idRanges(&p.o.GIDs, "gidmapping", v) }},
	"squash_to_uid":  {read: func(p *parser, v string) error { return id(&p.o.SquashUID, "squash_to_uid", v) }},
	"squash_to_gid":  {read: func(p *parser, v string) error { return id(&p.o.SquashGID, "squash_to_gid", v) }},
	"squash_to_root": {flag: true, read: func(p *parser, _ string) error { p.userRoot = true; return nil }},
	"userxattr":      {flag: true, read: func(p *parser, _ string) error { p.o.UserXattr = true; return nil }},
	"volatile":       {flag: true, read: func(p *parser, _ string) error { p.volatile = true; return nil }},
	"static_nlink":   {flag: true, read: func(p *parser, _ string) error { p.o.StaticNlink = true; return nil }},
	"noacl":          {flag: true, read: func(p *parser, _ string) error { p.o.NoACL = true; return nil }},
	"ro":             {flag: true, read: func(p *parser, _ string) error { p.o.ReadOnly = true; return nil }},
	"rw":             {flag: true, read: func(p *parser, _ string) error { p.o.ReadOnly = false; return nil }},
}

const (
	inGuest  = "it is an option of the mount in the guest"
	noMount  = "nothing is mounted on the host"
	ownPools = "the daemon has its own threads"
)

// ignored are options that change nothing here, and why.
var ignored = map[string]string{
	"context": inGuest, "fscontext": inGuest, "defcontext": inGuest, "rootcontext": inGuest,
	"suid": inGuest, "nosuid": inGuest, "dev": inGuest, "nodev": inGuest, "exec": inGuest, "noexec": inGuest,
	"atime": inGuest, "noatime": inGuest, "diratime": inGuest, "nodiratime": inGuest, "relatime": inGuest, "norelatime": inGuest,
	"strictatime": inGuest, "nostrictatime": inGuest, "lazytime": inGuest, "nolazytime": inGuest,
	"sync": inGuest, "async": inGuest, "dirsync": inGuest, "iversion": inGuest, "noiversion": inGuest, "mand": inGuest, "nomand": inGuest,
	"defaults": noMount, "auto": noMount, "noauto": noMount, "user": noMount, "nouser": noMount, "users": noMount, "owner": noMount,
	"group": noMount, "nofail": noMount, "_netdev": noMount, "silent": noMount, "loud": noMount, "nonempty": noMount,
	"allow_other": noMount, "allow_root": noMount, "auto_unmount": noMount, "fsname": noMount, "subtype": noMount, "blkdev": noMount,
	"mountpoint": noMount, "fd": noMount, "rootmode": noMount, "user_id": noMount, "group_id": noMount,
	"threaded": ownPools, "max_idle_threads": ownPools, "max_threads": ownPools, "clone_fd": ownPools,
	"default_permissions": "the guest's kernel always checks permissions",
	"override_creds":      "files are always reached with the daemon's own credentials",
	"nooverride_creds":    "files are always reached with the daemon's own credentials",
	"writeback":           "it is agreed on with the guest; see the cache policy of the share",
	"fast_ino":            "inode numbers never cost a walk",
	"ino32_t":             "inode numbers are the guest's 64 bits",
	"debug":               "see the daemon's log level",
	"max_write":           "it is agreed on with the guest", "max_read": "it is agreed on with the guest",
	"max_readahead": "it is agreed on with the guest", "max_background": "it is agreed on with the guest",
	"congestion_threshold": "it is agreed on with the guest", "async_read": "it is agreed on with the guest",
	"sync_read": "it is agreed on with the guest", "big_writes": "it is agreed on with the guest",
	"kernel_cache": "see the cache policy of the share", "auto_cache": "see the cache policy of the share",
	"direct_io": "see the cache policy of the share", "entry_timeout": "see the cache policy of the share", "attr_timeout": "see the cache policy of the share",
	"negative_timeout": "see the cache policy of the share", "ac_attr_timeout": "see the cache policy of the share",
}

// refused are options that ask for something that would not be done, and why, and what to do instead.
var refused = map[string]string{
	"datadir+":          "data-only layers are not supported; unpack them, or serve the image that they are of with lazyimage",
	"xattr_permissions": "put a permshift layer below instead, which reads and writes the same attributes",
	"uid":               "use squash_to_uid=",
	"gid":               "use squash_to_gid=",
	"umask":             "the modes shown are those of the files; change them, or use permshift",
	"remount":           "a graft is changed by adding it anew",
	"bind":              "name the directory as lowerdir= instead",
	"rbind":             "name the directory as lowerdir= instead",
	"move":              "there is no mount to be moved",
}

func (p *parser) option(name, value string, hasValue bool) error {
	if h, ok := known[name]; ok {
		switch {
		case h.flag && hasValue:
			return fmt.Errorf("mount option %s takes no value, but has %q", name, value)
		case !h.flag && !hasValue:
			return fmt.Errorf("mount option %s needs a value: %s=…", name, name)
		case p.seen[name] && slices.Contains([]string{"lowerdir", "upperdir", "workdir", "upper", "state", "from"}, name):
			return fmt.Errorf("mount option %s is given twice; leave one of them out", name)
		}
		return h.read(p, value)
	}
	if why, ok := refused[name]; ok {
		if name == "xattr_permissions" && value == "0" {
			return nil
		}
		return fmt.Errorf("mount option %s is refused: %s", name, why)
	}
	if why, ok := ignored[name]; ok {
		p.note("%s is ignored: %s", name, why)
		return nil
	}
	if strings.HasPrefix(name, "x-") || strings.HasPrefix(name, "X-") || name == "comment" {
		return nil // mount(8): for other programs
	}
	if looksLikeRange(name) && !hasValue {
		return fmt.Errorf("mount option %q is not known; write the ranges of uidmapping= and gidmapping= with colons between them, 0:1000:1:1:110000:65536", name)
	}
	return fmt.Errorf("mount option %q is neither one of fuse-overlayfs nor of overlayfs; see docs/overlay-options.md", name)
}

func (p *parser) note(format string, args ...any) {
	if n := fmt.Sprintf(format, args...); !slices.Contains(p.o.Notes, n) {
		p.o.Notes = append(p.o.Notes, n)
	}
}

// finish checks what options have to do with each other.
func (p *parser) finish() error {
	o := p.o
	if o.Upper != "" {
		if o.UpperKind != UpperNone {
			return errors.New("upper= and upperdir= are both given; leave one of them out")
		}
		o.UpperKind = UpperDir
		if o.Work == "" {
			return errors.New("upperdir= needs workdir=, an empty directory on the same file system")
		}
		if o.Work == o.Upper {
			return fmt.Errorf("workdir= and upperdir= are the same directory, %s; give each its own", o.Upper)
		}
	} else if o.Work != "" {
		o.Work = ""
		p.note("workdir is ignored: without upperdir= nothing is written")
	}
	if o.From != "" && o.UpperKind != UpperDiscard && o.UpperKind != UpperKeep {
		return errors.New("from= needs upper=discard or upper=keep, which makes the directory that starts as the checkpoint was")
	}
	if !p.seen["redirect_dir"] && o.UpperKind != UpperNone && o.UpperKind != UpperDir {
		o.Redirect = RedirectOn
	}
	if p.volatile {
		o.NoFsync = true
	}
	if p.userRoot {
		// squash_to_uid and squash_to_gid go before it, as in fuse-overlayfs.
		zero := uint32(0)
		if o.SquashUID == nil {
			o.SquashUID = &zero
		}
		if o.SquashGID == nil {
			o.SquashGID = &zero
		}
	}
	if o.UserXattr && o.Redirect == RedirectOn {
		p.note("redirect_dir=on with userxattr: the kernel's overlayfs would not follow what is noted in user.overlay.redirect")
	}
	return nil
}

// unescape takes backslashes away that stand before another character.
func unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// splitColons splits at colons that have no backslash before them; the pieces keep their backslashes.
func splitColons(s string) []string {
	var pieces []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case ':':
			pieces = append(pieces, s[start:i])
			start = i + 1
		}
	}
	return append(pieces, s[start:])
}

func (p *parser) lowerdir(value string) error {
	if p.seen["lowerdir+"] {
		return errors.New("lowerdir= and lowerdir+= are both given; write all layers as one or as the other")
	}
	pieces := splitColons(value)
	for i, piece := range pieces {
		switch {
		case piece != "":
		case value == "":
			return errors.New("lowerdir= is empty: it names at least one layer, DIR[:DIR...] with the uppermost first")
		case i > 0 && i < len(pieces)-1:
			return fmt.Errorf("lowerdir=%s has \"::\", which announces data-only layers; they are not supported: unpack them, or take one colon out", value)
		default:
			return fmt.Errorf("lowerdir=%s begins or ends with a colon; take it out", value)
		}
		if err := p.lower("lowerdir", unescape(piece)); err != nil {
			return err
		}
	}
	return nil
}

// lowerdirAdd takes one layer whose colons and backslashes are its own.
func (p *parser) lowerdirAdd(value string) error {
	if p.seen["lowerdir"] {
		return errors.New("lowerdir+= follows lowerdir=; write all layers as one or as the other")
	}
	if value == "" {
		return errors.New("lowerdir+= is empty: it names one layer")
	}
	return p.lower("lowerdir+", value)
}

func (p *parser) lower(option, s string) error {
	if len(p.o.Lowers) == MaxLowers {
		return fmt.Errorf("%s: there are more than %d layers; merge some of them", option, MaxLowers)
	}
	l, err := parseLower(s)
	if err != nil {
		return fmt.Errorf("%s: %w", option, err)
	}
	p.o.Lowers = append(p.o.Lowers, l)
	return nil
}

func parseLower(s string) (Lower, error) {
	rest, isPlugin := strings.CutPrefix(s, "//")
	if !isPlugin {
		return Lower{Dir: s}, nil
	}
	const form = "expected //NAME/DATA/PATH, where DATA and PATH may be empty"
	name, rest, ok := strings.Cut(rest, "/")
	if !ok {
		return Lower{}, fmt.Errorf("layer %q has no / after the name of the plug-in; %s", s, form)
	}
	if name == "" {
		return Lower{}, fmt.Errorf("layer %q names no plug-in; %s, and a directory begins with one /", s, form)
	}
	data, path, ok := strings.Cut(rest, "/")
	if !ok {
		return Lower{}, fmt.Errorf("layer %q has no / after its data; %s", s, form)
	}
	return Lower{Plugin: name, Data: data, Path: path}, nil
}

func (p *parser) upperdir(value string) error {
	upper := unescape(value)
	if strings.HasPrefix(upper, "//") {
		return fmt.Errorf("upperdir=%s: plug-ins are only for lower layers; name a directory, which begins with one /", value)
	}
	return dir(&p.o.Upper, "upperdir", upper)
}

func dir(to *string, option, value string) error {
	if value == "" {
		return fmt.Errorf("%s= is empty: it names a directory", option)
	}
	*to = value
	return nil
}

func (p *parser) upper(value string) error {
	return choose(&p.o.UpperKind, "upper", value, map[string]UpperKind{"none": UpperNone, "discard": UpperDiscard, "keep": UpperKeep})
}

func (p *parser) from(value string) error {
	if value == "" {
		return errors.New("from= is empty: it names a checkpoint")
	}
	p.o.From = value
	return nil
}

// choose sets to to what choices has for value.
func choose[T any](to *T, option, value string, choices map[string]T) error {
	v, ok := choices[value]
	if !ok {
		names := make([]string, 0, len(choices))
		for name := range choices {
			names = append(names, name)
		}
		slices.Sort(names)
		return fmt.Errorf("%s=%s: expected one of %s", option, value, strings.Join(names, ", "))
	}
	*to = v
	return nil
}

func (p *parser) redirectDir(value string) error {
	// off is follow in the kernel unless it is built to follow nothing.
	return choose(&p.o.Redirect, "redirect_dir", value, map[string]Redirect{
		"on": RedirectOn, "off": RedirectFollow, "follow": RedirectFollow, "nofollow": RedirectNone,
	})
}

func (p *parser) xino(value string) error {
	return choose(&p.o.XIno, "xino", value, map[string]XIno{"auto": XInoAuto, "on": XInoOn, "off": XInoOff})
}

// onOff checks the value of an option that is ignored, or not, depending on it.
func onOff(option, value string) (bool, error) {
	var on bool
	err := choose(&on, option, value, map[string]bool{"on": true, "off": false})
	return on, err
}

func (p *parser) index(value string) error {
	on, err := onOff("index", value)
	if on {
		p.note("index=on is ignored: there is no index; hard links of a lower layer part when one is changed, as with index=off")
	}
	return err
}

func (p *parser) metacopy(value string) error {
	on, err := onOff("metacopy", value)
	if on {
		p.note("metacopy=on is ignored: a file is always copied up whole")
	}
	return err
}

func (p *parser) nfsExport(value string) error {
	on, err := onOff("nfs_export", value)
	if on {
		p.note("nfs_export=on is ignored: it takes an index, and there is none")
	}
	return err
}

func (p *parser) verity(value string) error {
	var on bool
	if err := choose(&on, "verity", value, map[string]bool{"off": false, "on": true, "require": true}); err != nil {
		return err
	}
	if on {
		return fmt.Errorf("verity=%s is refused: digests of data-only layers are not checked here", value)
	}
	return nil
}

func (p *parser) uuid(value string) error {
	var auto bool
	if err := choose(&auto, "uuid", value, map[string]bool{"auto": true, "off": false, "null": false, "on": false}); err != nil {
		return err
	}
	p.note("uuid is ignored: a virtio-fs mount has none")
	return nil
}

func (p *parser) fsync(value string) error {
	// Numbers are fuse-overlayfs's; the kernel's words came with its fsync= option.
	return choose(&p.o.NoFsync, "fsync", value, map[string]bool{"0": true, "1": false, "volatile": true, "auto": false, "strict": false})
}

func (p *parser) noxattrs(value string) error {
	var on bool
	err := choose(&on, "noxattrs", value, map[string]bool{"0": false, "1": true})
	if on {
		p.note("noxattrs=1 is ignored: the share's option xattr says whether guests have extended attributes")
	}
	return err
}

func (p *parser) timeout(value string) error {
	seconds, err := strconv.ParseFloat(value, 64)
	if err != nil || !(seconds >= 0 && seconds <= math.MaxInt32) {
		return fmt.Errorf("timeout=%s: expected seconds, as 1 or 0.5", value)
	}
	p.note("timeout is ignored: the share's cache policy says how long a guest may keep attributes and names")
	return nil
}

func (p *parser) plugins(value string) error {
	// Given and empty, it turns the default directory off.
	p.o.Plugins = []string{}
	for _, piece := range splitColons(value) {
		if piece != "" {
			p.o.Plugins = append(p.o.Plugins, unescape(piece))
		}
	}
	return nil
}

func id(to **uint32, option, value string) error {
	// The last number is no id: chown(2) takes it for "leave it".
	n, err := strconv.ParseUint(value, 10, 32)
	if err != nil || n == math.MaxUint32 {
		return fmt.Errorf("%s=%s: expected an id, 0 to %d", option, value, uint32(math.MaxUint32-1))
	}
	v := uint32(n)
	*to = &v
	return nil
}

// idRanges reads STORED:SHOWN:COUNT, any number of times, with colons or commas between them.
func idRanges(to *[]IDRange, option, value string) error {
	numbers := strings.FieldsFunc(value, func(r rune) bool { return r == ':' || r == ',' })
	if len(numbers) == 0 || len(numbers)%3 != 0 {
		return fmt.Errorf("%s=%s: expected STORED:SHOWN:COUNT, and more of them after another colon", option, value)
	}
	if len(numbers) > 3*MaxIDRanges {
		return fmt.Errorf("%s: there are more than %d ranges", option, MaxIDRanges)
	}
	ranges := make([]IDRange, 0, len(numbers)/3)
	for i := 0; i < len(numbers); i += 3 {
		var n [3]uint32
		for j, text := range numbers[i : i+3] {
			v, err := strconv.ParseUint(text, 10, 32)
			if err != nil {
				return fmt.Errorf("%s=%s: %q is not a number of 32 bits", option, value, text)
			}
			n[j] = uint32(v)
		}
		r := IDRange{n[0], n[1], n[2]}
		if r.Count == 0 || uint64(r.Stored)+uint64(r.Count) > math.MaxUint32 || uint64(r.Shown)+uint64(r.Count) > math.MaxUint32 {
			return fmt.Errorf("%s=%s: the range %d:%d:%d is empty or goes beyond the last id", option, value, r.Stored, r.Shown, r.Count)
		}
		for _, other := range ranges {
			if overlap(r.Stored, other.Stored, r.Count, other.Count) || overlap(r.Shown, other.Shown, r.Count, other.Count) {
				return fmt.Errorf("%s=%s: the ranges %d:%d:%d and %d:%d:%d have ids in common", option, value,
					other.Stored, other.Shown, other.Count, r.Stored, r.Shown, r.Count)
			}
		}
		ranges = append(ranges, r)
	}
	*to = ranges
	return nil
}

func overlap(a, b, na, nb uint32) bool {
	return a < b+nb && b < a+na
}

func looksLikeRange(s string) bool {
	return strings.Count(s, ":") >= 2 && strings.Trim(s, "0123456789:") == ""
}
