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
