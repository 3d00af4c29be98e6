package passthrough

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// callsEnv makes the test binary the process whose system calls are counted.
const callsEnv = "SLUICE_TEST_COUNTED"

func TestMain(m *testing.M) {
	unix.Umask(0) // as the daemon does
	if os.Getenv(callsEnv) != "" {
		countedMain()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

const (
	userID  = 65534
	userEnv = "SLUICE_TEST_USER"
)

// TestAsOrdinaryUser runs every test that is not root's again as an ordinary user, whose nodes have no file handles.
func TestAsOrdinaryUser(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv(userEnv) == "" {
			t.Log("running as an ordinary user already")
		}
		return
	}
	tmp, err := os.MkdirTemp("", "sluice-user")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	if err := os.Chown(tmp, userID, userID); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run", "^(TestLifeOfAFile|TestListing|TestConformance|TestReplacedWhileOpened|TestBudgetWithManyThreads|TestStress|TestOrdinaryUser.*|TestEscape.*|TestXattr.*|TestSetattr.*)$")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), userEnv+"=1", "TMPDIR="+tmp, "HOME="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: userID, Gid: userID}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "--- PASS: TestOrdinaryUser") {
		t.Fatalf("the ordinary user's tests did not run:\n%s", out)
	}
}

// needRoot says whether a test of what only root can do is to run: TestAsOrdinaryUser's process leaves those out.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("a test of what root does")
	}
}
