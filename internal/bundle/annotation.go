package bundle

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// The annotations that are ours. Those of an extension are io.sluice.x.<extension>.<anything>.
const (
	annotationPrefix    = "io.sluice."
	annotationBackend   = "io.sluice.backend"
	annotationMount     = "io.sluice.mount." // a destination as the mount has it, and then
	annotationOfMount   = ".backend"
	annotationOption    = "io.sluice.option." // an option's name
	annotationExtension = "io.sluice.x."      // an extension's name, a dot, and anything
)

// annotations is what they ask for.
type annotations struct {
	root    string
	mounts  map[string]string // backends by destination
	options map[string]string
}

// readAnnotations refuses what it does not know below io.sluice: a name misspelled would have the wrong backend serve a mount.
func readAnnotations(spec *specs.Spec) (annotations, error) {
	a := annotations{mounts: map[string]string{}, options: map[string]string{}}
	// In order, so that of several mistakes it is always the same that is told.
	for _, key := range slices.Sorted(maps.Keys(spec.Annotations)) {
		rest, ours := strings.CutPrefix(key, annotationPrefix)
		if !ours || isExtensions(key) {
			continue
		}
		value := spec.Annotations[key]
		ofMount, isMount := strings.CutPrefix(key, annotationMount)
		destination, isBackend := strings.CutSuffix(ofMount, annotationOfMount)
		option, isOption := strings.CutPrefix(key, annotationOption)
		backend := key == annotationBackend || isMount && isBackend
		switch {
		case backend && value == "":
			return annotations{}, fmt.Errorf("annotation %q is empty: expected the name of a backend", key)
		case key == annotationBackend:
			a.root = value
		case backend:
			if !slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return m.Destination == destination }) {
				return annotations{}, fmt.Errorf("annotation %q: no mount has the destination %q; write it as the mount does", key, destination)
			}
			a.mounts[destination] = value
		case isOption && option != "":
			a.options[option] = value
		default:
			return annotations{}, fmt.Errorf("annotation %q: %q is unknown below %s: expected backend, mount.<destination>.backend, option.<name> or x.<extension>.<name>", key, rest, annotationPrefix)
		}
	}
	return a, nil
}

func isExtensions(key string) bool {
	rest, ok := strings.CutPrefix(key, annotationExtension)
	extension, name, _ := strings.Cut(rest, ".")
	return ok && extension != "" && name != ""
}
