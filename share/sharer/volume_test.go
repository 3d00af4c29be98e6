package sharer

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
)

// TestWatchLimits is row C10's limits: above one, a volume is shared all the same, and counted.
func TestWatchLimits(t *testing.T) {
	// A volume of n keys has 2n+2 files here: the keys, the links to them, ..data and the test's own.
	keys := func(n int, value string) map[string]string {
		keys := make(map[string]string)
		for i := range n {
			keys[fmt.Sprint("key", i)] = value
		}
		return keys
	}
	for _, tt := range []struct {
		name   string
		kind   string
		keys   map[string]string
		limits Limits
		watch  bool
		above  uint64
	}{
		{"at Kata's limit", k8sConfigMap, keys(3, "x"), Limits{}, true, 0},
		{"above it", k8sConfigMap, keys(4, "x"), Limits{}, false, 1},
		{"a larger one", k8sSecret, keys(4, "x"), Limits{HostFiles: 10}, true, 0},
		{"the agent's", k8sProjected, keys(8, "x"), Limits{HostFiles: 100}, false, 1},
		{"no limit", k8sDownwardAPI, keys(50, "x"), Limits{HostFiles: -1, Files: -1, Bytes: -1}, true, 0},
		{"bytes", k8sConfigMap, keys(2, "12345"), Limits{Bytes: 9}, false, 1},
		{"just the bytes", k8sConfigMap, keys(2, "12345"), Limits{Bytes: 10}, true, 0},
		{"no such volume", "kubernetes.io~host-path", keys(1, "x"), Limits{}, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			vol := newConfigMap(t, root, tt.kind, "vol", tt.keys)
			s, d := grafting(t, Config{Limits: tt.limits})
			for _, destination := range []string{"/a", "/b"} {
				mustShare(t, s, "c", &Mount{Source: vol.dir, Destination: destination, ReadOnly: true})
			}
			if g := only(t, d); g.Watch != tt.watch || g.Source != vol.dir {
				t.Errorf("graft %+v, want watch=%v", g.GraftSpec, tt.watch)
			}
			if got, err := s.Stats(t.Context()); err != nil || got.WatchLimited != tt.above {
				t.Errorf("%d volumes above a limit, want %d", got.WatchLimited, tt.above)
			}
		})
	}
	// What is copied is copied again when it changes, limit or not.
	root := t.TempDir()
	s, g := copying(t, Config{KubeletRoot: root})
	vol := newConfigMap(t, root, k8sConfigMap, "vol", keys(9, "1"))
	watching(t, s)
	f := mustShare(t, s, "c", &Mount{Source: vol.dir, Destination: "/x"})
	vol.update(keys(9, "2"))
	g.until(t, "a change above the limit", g.has(f.GuestPath, keys(9, "2")))
	if s.watchLimited.Load() != 1 {
		t.Errorf("%d volumes above a limit", s.watchLimited.Load())
	}
}

// TestWatchGrafts counts what the daemon tells, goes on when it goes away, and stops.
func TestWatchGrafts(t *testing.T) {
	s, d := grafting(t, Config{})
	d.Fail("Events", errors.New("not now"))
	watching(t, s)
	stats := func() Stats {
		stats, err := s.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return stats
	}
	// Nobody is told what was before, so until something arrives.
	limit := time.After(20 * time.Second)
	for stats().Events == 0 {
		d.Emit(guestTag, api.Event{Kind: api.EventModify, Path: "/x"})
		select {
		case <-limit:
			t.Fatal("no events")
		case <-time.After(time.Millisecond):
		}
	}
	for _, kind := range []string{api.EventLimit, api.EventRescan, api.EventDelete} {
		d.Emit(guestTag, api.Event{Kind: kind, Path: "/x"})
	}
	for ; ; time.Sleep(time.Millisecond) {
		if now := stats(); now.WatchLimited == 1 && now.Rescans == 1 {
			break
		}
		select {
		case <-limit:
			t.Fatalf("counted %+v", stats())
		default:
		}
	}
	if err := s.StartFileEventWatcher(context.Background()); err != nil {
		t.Errorf("a second start: %v", err)
	}
}

