package frontend

// Workload is one thing to measure. Those that Workloads returns are all there are.
type Workload struct {
	Name string
	Doc  string // what one operation is
	// Requests are how many FUSE requests an operation takes, FORGETs not counted.
	Requests int

	shapes  []shape // of the requests, by step
	program func() program
}

// program is what one queue does in a Run: prepare and finish, not measured, and operations, any number of them at the same time, each
// a sequence of requests. Nothing of begin and answer may allocate.
type program interface {
	prepare(q *queue) error
	// begin fills in the first request of an operation, step 0.
	begin(q *queue, s *slot)
	// answer checks the answer to s's step. It sets the step and fills in its request, or says that there is no more.
	answer(q *queue, s *slot, r result) (more bool, err error)
	finish(q *queue) error
}

// Workloads returns every workload, in the order in which a report has them.
func Workloads() []Workload {
	return []Workload{
		{"nop", "BMAP, which is answered with ENOSYS: what a request costs that does nothing", 1, []shape{bmapShape}, newProgram[nop]},
		{"getattr", "GETATTR of one of 64 known files", 1, []shape{getattrShape}, newProgram[getattr]},
		{"lookup", "LOOKUP of one of 64 known names", 1, []shape{lookupShape}, newProgram[lookup]},
		{"lookup-cold", "LOOKUP of a name that the server does not know; of 20,000, which are forgotten again in batches meanwhile", 1, []shape{lookupShape}, newProgram[lookupCold]},
		{"lookup-miss", "LOOKUP of a name that is not there", 1, []shape{lookupShape}, newProgram[lookupMiss]},
		{"openrel", "OPEN of one of 64 files, RELEASE", 2, []shape{openShape, releaseShape}, newProgram[openrel]},
		{"read4k", "READ of 4 KiB at random, in a file of 64 MiB", 1, []shape{readShape(4 << 10)}, newProgram[readRandom]},
		{"read128k", "READ of 128 KiB at random, in a file of 64 MiB", 1, []shape{readShape(128 << 10)}, newProgram[readRandom]},
		{"seq1m", "READ of 1 MiB, one after the other, in a file of 64 MiB", 1, []shape{readShape(1 << 20)}, newProgram[readSequential]},
		{"write4k", "WRITE of 4 KiB at random, in a file of 64 MiB", 1, []shape{writeShape(4 << 10)}, newProgram[writeRandom]},
		{"write128k", "WRITE of 128 KiB at random, in a file of 64 MiB", 1, []shape{writeShape(128 << 10)}, newProgram[writeRandom]},
		{"readdirplus", "READDIRPLUS of a whole directory of 1,000 known entries, 32 KiB at a time", 7, []shape{readdirplusShape}, newProgram[readdirplus]},
		{"create", "CREATE, RELEASE, UNLINK, FORGET of a file", 3, []shape{createShape, releaseShape, unlinkShape}, newProgram[create]},
		{"rename", "RENAME of a file in its directory", 1, []shape{renameShape}, newProgram[rename]},
		{"setattr", "SETATTR, of mode and times by turns", 1, []shape{setattrShape}, newProgram[setattr]},
		{"statfs", "STATFS", 1, []shape{statfsShape}, newProgram[statfs]},
		{
			"gitstatus", "one directory of 100 files out of 200, as `git status` looks at it: GETATTR, LOOKUP of each file, OPENDIR, READDIRPLUS to the end, RELEASEDIR", 105,
			[]shape{getattrShape, lookupShape, opendirShape, readdirplusShape, releasedirShape},
			newProgram[gitstatus],
		},
	}
}

// Find returns the workload called name.
func Find(name string) (w Workload, ok bool) {
	for _, w := range Workloads() {
		if w.Name == name {
			return w, true
		}
	}
	return Workload{}, false
}

// newProgram makes what P is a pointer-method set of.
func newProgram[T any, P interface {
	*T
	program
}]() program {
	return P(new(T))
}
