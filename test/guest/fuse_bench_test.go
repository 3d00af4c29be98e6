package guest_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/internal/testguest/sshd"
	"github.com/sluicefs/sluice/internal/testguest/tree"
)

// The tree that FUSE programs serve in the benchmark.
const (
	fuseBenchDirs  = 10
	fuseBenchFiles = 100
	fuseBenchBytes = 32 << 20 // of the file that is read
)

// fuseBench is a guest whose share has a program as a graft, and as another one the same program's mount on the host.
type fuseBench struct {
	b       *testing.B
	ctx     context.Context
	scratch string
	c       *client.Client
	g       *testguest.Guest
	d       *testguest.Daemon
	mounted int // process id of a program that is mounted on the host
}

func (f *fuseBench) check(err error) {
	f.b.Helper()
	if err != nil {
		f.b.Fatal(err)
	}
}

// must runs a command on the host.
func (f *fuseBench) must(args ...string) {
	f.b.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		f.b.Fatalf("%q: %v\n%s", args, err, out)
	}
}

// bridge adds the program as a graft.
func (f *fuseBench) bridge(args []string, options ...string) (path string, remove func()) {
	f.b.Helper()
	spec := api.GraftSpec{Path: "/bridged", Backend: "fuse", Options: append([]string{"command=" + strings.Join(args, " ")}, options...)}
	_, err := f.c.AddGraft(f.ctx, testguest.Tag, spec, false)
	f.check(err)
	return "/mnt/bridged", func() { f.check(f.c.RemoveGraft(f.ctx, testguest.Tag, spec.Path)) }
}

// mount mounts the program on the host and adds that as a graft.
func (f *fuseBench) mount(args []string) (path string, remove func()) {
	f.b.Helper()
	dir, err := os.MkdirTemp(f.scratch, "m")
	f.check(err)
	var before, now unix.Stat_t
	f.check(unix.Stat(dir, &before))
	mounted := []string{}
	for _, a := range args[1:] {
		mounted = append(mounted, strings.ReplaceAll(a, "{mnt}", dir))
	}
	cmd := exec.Command(args[0], mounted...)
	f.check(cmd.Start())
	f.b.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // in case that the benchmark fails
	for end := time.Now().Add(20 * time.Second); now.Dev == 0 || now.Dev == before.Dev; time.Sleep(time.Millisecond) {
		if _ = unix.Stat(dir, &now); time.Now().After(end) {
			f.b.Fatalf("%q has mounted nothing", args)
		}
	}
	_, err = f.c.AddGraft(f.ctx, testguest.Tag, api.GraftSpec{Path: "/mounted", Source: dir}, false)
	f.check(err)
	f.mounted = cmd.Process.Pid
	return "/mnt/mounted", func() {
		f.mounted = 0
		f.check(f.c.RemoveGraft(f.ctx, testguest.Tag, "/mounted"))
		f.check(unix.Unmount(dir, unix.MNT_DETACH))
		_ = cmd.Process.Kill() // the daemon may still have it open
		_ = cmd.Wait()
	}
}

// work is what the daemon and the program called name have done so far, since the latter was started: microseconds on a CPU, how often
// they have waited for something, and how many answers the program has given, as far as it writes nothing else. Other processes of the
// host do not touch it, as they do the time that passes.
func (f *fuseBench) work(name string) (cpu, waits, answers float64) {
	pids := f.d.PIDs()
	if f.mounted != 0 {
		pids = append(pids, f.mounted)
	}
	for _, pid := range pids {
		if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); strings.TrimSpace(string(comm)) == name {
			text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
			if _, writes, ok := strings.Cut(string(text), "syscw: "); ok {
				var n float64
				_, _ = fmt.Sscan(writes, &n)
				answers += n
			}
		}
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid)) // of which some may end meanwhile
		for _, task := range tasks {
			var ns float64
			text, _ := os.ReadFile(task + "/schedstat")
			_, _ = fmt.Sscan(string(text), &ns)
			cpu += ns / 1e3
			text, _ = os.ReadFile(task + "/status")
			for line := range strings.Lines(string(text)) {
				var n float64
				if _, err := fmt.Sscanf(line, "voluntary_ctxt_switches: %g", &n); err == nil {
					waits += n
				}
			}
		}
	}
	return cpu, waits, answers
}

// fuseSteps are what the guest does in a directory, in rounds of which each begins with programs that were just started. The guest
// forgets before each step; the program, and who asks it, remember for as long as the program allows.
var fuseSteps = [][]struct{ name, script string }{
	{{"find-cold", "find %s/tree -size +99999k"}, {"find-warm", "find %s/tree -size +99999k"}, {"read", "cat %s/big >/dev/null"}},
	{{"stat-cold", "cd %s/tree; xargs stat -c '' </tmp/names >/dev/null"}, {"stat-warm", "cd %s/tree; xargs stat -c '' </tmp/names >/dev/null"}},
}

// fuseWrites are those for programs that write.
var fuseWrites = []struct{ name, script string }{
	{"untar", "mkdir %[1]s/new; tar x -C %[1]s/new </tmp/tar"},
	{"find-new", "find %s/new -size +99999k"},
	{"rm", "rm -r %s/new"},
}

