package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/config"
)

const (
	// wantedNofile is the default limit on open files, as virtiofsd's.
	wantedNofile = 1000000
	// defaultMaxFDs caps the default of --max-fds: each descriptor pins an inode in the host's memory.
	defaultMaxFDs = 65536
)

// reservedFDs is how many descriptors the daemon itself may need: one for each memory slot the front-end may fill
// (VHOST_USER_MAX_RAM_SLOTS), kick, call and error of each queue, and the rest.
func reservedFDs(requestQueues int) uint64 {
	return 509 + 3*uint64(requestQueues+1) + 100
}

// setLimits sets RLIMIT_NOFILE and settles the budgets of cfg.Share that depend on it.
func setLimits(cfg *config.Config, log *slog.Logger) error {
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	limit := now.Cur
	if want := wantNofile(cfg.RlimitNofile, now, nrOpen()); want != limit {
		err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: want, Max: want})
		switch {
		case err == nil:
			limit = want
		case cfg.RlimitNofile != config.DefaultNofile:
			return fmt.Errorf("--rlimit-nofile: set the limit of open files to %d (it is %d of at most %d): %w", want, now.Cur, now.Max, err)
		case !errors.Is(err, unix.EPERM):
			return fmt.Errorf("set the limit of open files to %d: %w", want, err)
		default:
			log.Warn("the limit of open files may not be raised as far as it should be", "wanted", want, "limit", now.Max)
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: now.Max, Max: now.Max}); err != nil {
				return fmt.Errorf("set the limit of open files to %d: %w", now.Max, err)
			}
			limit = now.Max
		}
	}
	return settleBudgets(&cfg.Share, limit, reservedFDs(cfg.RequestQueues))
}

// wantNofile is the limit to set for --rlimit-nofile=asked; it is now.Cur where nothing is to be done.
func wantNofile(asked int64, now unix.Rlimit, nrOpen uint64) uint64 {
	switch asked {
	case 0:
		return now.Cur
	case config.DefaultNofile:
		if want := min(wantedNofile, nrOpen); now.Cur < want {
			return want
		}
		return now.Cur
	default:
		return uint64(asked)
	}
}

// nrOpen is fs.nr_open, above which no limit can be set; the kernel's own default where /proc does not tell.
func nrOpen() uint64 {
	const kernelDefault = 1 << 20
	text, err := os.ReadFile("/proc/sys/fs/nr_open")
	if err != nil {
		return kernelDefault
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return kernelDefault
	}
	return n
}

// settleBudgets replaces the defaults of s by numbers and checks that s.MaxFDs fits into limit, of which the daemon
// itself may need reserved.
func settleBudgets(s *config.Share, limit, reserved uint64) error {
	if limit <= reserved {
		return fmt.Errorf("the limit of %d open files is too low: sluiced itself may need %d; raise it, or --rlimit-nofile", limit, reserved)
	}
	left := limit - reserved
	if s.MaxFDs == 0 {
		// The other half is for the files that the guest has open.
		s.MaxFDs = int(min(max(left/2, 1), defaultMaxFDs))
	}
	if uint64(s.MaxFDs) > left {
		return fmt.Errorf("--max-fds: %d do not fit into the limit of %d open files, of which sluiced itself may need %d; lower it to %d, or raise --rlimit-nofile to %d",
			s.MaxFDs, limit, reserved, left, uint64(s.MaxFDs)+reserved)
	}
	if s.MaxInodes == 0 {
		s.MaxInodes = config.DefaultMaxInodes
	}
	return nil
}
