package plugins

import (
	"fmt"
	"strings"

	"github.com/sluicefs/sluice/plugin"
)

// Entry is an entry of lowerdir that is a plug-in's.
type Entry struct {
	// Name is the plug-in's. Data and Path are for it alone; both may be "". Data has no slash: what needs one is written in base64.
	Name, Data, Path string
}

// IsEntry says whether an entry of lowerdir is a plug-in's: those begin with two slashes.
func IsEntry(entry string) bool { return strings.HasPrefix(entry, "//") }

// ParseEntry takes //NAME/DATA/PATH apart.
func ParseEntry(entry string) (Entry, error) {
	rest, ok := strings.CutPrefix(entry, "//")
	var e Entry
	if ok {
		e.Name, rest, ok = strings.Cut(rest, "/")
	}
	if ok {
		e.Data, e.Path, ok = strings.Cut(rest, "/")
	}
	switch {
	case !ok:
		return e, fmt.Errorf("layer %q: expected //NAME/DATA/PATH; DATA may be empty", entry)
	case !plugin.ValidPluginName(e.Name):
		return e, fmt.Errorf("layer %q: its plug-in is called %q, expected 1 to 64 letters, digits, '.', '_' and '-'", entry, e.Name)
	case len(e.Data) > plugin.MaxPath || len(e.Path) > plugin.MaxPath || strings.ContainsRune(entry, 0):
		return e, fmt.Errorf("layer %.100q…: expected DATA and PATH of at most %d bytes each, without a NUL", entry, plugin.MaxPath)
	}
	return e, nil
}