// TestEphemeral is row C16: volumes that are not the host's.
func TestEphemeral(t *testing.T) {
	want := &Storage{Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: "/run/kata-containers/sandbox/shm", Options: []string{"noexec", "nosuid", "nodev", "mode=1777", "size=67108864"}}
	if got := ShmStorage(64 << 20); !reflect.DeepEqual(got, want) {
		t.Errorf("shared memory is %+v", got)
	}
	dir := t.TempDir()
	// The test's directory may be on a tmpfs itself.
	disk := filepath.Join(podDir(dir, k8sEmptyDir), "cache")
	write(t, filepath.Join(disk, "x"), "")
	var stat unix.Statfs_t
	if err := unix.Statfs(disk, &stat); err != nil {
		t.Fatal(err)
	}
	onTmpfs := stat.Type == unix.TMPFS_MAGIC

	s, d := grafting(t, Config{})
	memory := Mount{Source: "/no/such/kubernetes.io~empty-dir/scratch", Destination: "/scratch", Type: "ephemeral"}
	f := mustShare(t, s, "a", &memory)
	if want := (&SharedFile{GuestPath: "/run/kata-containers/sandbox/ephemeral/scratch", VolumeStorages: []*Storage{{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: "/run/kata-containers/sandbox/ephemeral/scratch"}}}); !reflect.DeepEqual(f, want) {
		t.Errorf("emptyDir of memory: %+v", f)
	}
	local := Mount{Source: disk, Destination: "/cache", Type: "local"}
	if !onTmpfs {
		local.Type = "bind"
	}
	f = mustShare(t, s, "a", &local)
	if len(f.VolumeStorages) != 1 || f.VolumeStorages[0].Driver != "local" || f.VolumeStorages[0].Options[0] != "mode=0777" ||
		f.GuestPath != defaultGuestDir+"/pod1/rootfs/local/cache" || f.VolumeStorages[0].MountPoint != f.GuestPath {
		t.Errorf("emptyDir of the disk: %+v", f)
	}
	if left := grafted(t, d); len(left) != 0 {
		t.Errorf("what the guest makes is grafted: %v", left)
	}
	mustUnshare(t, s, "a", &local)

	if !onTmpfs {
		s, d := grafting(t, Config{DisableGuestEmptyDir: true})
		mustShare(t, s, "a", &Mount{Source: disk, Destination: "/cache"})
		if g := only(t, d); g.Source != disk || g.ReadOnly {
			t.Errorf("emptyDir that is shared: %+v", g.GraftSpec)
		}
		// Copied, it is the sandbox's.
		copier, _ := copying(t, Config{DisableGuestEmptyDir: true})
		f := mustShare(t, copier, "a", &Mount{Source: disk, Destination: "/elsewhere"})
		if ok, err := filepath.Match("/shared/sandbox-????????????????-cache", f.GuestPath); !ok || err != nil {
			t.Errorf("emptyDir that is copied: %s", f.GuestPath)
		}
	}

	// In the daemon's memory: one for all of the sandbox, with a limit, and gone with the last.
	s, d = grafting(t, Config{MemoryGrafts: true, MemoryBytes: 1 << 20})
	other := memory
	other.Destination = "/other"
	at := mustShare(t, s, "a", &memory).GuestPath
	if again := mustShare(t, s, "b", &other).GuestPath; again != at {
		t.Errorf("two containers have it at %s and %s", at, again)
	}
	g := only(t, d)
	if g.Backend != "mem" || g.Source != "" || g.MaxBytes != 1<<20 || g.ReadOnly {
		t.Errorf("graft of memory: %+v", g.GraftSpec)
	}
	mustUnshare(t, s, "a", &memory)
	only(t, d)
	mustUnshare(t, s, "b", &other)
	if left := grafted(t, d); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	sized := Mount{Source: "/x/sized", Destination: "/sized", Type: "ephemeral", Options: []string{"size=4096"}}
	mustShare(t, s, "a", &sized)
	if g := only(t, d); g.MaxBytes != 4096 {
		t.Errorf("limit %d", g.MaxBytes)
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
	if left := grafted(t, d); len(left) != 0 {
		t.Errorf("left after Cleanup: %v", left)
	}
	prepare(t, s)
	for _, size := range []string{"size=", "size=0", "size=-1", "size=1k"} {
		if _, err := s.ShareFile(t.Context(), &Container{ID: "a"}, &Mount{Source: "/x/y", Destination: "/y", Type: "ephemeral", Options: []string{size}}); err == nil {
			t.Errorf("option %q passes", size)
		}
	}
}

// TestTmpfsIsMemory tells an emptyDir's medium by what the host has there.
func TestTmpfsIsMemory(t *testing.T) {
	if !inPrivateMounts(t) {
		return
	}
	dir := filepath.Join(podDir(t.TempDir(), k8sEmptyDir), "scratch")
	write(t, filepath.Join(dir, "x"), "")
	mountAt(t, "none", dir, "tmpfs", 0, "size=1m,gid=77")
	s, _ := grafting(t, Config{})
	f := mustShare(t, s, "a", &Mount{Source: dir, Destination: "/x", Type: "bind"})
	if len(f.VolumeStorages) != 1 || f.VolumeStorages[0].Driver != "ephemeral" || !reflect.DeepEqual(f.VolumeStorages[0].Options, []string{"fsgid=77"}) {
		t.Errorf("shared %+v", f)
	}
	s, d := grafting(t, Config{MemoryGrafts: true})
	mustShare(t, s, "a", &Mount{Source: dir, Destination: "/x", Type: "bind"})
	if g := only(t, d); g.Backend != "mem" || g.MaxBytes != 1<<20 {
		t.Errorf("graft %+v", g.GraftSpec)
	}
}
