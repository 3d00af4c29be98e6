package overlay_test

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/overlay"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
)

var (
	sequences  = flag.Int("overlay.sequences", 60, "random sequences of operations to compare with the kernel's overlayfs")
	firstSeed  = flag.Uint64("overlay.seed", 1, "seed of the first batch of sequences")
	oracleDir  = flag.String("overlay.dir", "", "directory for the layers, on the file system to test with; a tmpfs of its own if empty")
	itself     = flag.Bool("overlay.kernel", false, "compare the kernel with itself, to test the oracle")
	keepGoing  = flag.Bool("overlay.all", false, "go on after a batch that differs")
	shrinkFail = flag.Bool("overlay.shrink", true, "make a sequence that differs as short as it can be")
)

const (
	// opsEach is how many operations a sequence has, and perBatch how many of them follow each other on one mount: the trees are
	// compared after each.
	opsEach  = 30
	perBatch = 5
)

// script is all that a batch depends on.
type script struct {
	// seed makes the layers, of fill operations each.
	seed uint64
	fill int
	ops  []op
	// every is how many operations come between two comparisons of the trees.
	every int
}

func newScript(seed uint64, sequences int) script {
	r := rand.New(rand.NewPCG(seed, 1))
	s := script{seed: seed, fill: 40, every: opsEach}
	for range sequences * opsEach {
		s.ops = append(s.ops, inTree.op(r))
	}
	return s
}

func (s script) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "{seed: %d, fill: %d, ops: []string{", s.seed, s.fill)
	for _, o := range s.ops {
		fmt.Fprintf(&b, "\n\t`%s`,", o)
	}
	return b.String() + "\n}}"
}

// variant is how an overlay is mounted, and what its lower layers look like.
type variant struct {
	name string
	// mount is for the kernel.
	mount    string
	format   overlay.Format
	redirect overlay.RedirectDir
	// files has whiteouts and opaque directories of ours' lower layers marked by files, as fuse-overlayfs has them.
	files bool
}

var variants = []variant{
	{"trusted", "redirect_dir=on", overlay.FormatTrusted, overlay.RedirectOn, false},
	{"trusted, marks as files", "redirect_dir=on", overlay.FormatTrusted, overlay.RedirectOn, true},
	{"follow", "redirect_dir=follow", overlay.FormatTrusted, overlay.RedirectFollow, false},
	{"userxattr", "userxattr", overlay.FormatUser, overlay.RedirectOff, false},
}

const mountOptions = ",index=off,metacopy=off,xino=auto,volatile"

// stack is the directories of one batch.
type stack struct {
	variant
	dir string
	// lowers are the kernel's, the uppermost first, and ours the same, but for how marks are made.
	lowers, ours []string
	mounted      []string
	// keep is how many files a guest on ours has in its caches.
	keep int
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the oracle is the kernel's overlayfs, which takes root to mount: run it as root")
	}
}

