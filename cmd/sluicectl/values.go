package main

import (
	"encoding/json"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/sluicefs/sluice/control/api"
)

// size is a number of bytes on the command line: 4096, 10G, 1.5T.
type size uint64

const units = "KMGTPE"

// parseSize parses a number of bytes, of which K, M, G, T, P and E make 1024 times as many each.
func parseSize(s string) (uint64, error) {
	wrong := fmt.Errorf("%q is not a size; expected bytes, or a number with K, M, G or T behind it, such as 10G", s)
	number, shift := s, 0
	if s != "" {
		if i := strings.IndexByte(units, s[len(s)-1]&^0x20); i >= 0 {
			number, shift = s[:len(s)-1], 10*(i+1)
		}
	}
	if strings.Trim(number, "0123456789.") != "" {
		return 0, wrong // what ParseFloat would take: signs, exponents, "inf"
	}
	if n, err := strconv.ParseUint(number, 10, 64); err == nil {
		if n > math.MaxUint64>>shift {
			return 0, strconv.ErrRange
		}
		return n << shift, nil
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil || shift == 0 {
		return 0, wrong
	}
	if f = math.Ldexp(f, shift); f >= math.MaxUint64 {
		return 0, strconv.ErrRange
	}
	return uint64(f), nil
}

// String, Set and Type make a size a pflag.Value.
func (s *size) String() string {
	n, unit := uint64(*s), ""
	for i := 0; n != 0 && n%1024 == 0 && i < len(units); i++ {
		n, unit = n/1024, units[i:i+1]
	}
	return strconv.FormatUint(n, 10) + unit
}

// Set implements pflag.Value.
func (s *size) Set(text string) error {
	n, err := parseSize(text)
	if err == nil {
		*s = size(n)
	}
	return err
}

// Type implements pflag.Value.
func (s *size) Type() string { return "size" }

// idRanges are the ranges of an id map on the command line, GUEST:HOST:COUNT each.
type idRanges []api.IDRange

// String, Set and Type make them a pflag.Value.
func (r *idRanges) String() string {
	var all []string
	for _, m := range *r {
		all = append(all, fmt.Sprintf("%d:%d:%d", m.Guest, m.Host, m.Count))
	}
	return strings.Join(all, "+")
}

// Set implements pflag.Value: it adds a range.
func (r *idRanges) Set(text string) error {
	var n [3]uint32
	parts := strings.Split(text, ":")
	if len(parts) != len(n) {
		return fmt.Errorf("%q is not a range of ids; expected GUEST:HOST:COUNT, such as 0:100000:65536", text)
	}
	for i, part := range parts {
		v, err := strconv.ParseUint(part, 10, 32)
		if err != nil {
			return fmt.Errorf("%q: %q is not an id or a number of ids; expected GUEST:HOST:COUNT, such as 0:100000:65536", text, part)
		}
		n[i] = uint32(v)
	}
	*r = append(*r, api.IDRange{Guest: n[0], Host: n[1], Count: n[2]})
	return nil
}

// Type implements pflag.Value.
func (r *idRanges) Type() string { return "range" }

// lowers are the trees that a graft is made of, on the command line: a directory, or an api.LowerSpec in JSON, each.
type lowers []api.LowerSpec

// String, Set and Type make them a pflag.Value.
func (l *lowers) String() string {
	var all []string
	for _, lower := range *l {
		text := lower.Backend
		if text == "" {
			text = lower.Source
		}
		all = append(all, text)
	}
	return strings.Join(all, "+")
}

// Set implements pflag.Value: it adds one below those there are.
func (l *lowers) Set(text string) error {
	var lower api.LowerSpec
	if strings.HasPrefix(text, "{") {
		dec := json.NewDecoder(strings.NewReader(text))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&lower); err != nil {
			return fmt.Errorf("%q: %w; expected a directory, or JSON such as {\"backend\": \"lazyimage\", \"options\": [\"image=…\"]}", text, err)
		}
	} else {
		var err error
		if lower.Source, err = filepath.Abs(text); err != nil {
			return err
		}
	}
	*l = append(*l, lower)
	return nil
}

// Type implements pflag.Value.
func (l *lowers) Type() string { return "lower" }

// policy is a cache policy on the command line.
type policy string

var policies = []string{"never", "metadata", "auto", "always"}

// String, Set and Type make it a pflag.Value.
func (p *policy) String() string { return string(*p) }

// Set implements pflag.Value.
func (p *policy) Set(text string) error {
	if !slices.Contains(policies, text) {
		return fmt.Errorf("%q is not a cache policy; expected one of %s", text, strings.Join(policies, ", "))
	}
	*p = policy(text)
	return nil
}

// Type implements pflag.Value.
func (p *policy) Type() string { return "policy" }

// Choices are for completion.
func (p *policy) Choices() []string { return policies }
