package configfile

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/sluicefs/sluice/control/api"
)

// Keys of --share that a [[share]] does not have.
const keyRO = "ro" // read-only

// rootKeys say what the root of the share is; see rootText.
var rootKeys = []string{"dir", "image", "fuse", "lowerdir", "upperdir", "workdir", "overlay", "casefold", "backend", "option"}

// Backends that keys of --share stand for.
const (
	backendOverlay    = "overlay"
	backendLazyImage  = "lazyimage"
	backendFUSEBridge = "fuse"
	backendCaseFold   = "casefold"
)

// rootText is what --share says of the root.
type rootText struct {
	values   map[string]string
	options  []string
	casefold bool
}

// set takes a key in.
func (r *rootText) set(key, value string, valued bool) error {
	switch {
	case key == "casefold" && valued:
		return errors.New("it has a value: expected the name alone, or to be left out")
	case key == "casefold":
		r.casefold = true
	case value == "" && key == "dir":
		return errors.New("it has no value: expected the directory to serve")
	case value == "":
		return fmt.Errorf("it has no value: expected %s=VALUE", key)
	case key == "option":
		r.options = append(r.options, value)
	default:
		r.values[key] = value
	}
	return nil
}

// graft is the root, nil where nothing is said of one. What is innermost is what dir, image, fuse or backend names; an overlay is put
// on it, and case folding on that.
func (r *rootText) graft() (*api.GraftSpec, error) {
	v := r.values
	var of []string
	for _, key := range []string{"image", "fuse", "backend", "lowerdir"} {
		if v[key] != "" {
			of = append(of, key)
		}
	}
	if v["dir"] != "" && v["backend"] == "" {
		of = append(of, "dir")
	}
	if len(of) > 1 {
		return nil, fmt.Errorf("%s and %s: each says what the share is: expected one of them", of[0], of[1])
	}
	if len(of) == 0 {
		for _, key := range []string{"overlay", "upperdir", "workdir"} {
			if v[key] != "" {
				return nil, fmt.Errorf("%s: there is nothing under it: expected dir, image, fuse, backend or lowerdir, too", key)
			}
		}
		if r.casefold || len(r.options) > 0 {
			return nil, errors.New("casefold and option are for what the share is: expected dir, image, fuse, backend or lowerdir, too")
		}
		return nil, nil
	}
	l := api.LowerSpec{Options: r.options}
	switch of[0] {
	case "dir":
		l.Source = v["dir"]
		if len(r.options) > 0 && v["overlay"]+v["upperdir"] == "" {
			return nil, errors.New("option: a directory has none: expected it with backend, image, fuse or an overlay")
		}
	case "image":
		l.Backend, l.Options = backendLazyImage, append([]string{"image=" + v["image"]}, l.Options...)
	case "fuse":
		l.Backend, l.Options = backendFUSEBridge, append([]string{"command=" + v["fuse"]}, l.Options...)
	case "backend":
		l.Backend, l.Source = v["backend"], v["dir"]
	case "lowerdir":
		l.Backend, l.Options = backendOverlay, append([]string{"lowerdir=" + v["lowerdir"]}, l.Options...)
	}
	if err := r.addOverlay(&l, of[0] == "lowerdir"); err != nil {
		return nil, err
	}
	if r.casefold {
		l = api.LowerSpec{Backend: backendCaseFold, Lowers: []api.LowerSpec{l}}
	}
	return &api.GraftSpec{Path: "/", Backend: l.Backend, Source: l.Source, Options: l.Options, Lowers: l.Lowers}, nil
}

// addOverlay puts the overlay on l that is asked for; already says that l is one.
func (r *rootText) addOverlay(l *api.LowerSpec, already bool) error {
	var options []string
	if upper := r.values["overlay"]; upper != "" {
		options = append(options, "upper="+upper)
	}
	for _, key := range []string{"upperdir", "workdir"} {
		if r.values[key] != "" {
			options = append(options, key+"="+r.values[key])
		}
	}
	switch {
	case r.values["overlay"] != "" && r.values["upperdir"] != "":
		return errors.New("overlay and upperdir: each says where changes go: expected one of them")
	case already:
		l.Options = append(l.Options, options...)
	case len(options) > 0 && l.Backend == "":
		*l = api.LowerSpec{Backend: backendOverlay, Options: append(options, l.Options...), Lowers: []api.LowerSpec{{Source: l.Source}}}
	case len(options) > 0:
		*l = api.LowerSpec{Backend: backendOverlay, Options: options, Lowers: []api.LowerSpec{*l}}
	}
	return nil
}

