package guest_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest"
)

// surroundings is what the daemon runs in: a sandbox and a user. All tests hold in each.
type surroundings struct {
	name    string
	uid     uint32
	options []string
	// firstID is the host's id for the guest's 0; others follow it. Without a range there is only the one.
	firstID int
	ranges  bool
	// without are cases of guestprog that need what the daemon may not do here: ids of others, device nodes.
	without []string
	// rootWithout are more of them, when the guest's root tries.
	rootWithout []string
}

// ordinary is the user that stands for all who are not root.
const ordinary = 65534

// subIDs are the ids that TestMain has /etc/subuid and /etc/subgid give to the ordinary user.
const (
	subIDs   = 300000
	numSubID = 65536
)

var allSurroundings = []surroundings{
	{name: "root+namespace", ranges: true},
	{name: "root+chroot", options: []string{"--sandbox", "chroot"}, ranges: true},
	{
		name: "user+namespace", uid: ordinary, firstID: subIDs, ranges: true,
		options: []string{"--uid-map", idMapOption, "--gid-map", idMapOption},
		without: []string{"device"},
	},
	{
		name: "user+none", uid: ordinary, options: []string{"--sandbox", "none"}, firstID: ordinary,
		without: []string{
			"device", "chown", "set-id cleared by chown", "setgid directory", "owner and group", "permission denied", "sticky directory",
			"supplementary group",
		},
		rootWithout: []string{"symbolic links"}, // whose owner it changes
	},
}

var idMapOption = fmt.Sprintf(":0:%d:%d:", subIDs, numSubID)

// around is what this run's daemons are in: $SLUICE_SURROUNDINGS, or else the default of sluiced.
var around = allSurroundings[0]

func chooseSurroundings() error {
	name := os.Getenv("SLUICE_SURROUNDINGS")
	if name == "" {
		return nil
	}
	i := slices.IndexFunc(allSurroundings, func(s surroundings) bool { return s.name == name })
	if i < 0 {
		var names []string
		for _, s := range allSurroundings {
			names = append(names, s.name)
		}
		return fmt.Errorf("SLUICE_SURROUNDINGS=%s: expected one of %s", name, strings.Join(names, ", "))
	}
	around = allSurroundings[i]
	return nil
}

// subIDsGiven is set in the environment of a run that withSubIDs has started.
const subIDsGiven = "SLUICE_SUBIDS_GIVEN"

// withSubIDs runs the tests in a mount namespace where the ordinary user has ids of its own to map, and returns their exit
// status. The host's files stay as they are.
func withSubIDs() (int, error) {
	runtime.LockOSThread() // the namespace is this thread's, and its children's
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return 1, fmt.Errorf("unshare the mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 1, fmt.Errorf("make mounts private: %w", err)
	}
	dir, err := os.MkdirTemp("", "sluice-subids-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "ids")
	if err := os.WriteFile(file, fmt.Appendf(nil, "%d:%d:%d\n", ordinary, subIDs, numSubID), 0o644); err != nil {
		return 1, err
	}
	for _, path := range []string{"/etc/subuid", "/etc/subgid"} {
		if err := unix.Mount(file, path, "", unix.MS_BIND, ""); err != nil {
			return 1, fmt.Errorf("bind over %s (of the package uidmap): %w", path, err)
		}
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), subIDsGiven+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// user is one of the guest's that is not root and may have files here: uid 1000, who is also in the group 2000, or, where the
// daemon has one id only, that one.
func (s surroundings) user() testguest.Command {
	if !s.ranges {
		return testguest.Command{UID: uint32(s.firstID), GID: uint32(s.firstID), Groups: []uint32{uint32(s.firstID)}}
	}
	return testguest.Command{UID: 1000, GID: 1000, Groups: []uint32{1000, 2000}}
}

// posix is guestprog's command for the cases that hold here for a user.
func (s surroundings) posix(as testguest.Command) testguest.Command {
	without := append([]string{"-"}, s.without...)
	if as.UID == 0 {
		without = append(without, s.rootWithout...)
	}
	as.Args = []string{"guestprog", "posix", "/mnt", strings.Join(without, ",")}
	return as
}

// hostID is the host's id for an id of the guest's.
func (s surroundings) hostID(id int) int {
	if s.ranges {
		return s.firstID + id
	}
	return s.firstID
}
