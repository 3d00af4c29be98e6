package control

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/docs"
)

// A document is what of an OpenAPI document is held against the code.
type document struct {
	OpenAPI string
	Paths   map[string]map[string]yaml.Node
	All     map[string]any `yaml:",inline"`
}

type operation struct {
	OperationID string           `yaml:"operationId"`
	HostOnly    bool             `yaml:"x-host-only"`
	Parameters  []map[string]any `yaml:"parameters"`
	RequestBody map[string]any   `yaml:"requestBody"`
	Responses   map[string]any   `yaml:"responses"`
}

func load(t *testing.T) (document, map[string]any) {
	t.Helper()
	var doc document
	var raw map[string]any
	if err := yaml.Unmarshal(docs.OpenAPI, &doc); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(docs.OpenAPI, &raw); err != nil {
		t.Fatal(err)
	}
	return doc, raw
}

// resolve finds what a $ref means; it fails the test if there is no such thing.
func resolve(t *testing.T, raw map[string]any, ref string) map[string]any {
	t.Helper()
	at := raw
	for name := range strings.SplitSeq(strings.TrimPrefix(ref, "#/"), "/") {
		next, ok := at[name].(map[string]any)
		if !ok {
			t.Fatalf("%s: there is no %q", ref, name)
		}
		at = next
	}
	return at
}

func TestOpenAPIHasTheOperations(t *testing.T) {
	doc, raw := load(t)
	if doc.OpenAPI != "3.1.0" {
		t.Errorf("openapi is %q", doc.OpenAPI)
	}
	have := make(map[string]bool)
	for path, item := range doc.Paths {
		var shared []map[string]any
		for method, node := range item {
			if method == "parameters" {
				if err := node.Decode(&shared); err != nil {
					t.Fatal(err)
				}
			}
		}
		for method, node := range item {
			if method == "parameters" {
				continue
			}
			var op operation
			if err := node.Decode(&op); err != nil {
				t.Fatal(err)
			}
			method = strings.ToUpper(method)
			have[method+" "+path] = true
			i := slices.IndexFunc(routes, func(r route) bool { return r.method == method && r.pattern == path })
			if i < 0 {
				t.Errorf("%s %s is described and not there", method, path)
				continue
			}
			r := routes[i]
			if op.OperationID != r.operation || op.HostOnly != (r.hostOnly != "") {
				t.Errorf("%s %s: operationId %q, x-host-only %v; expected %q, %v", method, path, op.OperationID, op.HostOnly, r.operation, r.hostOnly != "")
			}
			if op.Responses["default"] == nil {
				t.Errorf("%s: no default response", r.operation)
			}
			var query, inPath []string
			for _, p := range append(op.Parameters, shared...) {
				if ref, ok := p["$ref"].(string); ok {
					p = resolve(t, raw, ref)
				}
				if p["in"] == "query" {
					query = append(query, p["name"].(string))
				} else {
					inPath = append(inPath, p["name"].(string))
				}
			}
			slices.Sort(query)
			if want := parameters[r.operation]; !slices.Equal(query, want) {
				t.Errorf("%s: parameters %q, expected %q", r.operation, query, want)
			}
			if strings.Contains(path, "{tag}") != slices.Equal(inPath, []string{"tag"}) {
				t.Errorf("%s: parameters of the path are %q", r.operation, inPath)
			}
			if hasBody := r.method == "POST" || r.method == "PUT" || r.method == "PATCH"; hasBody != (op.RequestBody != nil) {
				t.Errorf("%s: body is described: %v", r.operation, op.RequestBody != nil)
			}
		}
	}
	for _, r := range routes {
		if !have[r.method+" "+r.pattern] {
			t.Errorf("%s %s is there and not described", r.method, r.pattern)
		}
	}
}

// parameters are the query's by operation. TestParameters holds them against the handlers.
var parameters = map[string][]string{
	"removeShare": {"force"}, "changeGraft": {"path"}, "removeGraft": {"path"}, "actGraft": {"action", "path"}, "getEvents": {"since"},
	"nydusMount": {"mountpoint", "tag"}, "nydusRemount": {"mountpoint", "tag"}, "nydusUmount": {"mountpoint", "tag"},
}