// oracleRoot is a directory for all batches.
func oracleRoot(t testing.TB) string {
	dir := t.TempDir()
	if *oracleDir != "" {
		var err error
		if dir, err = os.MkdirTemp(*oracleDir, "sluice-oracle-"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		return dir
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

func mkdirs(dirs ...string) error {
	for _, d := range dirs {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// newStack makes the layers of a script.
func newStack(root string, s script) (*stack, error) {
	dir, err := os.MkdirTemp(root, "batch-")
	if err != nil {
		return nil, err
	}
	n := uint64(len(variants))
	st := &stack{variant: variants[s.seed%n], dir: dir, keep: int(s.seed / n % 2 * 100)}
	r := rand.New(rand.NewPCG(s.seed, 2))
	for i := range 1 + r.IntN(3) {
		if err := st.addLower(i, r, s.fill); err != nil {
			return st, fmt.Errorf("layer %d: %w", i, err)
		}
	}
	st.ours = st.lowers
	if st.files {
		st.ours = nil
		for i, from := range st.lowers {
			to := fmt.Sprintf("%s/files%d", dir, i)
			if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
				return st, fmt.Errorf("%w: %s", err, out)
			}
			if err := marksAsFiles(to); err != nil {
				return st, err
			}
			st.ours = append(st.ours, to)
		}
	}
	return st, nil
}

// addLower makes a layer by work on an overlay over those that there are: it has whiteouts, opaque directories, redirects.
func (st *stack) addLower(i int, r *rand.Rand, n int) error {
	upper, work := fmt.Sprintf("%s/lower%d", st.dir, i), fmt.Sprintf("%s/lowerwork%d", st.dir, i)
	if err := mkdirs(upper, work); err != nil {
		return err
	}
	at := upper
	if len(st.lowers) > 0 {
		var err error
		if at, err = st.mountAt(fmt.Sprintf("making%d", i), st.lowers, upper, work); err != nil {
			return err
		}
	}
	k := newKernelSide(at)
	for range n {
		k.do(inLayers.op(r))
	}
	k.closeSlots()
	if at != upper {
		if err := st.unmount(at); err != nil {
			return err
		}
	}
	st.lowers = slices.Insert(st.lowers, 0, upper)
	return filepath.Walk(upper, func(path string, _ os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		old := []unix.Timespec{{Sec: 1_600_000_000}, {Sec: 1_600_000_000 + int64(len(path)+i)}}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, old, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// marksAsFiles replaces whiteouts and opaque marks in a layer by files whose names say the same.
func marksAsFiles(dir string) error {
	times := make(map[string][]unix.Timespec) // of directories, which are not to show it
	if err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		switch {
		case st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0:
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.WriteFile(filepath.Dir(path)+"/.wh."+info.Name(), nil, 0o600)
		case info.IsDir():
			times[path] = []unix.Timespec{st.Atim, st.Mtim}
			value := make([]byte, 16)
			if n, _ := unix.Lgetxattr(path, "trusted.overlay.opaque", value); n != 1 || value[0] != 'y' {
				return nil
			}
			if err := unix.Lremovexattr(path, "trusted.overlay.opaque"); err != nil {
				return err
			}
			return os.WriteFile(path+"/.wh..wh..opq", nil, 0o600)
		}
		return nil
	}); err != nil {
		return err
	}
	for path, t := range times {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, t, 0); err != nil {
			return err
		}
	}
	return nil
}

func (st *stack) mountAt(name string, lowers []string, upper, work string) (string, error) {
	at := st.dir + "/" + name
	if err := os.MkdirAll(at, 0o755); err != nil {
		return "", err
	}
	// What volatile leaves behind keeps the next mount from using the directory.
	if err := os.RemoveAll(work + "/work"); err != nil {
		return "", err
	}
	data := "lowerdir=" + strings.Join(lowers, ":") + ",upperdir=" + upper + ",workdir=" + work + "," + st.mount + mountOptions
	if err := unix.Mount("overlay", at, "overlay", 0, data); err != nil {
		return "", fmt.Errorf("mount -t overlay -o %s: %w", data, err)
	}
	st.mounted = append(st.mounted, at)
	return at, nil
}

func (st *stack) unmount(at string) error {
	st.mounted = slices.DeleteFunc(st.mounted, func(m string) bool { return m == at })
	if err := unix.Unmount(at, 0); err != nil {
		_ = unix.Unmount(at, unix.MNT_DETACH)
		return fmt.Errorf("unmount %s: %w", at, err)
	}
	return nil
}

func (st *stack) close() {
	for _, at := range st.mounted {
		_ = unix.Unmount(at, unix.MNT_DETACH)
	}
	_ = os.RemoveAll(st.dir)
}

// open has ours merge the layers with an upper.
func (st *stack) open(lowers []string, upper, work string) (*ourSide, error) {
	cfg := overlay.Config{Format: st.format, RedirectDir: st.redirect, Volatile: true}
	serve := func(dir, work string) (*passthrough.FS, error) {
		pc := passthrough.Config{Dir: dir, PosixACL: true}
		if work != "" {
			fd, err := unix.Open(work, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			defer unix.Close(fd)
			pc.WorkDirFD = fd
		}
		return passthrough.New(pc)
	}
	up, err := serve(upper, work)
	if err != nil {
		return nil, err
	}
	cfg.Upper = up
	for _, dir := range lowers {
		low, err := serve(dir, "")
		if err != nil {
			return nil, err
		}
		cfg.Lowers = append(cfg.Lowers, overlay.Layer{Backend: low, Name: dir, StableIno: true})
	}
	fs, err := overlay.New(cfg)
	if err != nil {
		return nil, err
	}
	ours := newOurSide(fs, upper)
	ours.keep = st.keep
	return ours, nil
}

// difference is where two sides part.
type difference struct {
	// after is how many operations had been done.
	after int
	text  string
}

func (d *difference) Error() string { return fmt.Sprintf("after %d operations: %s", d.after, d.text) }

// compareTrees returns the differences of two trees, or "".
func compareTrees(what string, got, want map[string]string) string {
	var b strings.Builder
	paths := slices.Sorted(maps.Keys(want))
	for path := range got {
		if _, ok := want[path]; !ok {
			paths = append(paths, path)
		}
	}
	for _, path := range paths {
		if got[path] != want[path] {
			fmt.Fprintf(&b, "\n%s: %s\n\tours:   %s\n\tkernel: %s", what, path, got[path], want[path])
		}
	}
	return b.String()
}

// sameTree compares two sides' trees.
func sameTree(what string, ours, kernel side) (map[string]string, string) {
	want, err := kernel.tree()
	if err != nil {
		return nil, fmt.Sprintf("%s: kernel: %v", what, err)
	}
	got, err := ours.tree()
	if err != nil {
		return nil, fmt.Sprintf("%s: ours: %v", what, err)
	}
	return want, compareTrees(what, got, want)
}

// run does a script on both sides. It returns a *difference, or another error where the test itself has failed.
func run(root string, s script) (err error) {
	st, err := newStack(root, s)
	if st != nil {
		defer st.close()
	}
	if err != nil {
		return err
	}
	before := make(map[string]map[string]string)
	for _, dir := range slices.Concat(st.lowers, st.ours) {
		if before[dir], err = newKernelSide(dir).tree(); err != nil {
			return err
		}
	}
	upper, work, ourUpper, ourWork := st.dir+"/upper", st.dir+"/work", st.dir+"/ourupper", st.dir+"/ourwork"
	if err := mkdirs(upper, work, ourUpper, ourWork); err != nil {
		return err
	}
	at, err := st.mountAt("merged", st.lowers, upper, work)
	if err != nil {
		return err
	}
	kernel := newKernelSide(at)
	ours, closeOurs, err := st.second(ourUpper, ourWork)
	if err != nil {
		return err
	}
	closed := false
	defer func() {
		kernel.closeSlots()
		if !closed {
			ours.closeSlots()
			_ = closeOurs()
		}
	}()
	tree, text := sameTree("fresh", ours, kernel)
	if text != "" {
		return &difference{0, text}
	}
	for i, o := range s.ops {
		k, u := kernel.do(o), ours.do(o)
		if k != u && !deliberate(o, k, u) {
			return &difference{i + 1, fmt.Sprintf("%s\n\tours:   %s\n\tkernel: %s", o, u, k)}
		}
		for _, o := range after(o, k, u) {
			kernel.do(o)
			ours.do(o)
		}
		if (i+1)%s.every == 0 || i == len(s.ops)-1 {
			if tree, text = sameTree("merged", ours, kernel); text != "" {
				return &difference{i + 1, text}
			}
		}
	}
	kernel.closeSlots()
	ours.closeSlots()
	if text := idle(ours); text != "" {
		return &difference{len(s.ops), text}
	}
	closed = true
	if err := closeOurs(); err != nil {
		return err
	}
	if err := st.unmount(at); err != nil {
		return err
	}
	if text := st.crossed(tree, upper, work, ourUpper, ourWork); text != "" {
		return &difference{len(s.ops), text}
	}
	for dir, was := range before {
		is, err := newKernelSide(dir).tree()
		if err != nil {
			return err
		}
		if text := compareTrees("lower layer "+filepath.Base(dir)+" (is, was)", is, was); text != "" {
			return &difference{len(s.ops), text}
		}
	}
	return nil
}

// second opens what is compared with the kernel.
func (st *stack) second(upper, work string) (side, func() error, error) {
	if *itself {
		at, err := st.mountAt("second", st.lowers, upper, work)
		return newKernelSide(at), func() error { return st.unmount(at) }, err
	}
	o, err := st.open(st.ours, upper, work)
	if err != nil {
		return nil, nil, err
	}
	return o, o.fs.Close, nil
}

// idle says what of the nodes of a tree that nothing uses is wrong: only what is in use may be known.
func idle(s side) string {
	o, ok := s.(*ourSide)
	if !ok {
		return ""
	}
	if _, e := o.walk(""); e != 0 {
		return fmt.Sprintf("the root is gone: %v", e)
	}
	return ""
}

// crossed has each side read the other's upper, which has to be tree.
func (st *stack) crossed(tree map[string]string, upper, work, ourUpper, ourWork string) string {
	// The kernel's own is mounted again first: what it makes of its own marks is what they mean.
	check := func(name string, lowers []string, upper, work string) string {
		at, err := st.mountAt(name, lowers, upper, work)
		if err != nil {
			return err.Error()
		}
		got, err := newKernelSide(at).tree()
		if err != nil {
			return fmt.Sprintf("%s: %v", name, err)
		}
		if err := st.unmount(at); err != nil {
			return err.Error()
		}
		return compareTrees(name+" (is, was)", got, tree)
	}
	if text := check("kernels-own-again", st.lowers, upper, work); text != "" {
		return text
	}
	if *itself {
		return ""
	}
	if text := check("kernel-over-ours", st.lowers, ourUpper, ourWork); text != "" {
		return text
	}
	for _, u := range []struct{ name, upper, work string }{{"ours again", ourUpper, ourWork}, {"ours over the kernel's", upper, work}} {
		if err := os.RemoveAll(u.work + "/work"); err != nil {
			return err.Error()
		}
		o, err := st.open(st.ours, u.upper, u.work)
		if err != nil {
			return fmt.Sprintf("%s: %v", u.name, err)
		}
		got, err := o.tree()
		if err != nil {
			return fmt.Sprintf("%s: %v", u.name, err)
		}
		if err := o.fs.Close(); err != nil {
			return fmt.Sprintf("%s: %v", u.name, err)
		}
		if text := compareTrees(u.name, got, tree); text != "" {
			return text
		}
	}
	return ""
}

// deliberate says that ours and the kernel's answers to an operation differ on purpose. Nothing else may; what the oracle leaves out
// from the start is at xattrNames.
func deliberate(o op, kernel, ours string) bool {
	switch {
	case o.what == "fchmod" && kernel == "EEXIST" && ours == "OK":
		// A lower file that is open and has been removed cannot be changed any more in the kernel's overlay, which would have to copy
		// it up to the name that it had and finds a whiteout there. Ours copies it up without a name.
		return true
	case (o.what == "rename" || o.what == "exchange") && kernel == "ESTALE" && ours == "OK",
		o.what == "whiteout" && kernel == "EINVAL" && ours == "OK":
		// A lower file with several links that gets one in the upper layer is known to the kernel by its old inode as well, and it is
		// confused when one is renamed to the other. To ours they are one file, and nothing is to be done.
		return true
	}
	return false
}

// after is what is done on both sides once an operation has ended as the kernel's did, for what is left different on purpose.
func after(o op, kernel, ours string) []op {
	switch {
	case kernel != ours && o.slot >= 0:
		return []op{{what: "close", slot: o.slot}} // so that nothing comes of it
	case o.what == "rename" && kernel == "ENOTEMPTY":
		// The kernel has copied up by then what was to be renamed, and where to; ours has not, and so shows other link counts.
		touch := []op{{what: "utimens", a: o.a}}
		if i := strings.LastIndexByte(o.b, '/'); i >= 0 {
			touch = append(touch, op{what: "utimens", a: o.b[:i]})
		}
		return touch
	}
	return nil
}

// shrink makes a script that differs as short as it can be, and still differ.
func shrink(root string, s script) script {
	fails := func(s script) bool {
		s.every = 1
		_, differs := run(root, s).(*difference)
		return differs
	}
	if d, ok := run(root, s).(*difference); ok && d.after < len(s.ops) {
		if t := s; fails(script{t.seed, t.fill, t.ops[:d.after], 1}) {
			s.ops = s.ops[:d.after]
		}
	}
	for step := max(len(s.ops)/2, 1); step >= 1; step /= 2 {
		for at := 0; at < len(s.ops); {
			t := s
			t.ops = slices.Delete(slices.Clone(s.ops), at, min(at+step, len(s.ops)))
			if fails(t) {
				s = t
			} else {
				at += step
			}
		}
	}
	for _, fill := range []int{0, 2, 5, 10, 15, 20, 30} {
		if t := s; fill < s.fill {
			t.fill = fill
			if fails(t) {
				s = t
				break
			}
		}
	}
	s.every = 1
	return s
}

// TestOracle does random operations to an overlay of ours and to one of the kernel's over the same layers, and compares what comes of
// each, all of the trees, the lower layers with what they were, and what each makes of the other's upper layer.
func TestOracle(t *testing.T) {
	needRoot(t)
	root := oracleRoot(t)
	failed := 0
	for done, seed := 0, *firstSeed; done < *sequences; done, seed = done+perBatch, seed+1 {
		s := newScript(seed, perBatch)
		err := run(root, s)
		if err == nil {
			continue
		}
		if _, ok := err.(*difference); !ok {
			t.Fatalf("seed %d: %v", seed, err)
		}
		t.Errorf("seed %d (%s): %v", seed, variants[seed%uint64(len(variants))].name, err)
		if *shrinkFail {
			short := shrink(root, s)
			t.Logf("in short: %v\n%v", short, run(root, short))
		}
		if failed++; !*keepGoing || failed > 100 {
			break
		}
	}
}

// TestOracleAgain does what once made a difference.
func TestOracleAgain(t *testing.T) {
	needRoot(t)
	root := oracleRoot(t)
	for _, past := range pastDifferences {
		s := script{seed: past.seed, fill: past.fill, every: 1}
		for _, text := range past.ops {
			o, err := parseOp(text)
			if err != nil {
				t.Fatal(err)
			}
			s.ops = append(s.ops, o)
		}
		if err := run(root, s); err != nil {
			t.Errorf("%s: %v: %v", past.what, s, err)
		}
	}
}
