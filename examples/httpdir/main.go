// Command httpdir is a layer plug-in: directories that fill with the files of a web server, each when it is first opened.
//
//	lowerdir=//http/BASE64/DIRECTORY
//
// BASE64 is the server's URL (base64url), whose index.txt lists the files as package webtree says; DIRECTORY is a path of the
// host without its first slash, where they are kept.
package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/sluicefs/sluice/examples/httpdir/filldir"
	"github.com/sluicefs/sluice/examples/httpfs/webtree"
	"github.com/sluicefs/sluice/plugin"
)

func main() {
	if err := plugin.Main(web{}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

type web struct{}

func (web) Name() string { return "http" }

func (web) Needs() plugin.Needs { return plugin.Needs{Network: true} }

func (web) NumLayers(context.Context, string, string) (int, error) { return 1, nil }

func (web) Load(_ context.Context, data, path string, _ int) (plugin.Layer, error) {
	url, err := base64.URLEncoding.DecodeString(data)
	if err != nil {
		return nil, fmt.Errorf("the URL in base64: %w", err)
	}
	tree, err := webtree.New(&http.Client{Timeout: 30 * time.Second}, string(url))
	if err != nil {
		return nil, err
	}
	return filldir.New(tree, "/"+path)
}
