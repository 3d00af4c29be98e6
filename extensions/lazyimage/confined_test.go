package lazyimage

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/seccomp"
)

// role is the environment variable that makes this binary the half inside, whose value is Given.Data.
const role = "LAZYIMAGE_TEST_INSIDE"

// inside opens what it was given as descriptor 3 behind the filter, reads all there is, and says what the filter would not have let it.
func inside(data string) error {
	e := new(Extension)
	policy, err := seccomp.New(seccomp.Base(seccomp.BaseOptions{PID: os.Getpid(), Link: true}), seccomp.Source{Owner: Name, Rules: e.SeccompRules()})
	if err != nil {
		return err
	}
	err = seccomp.Install(seccomp.InstallConfig{
		Filters: seccomp.Filters{Deny: policy.Deny(), Allow: policy.Allow(), NoSys: policy.NoSys()}, Action: seccomp.Log,
	})
	if err != nil {
		return err
	}
	given := &extensions.Given{Data: json.RawMessage(data), Files: []*os.File{os.NewFile(3, "line")}}
	var tell func(string, json.RawMessage, []*os.File) (any, error)
	b, _, err := e.OpenInside(&extensions.Inside{
		Log: slog.New(slog.DiscardHandler), OnTell: func(f func(string, json.RawMessage, []*os.File) (any, error)) { tell = f }, MaxFDs: 4,
	}, extensions.Mount{Backend: Name}, given)
	if err != nil {
		return err
	}
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	for range 2 {
		for _, p := range []string{"etc/hostname", "bin/tool"} {
			s, errno := read(c, p)
			fmt.Println(p, len(s), errno)
		}
	}
	_, err = tell("check", nil, nil)
	fmt.Println("check", err)
	fmt.Println("close", b.Close())
	for _, v := range seccomp.Seen() {
		fmt.Println("filtered", v.Syscall, v.Count)
	}
	return nil
}

// The half inside makes no system call but those that are the daemon's own, and those that it declares.
func TestInsideTheFilter(t *testing.T) {
	image := imagetest.New(t, files...)
	e := &Extension{program: fetch}
	var onClose []func() error
	out := &extensions.Outside{
		Log:     slog.New(slog.DiscardHandler),
		OnClose: func(f func() error) { onClose = append(onClose, f) },
		Action:  func(string, func(context.Context, json.RawMessage) (any, error)) {},
	}
	defer func() {
		for i := range onClose {
			if err := onClose[len(onClose)-1-i](); err != nil {
				t.Error(err)
			}
		}
	}()
	given, err := e.OpenOutside(t.Context(), out, mount("image="+image.Ref))
	if err != nil {
		t.Fatal(err)
	}
	defer given.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), role+"="+string(given.Data))
	cmd.ExtraFiles = given.Files
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, b.String())
	}
	want := strings.Repeat("etc/hostname 5 errno 0\nbin/tool 200000 errno 0\n", 2) + "check <nil>\nclose <nil>\n"
	if b.String() != want {
		t.Errorf("it says\n%s, expected\n%s", b.String(), want)
	}
}
