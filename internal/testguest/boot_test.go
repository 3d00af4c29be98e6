package testguest

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestGuest(t *testing.T) {
	kit, err := FindKit()
	if err != nil {
		t.Fatal(err)
	}
	initrd := filepath.Join(t.TempDir(), "initrd")
	if err := WriteInitramfs(initrd, kit, nil); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []Kind{UML, QEMU} {
		t.Run(string(kind), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			begin := time.Now()
			g, err := Boot(ctx, Config{Kind: kind, Kit: kit, Initrd: initrd, Scratch: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(g.Close)
			t.Logf("booted in %v", time.Since(begin))

			big := strings.Repeat("0123456789abcde\n", 1<<16)
			for _, test := range []struct {
				name    string
				command Command
				want    Result
			}{
				{"output and status", Command{Args: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}}, Result{"out\n", "err\n", 3}},
				{"signal", Command{Args: []string{"sh", "-c", "kill -9 $$"}}, Result{Status: 128 + 9}},
				{"user", Command{Args: []string{"id", "-G"}, UID: 1000, GID: 1000, Groups: []uint32{1000, 2000}}, Result{Stdout: "1000 2000\n"}},
				{"environment", Command{Args: []string{"sh", "-c", "pwd; echo $X"}, Dir: "/tmp", Env: []string{"X=y"}}, Result{Stdout: "/tmp\ny\n"}},
				{"a mebibyte", Command{Args: []string{"sh", "-c", "yes 0123456789abcde | head -n 65536"}}, Result{Stdout: big}},
				{"a long argument", Command{Args: []string{"printf", "%s", big[:2<<10]}}, Result{Stdout: big[:2<<10]}},
			} {
				t.Run(test.name, func(t *testing.T) {
					got, err := g.Run(ctx, test.command)
					if err != nil {
						t.Fatalf("%v\nconsole:\n%s", err, g.Console())
					}
					if got != test.want {
						t.Errorf("got %.200s, want %.200s", fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", test.want))
					}
				})
			}
			if _, err := g.Run(ctx, Command{Args: []string{"no-such-program"}}); err == nil || !strings.Contains(err.Error(), "not found") {
				t.Errorf("run a program that does not exist: %v, want an error that says so", err)
			}
			if _, err := g.Run(ctx, Command{Args: []string{"echo", big}}); err == nil || !strings.Contains(err.Error(), "at most") {
				t.Errorf("run a command of a mebibyte: %v, want an error that says how much is possible", err)
			}
			if err := g.PowerOff(ctx); err != nil {
				t.Errorf("%v\nconsole:\n%s", err, g.Console())
			}
		})
	}
}
