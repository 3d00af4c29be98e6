package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// marker is the environment variable that tells the child that it is one, and what it was given.
const marker = "SLUICE_SANDBOX"

// A handover is the value of marker.
type handover struct {
	mode  Mode
	files int
	identity
}

const handoverFormat = "mode=%d files=%d user=%t group=%t groups=%t"

func (h handover) String() string {
	return fmt.Sprintf(handoverFormat, h.mode, h.files, h.rootUser, h.rootGroup, h.keepGroups)
}

func parseHandover(text string) (h handover, err error) {
	_, err = fmt.Sscanf(text, handoverFormat, &h.mode, &h.files, &h.rootUser, &h.rootGroup, &h.keepGroups)
	if err != nil || h.String() != text || h.files < 0 || h.mode > None {
		return handover{}, fmt.Errorf("the environment variable %s is %q: expected it to be unset; it is for sluiced's own use", marker, text)
	}
	return h, nil
}

// The child's descriptors: the end of a pipe that only the launcher can write to, the other end of one that only the child
// can write to, and then Launch.Files.
const (
	lifelineFD  = 3
	readyFD     = 4
	firstFileFD = 5
)

// Inherited returns the box of a process that Start has started, and Launch.Files, as soon as the launcher has prepared
// everything; and nil in any other process. It is to be called once, before anything else is opened.
func Inherited() (*Box, []*os.File, error) {
	text, ok := os.LookupEnv(marker)
	if !ok {
		return nil, nil, nil
	}
	if err := os.Unsetenv(marker); err != nil {
		return nil, nil, err
	}
	h, err := parseHandover(text)
	if err != nil {
		return nil, nil, err
	}
	if h.mode == Namespace && os.Getpid() != 1 || !isPipe(lifelineFD) || !isPipe(readyFD) {
		return nil, nil, fmt.Errorf("the environment variable %s is set, but no launcher started this process: expected it to be unset", marker)
	}
	files := make([]*os.File, h.files)
	for i := range files {
		fd := firstFileFD + i
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, nil, fmt.Errorf("descriptor %d from the launcher: %w", fd, err)
		}
		files[i] = os.NewFile(uintptr(fd), fmt.Sprintf("inherited %d", i))
	}
	// It was started as /proc/self/exe, which would be its name.
	_ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)

	// Go handles signals now. Until it does they are lost to the first process of a process namespace, so the launcher waits.
	_, err = unix.Write(readyFD, []byte{1})
	if err := errors.Join(err, unix.Close(readyFD)); err != nil {
		return nil, nil, fmt.Errorf("answer the launcher: %w", err)
	}
	unix.CloseOnExec(lifelineFD)
	if err := unix.SetNonblock(lifelineFD, true); err != nil {
		return nil, nil, err
	}
	b := &Box{mode: h.mode, identity: h.identity, lifeline: os.NewFile(lifelineFD, "lifeline"), orphaned: make(chan struct{})}
	var ready [1]byte
	if _, err := io.ReadFull(b.lifeline, ready[:]); err != nil {
		return nil, nil, errors.New("the launcher gave up before the sandbox was prepared")
	}
	go func() {
		defer close(b.orphaned)
		// PR_SET_PDEATHSIG would tell of the end of the launcher's thread, and threads of a Go program come and go.
		// There is nothing more to read; the end is the message.
		_, _ = io.Copy(io.Discard, b.lifeline)
	}()
	return b, files, nil
}

func isPipe(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO
}
