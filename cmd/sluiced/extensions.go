package main

import "github.com/sluicefs/sluice/extensions"

// builtin are the extensions of sluiced itself, in the order they are asked in. Yours go into a program of your own: see
// docs/extensions.md.
var builtin []extensions.Extension
