package share

import (
	"math"
	"strings"
	"testing"
)

func TestIDMapValidate(t *testing.T) {
	const last = math.MaxUint32 - 1
	for _, tt := range []struct {
		name string
		m    IDMap
		want string // part of the error; "" is none
	}{
		{"none", nil, ""},
		{"one", IDMap{{0, 100000, 65536}}, ""},
		{"two that touch", IDMap{{0, 1000, 10}, {10, 1010, 10}}, ""},
		{"the last id", IDMap{{last, last, 1}}, ""},
		{"empty", IDMap{{0, 0, 0}}, "empty"},
		{"4294967295 of the guest", IDMap{{last, 0, 2}}, "beyond"},
		{"4294967295 of the backend", IDMap{{0, last, 2}}, "beyond"},
		{"wraps", IDMap{{10, 0, math.MaxUint32}}, "beyond"},
		{"overlap in the guest", IDMap{{0, 0, 10}, {9, 100, 10}}, "overlap"},
		{"overlap in the backend", IDMap{{0, 100, 10}, {50, 95, 10}}, "overlap"},
		{"one within another", IDMap{{5, 0, 1}, {0, 100, 10}}, "overlap"},
	} {
		err := tt.m.Validate()
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, expected an error with %q", tt.name, err, tt.want)
		}
	}
}

func TestIDMap(t *testing.T) {
	m := IDMap{{0, 100000, 1000}, {5000, 7, 1}}
	for _, tt := range []struct {
		guest, host uint32
		ok          bool
	}{
		{0, 100000, true},
		{999, 100999, true},
		{1000, OverflowID, false},
		{5000, 7, true},
		{5001, OverflowID, false},
		{math.MaxUint32, OverflowID, false},
	} {
		if host, ok := m.host(tt.guest); host != tt.host || ok != tt.ok {
			t.Errorf("guest's %d is the backend's %d, %v, expected %d, %v", tt.guest, host, ok, tt.host, tt.ok)
		}
		if guest := m.guest(tt.host); tt.ok && guest != tt.guest {
			t.Errorf("the backend's %d is the guest's %d, expected %d", tt.host, guest, tt.guest)
		}
	}
	for _, id := range []uint32{0, 6, 8, 99999, 101000, math.MaxUint32} {
		if guest := m.guest(id); guest != OverflowID {
			t.Errorf("the backend's %d, in no range, reads as %d", id, guest)
		}
	}
	var same IDMap
	if host, ok := same.host(math.MaxUint32); host != math.MaxUint32 || !ok || same.guest(12) != 12 {
		t.Error("an empty map changes ids")
	}
}
