// Command sluiced serves a directory to a virtual machine: it is a vhost-user back-end of the virtio-fs device.
package main

import (
	"os"

	"github.com/sluicefs/sluice/daemon"
	"github.com/sluicefs/sluice/extensions/builtin"
)

//go:generate sh -c "go run . man >../../docs/man/sluiced.1"
//go:generate sh -c "go run . completion bash >../../contrib/completions/sluiced.bash"
//go:generate sh -c "go run . completion zsh >../../contrib/completions/_sluiced"
//go:generate sh -c "go run . completion fish >../../contrib/completions/sluiced.fish"

func main() {
	os.Exit(daemon.Main(builtin.All()...))
}
