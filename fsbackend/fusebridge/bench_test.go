package fusebridge

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/internal/program"
)

// The benchmarks of this file compare a program behind a bridge with the same program mounted on the host and served from there by
// passthrough, which takes root. Rounds of the two are interleaved; what is reported is the median of the ratios of their times,
// above 1 where the bridge is faster.

const (
	benchDirs  = 20
	benchFiles = 100 // in each
)

// A rig is a program that is served one way or the other, until stop.
type rig struct {
	c    *fsbackendtest.Client
	stop func()
}

// benchProgram is a FUSE program on a tree that prepare has made, as a bridge's and mounted at a directory.
type benchProgram struct {
	name    string
	prepare func(b *testing.B, tree string) string // returns what is served
	bridged func(what string) program.Config
	mounted func(what, dir string) *exec.Cmd // in the foreground
}

var benchPrograms = []benchProgram{
	{
		"squashfuse_ll", squash,
		func(what string) program.Config { return command("squashfuse_ll", "-f", what, mnt) },
		func(what, dir string) *exec.Cmd {
			return exec.Command("squashfuse_ll", "-f", "-o", "allow_other", what, dir)
		},
	},
	{
		"squashfuse", squash,
		func(what string) program.Config { return command("squashfuse", "-f", what, mnt) },
		func(what, dir string) *exec.Cmd {
			return exec.Command("squashfuse", "-f", "-o", "allow_other", what, dir)
		},
	},
	{
		"squashfuse-notimeout", squash,
		func(what string) program.Config {
			return command("squashfuse", "-f", "-o", "attr_timeout=0,entry_timeout=0", what, mnt)
		},
		func(what, dir string) *exec.Cmd {
			return exec.Command("squashfuse", "-f", "-o", "allow_other,attr_timeout=0,entry_timeout=0", what, dir)
		},
	},
	{
		"loopback", func(_ *testing.B, tree string) string { return tree }, loopbackOn,
		func(what, dir string) *exec.Cmd {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(program.DefaultEnv(), role+"="+what, mountRole+"="+dir)
			return cmd
		},
	},
	{
		"fuse-overlayfs", func(_ *testing.B, tree string) string { return tree },
		func(what string) program.Config { return command("fuse-overlayfs", "-f", "-o", "lowerdir="+what, mnt) },
		func(what, dir string) *exec.Cmd {
			return exec.Command("fuse-overlayfs", "-f", "-o", "allow_other,lowerdir="+what, dir)
		},
	},
}

func squash(b *testing.B, tree string) string {
	image := filepath.Join(b.TempDir(), "image")
	run(b, "mksquashfs", tree, image, "-quiet", "-no-progress")
	return image
}

// bridge serves p behind a bridge.
func (p *benchProgram) bridge(b *testing.B, what string) rig {
	s := serve(b, p.bridged(what), Config{ParallelLookups: true}) // as the extension has it for these programs
	return rig{&fsbackendtest.Client{R: fsbackend.Resolve(s)}, func() { _ = s.Close() }}
}

// mount mounts p on the host and serves it by passthrough.
func (p *benchProgram) mount(b *testing.B, what string) rig {
	dir := b.TempDir()
	var before, now unix.Stat_t
	if err := unix.Stat(dir, &before); err != nil {
		b.Fatal(err)
	}
	cmd := p.mounted(what, dir)
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if err := unix.Stat(dir, &now); err == nil && now.Dev != before.Dev {
			break
		}
		if time.Now().After(end) {
			b.Fatalf("%s has mounted nothing at %s", p.name, dir)
		}
	}
	fs, err := passthrough.New(passthrough.Config{Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		_ = fs.Close()
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			b.Error(err)
		}
		_ = cmd.Wait()
	})
	b.Cleanup(stop) // what is mounted must not stay
	return rig{&fsbackendtest.Client{R: fsbackend.Resolve(fs)}, stop}
}

// Steps of a round, in order. A guest that has just looked at a tree does them again while what it was told is good no longer.
var steps = []struct {
	name string
	run  func(b *testing.B, c *fsbackendtest.Client)
}{
	{"readdirplus-cold", listAll},
	{"lookup-warm", lookupAll},
	{"readdirplus-warm", listAll},
}

// coldSteps are those of a round that begins with looking names up.
var coldSteps = []struct {
	name string
	run  func(b *testing.B, c *fsbackendtest.Client)
}{
	{"lookup-cold", lookupAll},
	{"getattr-warm", getattrAll},
	{"lookup-warm", lookupAll},
}

// lookupAll looks every file up by its path, as a guest that knows none of it.
func lookupAll(b *testing.B, c *fsbackendtest.Client) {
	for d := range benchDirs {
		dir, errno := c.Lookup(fsbackendtest.Root, fmt.Sprint("dir", d))
		if errno != 0 {
			b.Fatal(errno)
		}
		for f := range benchFiles {
			if _, errno := c.Lookup(dir.NodeId, fmt.Sprint("file", f)); errno != 0 {
				b.Fatal(errno)
			}
		}
	}
}

