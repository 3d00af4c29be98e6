package overlay_test

// pastDifferences are scripts that once made a difference, as TestOracle prints them. The layers come from the seed (inLayers).
var pastDifferences = []struct {
	what string
	seed uint64
	fill int
	ops  []string
}{
	{"an open file without a name has a link", 13, 0, []string{
		`tmpfile "" "" 1 13904`,
		`fstat "" "" 1 42021`,
	}},
	{"an open file of a lower layer that was removed has a link", 14, 30, []string{
		`exchange "b" "a" -1 23758`,
		`openro "b" "" 2 40055`,
		`unlink "b" "" -1 30875`,
		`fstat "" "" 2 37506`,
	}},
	{"a directory that cannot be moved is asked whether the other one is empty", 18, 20, []string{
		`rename "c" "e" -1 32650`,
	}},
	{"an exchange that cannot be has copied a file up", 107, 30, []string{
		`exchange "c" "a" -1 34635`,
	}},
	{"an exchange that cannot be has copied a directory up", 243, 40, []string{
		`exchange "c/e" "d" -1 17174`,
	}},
	{"a file comes back when a hard link in its place is renamed", 156, 10, []string{
		`open "d" "" 4 34259`,
		`linkslot "e" "" 4 46958`,
		`rename "d" "c" -1 59285`,
	}},
	{"a file comes back when a hard link in its place is removed", 119, 20, []string{
		`open "d" "" 2 64504`,
		`link "d" "b" -1 38266`,
		`unlink "d" "" -1 3063`,
	}},
	{"a file comes back when the hard link that replaced it is removed", 110, 30, []string{
		`rename "a" "c" -1 58372`,
		`rename "c" "e/c" -1 41340`,
		`create "a" "" 3 37918`,
		`linkslot "c" "" 3 959`,
		`unlink "a" "" -1 7721`,
	}},
	{"a directory comes back when the file that replaced it, of two names, is renamed", 254, 15, []string{
		`rmdir "e" "" -1 991`,
		`create "e" "" 2 3933`,
		`linkslot "b/c" "" 2 58741`,
		`rename "e" "d" -1 9139`,
	}},
	{"a file comes back when a link over its whiteout is renamed over another", 1636, 40, []string{
		`unlink "a" "" -1 24060`,
		`create "b" "" 1 14790`,
		`unlink "d" "" -1 4528`,
		`link "b" "a" -1 40665`,
		`rename "a" "d" -1 58635`,
	}},
	{"a directory comes back when a link over its whiteout is renamed", 1655, 40, []string{
		`create "e" "" 0 39827`,
		`rmdir "b" "" -1 51344`,
		`link "e" "b" -1 34485`,
		`rename "b" "a" -1 49118`,
	}},
	{"a link in another directory is listed with another number", 523, 30, []string{
		`mkdir "d" "" -1 34819`,
		`link "b" "d/b" -1 28946`,
	}},
	{"an open file's link in another directory is listed with another number", 834, 30, []string{
		`mkdir "e" "" -1 54439`,
		`open "a" "" 1 19126`,
		`linkslot "e/e" "" 1 25329`,
	}},
	{"the kernel copies up what it then does not rename", 1000473, 40, []string{
		`mkdir "e" "" -1 2257`,
		`create "e/a" "" 3 1919`,
		`rename "a" "e" -1 54263`,
	}},
}
