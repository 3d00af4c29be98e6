package guest_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/internal/testguest/tree"
)

// BenchmarkREAD has guests read 4 KiB at a time past their caches, in turn: from a daemon that serves a directory and nothing else,
// and from those whose shares can change, with one graft and with a thousand, the root's file and a graft's. The unit x-alone is
// how many times what the first takes, by medians.
func BenchmarkREAD(b *testing.B) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	check := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	share := filepath.Join(b.TempDir(), "share")
	check(os.Mkdir(share, 0o755))
	check(tree.WriteRandom(filepath.Join(share, "file"), 16<<20, 1))
	boot := func(grafts int) *testguest.Guest {
		b.Helper()
		scratch, err := os.MkdirTemp("", "sluice-bench-")
		check(err)
		b.Cleanup(func() { _ = os.RemoveAll(scratch) })
		args, control := []string{"--allow-direct-io"}, filepath.Join(scratch, "control.sock")
		if grafts > 0 {
			args = append(args, "--control-socket", control)
		}
		d, err := testguest.StartDaemon(ctx, testguest.DaemonConfig{Program: program, Scratch: scratch, Share: share, Args: args})
		check(err)
		b.Cleanup(d.Close)
		if grafts > 0 {
			c, err := client.New(client.Config{Socket: control})
			check(err)
			for i := range grafts {
				_, err := c.AddGraft(ctx, testguest.Tag, api.GraftSpec{Path: fmt.Sprint("/g", i), Source: share}, false)
				check(err)
			}
			check(c.Close())
		}
		g, err := testguest.Boot(ctx, testguest.Config{Kind: testguest.UML, Kit: kit, Initrd: initrd, Scratch: scratch, Devices: []testguest.Device{d.Device()}})
		check(err)
		b.Cleanup(g.Close)
		_, err = g.Sh(ctx, "mount -t virtiofs "+testguest.Tag+" /mnt")
		check(err)
		return g
	}
	alone, one, thousand := boot(0), boot(1), boot(1000)
	list := []struct {
		name  string
		g     *testguest.Guest
		file  string
		taken []float64
	}{
		{"alone", alone, "/mnt/file", nil},
		{"root", one, "/mnt/file", nil},
		{"1", one, "/mnt/g0/file", nil},
		{"1000-root", thousand, "/mnt/file", nil},
		{"1000", thousand, "/mnt/g500/file", nil},
	}
	for _, how := range []string{"sequential", "random"} {
		b.Run(how, func(b *testing.B) {
			for i := range list {
				list[i].taken = nil
			}
			for b.Loop() {
				for i := range list {
					e := &list[i]
					text, err := e.g.Sh(ctx, fmt.Sprint("guestprog read ", e.file, " 4000 ", how))
					check(err)
					ns, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
					check(err)
					e.taken = append(e.taken, ns)
				}
			}
			median := func(i int) float64 {
				slices.Sort(list[i].taken)
				return list[i].taken[len(list[i].taken)/2]
			}
			b.ReportMetric(median(0), "ns-alone")
			for i := 1; i < len(list); i++ {
				b.ReportMetric(median(i)/median(0), list[i].name+"-x-alone")
			}
		})
	}
}
