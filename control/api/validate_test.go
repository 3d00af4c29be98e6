package api_test

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/share"
)

// full is a share with most of what a share can have.
func full() api.ShareSpec {
	return api.ShareSpec{
		Tag: "src", Socket: "/run/src.sock", SocketGroup: "kvm", Cache: "always", RequestQueues: 255,
		Grafts: []api.GraftSpec{
			{Path: "/", Source: "/srv/src", Watch: true, FollowMounts: true},
			{Path: "/scratch", Backend: "mem", Cache: "never", UIDMap: []api.IDRange{{0, 1000, 10}, {20, 0, 5}}},
			{Path: "/image", Backend: "lazy", Type: "lazy", Options: []string{"x"}},
			{Path: "/asked", Type: "lazy", Options: []string{"x"}},
		},
	}
}

// nest is a layer made of layers, depth of them.
func nest(depth int) []api.LowerSpec {
	if depth == 1 {
		return []api.LowerSpec{{Source: "/bottom"}}
	}
	return []api.LowerSpec{{Backend: "overlay", Lowers: nest(depth - 1)}}
}

func TestShareSpecProblems(t *testing.T) {
	long := strings.Repeat("n", 256)
	for _, tt := range []struct {
		name   string
		change func(*api.ShareSpec)
		want   []string // "field: the beginning of the problem"
	}{
		{"as it is", func(*api.ShareSpec) {}, nil},
		{"smallest", func(s *api.ShareSpec) { *s = api.ShareSpec{Tag: "t"} }, nil},
		{"longest tag", func(s *api.ShareSpec) { s.Tag = strings.Repeat("é", 18) }, nil},
		{"longest socket", func(s *api.ShareSpec) { s.Socket = "/" + strings.Repeat("s", 106) }, nil},

		{"no tag", func(s *api.ShareSpec) { s.Tag = "" }, []string{"tag: it is empty"}},
		{"long tag", func(s *api.ShareSpec) { s.Tag = strings.Repeat("é", 18) + "t" }, []string{"tag: it has 37 bytes"}},
		{"tag not UTF-8", func(s *api.ShareSpec) { s.Tag = "\xff" }, []string{`tag: "\xff" is not UTF-8`}},
		{"tag with a newline", func(s *api.ShareSpec) { s.Tag = "a\nb" }, []string{`tag: "a\nb" has a control`}},
		{"tag with a NUL", func(s *api.ShareSpec) { s.Tag = "a\x00" }, []string{`tag: "a\x00" has a control`}},
		{"tag with a slash", func(s *api.ShareSpec) { s.Tag = "a/b" }, []string{`tag: "a/b" has a slash`}},
		{"tag dot", func(s *api.ShareSpec) { s.Tag = "." }, []string{`tag: "." means a directory`}},
		{"tag dot dot", func(s *api.ShareSpec) { s.Tag = ".." }, []string{`tag: ".." means a directory`}},
		{"relative socket", func(s *api.ShareSpec) { s.Socket = "s" }, []string{`socket: "s" is relative`}},
		{"long socket", func(s *api.ShareSpec) { s.Socket = "/" + strings.Repeat("s", 107) }, []string{"socket: 108 bytes are too long"}},
		{"socket is a directory", func(s *api.ShareSpec) { s.Socket = "/run/" }, []string{`socket: "/run/" ends in a slash`}},
		{"socket with a NUL", func(s *api.ShareSpec) { s.Socket = "/\x00" }, []string{`socket: "/\x00" has a NUL`}},
		{"group", func(s *api.ShareSpec) { s.SocketGroup = "a\nb" }, []string{"socket_group: "}},
		{"cache", func(s *api.ShareSpec) { s.Cache = "maybe" }, []string{`cache: "maybe" is not a cache policy: expected one of never, metadata, auto, always`}},
		{"queues", func(s *api.ShareSpec) { s.RequestQueues = 256 }, []string{"num_request_queues: 256 is out of range"}},
		{"fewer queues than none", func(s *api.ShareSpec) { s.RequestQueues = -1 }, []string{"num_request_queues: -1"}},
		{"fds", func(s *api.ShareSpec) { s.MaxFDs = -1 }, []string{"max_fds: -1"}},
		{"inodes", func(s *api.ShareSpec) { s.MaxInodes = -1 }, []string{"max_inodes: -1"}},
		{"layers", func(s *api.ShareSpec) { s.Grafts[2].Lowers = nest(4) }, nil},
		{"layers nested too deep", func(s *api.ShareSpec) { s.Grafts[2].Lowers = nest(5) }, []string{"grafts[2].lowers[0].lowers[0].lowers[0].lowers[0].lowers: they are made of others, and those again, 5 deep"}},
		{"too many layers", func(s *api.ShareSpec) { s.Grafts[2].Lowers = make([]api.LowerSpec, 501) }, []string{"grafts[2].lowers: there are 501: expected at most 500"}},
		{"a layer of nothing", func(s *api.ShareSpec) {
			s.Grafts[2].Lowers = []api.LowerSpec{{Backend: "mem"}, {}, {Backend: "passthrough"}}
		}, []string{"grafts[2].lowers[1].source: there is nothing to serve", "grafts[2].lowers[2].source: there is nothing to serve"}},
		{"a relative layer", func(s *api.ShareSpec) { s.Grafts[2].Lowers = []api.LowerSpec{{Source: "a"}} }, []string{`grafts[2].lowers[0].source: "a" is relative`}},
		{"a layer's backend", func(s *api.ShareSpec) { s.Grafts[2].Lowers = []api.LowerSpec{{Backend: "a/b"}} }, []string{`grafts[2].lowers[0].backend: "a/b" cannot be a name`}},
		{"layers of mem", func(s *api.ShareSpec) { s.Grafts[1].Lowers = []api.LowerSpec{{Source: "/a"}} }, []string{"grafts[1].lowers: backend mem is made of no others"}},
		{"layers of passthrough", func(s *api.ShareSpec) { s.Grafts[0].Backend, s.Grafts[0].Lowers = "passthrough", nest(1) }, []string{"grafts[0].lowers: backend passthrough is made of no others"}},
		{"several", func(s *api.ShareSpec) { s.Tag, s.MaxFDs, s.Grafts[2].Path = "", -1, "x" }, []string{"tag: ", "max_fds: ", "grafts[2].path: "}},

		{"two at one path", func(s *api.ShareSpec) { s.Grafts[2].Path = "/scratch" }, []string{`grafts[2].path: "/scratch" is where graft 1 is`}},
		{"no path", func(s *api.ShareSpec) { s.Grafts[1].Path = "" }, []string{"grafts[1].path: it is empty"}},
		{"relative path", func(s *api.ShareSpec) { s.Grafts[1].Path = "a/b" }, []string{`grafts[1].path: "a/b" is relative`}},
		{"slash at the end", func(s *api.ShareSpec) { s.Grafts[1].Path = "/a/" }, []string{`grafts[1].path: "/a/" is not clean: expected "/a"`}},
		{"upwards", func(s *api.ShareSpec) { s.Grafts[1].Path = "/a/../b" }, []string{`grafts[1].path: "/a/../b" is not clean: expected "/b"`}},
		{"path with a NUL", func(s *api.ShareSpec) { s.Grafts[1].Path = "/a\x00" }, []string{"grafts[1].path: "}},
		{"path not UTF-8", func(s *api.ShareSpec) { s.Grafts[1].Path = "/\xff" }, []string{"grafts[1].path: "}},
		{"longest name", func(s *api.ShareSpec) { s.Grafts[1].Path = "/a/" + long[1:] }, nil},
		{"long name", func(s *api.ShareSpec) { s.Grafts[1].Path = "/a/" + long }, []string{"grafts[1].path: a name in it has 256 bytes"}},
		{"longest path", func(s *api.ShareSpec) { s.Grafts[1].Path = strings.Repeat("/"+long[:194], 21) }, nil},
		{"long path", func(s *api.ShareSpec) { s.Grafts[1].Path = strings.Repeat("/"+long[:255], 16) }, []string{"grafts[1].path: it has 4096 bytes"}},

		{"relative source", func(s *api.ShareSpec) { s.Grafts[0].Source = "src" }, []string{`grafts[0].source: "src" is relative`}},
		{"source with a NUL", func(s *api.ShareSpec) { s.Grafts[0].Source = "/\x00" }, []string{"grafts[0].source: "}},
		{"mem of something", func(s *api.ShareSpec) { s.Grafts[1].Source = "/srv" }, []string{"grafts[1].source: backend mem begins empty"}},
		{"passthrough of nothing", func(s *api.ShareSpec) { s.Grafts[1].Backend = "passthrough" }, []string{"grafts[1].source: backend passthrough has nothing"}},
		{"type of mem", func(s *api.ShareSpec) { s.Grafts[1].Type = "x" }, []string{"grafts[1].type: it is for extensions"}},
		{"options of passthrough", func(s *api.ShareSpec) { s.Grafts[0].Backend, s.Grafts[0].Options = "passthrough", []string{"x"} }, []string{"grafts[0].options: they are for extensions"}},
		{"backend", func(s *api.ShareSpec) { s.Grafts[2].Backend = "a/b" }, []string{"grafts[2].backend: "}},
		{"graft's cache", func(s *api.ShareSpec) { s.Grafts[1].Cache = "Never" }, []string{"grafts[1].cache: "}},
		{"watch of nothing", func(s *api.ShareSpec) { s.Grafts[1].Watch = true }, []string{"grafts[1].watch: "}},
		{"mounts of nothing", func(s *api.ShareSpec) { s.Grafts[1].FollowMounts = true }, []string{"grafts[1].follow_mounts: "}},

		{"no ids", func(s *api.ShareSpec) { s.Grafts[1].UIDMap[1].Count = 0 }, []string{"grafts[1].uid_map[1].count: it is 0"}},
		{"overlapping guest ids", func(s *api.ShareSpec) { s.Grafts[1].UIDMap[1] = api.IDRange{9, 0, 1} }, []string{"grafts[1].uid_map[1].guest: 9 is in two ranges, also in 0"}},
		{"overlapping host ids", func(s *api.ShareSpec) { s.Grafts[1].UIDMap[1] = api.IDRange{20, 999, 2} }, []string{"grafts[1].uid_map[1].host: 1000 is in two ranges, also in 0"}},
		{"ranges that touch", func(s *api.ShareSpec) { s.Grafts[1].UIDMap[1] = api.IDRange{10, 999, 1} }, nil},
		{"last id", func(s *api.ShareSpec) { s.Grafts[1].GIDMap = []api.IDRange{{4294967294, 1, 1}} }, nil},
		{"beyond the last id", func(s *api.ShareSpec) { s.Grafts[1].GIDMap = []api.IDRange{{1, 4294967294, 2}} }, []string{"grafts[1].gid_map[0]: the range goes beyond"}},
		{"many ranges", func(s *api.ShareSpec) { s.Grafts[1].GIDMap = make([]api.IDRange, 341) }, []string{"grafts[1].gid_map: it has 341 ranges"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := full()
			tt.change(&s)
			all := s.Problems()
			ok := len(all) == len(tt.want)
			for i := range min(len(all), len(tt.want)) {
				ok = ok && strings.HasPrefix(all[i].Error(), tt.want[i]) && strings.Contains(all[i].Problem, "expected")
			}
			if !ok {
				t.Errorf("found %v, want %q", all, tt.want)
			}
			err := s.Validate()
			if first := new(api.FieldError); errors.As(err, &first) != (len(all) > 0) || err != nil && first != all[0] && *first != *all[0] {
				t.Errorf("Validate: %v, want the first of %v", err, all)
			}
		})
	}
}

