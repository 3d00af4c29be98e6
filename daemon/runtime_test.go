package daemon

import (
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"testing"
)

func TestCgroupMemory(t *testing.T) {
	root := t.TempDir()
	for path, max := range map[string]string{
		"machine":               "2000000\n",
		"machine/vm":            "max\n",
		"machine/vm/sluiced":    "3000000\n",
		"machine/vm/small":      "1000000\n",
		"machine/vm/small/leaf": "max\n",
		"broken":                "a lot\n",
		"free":                  "max\n",
	} {
		if err := os.MkdirAll(filepath.Join(root, path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path, "memory.max"), []byte(max), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for cgroup, want := range map[string]int64{
		"0::/machine/vm/sluiced\n":                      2000000, // the parent's is lower
		"0::/machine/vm/small/leaf\n":                   1000000,
		"4:memory:/old\n1:name=systemd:/x\n0::/machine": 2000000,
		"0::/broken\n":                                  math.MaxInt64,
		"0::/free\n":                                    math.MaxInt64,
		"0::/\n":                                        math.MaxInt64,
		"0::/../../machine/vm\n":                        2000000, // seen from a namespace of cgroups it is outside of
		"0::/not/there\n":                               math.MaxInt64,
		"4:memory:/machine\n":                           math.MaxInt64, // version 1
		"":                                              math.MaxInt64,
	} {
		file := filepath.Join(root, "cgroup")
		if err := os.WriteFile(file, []byte(cgroup), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := cgroupMemory(file, root); got != want {
			t.Errorf("%q: %d, want %d", cgroup, got, want)
		}
	}
	if got := cgroupMemory(filepath.Join(root, "absent"), root); got != math.MaxInt64 {
		t.Errorf("without a list of cgroups: %d", got)
	}
}

func TestOwnMemoryLimitCounts(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	limitMemory(func(name string) string { return map[string]string{"GOMEMLIMIT": "1GiB"}[name] })
	if after := debug.SetMemoryLimit(-1); after != before {
		t.Errorf("the limit is %d, expected it to stay %d", after, before)
	}
}
