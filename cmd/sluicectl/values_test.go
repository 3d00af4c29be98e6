package main

import (
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/sluicefs/sluice/control/api"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]uint64{
		"0": 0, "4096": 4096, "1K": 1024, "2k": 2048, "10G": 10 << 30, "1.5M": 3 << 19, "1T": 1 << 40, "18446744073709551615": math.MaxUint64, "15E": 15 << 60,
	} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("%q is %d (%v), want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "K", "10X", "-1", "+1", "1e3", "0x10", "inf", "1.5", "1.2.3G", ".", "10 G", "18446744073709551616", "16E", "99999999T", "1_0"} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("%q is taken as %d", text, got)
		}
	}
	for n, want := range map[size]string{0: "0", 1: "1", 1024: "1K", 1536: "1536", 10 << 30: "10G", 1 << 60: "1E", math.MaxUint64: "18446744073709551615"} {
		if got := n.String(); got != want {
			t.Errorf("%d is written %q, want %q", uint64(n), got, want)
		}
	}
}

func TestParseGraft(t *testing.T) {
	for _, tt := range []struct {
		text string
		want api.GraftSpec
	}{
		{"/=/srv", api.GraftSpec{Path: "/", Source: "/srv"}},
		{"/a//b/=/srv/../x", api.GraftSpec{Path: "/a/b", Source: "/x"}},
		{"/a=/srv:ro", api.GraftSpec{Path: "/a", Source: "/srv", ReadOnly: true}},
		{"/a=/srv:rw,ro", api.GraftSpec{Path: "/a", Source: "/srv", ReadOnly: true}},
		{"/a=/srv,ro,rw", api.GraftSpec{Path: "/a", Source: "/srv"}},
		{"/a=/srv,ro=false,nosuid=true", api.GraftSpec{Path: "/a", Source: "/srv", NoSUID: true}},
		{"/a=/srv:x", api.GraftSpec{Path: "/a", Source: "/srv:x"}},
		{"/a=/b=c", api.GraftSpec{Path: "/a", Source: "/b=c"}},
		{`/a\=b=/c\,d\:ro`, api.GraftSpec{Path: "/a=b", Source: "/c,d:ro"}},
		{`/a=/c\\:ro`, api.GraftSpec{Path: "/a", Source: `/c\`, ReadOnly: true}},
		{"/a=,backend=mem,max-bytes=64M", api.GraftSpec{Path: "/a", Backend: "mem", MaxBytes: 64 << 20}},
		{"/a=remote:x,type=nfs,option=vers=4,option=soft", api.GraftSpec{Path: "/a", Source: "remote:x", Type: "nfs", Options: []string{"vers=4", "soft"}}},
		{
			"/a=/s,uid-map=0:1000:1,uid-map=1:2000:9,gid-map=0:5:1,cache=never,watch,follow-mounts,nodev,noexec,nosymfollow,max-inodes=7",
			api.GraftSpec{
				Path: "/a", Source: "/s", UIDMap: []api.IDRange{{Guest: 0, Host: 1000, Count: 1}, {Guest: 1, Host: 2000, Count: 9}}, GIDMap: []api.IDRange{{Guest: 0, Host: 5, Count: 1}},
				Cache: "never", Watch: true, FollowMounts: true, NoDev: true, NoExec: true, NoSymfollow: true, MaxInodes: 7,
			},
		},
	} {
		if got, err := parseGraft(tt.text); err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%q is %+v (%v), want %+v", tt.text, got, err, tt.want)
		}
	}
	for text, want := range map[string]string{
		"":                               "has no source",
		"/a":                             "has no source",
		"a=/srv":                         "is relative: expected an absolute one, such as /a",
		"=/srv":                          "is relative",
		"/a=/srv,fast":                   `unknown option "fast"`,
		"/a=/srv,":                       `unknown option ""`,
		"/a=/srv,cache":                  "option cache needs a value",
		"/a=/srv,cache=some":             "not a cache policy",
		"/a=/srv,max-bytes=ten":          "not a size",
		"/a=/srv,max-bytes=99E":          "max-bytes: 99E is out of range",
		"/a=/srv,max-inodes=-1":          "not a whole number",
		"/a=/srv,ro=perhaps":             "not true or false",
		"/a=/srv,uid-map=0:1":            "expected GUEST:HOST:COUNT",
		"/a=/srv,uid-map=0:x:1":          `"x" is not an id`,
		"/a=/srv,gid-map=0:1:9999999999": "is not an id",
		"/a\x00=/srv":                    "NUL",
	} {
		if got, err := parseGraft(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v (%+v), want an error with %q", text, err, got, want)
		}
	}
}

// FuzzParseGraft writes what it parsed again, and expects to read the same.
func FuzzParseGraft(f *testing.F) {
	for _, s := range []string{"/a=/srv:ro,nosuid", `/a\=b=/c\,d\:ro`, "/x=,backend=mem,max-bytes=64M", "/h=/s,uid-map=0:1000:1,cache=never", `/a=b\`, "/t=s,type=x,option=a=b\\,c", ",,,", "=:ro"} {
		f.Add(s)
	}
	quote := strings.NewReplacer(`\`, `\\`, ",", `\,`, ":", `\:`, "=", `\=`).Replace
	f.Fuzz(func(t *testing.T, text string) {
		g, err := parseGraft(text)
		if err != nil {
			return
		}
		again := quote(g.Path) + "=" + quote(g.Source)
		for _, o := range graftOptions {
			switch v := o.field(&g).(type) {
			case *bool:
				if *v {
					again += "," + o.name
				}
			case *[]string:
				for _, s := range *v {
					again += "," + o.name + "=" + quote(s)
				}
			case *idRanges:
				for _, r := range *v {
					again += "," + o.name + "=" + (&idRanges{r}).String()
				}
			default:
				fs := pflag.NewFlagSet("", pflag.ContinueOnError)
				o.addTo(fs, &g)
				if s := fs.Lookup(o.name).Value.String(); s != "" {
					again += "," + o.name + "=" + quote(s)
				}
			}
		}
		if back, err := parseGraft(again); err != nil || !reflect.DeepEqual(back, g) {
			t.Errorf("%q is %+v; written as %q it is %+v (%v)", text, g, again, back, err)
		}
	})
}

// TestOptions sets each field of the API's types by an option, and finds each option to set one.
func TestOptions(t *testing.T) {
	var share api.ShareSpec
	fields := pointers(&share)
	delete(fields, reflect.ValueOf(&share.Tag).Pointer())
	delete(fields, reflect.ValueOf(&share.Grafts).Pointer())
	for _, o := range shareOptions {
		checkField(t, fields, o.name, o.field(&share))
	}
	for _, name := range fields {
		t.Errorf("no option sets ShareSpec.%s", name)
	}

	var graft api.GraftSpec
	fields = pointers(&graft)
	delete(fields, reflect.ValueOf(&graft.Path).Pointer())
	delete(fields, reflect.ValueOf(&graft.Source).Pointer())
	changeable := make(map[string]bool)
	for i := range reflect.TypeFor[api.GraftChange]().NumField() {
		changeable[reflect.TypeFor[api.GraftChange]().Field(i).Name] = true
	}
	for _, o := range graftOptions {
		field := checkField(t, fields, o.name, o.field(&graft))
		if o.change == nil {
			continue
		}
		var change api.GraftChange
		o.change(&change, &graft)
		if v := reflect.ValueOf(change).FieldByName(field); !v.IsValid() || v.IsNil() || v.Pointer() != reflect.ValueOf(o.field(&graft)).Pointer() {
			t.Errorf("--%s does not change GraftChange.%s", o.name, field)
		}
		delete(changeable, field)
	}
	for _, name := range fields {
		t.Errorf("no option sets GraftSpec.%s", name)
	}
	for name := range changeable {
		t.Errorf("no option sets GraftChange.%s", name)
	}
}

// pointers are the fields of v by address.
func pointers[T any](v *T) map[uintptr]string {
	all := make(map[uintptr]string)
	s := reflect.ValueOf(v).Elem()
	for i := range s.NumField() {
		all[s.Field(i).Addr().Pointer()] = s.Type().Field(i).Name
	}
	return all
}

// checkField takes the field at p out of fields and returns its name.
func checkField(t *testing.T, fields map[uintptr]string, option string, p any) string {
	at := reflect.ValueOf(p).Pointer()
	field := fields[at]
	if field == "" {
		t.Errorf("--%s sets no field, or one that another option sets", option)
	}
	delete(fields, at)
	return field
}
