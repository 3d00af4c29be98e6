package permshift

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	for _, row := range []struct {
		format Format
		value  string
		want   Stat
		ok     bool
	}{
		{OriginalPermissions, "755:1000:1001\x00", Stat{1000, 1001, 0o755, 0, 0}, true},
		{OriginalPermissions, "0:0:0", Stat{0, 0, 0, 0, 0}, true},
		{OriginalPermissions, "4755:0:0\x00", Stat{0, 0, 0o4755, 0, 0}, true},
		{OriginalPermissions, "644:-2:-2\x00", Stat{4294967294, 4294967294, 0o644, 0, 0}, true},
		{OriginalPermissions, "644:0", Stat{}, false},
		{OriginalPermissions, "648:0:0", Stat{}, false},
		{OriginalPermissions, "644:0:0:file", Stat{}, false},
		{OriginalPermissions, "100644:0:0", Stat{}, false},
		{OriginalPermissions, "644:0:0\x00\x00", Stat{}, false},

		{ContainersOverride, "1000:1011:0644:file", Stat{1000, 1011, unix.S_IFREG | 0o644, 0, 0}, true},
		{ContainersOverride, "1001:1012:0755:dir", Stat{1001, 1012, unix.S_IFDIR | 0o755, 0, 0}, true},
		{ContainersOverride, "1002:1013:0777:symlink", Stat{1002, 1013, unix.S_IFLNK | 0o777, 0, 0}, true},
		{ContainersOverride, "1003:1014:0666:pipe", Stat{1003, 1014, unix.S_IFIFO | 0o666, 0, 0}, true},
		{ContainersOverride, "1004:1015:0700:socket", Stat{1004, 1015, unix.S_IFSOCK | 0o700, 0, 0}, true},
		{ContainersOverride, "1005:1016:0600:block-8-0", Stat{1005, 1016, unix.S_IFBLK | 0o600, 8, 0}, true},
		{ContainersOverride, "1006:1017:0600:char-1-3", Stat{1006, 1017, unix.S_IFCHR | 0o600, 1, 3}, true},
		{ContainersOverride, "1006:1017:0600:char-4095-1048575", Stat{1006, 1017, unix.S_IFCHR | 0o600, 4095, 1048575}, true},
		{SecurityOverride, "0:0:555", Stat{0, 0, 0o555, 0, 0}, true}, // what fuse-overlayfs marks a root with
		{UserOverride, "1012:1022:4755\x00", Stat{1012, 1022, 0o4755, 0, 0}, true},
		{ContainersOverride, "0:0:0100755", Stat{0, 0, unix.S_IFREG | 0o755, 0, 0}, true}, // libkrun's
		{ContainersOverride, "0:0:040755", Stat{0, 0, unix.S_IFDIR | 0o755, 0, 0}, true},
		{ContainersOverride, "0:0:020666", Stat{}, false}, // a device without a number
		{ContainersOverride, "0:0:0170000", Stat{}, false},
		{ContainersOverride, "", Stat{}, false},
		{ContainersOverride, "::", Stat{}, false},
		{ContainersOverride, "0:0", Stat{}, false},
		{ContainersOverride, "0:0:", Stat{}, false},
		{ContainersOverride, "0:0:644:", Stat{}, false},
		{ContainersOverride, "0:0:644:files", Stat{}, false},
		{ContainersOverride, "0:0:644:file:", Stat{}, false},
		{ContainersOverride, "0:0:1000000", Stat{}, false},
		{ContainersOverride, "4294967295:0:644", Stat{}, false},
		{ContainersOverride, "-1:0:644", Stat{}, false},
		{ContainersOverride, "-0:0:644", Stat{}, false},
		{ContainersOverride, "-2147483648:0:644", Stat{UID: 1 << 31, Mode: 0o644}, true},
		{ContainersOverride, "-2147483649:0:644", Stat{}, false},
		{ContainersOverride, "0x1:0:644", Stat{}, false},
		{ContainersOverride, " 0:0:644", Stat{}, false},
		{ContainersOverride, "0:0:600:char-1", Stat{}, false},
		{ContainersOverride, "0:0:600:char--3", Stat{}, false},
		{ContainersOverride, "0:0:600:char-1-", Stat{}, false},
		{ContainersOverride, "0:0:600:char-1-3-5", Stat{}, false},
		{ContainersOverride, "0:0:600:char-4096-0", Stat{}, false},
		{ContainersOverride, "0:0:600:block-1-1048576", Stat{}, false},
		{ContainersOverride, strings.Repeat("0", 60) + ":0:644", Stat{}, false},
	} {
		got, ok := row.format.Parse([]byte(row.value))
		if got != row.want || ok != row.ok {
			t.Errorf("%v: %q is %+v, %v, expected %+v, %v", row.format, row.value, got, ok, row.want, row.ok)
		}
	}
}

