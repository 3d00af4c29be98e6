package guest_test

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest"
)

// repository is the directory of the repository.
const repository = "../.."

// TestPlugins serves an overlay of layers that two programs have: one in Python, whose entry is three layers, and one in Go, whose files
// are fetched when they are opened. One is killed at work.
func TestPlugins(t *testing.T) {
	forRoot(t)
	t.Parallel()
	s := &steered{machine: newScratch(t)}
	tars := filepath.Join(s.scratch, "tars")
	s.check(os.Mkdir(tars, 0o755))
	for i, script := range []string{
		"mknod hidden c 0 0; echo top >both", // a whiteout of what the third layer has
		"echo middle >middle; echo middle >both",
		"echo bottom >hidden; echo bottom >bottom; mkdir dir; head -c 300000 /dev/zero >dir/large",
	} {
		dir := filepath.Join(s.scratch, fmt.Sprint("l", i))
		s.check(os.Mkdir(dir, 0o755))
		hostSh(t, fmt.Sprintf("cd %s; %s; tar cf %s/%d.tar .", dir, script, tars, i))
	}
	var bodies atomic.Int32
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/index.txt" {
			fmt.Fprint(w, "web/one\nweb/two\n")
			return
		}
		if r.Method == http.MethodGet {
			bodies.Add(1)
		}
		body := map[string]string{"/web/one": "first", "/web/two": "second"}[r.URL.Path]
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(body))
	}))
	t.Cleanup(web.Close)
	filled := filepath.Join(s.scratch, "filled")
	s.check(os.Mkdir(filled, 0o755))
	httpdir, remove, err := testguest.BuildExample("httpdir")
	s.check(err)
	t.Cleanup(remove)
	tarlayers, err := filepath.Abs(filepath.Join(repository, "examples/tarlayers/tarlayers.py"))
	s.check(err)
	lowers := fmt.Sprintf("//tar//%s:%s", strings.TrimPrefix(tars, "/"), fmt.Sprintf("//http/%s/%s", base64.URLEncoding.EncodeToString([]byte(web.URL)), strings.TrimPrefix(filled, "/")))
	s.startSteered(testguest.DaemonConfig{Program: program, Shares: true, Args: []string{
		"--plugin", tarlayers, "--plugin", httpdir, "--state-dir", filepath.Join(s.scratch, "state"),
		"--share", fmt.Sprintf("tag=p,socket=%s/p.sock,lowerdir=%s,overlay=discard", s.scratch, lowers),
	}})
	g := s.on("p")
	g.says("both\nbottom\ndir\nmiddle\nweb", "ls /mnt/p")
	g.says("top\nbottom\nmiddle", "cd /mnt/p; cat both bottom middle")
	g.says("300000", "wc -c </mnt/p/dir/large")
	g.denies(noEntry, "cat /mnt/p/hidden")

	g.says("one\ntwo", "ls /mnt/p/web")
	if n := bodies.Load(); n != 0 {
		t.Errorf("%d files were fetched for a listing", n)
	}
	g.says("first", "cat /mnt/p/web/one")
	g.says("first", "cat /mnt/p/web/one")
	if n := bodies.Load(); n != 1 {
		t.Errorf("%d fetches of one file", n)
	}
	if got, err := os.ReadFile(filepath.Join(filled, "files/web/one")); err != nil || string(got) != "first" {
		t.Errorf("the host's directory has %q, %v", got, err)
	}
	g.sh("echo mine >/mnt/p/web/one; rm /mnt/p/bottom")
	g.says("mine", "cat /mnt/p/web/one")
	g.denies(noEntry, "cat /mnt/p/bottom")

	s.check(unix.Kill(s.process("python3"), unix.SIGKILL))
	g.says("second", "cat /mnt/p/web/two")
	g.await("the plug-in serves again", func() bool {
		out, err := g.trySh("echo 3 >/proc/sys/vm/drop_caches; cat /mnt/p/middle")
		return err == nil && out == "middle"
	})
}