func TestGraftValidate(t *testing.T) {
	g := api.GraftSpec{Path: "data", Source: "/srv"}
	want := `path: "data" is relative: expected an absolute path in the share, such as /data`
	err := g.Validate()
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if e := new(api.FieldError); !errors.As(err, &e) || *e.API() != (api.Error{Code: api.CodeInvalid, Message: want}) {
		t.Errorf("as an answer: %+v", e.API())
	}
	if err := api.CheckPath("data"); err == nil || err.Error() != want {
		t.Errorf("CheckPath: %v, want %s", err, want)
	}
	if err := api.CheckTag("data"); err != nil {
		t.Errorf("CheckTag: %v", err)
	}
	g.Path = "/data"
	if err := g.Validate(); err != nil {
		t.Error(err)
	}
}

func TestGraftChangeValidate(t *testing.T) {
	for policy, ok := range map[string]bool{"": true, "auto": true, "none": false} {
		c := api.GraftChange{Cache: &policy}
		if err := c.Validate(); (err == nil) != ok {
			t.Errorf("cache %q: %v", policy, err)
		}
	}
	if err := new(api.GraftChange).Validate(); err != nil {
		t.Errorf("no change: %v", err)
	}
}

// TestAgreesWithConfig holds what cannot be imported here against what the command line takes.
func TestAgreesWithConfig(t *testing.T) {
	for name, n := range map[string][2]int{
		"MaxTag":           {api.MaxTag, config.MaxTag},
		"MaxSocketPath":    {api.MaxSocketPath, config.MaxSocketPath},
		"MaxRequestQueues": {api.MaxRequestQueues, config.MaxRequestQueues},
	} {
		if n[0] != n[1] {
			t.Errorf("%s is %d here and %d on the command line", name, n[0], n[1])
		}
	}
	if want := config.CachePolicy(0).Choices(); !slices.Equal(api.CachePolicies(), want) {
		t.Errorf("cache policies are %v here and %v on the command line", api.CachePolicies(), want)
	}
}