func TestParameters(t *testing.T) {
	r := newRig(t, nil)
	for _, rt := range routes {
		// openapi.yaml and metrics have nothing that a parameter could be meant for, nydusd's API passes over those it does not know.
		if isNydus(rt.pattern) || rt.operation == "getOpenAPI" || rt.operation == "getMetrics" || rt.operation == "getHealth" {
			continue
		}
		_, text := do(t, r.client, rt.method, strings.ReplaceAll(rt.pattern, "{tag}", "x")+"?nonsense=1", "{}")
		want := "expected none"
		if names := parameters[rt.operation]; names != nil {
			want = "expected " + join(names)
		}
		if !strings.Contains(text, want) {
			t.Errorf("%s: %s, expected it to say %q", rt.operation, text, want)
		}
	}
}

// schemaTypes are the Go types of the schemas.
var schemaTypes = map[string]any{
	"Error": api.Error{}, "ShareSpec": api.ShareSpec{}, "Share": api.Share{}, "GraftSpec": api.GraftSpec{}, "Graft": api.Graft{},
	"GraftChange": api.GraftChange{}, "IDRange": api.IDRange{}, "LowerSpec": api.LowerSpec{}, "Info": api.Info{}, "Event": api.Event{}, "Stats": api.Stats{},
	"ShareStats": api.ShareStats{}, "OpStats": api.OpStats{}, "QueueStats": api.QueueStats{}, "EventStats": api.EventStats{},
	"ImageStats":      api.ImageStats{},
	"NydusDaemonInfo": nydusInfo{}, "NydusVersion": nydusVersion{}, "NydusMountCmd": mountCmd{},
}

func TestOpenAPIHasTheFields(t *testing.T) {
	_, raw := load(t)
	schemas := resolve(t, raw, "#/components/schemas")
	for name := range schemas {
		if schemaTypes[name] == nil && name != "Cache" && name != "Counters" {
			t.Errorf("schema %s is of no type", name)
		}
	}
	for name, v := range schemaTypes {
		schema, ok := schemas[name].(map[string]any)
		if !ok {
			t.Errorf("no schema %s", name)
			continue
		}
		props := make(map[string]string)
		required := make(map[string]bool)
		flatten(t, raw, schema, props, required)
		fields := make(map[string]string)
		always := make(map[string]bool)
		fieldsOf(reflect.TypeOf(v), fields, always)
		if !maps.Equal(props, fields) {
			t.Errorf("schema %s has %v, the type %v", name, props, fields)
		}
		// What a request has to have is less than what an answer always has.
		if !strings.HasSuffix(name, "Spec") && name != "GraftChange" && name != "NydusMountCmd" && !maps.Equal(required, always) {
			t.Errorf("schema %s requires %v, the type always has %v", name, slices.Sorted(maps.Keys(required)), slices.Sorted(maps.Keys(always)))
		}
	}
}

// flatten gathers properties, by name with their type, and required ones of a schema and those in its allOf.
func flatten(t *testing.T, raw, schema map[string]any, props map[string]string, required map[string]bool) {
	t.Helper()
	if ref, ok := schema["$ref"].(string); ok {
		schema = resolve(t, raw, ref)
	}
	if all, ok := schema["allOf"].([]any); ok {
		for _, s := range all {
			flatten(t, raw, s.(map[string]any), props, required)
		}
		return
	}
	if schema["type"] != "object" {
		t.Errorf("schema %v is no object", schema)
	}
	for name, p := range schema["properties"].(map[string]any) {
		props[name] = typeOf(t, raw, p.(map[string]any))
	}
	if list, ok := schema["required"].([]any); ok {
		for _, name := range list {
			required[name.(string)] = true
		}
	}
}

