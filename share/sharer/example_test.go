package sharer_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/control"
	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/control/controltest"
	"github.com/sluicefs/sluice/share/sharer"
)

// begin of the example in docs/kata.md
func runPod(ctx context.Context, socket, hostDir, bundle, volume string) error {
	daemon, err := client.New(client.Config{Socket: socket})
	if err != nil {
		return err
	}
	defer daemon.Close()
	pod, err := sharer.New(sharer.Config{ID: "pod1", Backend: sharer.Grafts{Daemon: daemon, Tag: "kataShared"}, HostDir: hostDir})
	if err != nil {
		return err
	}
	defer pod.Cleanup(context.WithoutCancel(ctx)) // after the VM has ended
	if err := pod.Prepare(ctx); err != nil {
		return err
	}
	web := &sharer.Container{ID: "web", RootFs: sharer.RootFs{Target: filepath.Join(bundle, "rootfs"), Mounted: true}}
	root, err := pod.ShareRootFilesystem(ctx, web)
	if err != nil {
		return err
	}
	conf, err := pod.ShareFile(ctx, web, &sharer.Mount{Source: volume, Destination: "/etc/nginx", ReadOnly: true})
	if err != nil {
		return err
	}
	go pod.StartFileEventWatcher(ctx) // until Cleanup
	return startInGuest(root.GuestPath, conf)
}

// end of the example

// startInGuest stands for the runtime's agent.
func startInGuest(root string, conf *sharer.SharedFile) error {
	name := filepath.Base(conf.GuestPath)
	fmt.Println(root)
	fmt.Println(name[:len("web-")] + "…" + name[len(name)-len("-nginx"):])
	return nil
}

func Example() {
	dir, err := os.MkdirTemp("", "sharer-example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	for _, d := range []string{"bundle/rootfs", "volume"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			fmt.Println(err)
			return
		}
	}
	// What `sluiced --control-socket` is; with a daemon in this process a Grafter can be it, too.
	daemon := controltest.New()
	if _, err := daemon.AddShare(context.Background(), api.ShareSpec{Tag: "kataShared"}); err != nil {
		fmt.Println(err)
		return
	}
	l, err := net.Listen("unix", filepath.Join(dir, "control.sock"))
	if err != nil {
		fmt.Println(err)
		return
	}
	server, err := control.New(control.Config{Daemon: daemon, Listeners: []control.Listener{{Listener: l}}})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx) }()

	err = runPod(ctx, l.Addr().String(), filepath.Join(dir, "sandboxes"), filepath.Join(dir, "bundle"), filepath.Join(dir, "volume"))
	cancel()
	<-done
	grafts, listErr := daemon.Grafts(context.Background(), "kataShared")
	fmt.Println(err, len(grafts), listErr)
	// Output:
	// /run/kata-containers/shared/containers/web/rootfs
	// web-…-nginx
	// <nil> 1 <nil>
}

// TestDocumentedExample holds docs/kata.md to the example above, to the letter.
func TestDocumentedExample(t *testing.T) {
	source, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(source), "// begin of the example in docs/kata.md\n")
	example, _, ok := strings.Cut(rest, "\n// end of the example\n")
	if !ok || len(strings.Split(example, "\n")) < 20 {
		t.Fatal("the example is not where it is looked for")
	}
	doc, err := os.ReadFile("../../docs/kata.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(doc), "```go\n"+example+"```\n") {
		t.Errorf("docs/kata.md does not have this example:\n%s", example)
	}
}
