package daemon

import (
	"errors"
	"fmt"
	"os"
	"runtime/pprof"

	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/seccomp"
)

// outputs are the files that the serving process writes at its end, nil where none is asked for. They are created by the process
// that was started, with its view of the host.
type outputs struct {
	report  *os.File // of --seccomp-report
	profile *os.File // of --cpu-profile
}

func createOutputs(cfg config.Config) (o outputs, err error) {
	if o.report, err = createOutput("--seccomp-report", cfg.SeccompReport); err != nil {
		return outputs{}, err
	}
	if o.profile, err = createOutput("--cpu-profile", cfg.CPUProfile); err != nil {
		closeFiles(o.files())
		return outputs{}, err
	}
	return o, nil
}

func createOutput(option, path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Create(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", option, err)
	}
	return f, nil
}

// files are those that there are, in the order in which they are handed over.
func (o outputs) files() (all []*os.File) {
	for _, f := range []*os.File{o.report, o.profile} {
		if f != nil {
			all = append(all, f)
		}
	}
	return all
}

// handedOutputs are the files that the launching process has created for cfg.
func handedOutputs(cfg config.Config, files []*os.File) (o outputs) {
	if cfg.SeccompReport != "" {
		o.report, files = files[0], files[1:]
	}
	if cfg.CPUProfile != "" {
		o.profile = files[0]
	}
	return o
}

// begin starts what goes on until the end. It is to be called well before the filter is installed: pprof reads /proc/self/maps,
// if it is there, and does so when it finds the time.
func (o outputs) begin() error {
	if o.profile == nil {
		return nil
	}
	if err := pprof.StartCPUProfile(o.profile); err != nil {
		return fmt.Errorf("--cpu-profile: %w", err)
	}
	return nil
}

// end writes them.
func (o outputs) end() (err error) {
	if o.report != nil {
		err = errors.Join(seccomp.WriteReport(o.report), o.report.Close())
	}
	if o.profile != nil {
		pprof.StopCPUProfile()
		err = errors.Join(err, o.profile.Close())
	}
	return err
}
