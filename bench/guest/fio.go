package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"
)

// fioJob is a job of fio's.
type fioJob struct {
	rw     string // as fio calls it: randread, read, randwrite
	block  int    // bytes of a request
	direct bool   // O_DIRECT
	depth  int    // requests under way: by libaio where they are direct, and else by that many threads, as buffered ones have no other way
}

// args are fio's arguments to read or write count blocks of a file of the size given, of which each thread has a part of its own.
func (j fioJob) args(file string, size int64, count int) []string {
	args := []string{
		"fio", "--name=job", "--filename=" + file, "--rw=" + j.rw, "--bs=" + strconv.Itoa(j.block),
		"--allow_file_create=0", "--fallocate=none", "--randseed=1", "--thread", "--group_reporting", "--output-format=json", "--output=" + fioReport,
	}
	jobs := 1
	if j.direct {
		args = append(args, "--direct=1", "--ioengine=libaio", "--iodepth="+strconv.Itoa(j.depth))
	} else {
		args = append(args, "--ioengine=psync")
		jobs = j.depth
	}
	part := strconv.FormatInt(size/int64(jobs), 10)
	return append(args, "--numjobs="+strconv.Itoa(jobs), "--size="+part, "--offset_increment="+part, "--number_ios="+strconv.Itoa(max(count/jobs, 1)))
}

// fioReport is where in the guest fio leaves its results.
const fioReport = "/tmp/fio.json"

// fioResult is what a job has done.
type fioResult struct {
	bytes   int64
	ios     int64
	elapsed time.Duration
}

// parseFio reads fio's report of one job, or one group of jobs. Its start, which takes longer than many a job, is not in the time.
func parseFio(text []byte) (fioResult, error) {
	type side struct {
		Bytes     int64   `json:"io_bytes"`
		IOs       int64   `json:"total_ios"`
		Bandwidth float64 `json:"bw_bytes"`
	}
	var report struct {
		Jobs []struct {
			Error int  `json:"error"`
			Read  side `json:"read"`
			Write side `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(text, &report); err != nil {
		return fioResult{}, fmt.Errorf("read fio's report: %w", err)
	}
	if len(report.Jobs) != 1 {
		return fioResult{}, fmt.Errorf("read fio's report: %d jobs, expected 1", len(report.Jobs))
	}
	job := report.Jobs[0]
	if job.Error != 0 {
		return fioResult{}, fmt.Errorf("fio: a job has failed with error %d", job.Error)
	}
	done := job.Read
	if job.Write.Bytes > 0 {
		done = job.Write
	}
	if done.Bytes <= 0 || done.Bandwidth <= 0 {
		return fioResult{}, fmt.Errorf("read fio's report: %d bytes at %v bytes a second", done.Bytes, done.Bandwidth)
	}
	return fioResult{done.Bytes, done.IOs, time.Duration(float64(done.Bytes) / done.Bandwidth * float64(time.Second))}, nil
}
