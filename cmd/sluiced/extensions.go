package main

import (
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/extensions/casefold"
	"github.com/sluicefs/sluice/extensions/fusebridge"
	"github.com/sluicefs/sluice/extensions/lazyimage"
	"github.com/sluicefs/sluice/extensions/overlay"
	"github.com/sluicefs/sluice/extensions/permshift"
	"github.com/sluicefs/sluice/extensions/plugins"
)

// builtin are the extensions of sluiced itself, in the order they are asked in: the layers of docs/layers.md. Yours go into a program
// of your own: see docs/extensions.md.
var builtin = []extensions.Extension{
	overlay.Extension{},
	&lazyimage.Extension{},
	fusebridge.Extension{},
	permshift.Extension{},
	casefold.Extension{},
	&plugins.Extension{},
}