// BenchmarkFUSEPrograms has a guest work with FUSE programs as shares, and with the same mounted on the host and shared from there, in
// turn. The unit x is how many times as much the latter takes, the median of the rounds: of time, of CPU time of the daemon and the
// program, of their waits, and of answers.
func BenchmarkFUSEPrograms(b *testing.B) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	scratch, err := os.MkdirTemp("", "sluice-bench-")
	f := &fuseBench{b: b, ctx: ctx, scratch: scratch}
	f.check(err)
	b.Cleanup(func() { _ = os.RemoveAll(scratch) })
	in := func(name string) string { return filepath.Join(scratch, name) }
	var names strings.Builder
	for d := range fuseBenchDirs {
		f.check(os.MkdirAll(in(fmt.Sprintf("data/tree/dir%d", d)), 0o755))
		for i := range fuseBenchFiles {
			name := fmt.Sprintf("dir%d/file%d", d, i)
			fmt.Fprintln(&names, name)
			f.check(os.WriteFile(in("data/tree/"+name), []byte(name), 0o644))
		}
	}
	f.check(tree.WriteRandom(in("data/big"), fuseBenchBytes, 1))
	for _, dir := range []string{"share", "up", "work", "remote"} {
		f.check(os.Mkdir(in(dir), 0o755))
	}
	f.check(os.WriteFile(in("share/names"), []byte(names.String()), 0o644))
	f.must("tar", "cf", in("share/tar"), "-C", in("data/tree"), "dir0", "dir1")
	f.must("mksquashfs", in("data"), in("image"), "-quiet", "-no-progress")
	f.must("cp", "-a", in("data"), in("remote"))
	server, err := sshd.Start(scratch)
	f.check(err)
	b.Cleanup(server.Close)

	control := in("control.sock")
	d, err := testguest.StartDaemon(ctx, testguest.DaemonConfig{Program: program, Scratch: scratch, Share: in("share"), Args: []string{"--control-socket", control}})
	f.check(err)
	b.Cleanup(d.Close)
	f.d = d
	f.c, err = client.New(client.Config{Socket: control})
	f.check(err)
	b.Cleanup(func() { _ = f.c.Close() })
	f.g, err = testguest.Boot(ctx, testguest.Config{Kind: testguest.UML, Kit: kit, Initrd: initrd, Scratch: scratch, Devices: []testguest.Device{d.Device()}})
	f.check(err)
	b.Cleanup(f.g.Close)
	_, err = f.g.Sh(ctx, "mount -t virtiofs "+testguest.Tag+" /mnt; cp /mnt/names /mnt/tar /tmp")
	f.check(err)

	for _, p := range []struct {
		name    string
		args    []string
		writes  bool
		options []string
	}{
		{"squashfuse", []string{"squashfuse", "-f", "-o", "allow_other", in("image"), "{mnt}"}, false, nil},
		{"squashfuse_ll", []string{"squashfuse_ll", "-f", "-o", "allow_other", in("image"), "{mnt}"}, false, nil},
		{"fuse-overlayfs", []string{"fuse-overlayfs", "-f", "-o", fmt.Sprintf("allow_other,lowerdir=%s,upperdir=%s,workdir=%s", in("data"), in("up"), in("work")), "{mnt}"}, true, nil},
		{"sshfs", append(append([]string{"sshfs", "-f", "-o", "allow_other"}, server.Options(in("remote/data"))...), "{mnt}"), true, []string{"network"}},
	} {
		b.Run(p.name, func(b *testing.B) {
			f := *f
			f.b = b
			var order []string
			took := map[string]*[2][]float64{}
			rounds := fuseSteps
			if p.writes {
				rounds = append(slices.Clone(rounds), fuseWrites)
			}
			for turn := 0; b.Loop(); turn++ {
				for _, steps := range rounds {
					// One at a time: both may work on the same directories of the host.
					for side := range 2 {
						side = (side + turn) % 2
						var dir string
						var remove func()
						if side == 0 {
							dir, remove = f.bridge(p.args, p.options...)
						} else {
							dir, remove = f.mount(p.args)
						}
						for _, step := range steps {
							_, err := f.g.Sh(ctx, "echo 3 >/proc/sys/vm/drop_caches")
							f.check(err)
							cpu, waits, answers := f.work(p.name)
							began := time.Now()
							_, err = f.g.Sh(ctx, fmt.Sprintf(step.script, dir))
							f.check(err)
							elapsed := time.Since(began).Seconds()
							cpuAfter, waitsAfter, answersAfter := f.work(p.name)
							for what, n := range map[string]float64{"": elapsed, "-cpu": cpuAfter - cpu, "-waits": waitsAfter - waits, "-answers": answersAfter - answers} {
								if took[step.name+what] == nil {
									order = append(order, step.name+what)
									took[step.name+what] = new([2][]float64)
								}
								took[step.name+what][side] = append(took[step.name+what][side], n)
							}
						}
						remove()
					}
				}
			}
			for _, name := range order {
				t := took[name]
				ratios := make([]float64, len(t[0]))
				for i := range ratios {
					ratios[i] = t[1][i] / max(t[0][i], 1e-6)
				}
				median := func(all []float64) float64 {
					slices.Sort(all)
					return all[len(all)/2]
				}
				b.ReportMetric(median(ratios), name+"-x")
				switch {
				case strings.HasSuffix(name, "-answers"):
					b.ReportMetric(median(t[0]), name)
					b.ReportMetric(median(t[1]), name+"-mounted")
				case !strings.HasSuffix(name, "-cpu") && !strings.HasSuffix(name, "-waits"):
					b.ReportMetric(median(t[0])*1e3, name+"-ms")
				}
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
