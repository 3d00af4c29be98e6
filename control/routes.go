package control

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// A kind of operation decides how long it may take.
type kind int

const (
	look kind = iota
	change
	work   // copies files, say
	stream // ends with the client
)

const takesHostPaths = "it takes paths of the host"

// A route is one operation: what docs/openapi.yaml says of it is held against this table by a test.
type route struct {
	operation string // operationId
	method    string
	pattern   string // {tag} is any segment
	kind      kind
	// hostOnly says why no Allow can have it, if that is so.
	hostOnly string
	handle   func(*call) error
}

// routes are all operations.
var routes = []route{
	{"getInfo", http.MethodGet, "/v1/info", look, "", getInfo},
	{"listShares", http.MethodGet, "/v1/shares", look, "", listShares},
	{"addShare", http.MethodPost, "/v1/shares", change, takesHostPaths, addShare},
	{"getShare", http.MethodGet, "/v1/shares/{tag}", look, "", getShare},
	{"removeShare", http.MethodDelete, "/v1/shares/{tag}", change, "", removeShare},
	{"listGrafts", http.MethodGet, "/v1/shares/{tag}/grafts", look, "", listGrafts},
	{"addGraft", http.MethodPost, "/v1/shares/{tag}/grafts", change, takesHostPaths, addGraft},
	{"putGraft", http.MethodPut, "/v1/shares/{tag}/grafts", change, takesHostPaths, putGraft},
	{"changeGraft", http.MethodPatch, "/v1/shares/{tag}/grafts", change, "", changeGraft},
	{"removeGraft", http.MethodDelete, "/v1/shares/{tag}/grafts", change, "", removeGraft},
	{"actGraft", http.MethodPost, "/v1/shares/{tag}/grafts/act", work, takesHostPaths, actGraft},
	{"getEvents", http.MethodGet, "/v1/shares/{tag}/events", stream, "", getEvents},
	{"getStats", http.MethodGet, "/v1/stats", look, "", getStats},
	{"getOpenAPI", http.MethodGet, "/v1/openapi.yaml", look, "", getOpenAPI},
	{"getHealth", http.MethodGet, "/healthz", look, "", getHealth},
	{"getMetrics", http.MethodGet, "/metrics", look, "", getMetrics},
	{"nydusDaemon", http.MethodGet, "/api/v1/daemon", look, "", nydusDaemon},
	{"nydusMount", http.MethodPost, "/api/v1/mount", change, takesHostPaths, nydusMount},
	{"nydusRemount", http.MethodPut, "/api/v1/mount", change, takesHostPaths, nydusRemount},
	{"nydusUmount", http.MethodDelete, "/api/v1/mount", change, "", nydusUmount},
}

// match compares an escaped path with the pattern, and returns what is at {tag}.
func (r *route) match(path string) (tag string, ok bool) {
	pattern := r.pattern
	for {
		var want, have string
		var more, moreHave bool
		want, pattern, more = strings.Cut(pattern, "/")
		have, path, moreHave = strings.Cut(path, "/")
		if want == "{tag}" {
			var err error
			if tag, err = url.PathUnescape(have); err != nil || tag == "" {
				return "", false
			}
		} else if want != have {
			return "", false
		}
		if more != moreHave {
			return "", false
		}
		if !more {
			return tag, true
		}
	}
}

// find returns the route of a request. With none, allowed are the methods that the path has, in order; without any there is
// no such path.
func find(method, path string) (r *route, tag string, allowed []string) {
	for i := range routes {
		r := &routes[i]
		tag, ok := r.match(path)
		if !ok {
			continue
		}
		// net/http leaves out the body of an answer to HEAD; a stream would have nothing else.
		if method == r.method || method == http.MethodHead && r.method == http.MethodGet && r.kind != stream {
			return r, tag, nil
		}
		allowed = append(allowed, r.method)
		if r.method == http.MethodGet && r.kind != stream {
			allowed = append(allowed, http.MethodHead)
		}
	}
	slices.Sort(allowed)
	return nil, "", allowed
}

// isNydus says whether a path is of the API of nydusd.
func isNydus(path string) bool { return strings.HasPrefix(path, "/api/") }