// typeOf says what type a property has, as goType does.
func typeOf(t *testing.T, raw, p map[string]any) string {
	t.Helper()
	if ref, ok := p["$ref"].(string); ok {
		name := ref[strings.LastIndex(ref, "/")+1:]
		p = resolve(t, raw, ref)
		if p["type"] == "object" && p["properties"] != nil || p["allOf"] != nil {
			return name
		}
	}
	if of, ok := p["anyOf"].([]any); ok {
		return typeOf(t, raw, of[0].(map[string]any)) + "|null"
	}
	kind, null := p["type"], ""
	if list, ok := kind.([]any); ok {
		kind, null = list[0], "|null"
	}
	switch kind {
	case "array":
		return "[]" + typeOf(t, raw, p["items"].(map[string]any)) // a nil slice is null, or left out
	case "object":
		return "map of " + typeOf(t, raw, p["additionalProperties"].(map[string]any))
	case "integer", "string":
		if format, ok := p["format"]; ok {
			return fmt.Sprint(format) + null
		}
	}
	return fmt.Sprint(kind) + null
}

// fieldsOf gathers the JSON fields of a struct with their types, and those that are always there.
func fieldsOf(typ reflect.Type, fields map[string]string, always map[string]bool) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		if f.Anonymous {
			fieldsOf(f.Type, fields, always)
			continue
		}
		name, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
		fields[name] = goType(f.Type)
		if opts != "omitempty" {
			always[name] = true
		}
	}
}

func goType(typ reflect.Type) string {
	if typ.String() == "time.Time" {
		return "date-time"
	}
	switch typ.Kind() {
	case reflect.Pointer:
		return goType(typ.Elem()) + "|null"
	case reflect.Slice:
		return "[]" + goType(typ.Elem())
	case reflect.Map:
		return "map of " + goType(typ.Elem())
	case reflect.Struct:
		for name, v := range schemaTypes {
			if reflect.TypeOf(v) == typ {
				return name
			}
		}
	case reflect.Bool:
		return "boolean"
	case reflect.Int:
		return "integer"
	}
	return typ.Kind().String()
}

// TestOpenAPIHasTheCodes looks up the constants where they are.
func TestOpenAPIHasTheNames(t *testing.T) {
	_, raw := load(t)
	for _, tt := range []struct{ file, constant, ref string }{
		{"api/error.go", `Code\w+`, "#/components/schemas/Error/properties/code"},
		{"api/event.go", `Event\w+`, "#/components/schemas/Event/properties/kind"},
		{"api/api.go", `State\w+`, ""},
	} {
		src, err := os.ReadFile(tt.file)
		if err != nil {
			t.Fatal(err)
		}
		var consts []string
		for _, m := range regexp.MustCompile(`(?m)^\t`+tt.constant+`\s+= "(\w+)"`).FindAllSubmatch(src, -1) {
			consts = append(consts, string(m[1]))
		}
		var enum []string
		var list []any
		if tt.ref != "" {
			list = resolve(t, raw, tt.ref)["enum"].([]any)
		} else {
			share := resolve(t, raw, "#/components/schemas/Share")["allOf"].([]any)[1].(map[string]any)
			list = share["properties"].(map[string]any)["state"].(map[string]any)["enum"].([]any)
		}
		for _, name := range list {
			enum = append(enum, name.(string))
		}
		slices.Sort(consts)
		slices.Sort(enum)
		if len(consts) == 0 || !slices.Equal(consts, enum) {
			t.Errorf("%s has %q, the document %q", tt.file, consts, enum)
		}
	}
}

func TestOpenAPIRefs(t *testing.T) {
	_, raw := load(t)
	var walk func(any)
	n := 0
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if ref, ok := v["$ref"].(string); ok {
				resolve(t, raw, ref)
				n++
			}
			for _, e := range v {
				walk(e)
			}
		case []any:
			for _, e := range v {
				walk(e)
			}
		}
	}
	walk(raw)
	if n < 50 {
		t.Errorf("only %d references were looked at", n)
	}
}

func TestOpenAPIIsServed(t *testing.T) {
	r := newRig(t, nil)
	resp, text := do(t, r.client, "GET", "/v1/openapi.yaml", "")
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/yaml" || text != string(docs.OpenAPI) {
		t.Errorf("%d %s, %d bytes", resp.StatusCode, resp.Header.Get("Content-Type"), len(text))
	}
	var refusalBody api.Error
	_, body, _ := strings.Cut(string(refusal), "\r\n\r\n")
	if err := json.Unmarshal([]byte(body), &refusalBody); err != nil || refusalBody.Code != api.CodeUnavailable {
		t.Errorf("the answer for one too many is %s: %v", body, err)
	}
}
