package seccomp

import (
	"strings"
	"testing"
)

func TestInstallConfig(t *testing.T) {
	conds := func(c ...Cond) InstallConfig {
		return InstallConfig{Action: Kill, Filters: Filters{Allow: []Clause{{Syscall: "ioctl", Conds: c}}}}
	}
	for _, tt := range []struct {
		cfg  InstallConfig
		want string // "" is no error
	}{
		{InstallConfig{}, ""},
		{InstallConfig{Action: Log, Trace: true}, ""},
		{InstallConfig{Action: Log + 1}, "action Action(4): expected one of none, kill, trap, log"},
		{InstallConfig{Action: Kill, Trace: true}, "trace with action kill: expected log"},
		{InstallConfig{Filters: Filters{Allow: []Clause{{Syscall: "clone3"}}, NoSys: []string{"clone3"}}}, "clone3 is to be allowed and to fail with ENOSYS: expected one of them"},
		{conds(Cond{Arg: 1, Value: 3}, Cond{Arg: 5}), ""},
		{conds(Cond{Arg: 6}), "clause for ioctl: condition on argument 6: expected 0 to 5"},
		{conds(Cond{Arg: 1}, Cond{Arg: 1}), "clause for ioctl: two conditions on argument 1: expected a clause for each"},
		{conds(Cond{Op: OpMaskedEqual + 1}), "clause for ioctl: comparison Op(7): expected one that a filter has"},
		{conds(Cond{Op: OpMaskedEqual, Mask: 1, Value: 3}), "clause for ioctl: value 0x3 has bits outside the mask 0x1: expected one that can match"},
	} {
		got := ""
		if err := tt.cfg.Validate(); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("Validate() = %q, want %q", got, tt.want)
		}
		if tt.want == "" {
			continue
		}
		if err := Install(tt.cfg); err == nil || !strings.HasSuffix(err.Error(), tt.want) {
			t.Errorf("Install() = %v, want %s", err, tt.want)
		}
	}
	if err := Install(InstallConfig{Action: None}); err != nil {
		t.Errorf("install nothing: %v", err)
	}
}
