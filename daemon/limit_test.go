package daemon

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/config"
)

func TestWantNofile(t *testing.T) {
	for _, tt := range []struct {
		name   string
		asked  int64
		soft   uint64
		nrOpen uint64
		want   uint64
	}{
		{"left alone", 0, 1024, 1 << 20, 1024},
		{"default", config.DefaultNofile, 1024, 1 << 20, 1000000},
		{"default under a low fs.nr_open", config.DefaultNofile, 1024, 5000, 5000},
		{"default, already more", config.DefaultNofile, 2000000, 1 << 21, 2000000},
		{"asked for more", 4096, 1024, 1 << 20, 4096},
		{"asked for less", 700, 1024, 1 << 20, 700},
	} {
		if got := wantNofile(tt.asked, unix.Rlimit{Cur: tt.soft, Max: tt.soft}, tt.nrOpen); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
}

func TestSettleBudgets(t *testing.T) {
	for _, tt := range []struct {
		name            string
		asked           int
		limit, reserved uint64
		want            int
		err             string
	}{
		{"default", 0, 1000, 600, 200, ""},
		{"default, capped", 0, 1000000, 600, defaultMaxFDs, ""},
		{"default, least", 0, 601, 600, 1, ""},
		{"asked", 400, 1000, 600, 400, ""},
		{"asked for too much", 401, 1000, 600, 0, "lower it to 400, or raise --rlimit-nofile to 1001"},
		{"limit too low", 0, 600, 600, 0, "limit of 600 open files is too low"},
	} {
		s := config.Share{MaxFDs: tt.asked}
		err := settleBudgets(&s, tt.limit, tt.reserved)
		switch {
		case tt.err == "" && (err != nil || s.MaxFDs != tt.want || s.MaxInodes != config.DefaultMaxInodes):
			t.Errorf("%s: %d descriptors and %d inodes (%v), want %d and %d", tt.name, s.MaxFDs, s.MaxInodes, err, tt.want, config.DefaultMaxInodes)
		case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("%s: error %v, want %q", tt.name, err, tt.err)
		}
	}
}