// ParseShare parses the argument of --share, "tag=src,socket=/run/src.sock,dir=/srv/src,cache=auto,ro": the keys of a
// [[share]] in a configuration file but for graft, and what the root is instead (rootKeys). What is true or false there is named
// alone here. A comma that is part of a value is written "\,", a backslash "\\". Errors name the key.
func ParseShare(text string) (api.ShareSpec, error) {
	var s api.ShareSpec
	items, err := splitItems(text)
	if err != nil {
		return api.ShareSpec{}, err
	}
	root := rootText{values: make(map[string]string)}
	given := make(map[string]bool)
	for _, item := range items {
		key, value, valued := strings.Cut(item, "=")
		name := key
		if key == keyRO {
			name = "read-only"
		}
		if given[name] && name != "option" {
			return api.ShareSpec{}, fmt.Errorf("%s: it is given twice: expected it once", name)
		}
		given[name] = true
		if slices.Contains(rootKeys, name) {
			err = root.set(name, value, valued)
		} else {
			err = setShareKey(&s, name, value, valued)
		}
		if err != nil {
			return api.ShareSpec{}, fmt.Errorf("%s: %w", join("", key), err)
		}
	}
	switch g, err := root.graft(); {
	case err != nil:
		return api.ShareSpec{}, err
	case g != nil:
		s.Grafts = []api.GraftSpec{*g}
	}
	spellCache(&s)
	if all := s.Problems(); len(all) > 0 {
		field := all[0].TOML()
		if field == "graft[0].source" || field == "graft[0].lower[0].source" {
			field = "dir"
		}
		return api.ShareSpec{}, fmt.Errorf("%s: %s", field, all[0].Problem)
	}
	return s, nil
}

// splitItems splits at the commas that no backslash precedes.
func splitItems(text string) ([]string, error) {
	var (
		items []string
		item  strings.Builder
	)
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == ',':
			items = append(items, item.String())
			item.Reset()
		case c == '\\' && i+1 < len(text) && (text[i+1] == ',' || text[i+1] == '\\'):
			i++
			item.WriteByte(text[i])
		case c == '\\':
			return nil, fmt.Errorf(`%s: a backslash stands alone: expected "\," for a comma in a value, "\\" for a backslash`, quote(text))
		default:
			item.WriteByte(c)
		}
	}
	return append(items, item.String()), nil
}

// setShareKey sets the field of s that key is for.
func setShareKey(s *api.ShareSpec, key, value string, valued bool) error {
	all := fields(reflect.TypeFor[api.ShareSpec]())
	i := slices.IndexFunc(all, func(f field) bool { return f.key == key })
	if i < 0 || key == "graft" {
		known := shareTextKeys()
		if near := nearest(key, known); near != "" {
			return fmt.Errorf("there is no such key: did you mean %s?", near)
		}
		return fmt.Errorf("there is no such key: expected one of %s", strings.Join(known, ", "))
	}
	v := reflect.ValueOf(s).Elem().Field(all[i].index)
	switch {
	case v.Kind() == reflect.Bool && valued:
		return errors.New("it has a value: expected the name alone, or to be left out")
	case v.Kind() == reflect.Bool:
		v.SetBool(true)
	case value == "":
		return fmt.Errorf("it has no value: expected %s=VALUE", key)
	case v.Kind() == reflect.Int:
		n, err := strconv.Atoi(value)
		if err != nil {
			return fmt.Errorf("%s is no whole number: expected one", quote(value))
		}
		v.SetInt(int64(n))
	default:
		v.SetString(value)
	}
	return nil
}

// shareTextKeys are the keys of --share.
func shareTextKeys() []string {
	all := keys(reflect.TypeFor[api.ShareSpec]())
	all = slices.DeleteFunc(all, func(key string) bool { return key == "graft" })
	return append(append(all, rootKeys...), keyRO)
}
