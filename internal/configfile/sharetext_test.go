package configfile

import (
	"reflect"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/control/api"
)

func TestParseShare(t *testing.T) {
	for text, want := range map[string]api.ShareSpec{
		"tag=a": {Tag: "a"},
		"tag=src,socket=/run/src.sock,dir=/srv/src,cache=Auto,ro": {
			Tag: "src", Socket: "/run/src.sock", Cache: "auto", ReadOnly: true, Grafts: []api.GraftSpec{{Path: "/", Source: "/srv/src"}},
		},
		`dir=/a\,b\\c=d,tag=x\,y`: {Tag: "x,y", Grafts: []api.GraftSpec{{Path: "/", Source: `/a,b\c=d`}}},
		"tag=a,socket-group=kvm,read-only,writeback,xattr,allow-mmap,allow-direct-io,posix-lock,flock,no-readdirplus,num-request-queues=4,max-fds=10,max-inodes=20": {
			Tag: "a", SocketGroup: "kvm", ReadOnly: true, Writeback: true, Xattr: true, AllowMmap: true, AllowDirectIO: true, PosixLock: true,
			Flock: true, NoReaddirplus: true, RequestQueues: 4, MaxFDs: 10, MaxInodes: 20,
		},
	} {
		if s, err := ParseShare(text); err != nil || !reflect.DeepEqual(s, want) {
			t.Errorf("%s: %+v, %v", text, s, err)
		}
	}
	for text, want := range map[string]string{
		"":                             `"": there is no such key: expected one of tag, socket, `,
		"tag=a,":                       `"": there is no such key`,
		"tag=a,tag=b":                  "tag: it is given twice",
		"tag=a,ro,read-only":           "read-only: it is given twice",
		"tag=a,ro=true":                "ro: it has a value: expected the name alone",
		"tag":                          "tag: it has no value: expected tag=VALUE",
		"tag=":                         "tag: it has no value",
		"dir=,tag=a":                   "dir: it has no value: expected the directory",
		"dir=srv,tag=a":                `dir: "srv" is relative`,
		"dir=/srv":                     "tag: it is empty",
		"tag=a,sokcet=/s":              "sokcet: there is no such key: did you mean socket?",
		"tag=a,graft=/":                "graft: there is no such key: expected one of",
		"tag=a,source=/s":              "source: there is no such key: expected one of",
		"tag=a,max-fds=many":           `max-fds: "many" is no whole number`,
		"tag=a,max-fds=-1":             "max-fds: -1 is out of range",
		"tag=a,num-request-queues=256": "num-request-queues: 256 is out of range",
		"tag=a,cache=maybe":            `cache: "maybe" is not a cache policy`,
		`tag=a\b`:                      `"tag=a\\b": a backslash stands alone`,
		`tag=a\`:                       `"tag=a\\": a backslash stands alone`,
	} {
		if s, err := ParseShare(text); err == nil || !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error(), "expected") && !strings.Contains(err.Error(), "did you mean") {
			t.Errorf("%s: %+v, %v, want %s", text, s, err, want)
		}
	}
}

// TestParseShareRoots has a share be something else than a directory.
func TestParseShareRoots(t *testing.T) {
	dir := []api.LowerSpec{{Source: "/d"}}
	for text, want := range map[string]api.GraftSpec{
		"dir=/d,overlay=discard":                      {Backend: "overlay", Options: []string{"upper=discard"}, Lowers: dir},
		"dir=/d,overlay=keep,option=from=c,option=ro": {Backend: "overlay", Options: []string{"upper=keep", "from=c", "ro"}, Lowers: dir},
		"dir=/d,upperdir=/u,workdir=/w":               {Backend: "overlay", Options: []string{"upperdir=/u", "workdir=/w"}, Lowers: dir},
		"lowerdir=/a:/b":                              {Backend: "overlay", Options: []string{"lowerdir=/a:/b"}},
		"lowerdir=//p/x/,option=xino=on,overlay=keep": {Backend: "overlay", Options: []string{"lowerdir=//p/x/", "xino=on", "upper=keep"}},
		"lowerdir=/a,upperdir=/u,workdir=/w":          {Backend: "overlay", Options: []string{"lowerdir=/a", "upperdir=/u", "workdir=/w"}},
		"image=r/x:y,option=layer=1":                  {Backend: "lazyimage", Options: []string{"image=r/x:y", "layer=1"}},
		"fuse=prog -o a {mnt}":                        {Backend: "fuse", Options: []string{"command=prog -o a {mnt}"}},
		`fuse=prog -o a\,b {mnt}`:                     {Backend: "fuse", Options: []string{"command=prog -o a,b {mnt}"}},
		"backend=permshift,dir=/d,option=format=auto": {Backend: "permshift", Source: "/d", Options: []string{"format=auto"}},
		"backend=mem":                                 {Backend: "mem"},
		"dir=/d,casefold":                             {Backend: "casefold", Lowers: dir},
		"dir=/d,casefold,overlay=discard":             {Backend: "casefold", Lowers: []api.LowerSpec{{Backend: "overlay", Options: []string{"upper=discard"}, Lowers: dir}}},
		"image=r/x:y,option=layer=1,overlay=discard":  {Backend: "overlay", Options: []string{"upper=discard"}, Lowers: []api.LowerSpec{{Backend: "lazyimage", Options: []string{"image=r/x:y", "layer=1"}}}},
		"backend=x,dir=/d,upperdir=/u,workdir=/w":     {Backend: "overlay", Options: []string{"upperdir=/u", "workdir=/w"}, Lowers: []api.LowerSpec{{Backend: "x", Source: "/d"}}},
	} {
		want.Path = "/"
		if s, err := ParseShare("tag=a," + text); err != nil || !reflect.DeepEqual(s.Grafts, []api.GraftSpec{want}) {
			t.Errorf("%s: %+v, %v", text, s.Grafts, err)
		}
	}
	for text, want := range map[string]string{
		"dir=/d,lowerdir=/a":     "lowerdir and dir: each says what the share is",
		"image=x,fuse=y":         "image and fuse: each says what the share is",
		"backend=x,lowerdir=/a":  "backend and lowerdir: each says what the share is",
		"overlay=discard":        "overlay: there is nothing under it",
		"upperdir=/u,workdir=/w": "upperdir: there is nothing under it",
		"casefold":               "casefold and option are for what the share is",
		"option=x":               "casefold and option are for what the share is",
		"dir=/d,option=x":        "option: a directory has none",
		"dir=/d,casefold=yes":    "casefold: it has a value",
		"image=":                 "image: it has no value: expected image=VALUE",
		"dir=/d,overlay=keep,upperdir=/u,workdir=/w": "overlay and upperdir: each says where changes go",
		"dir=d,overlay=keep":                         `dir: "d" is relative`,
		"dir=/d,overlay=keep,overlay=discard":        "overlay: it is given twice",
		"backend=a/b":                                `graft[0].backend: "a/b" cannot be a name`,
		"backend=mem,dir=/d":                         "dir: backend mem begins empty",
		"lowerdir=/a,uperdir=/u":                     "uperdir: there is no such key: did you mean upperdir?",
	} {
		if s, err := ParseShare("tag=a," + text); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %+v, %v, want %s", text, s, err, want)
		}
	}
}
