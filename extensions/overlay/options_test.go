package overlay

import (
	"encoding/base64"
	"fmt"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func ptr[T any](v T) *T { return &v }

// TestLowers is row B2: what lowerdir= says, as fuse-overlayfs and the kernel read it.
func TestLowers(t *testing.T) {
	image := base64.URLEncoding.EncodeToString([]byte("docker://docker.io/library/alpine:latest"))
	for _, test := range []struct {
		options string
		lowers  []Lower
	}{
		{"lowerdir=/l", []Lower{{Dir: "/l"}}},
		{"lowerdir=/l1:/l2:/l3", []Lower{{Dir: "/l1"}, {Dir: "/l2"}, {Dir: "/l3"}}},
		{"lowerdir=l1:../l2", []Lower{{Dir: "l1"}, {Dir: "../l2"}}},
		{`lowerdir=/a\:b:/c`, []Lower{{Dir: "/a:b"}, {Dir: "/c"}}},
		{`lowerdir=/a\\:/b`, []Lower{{Dir: `/a\`}, {Dir: "/b"}}},
		{`lowerdir=/a\\\:b:/c`, []Lower{{Dir: `/a\:b`}, {Dir: "/c"}}},
		{`lowerdir=/a\,b:/c,ro`, []Lower{{Dir: "/a,b"}, {Dir: "/c"}}},
		{`lowerdir+=/a:b,lowerdir+=/c\d`, []Lower{{Dir: "/a:b"}, {Dir: `/c\d`}}},
		{"lowerdir=//test//rootfs/", []Lower{{Plugin: "test", Path: "rootfs/"}}},
		{"lowerdir=//test//", []Lower{{Plugin: "test"}}},
		{"lowerdir=//test///abs/path", []Lower{{Plugin: "test", Path: "/abs/path"}}},
		{"lowerdir=//test/data/rel/a/tive", []Lower{{Plugin: "test", Data: "data", Path: "rel/a/tive"}}},
		{"lowerdir=//crfs/" + image + "/cache:/base", []Lower{{Plugin: "crfs", Data: image, Path: "cache"}, {Dir: "/base"}}},
		{`lowerdir=/top://a/x\:y/p\:q://b//`, []Lower{{Dir: "/top"}, {Plugin: "a", Data: "x:y", Path: "p:q"}, {Plugin: "b"}}},
		{"lowerdir+=//a/x:y/p", []Lower{{Plugin: "a", Data: "x:y", Path: "p"}}},
		{"lowerdir=/a//b", []Lower{{Dir: "/a//b"}}},
	} {
		o, err := Parse(Split(test.options))
		if err != nil {
			t.Errorf("%s: %v", test.options, err)
		} else if !reflect.DeepEqual(o.Lowers, test.lowers) {
			t.Errorf("%s: lowers %+v, expected %+v", test.options, o.Lowers, test.lowers)
		}
	}
}

func TestRefused(t *testing.T) {
	for options, say := range map[string]string{
		"lowerdir":                 "needs a value",
		"lowerdir=":                "is empty",
		"lowerdir=:/a":             "begins or ends with a colon",
		"lowerdir=/a:":             "begins or ends with a colon",
		"lowerdir=/a::/b":          "data-only",
		"lowerdir=/a,datadir+=/b":  "data-only",
		"lowerdir=/a,lowerdir+=/b": "write all layers as one or as the other",
		"lowerdir+=/a,lowerdir=/b": "write all layers as one or as the other",
		"lowerdir=/a,lowerdir=/b":  "given twice",
		"lowerdir+=":               "is empty",
		"lowerdir=//":              "no / after the name",
		"lowerdir=//name":          "no / after the name",
		"lowerdir=//name/data":     "no / after its data",
		"lowerdir=///data/path":    "names no plug-in",
		"lowerdir=/a:///":          "names no plug-in",
		"lowerdir=/a" + strings.Repeat(":/b", MaxLowers):                    "more than 500 layers",
		"lowerdir=/a,upperdir=//n/d/p,workdir=/w":                           "plug-ins are only for lower layers",
		`lowerdir=/a,upperdir=\//n/d/p,workdir=/w`:                          "plug-ins are only for lower layers",
		"lowerdir=/a,upperdir=/u":                                           "needs workdir=",
		"lowerdir=/a,upperdir=/u,workdir=/u":                                "same directory",
		"lowerdir=/a,upperdir=,workdir=/w":                                  "is empty",
		"lowerdir=/a,upperdir=/u,workdir=/w,upper=discard":                  "both given",
		"lowerdir=/a,upper=tmpfs":                                           "discard, keep, none",
		"lowerdir=/a,upper=none,from=clean":                                 "needs upper=discard or upper=keep",
		"lowerdir=/a,from=clean":                                            "needs upper=discard or upper=keep",
		"lowerdir=/a,upperdir=/u,workdir=/w,from=clean":                     "needs upper=discard or upper=keep",
		"lowerdir=/a,redirect_dir=yes":                                      "expected one of follow, nofollow, off, on",
		"lowerdir=/a,index=1":                                               "expected one of off, on",
		"lowerdir=/a,xino=maybe":                                            "expected one of auto, off, on",
		"lowerdir=/a,metacopy=":                                             "expected one of",
		"lowerdir=/a,verity=require":                                        "refused",
		"lowerdir=/a,volatile=1":                                            "takes no value",
		"lowerdir=/a,noacl=":                                                "takes no value",
		"lowerdir=/a,squash_to_uid=-1":                                      "expected an id",
		"lowerdir=/a,squash_to_gid=4294967295":                              "expected an id",
		"lowerdir=/a,uidmapping=0:1000":                                     "STORED:SHOWN:COUNT",
		"lowerdir=/a,uidmapping=0:1000:0":                                   "empty or goes beyond",
		"lowerdir=/a,uidmapping=0:4294967295:1":                             "empty or goes beyond",
		"lowerdir=/a,uidmapping=0:x:1":                                      "not a number",
		"lowerdir=/a,gidmapping=0:1000:10:5:3000:1":                         "in common",
		"lowerdir=/a,gidmapping=0:1000:10:50:1009:1":                        "in common",
		"lowerdir=/a,uidmapping=0:1000:1,1:110000:65536":                    "with colons between them",
		"lowerdir=/a,uidmapping=" + strings.Repeat("1:1:1:", MaxIDRanges+1): "more than 340",
		"lowerdir=/a,timeout=-1":                                            "expected seconds",
		"lowerdir=/a,timeout=NaN":                                           "expected seconds",
		"lowerdir=/a,fsync=2":                                               "expected one of",
		"lowerdir=/a,xattr_permissions=2":                                   "permshift",
		"lowerdir=/a,remount":                                               "refused",
		"lowerdir=/a,frobnicate":                                            "neither one of",
		"lowerdir=/a,lowerDir=/b":                                           "neither one of",
		"lowerdir=/a\x00b":                                                  "NUL",
	} {
		o, err := Parse(Split(options))
		if err == nil {
			t.Errorf("%q was read as %+v, expected an error with %q", options, o, say)
		} else if !strings.Contains(err.Error(), say) {
			t.Errorf("%q: %v, expected an error with %q", options, err, say)
		}
	}
}

func TestOptions(t *testing.T) {
	one := []Lower{{Dir: "/l"}}
	for options, expected := range map[string]Options{
		"lowerdir=/l,upperdir=/u,workdir=/w":                                               {UpperKind: UpperDir, Upper: "/u", Work: "/w"},
		`lowerdir=/l,upperdir=/u\:1,workdir=w`:                                             {UpperKind: UpperDir, Upper: "/u:1", Work: "w"},
		"lowerdir=/l,upper=discard,state=/s":                                               {UpperKind: UpperDiscard, State: "/s", Redirect: RedirectOn},
		"lowerdir=/l,upper=keep,from=clean":                                                {UpperKind: UpperKeep, From: "clean", Redirect: RedirectOn},
		"lowerdir=/l,upper=discard,redirect_dir=follow":                                    {UpperKind: UpperDiscard},
		"lowerdir=/l,upper=none":                                                           {},
		"lowerdir=/l,redirect_dir=on":                                                      {Redirect: RedirectOn},
		"lowerdir=/l,redirect_dir=off":                                                     {Redirect: RedirectFollow},
		"lowerdir=/l,redirect_dir=nofollow":                                                {Redirect: RedirectNone},
		"lowerdir=/l,index=off,metacopy=off,nfs_export=off,verity=off,xattr_permissions=0": {},
		"lowerdir=/l,xino=on":                                                              {XIno: XInoOn},
		"lowerdir=/l,userxattr":                                                            {UserXattr: true},
		"lowerdir=/l,volatile":                                                             {NoFsync: true},
		"lowerdir=/l,fsync=0":                                                              {NoFsync: true},
		"lowerdir=/l,volatile,fsync=1":                                                     {NoFsync: true},
		"lowerdir=/l,fsync=strict":                                                         {},
		"lowerdir=/l,ro":                                                                   {ReadOnly: true},
		"lowerdir=/l,ro,rw":                                                                {},
		"lowerdir=/l,squash_to_root":                                                       {SquashUID: ptr[uint32](0), SquashGID: ptr[uint32](0)},
		"lowerdir=/l,squash_to_uid=7,squash_to_root":                                       {SquashUID: ptr[uint32](7), SquashGID: ptr[uint32](0)},
		"lowerdir=/l,squash_to_gid=8":                                                      {SquashGID: ptr[uint32](8)},
		"lowerdir=/l,static_nlink,noacl":                                                   {StaticNlink: true, NoACL: true},
		`lowerdir=/l,plugins=/a.so:/b\:c`:                                                  {Plugins: []string{"/a.so", "/b:c"}},
		"lowerdir=/l,plugins=":                                                             {Plugins: []string{}},
		"lowerdir=/l,uidmapping=0:1000:1:1:110000:65536,gidmapping=0:1000:1:1:110000:65536": { // fuse-overlayfs(1)
			UIDs: []IDRange{{0, 1000, 1}, {1, 110000, 65536}}, GIDs: []IDRange{{0, 1000, 1}, {1, 110000, 65536}},
		},
		`lowerdir=/l,uidmapping=0:1000:1\,1:110000:65536`: {UIDs: []IDRange{{0, 1000, 1}, {1, 110000, 65536}}},
		"lowerdir=/l,x-systemd.automount,comment=hello":   {},
		"lowerdir=/l,,": {},
	} {
		expected.Lowers = one
		o, err := Parse(Split(options))
		if err != nil {
			t.Errorf("%s: %v", options, err)
		} else if !reflect.DeepEqual(*o, expected) {
			t.Errorf("%s: %+v, expected %+v", options, *o, expected)
		}
	}
}

func TestNotes(t *testing.T) {
	for name := range ignored {
		for _, option := range []string{name, name + "=1"} {
			o, err := Parse([]string{"lowerdir=/l", option, option})
			if err != nil || len(o.Notes) != 1 || !strings.HasPrefix(o.Notes[0], name+" is ignored: ") {
				t.Errorf("%s: %+v, %v, expected one note that says so", option, o, err)
			}
		}
	}
	for _, option := range []string{"index=on", "metacopy=on", "nfs_export=on", "uuid=null", "workdir=/w"} {
		name, _, _ := strings.Cut(option, "=")
		o, err := Parse([]string{"lowerdir=/l", option})
		if err != nil || len(o.Notes) != 1 || !strings.HasPrefix(o.Notes[0], name) || o.Work != "" {
			t.Errorf("%s: %+v, %v, expected a note that says it is ignored", option, o, err)
		}
	}
	if o, err := Parse([]string{"lowerdir=/l", "userxattr", "redirect_dir=on"}); err != nil || len(o.Notes) != 1 {
		t.Errorf("userxattr with redirect_dir=on: %+v, %v, expected a note", o, err)
	}
}

// TestTables holds the three tables of options apart.
func TestTables(t *testing.T) {
	for name := range known {
		if ignored[name] != "" || refused[name] != "" {
			t.Errorf("%s is known, and ignored or refused", name)
		}
	}
	for name := range ignored {
		if refused[name] != "" {
			t.Errorf("%s is ignored and refused", name)
		}
	}
}

// TestDocumented finds every option that is taken or refused on its page.
func TestDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/overlay-options.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range [][]string{slices.Collect(maps.Keys(known)), slices.Collect(maps.Keys(refused))} {
		for _, name := range table {
			if name == "rbind" {
				continue
			}
			if !regexp.MustCompile("`" + regexp.QuoteMeta(name) + "[`=]").Match(page) {
				t.Errorf("%s is not in docs/overlay-options.md", name)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"lowerdir=/l1:/l2,upperdir=/u,workdir=/w,redirect_dir=on,index=off,xino=auto,userxattr",
		`lowerdir=/a\:b:/c\\,volatile,squash_to_root`, "lowerdir=//crfs/ZG9ja2Vy/cache://test//", "lowerdir=/a::/b",
		`lowerdir+=/a:b,lowerdir+=//n/d/p\,q`, "lowerdir=/l,uidmapping=0:1000:1:1:110000:65536,timeout=1e3,upper=keep,from=x",
		`lowerdir=\`, `\`, ",=,==", "lowerdir=/l,plugins=a:b",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, list string) {
		o, err := Parse(Split(list))
		if err != nil {
			if o != nil {
				t.Fatalf("%q: both options and %v", list, err)
			}
			return
		}
		if len(o.Lowers) > MaxLowers {
			t.Fatalf("%q: %d lowers", list, len(o.Lowers))
		}
		if (o.UpperKind == UpperDir) != (o.Upper != "" && o.Work != "") || strings.HasPrefix(o.Upper, "//") {
			t.Fatalf("%q: upper %q of kind %d, work %q", list, o.Upper, o.UpperKind, o.Work)
		}
		if len(o.Lowers) == 0 {
			return // they may be said in another way (Mount.Lowers)
		}
		// What was read, written again with its escapes, is read as the same layers.
		again := make([]string, len(o.Lowers))
		for i, l := range o.Lowers {
			if (l.Dir == "") == (l.Plugin == "") || strings.Contains(l.Data, "/") || strings.HasPrefix(l.Dir, "//") {
				t.Fatalf("%q: layer %+v", list, l)
			}
			text := l.Dir
			if l.Plugin != "" {
				text = fmt.Sprintf("//%s/%s/%s", l.Plugin, l.Data, l.Path)
			}
			again[i] = strings.NewReplacer(`\`, `\\`, ":", `\:`).Replace(text)
		}
		if p, err := Parse([]string{"lowerdir=" + strings.Join(again, ":")}); err != nil || !reflect.DeepEqual(p.Lowers, o.Lowers) {
			t.Fatalf("%q: layers %+v, written again and read: %+v, %v", list, o.Lowers, p, err)
		}
	})
}
