// Package docs is the part of the documentation that the program carries.
package docs

import _ "embed"

// OpenAPI describes the control API, as YAML.
//
//go:embed openapi.yaml
var OpenAPI []byte
