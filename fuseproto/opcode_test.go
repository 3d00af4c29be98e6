package fuseproto

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"
)

// golden returns enum fuse_opcode as testdata/opcodes.txt has it.
func golden(t *testing.T) map[Opcode]string {
	t.Helper()
	f, err := os.Open("testdata/opcodes.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	opcodes := make(map[Opcode]string)
	for scan := bufio.NewScanner(f); scan.Scan(); {
		if strings.HasPrefix(scan.Text(), "#") {
			continue
		}
		var name string
		var number uint32
		if _, err := fmt.Sscan(scan.Text(), &name, &number); err != nil {
			t.Fatalf("parse %q: %v", scan.Text(), err)
		}
		opcodes[Opcode(number)] = name
	}
	if len(opcodes) < 50 {
		t.Fatalf("read %d opcodes, expected all of fuse.h", len(opcodes))
	}
	return opcodes
}

func TestOpcodesAreThoseOfFuseH(t *testing.T) {
	opcodes := golden(t)
	for opcode, name := range opcodes {
		if opcode.String() != name {
			t.Errorf("opcode %d is called %v, expected %v", uint32(opcode), opcode, name)
		}
	}
	for opcode := range CUSE_INIT + 1000 {
		if name := opcode.String(); !strings.HasPrefix(name, "Opcode(") && opcodes[opcode] == "" {
			t.Errorf("opcode %d is called %v, but fuse.h has none of that number", uint32(opcode), name)
		}
	}
}