// TestAgreesWithShare holds the rules on ids against those of who translates them.
func TestAgreesWithShare(t *testing.T) {
	edges := []uint32{0, 1, 2, 3, 1<<32 - 3, 1<<32 - 2, 1<<32 - 1}
	var ranges []api.IDRange
	for _, guest := range edges {
		for _, host := range edges {
			for _, count := range edges {
				ranges = append(ranges, api.IDRange{guest, host, count})
			}
		}
	}
	for _, a := range ranges {
		for _, b := range append([]api.IDRange{{10, 10, 1}}, ranges...) {
			g := api.GraftSpec{Path: "/", UIDMap: []api.IDRange{a, b}}
			here, there := g.Validate(), share.IDMap{share.IDRange(a), share.IDRange(b)}.Validate()
			if (here == nil) != (there == nil) {
				t.Fatalf("%v and %v: here %v, in share %v", a, b, here, there)
			}
		}
	}
}

// TestFieldNames holds FieldError.TOML against the tags.
func TestFieldNames(t *testing.T) {
	for _, typ := range []reflect.Type{reflect.TypeFor[api.ShareSpec](), reflect.TypeFor[api.GraftSpec](), reflect.TypeFor[api.IDRange]()} {
		for i := range typ.NumField() {
			f := typ.Field(i)
			json, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			e := api.FieldError{Field: json}
			if got, want := e.TOML(), f.Tag.Get("toml"); got != want {
				t.Errorf("%s.%s: %q is made of %q, the tag is %q", typ.Name(), f.Name, got, json, want)
			}
		}
	}
}
