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
const (
	keyDir = "dir" // the source of a graft at "/"
	keyRO  = "ro"  // read-only
)

// ParseShare parses the argument of --share, "tag=src,socket=/run/src.sock,dir=/srv/src,cache=auto,ro": the keys of a
// [[share]] in a configuration file but for graft, and dir, the directory to serve. What is true or false there is named
// alone here. A comma that is part of a value is written "\,", a backslash "\\". Errors name the key.
func ParseShare(text string) (api.ShareSpec, error) {
	var s api.ShareSpec
	items, err := splitItems(text)
	if err != nil {
		return api.ShareSpec{}, err
	}
	given := make(map[string]bool)
	for _, item := range items {
		key, value, valued := strings.Cut(item, "=")
		name := key
		if key == keyRO {
			name = "read-only"
		}
		if given[name] {
			return api.ShareSpec{}, fmt.Errorf("%s: it is given twice: expected it once", name)
		}
		given[name] = true
		if err := setShareKey(&s, name, value, valued); err != nil {
			return api.ShareSpec{}, fmt.Errorf("%s: %w", join("", key), err)
		}
	}
	spellCache(&s)
	if all := s.Problems(); len(all) > 0 {
		field := all[0].TOML()
		if field == "graft[0].source" {
			field = keyDir
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
	if key == keyDir {
		if value == "" {
			return errors.New("it has no value: expected the directory to serve")
		}
		s.Grafts = []api.GraftSpec{{Path: "/", Source: value}}
		return nil
	}
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
	return append(all, keyDir, keyRO)
}
