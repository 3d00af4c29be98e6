// Package daemon is sluiced, to be made a program of one's own with other extensions in it:
//
//	func main() { os.Exit(daemon.Main(myfs.Extension{})) }
//
// run.go tells from top to bottom what happens when.
package daemon

import (
	"context"
	"os"

	"github.com/sluicefs/sluice/extensions"
	confined "github.com/sluicefs/sluice/internal/program"
)

// Main runs sluiced with the arguments of the process and these extensions, which are asked in this order, and returns
// the exit status. It is all that a program's main function does: with --sandbox namespace the program is started again
// by itself.
func Main(exts ...extensions.Extension) int {
	confined.MaybeConfine()
	raiseProcs()
	return run(context.Background(), os.Args[1:], stdio{out: os.Stdout, err: os.Stderr}, exts)
}
