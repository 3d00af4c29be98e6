package sandbox

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseCap(t *testing.T) {
	for name, want := range map[string]int{
		"CAP_CHOWN": unix.CAP_CHOWN, "cap_chown": unix.CAP_CHOWN, "chown": unix.CAP_CHOWN, "Cap_Sys_Admin": unix.CAP_SYS_ADMIN,
		"checkpoint_restore": unix.CAP_CHECKPOINT_RESTORE,
	} {
		if got, err := ParseCap(name); err != nil || got != capOf(want) {
			t.Errorf("ParseCap(%q) = %v, %v", name, got, err)
		}
	}
	for _, name := range []string{"", "cap_", "chown ", "cap_cap_chown", "root", "CHOWNİ"} {
		if got, err := ParseCap(name); err == nil || !strings.Contains(err.Error(), "dac_override") {
			t.Errorf("ParseCap(%q) = %v, %v; the error must list what there is", name, got, err)
		}
	}
}

func TestCapNames(t *testing.T) {
	if len(capNames) != unix.CAP_LAST_CAP+1 {
		t.Errorf("%d names for %d capabilities", len(capNames), unix.CAP_LAST_CAP+1)
	}
	for number, name := range capNames {
		if c, err := ParseCap(name); err != nil || c != capOf(number) {
			t.Errorf("capability %d: ParseCap(%q) = %v, %v", number, name, c, err)
		}
	}
	if got := (capOf(unix.CAP_CHOWN) | capOf(unix.CAP_MKNOD) | 1<<60).String(); got != "CAP_CHOWN CAP_MKNOD CAP_60" {
		t.Error(got)
	}
	if got := CapSet(0).String(); got != "none" {
		t.Error(got)
	}
}

func TestNeeded(t *testing.T) {
	const base = "CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_FSETID CAP_SETGID CAP_SETUID CAP_MKNOD"
	for _, tt := range []struct {
		o    Options
		want string
	}{
		{Options{}, base},
		{Options{Xattr: true}, base + " CAP_SETFCAP"},
		{Options{FileHandles: true}, "CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_SETGID CAP_SETUID CAP_MKNOD"},
		{Options{ReadOnly: true, Xattr: true, FileHandles: true}, "CAP_DAC_READ_SEARCH"},
		{Options{ReadOnly: true}, "CAP_DAC_READ_SEARCH"},
	} {
		if got := Needed(tt.o).String(); got != tt.want {
			t.Errorf("%+v: %s, want %s", tt.o, got, tt.want)
		}
	}
	// What virtiofsd keeps with xattr and file handles.
	if got := Needed(Options{Xattr: true, FileHandles: true}); got != 0x880000df {
		t.Errorf("%#x", uint64(got))
	}
}

func TestModcaps(t *testing.T) {
	for _, tt := range []struct {
		text string
		want string // of {chown, mknod} as changed
		err  string
	}{
		{"+sys_admin", "CAP_CHOWN CAP_SYS_ADMIN CAP_MKNOD", ""},
		{"-mknod", "CAP_CHOWN", ""},
		{"+SYS_ADMIN:-cap_chown", "CAP_SYS_ADMIN CAP_MKNOD", ""},
		{"-mknod:+mknod", "CAP_CHOWN CAP_MKNOD", ""},
		{"+mknod:-mknod", "CAP_CHOWN", ""},
		{"", "", "expected +NAME or -NAME"},
		{"mknod", "", "expected +NAME or -NAME"},
		{"+mknod:", "", "expected +NAME or -NAME"},
		{"+", "", `unknown capability ""`},
		{"+nothing", "", `unknown capability "nothing"`},
		{"-dac_read_search", "", "file handles need"},
		{"-dac_read_search:+dac_read_search", "CAP_CHOWN CAP_DAC_READ_SEARCH CAP_MKNOD", ""},
	} {
		m, err := ParseModcaps(tt.text)
		var got CapSet
		if err == nil {
			got, err = m.Apply(capOf(unix.CAP_CHOWN)|capOf(unix.CAP_MKNOD), Options{FileHandles: true})
		}
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: %v, want an error with %q", tt.text, err, tt.err)
			}
		} else if err != nil || got.String() != tt.want {
			t.Errorf("%q: %v, %v; want %s", tt.text, got, err, tt.want)
		}
	}
	m, err := ParseModcaps("-dac_read_search")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := m.Apply(Needed(Options{ReadOnly: true}), Options{}); err != nil || got != 0 {
		t.Errorf("without file handles: %v, %v", got, err)
	}
}

func FuzzModcaps(f *testing.F) {
	for _, s := range []string{"", "+chown", "+x:-y", "+cap_sys_admin:-MKNOD", ":", "+:-", "-dac_read_search"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		m, err := ParseModcaps(text)
		if err != nil {
			if m != (Modcaps{}) {
				t.Fatalf("%+v with an error", m)
			}
			return
		}
		if m.Add&m.Remove != 0 || m.Add|m.Remove == 0 {
			t.Fatalf("%q: %+v", text, m)
		}
		// Written out, it says the same again.
		var items []string
		for number := range capNames {
			if m.Add.Has(capOf(number)) {
				items = append(items, "+"+capOf(number).String())
			}
			if m.Remove.Has(capOf(number)) {
				items = append(items, "-"+capOf(number).String())
			}
		}
		if again, err := ParseModcaps(strings.Join(items, ":")); err != nil || again != m {
			t.Fatalf("%q: %+v, again %+v, %v", text, m, again, err)
		}
	})
}