func TestAppend(t *testing.T) {
	for _, row := range []struct {
		format Format
		st     Stat
		want   string
	}{
		{OriginalPermissions, Stat{1000, 1001, unix.S_IFREG | 0o644, 0, 0}, "644:1000:1001\x00"},
		{OriginalPermissions, Stat{0, 0, unix.S_IFDIR | 0o1777, 0, 0}, "1777:0:0\x00"},
		{ContainersOverride, Stat{1000, 1011, 0o44, 0, 0}, "1000:1011:0044:file"},
		{ContainersOverride, Stat{1, 2, unix.S_IFDIR | 0o2755, 0, 0}, "1:2:2755:dir"},
		{SecurityOverride, Stat{1, 2, unix.S_IFIFO | 0o600, 0, 0}, "1:2:0600:pipe"},
		{SecurityOverride, Stat{1, 2, unix.S_IFSOCK | 0o600, 0, 0}, "1:2:0600:socket"},
		{UserOverride, Stat{1, 2, unix.S_IFLNK | 0o777, 0, 0}, "1:2:0777:symlink"},
		{UserOverride, Stat{1, 2, unix.S_IFCHR | 0o600, 5, 6}, "1:2:0600:char-5-6"},
		{UserOverride, Stat{4294967294, 2, unix.S_IFBLK | 0o600, 4095, 1048575}, "4294967294:2:0600:block-4095-1048575"},
	} {
		if got := string(row.format.Append(nil, row.st)); got != row.want {
			t.Errorf("%v: %+v is %q, expected %q", row.format, row.st, got, row.want)
		}
	}
}

func TestParseFormat(t *testing.T) {
	for f := range formats {
		if got, err := ParseFormat(Format(f).String()); err != nil || got != Format(f) {
			t.Errorf("%v: %v, %v", Format(f), got, err)
		}
		if name := Format(f).Xattr(); name != "" {
			if got, err := ParseFormat(name); err != nil || got != Format(f) {
				t.Errorf("%s: %v, %v", name, got, err)
			}
		}
	}
	for _, name := range []string{"", "none", "user.other"} {
		if _, err := ParseFormat(name); err == nil || !strings.Contains(err.Error(), "containers-override") {
			t.Errorf("%q: %v, expected an error that names the formats", name, err)
		}
	}
	if got := Format(77).String(); got != "Format(77)" {
		t.Errorf("format 77 is called %q", got)
	}
}

// FuzzParse: what is read is written back as what means the same, in room that there is.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{"755:1000:1001\x00", "1000:1011:0644:file", "1:2:755", "0:0:600:char-1-3", "1:2:0600:block-4095-1048575", "-2:-3:0100755", "::", "0:0:644:symlink"} {
		for _, format := range detected {
			f.Add(int(format), []byte(seed))
		}
	}
	f.Fuzz(func(t *testing.T, format int, value []byte) {
		if format < 0 || format >= len(formats) {
			return
		}
		st, ok := Format(format).Parse(value)
		if !ok {
			if st != (Stat{}) {
				t.Fatalf("%q is refused, yet %+v", value, st)
			}
			return
		}
		var room [maxValue]byte
		again := Format(format).Append(room[:0], st)
		if len(again) > maxValue {
			t.Fatalf("%q becomes %q, longer than a value may be", value, again)
		}
		want := st
		if Format(format) != OriginalPermissions && want.Mode&unix.S_IFMT == 0 {
			want.Mode |= unix.S_IFREG
		}
		if got, ok := Format(format).Parse(again); !ok || got != want {
			t.Fatalf("%q becomes %q, which is %+v, %v, expected %+v", value, again, got, ok, want)
		}
	})
}