// getattrAll asks for every file's attributes. Nodes have been looked up in the same order by every rig, but their numbers differ.
func getattrAll(b *testing.B, c *fsbackendtest.Client) {
	for d := range benchDirs {
		dir, errno := c.Lookup(fsbackendtest.Root, fmt.Sprint("dir", d))
		if errno != 0 {
			b.Fatal(errno)
		}
		for range benchFiles {
			if _, errno := c.Getattr(dir.NodeId); errno != 0 {
				b.Fatal(errno)
			}
		}
	}
}

// listAll lists every directory with the attributes of what is in it.
func listAll(b *testing.B, c *fsbackendtest.Client) {
	for d := range benchDirs {
		dir, errno := c.Lookup(fsbackendtest.Root, fmt.Sprint("dir", d))
		if errno != 0 {
			b.Fatal(errno)
		}
		fh, errno := c.Opendir(dir.NodeId)
		if errno != 0 {
			b.Fatal(errno)
		}
		seen := 0
		for off := uint64(0); ; {
			entries, errno := c.Readdir(dir.NodeId, fh, off, 32<<10, true)
			if errno != 0 {
				b.Fatal(errno)
			}
			if len(entries) == 0 {
				break
			}
			for _, e := range entries {
				if e.Name[0] == 'f' {
					seen++
					if e.Entry.NodeId == 0 {
						if _, errno := c.Lookup(dir.NodeId, e.Name); errno != 0 { // as a guest would
							b.Fatal(errno)
						}
					}
				}
				off = e.Off
			}
		}
		c.Releasedir(dir.NodeId, fh)
		if seen != benchFiles {
			b.Fatalf("%d files listed, expected %d", seen, benchFiles)
		}
	}
}

// cpuTime is what this process has used, which is the daemon's part of both rigs: the programs are processes of their own.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkMetadata(b *testing.B) {
	tree := b.TempDir()
	for d := range benchDirs {
		dir := filepath.Join(tree, fmt.Sprint("dir", d))
		if err := os.Mkdir(dir, 0o755); err != nil {
			b.Fatal(err)
		}
		for f := range benchFiles {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("file", f)), []byte("x"), 0o644); err != nil {
				b.Fatal(err)
			}
		}
	}
	for _, p := range benchPrograms {
		b.Run(p.name, func(b *testing.B) {
			what := p.prepare(b, tree)
			ratios := map[string][]float64{}
			times, cpus := map[string][]float64{}, map[string][]float64{}
			for turn := 0; b.Loop(); turn++ {
				for _, round := range [][]struct {
					name string
					run  func(*testing.B, *fsbackendtest.Client)
				}{steps, coldSteps} {
					bridged, mounted := p.bridge(b, what), p.mount(b, what)
					for i, step := range round {
						var took, cpu [2]time.Duration
						for _, which := range [][]int{{0, 1}, {1, 0}}[(i+turn)%2] {
							began, used := time.Now(), cpuTime(b)
							step.run(b, []rig{bridged, mounted}[which].c)
							took[which], cpu[which] = time.Since(began), cpuTime(b)-used
						}
						name := step.name
						cpus[name] = append(cpus[name], float64(cpu[1])/float64(cpu[0]))
						ratios[name] = append(ratios[name], float64(took[1])/float64(took[0]))
						times[name] = append(times[name], float64(took[0])/float64(benchDirs*benchFiles)/1e3)
					}
					bridged.stop()
					mounted.stop()
				}
			}
			for name := range ratios {
				slices.Sort(ratios[name])
				slices.Sort(times[name])
				slices.Sort(cpus[name])
				b.ReportMetric(cpus[name][len(cpus[name])/2], name+"-cpu-ratio")
				b.ReportMetric(ratios[name][len(ratios[name])/2], name+"-ratio")
				b.ReportMetric(times[name][len(times[name])/2], name+"-us/file")
			}
		})
	}
}

// BenchmarkRoundTrip is one request and its reply, which nothing is kept of.
func BenchmarkRoundTrip(b *testing.B) {
	tree := b.TempDir()
	if err := os.WriteFile(filepath.Join(tree, "file"), []byte("x"), 0o644); err != nil {
		b.Fatal(err)
	}
	image := squash(b, tree)
	for _, name := range []string{"squashfuse_ll", "squashfuse"} {
		b.Run(name, func(b *testing.B) {
			c, _ := client(b, command(name, "-f", image, mnt), Config{NoCache: true})
			b.ReportAllocs()
			for b.Loop() {
				if _, errno := c.Getattr(fsbackendtest.Root); errno != 0 {
					b.Fatal(errno)
				}
			}
		})
	}
}
