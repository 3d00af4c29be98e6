// Package builtin has the extensions that sluiced comes with: the layers of docs/layers.md. A program of one's own that is to have
// them too gives them to daemon.Main beside its own.
package builtin

import (
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/extensions/casefold"
	"github.com/sluicefs/sluice/extensions/fusebridge"
	"github.com/sluicefs/sluice/extensions/lazyimage"
	"github.com/sluicefs/sluice/extensions/overlay"
	"github.com/sluicefs/sluice/extensions/permshift"
	"github.com/sluicefs/sluice/extensions/plugins"
)

// All returns them, in the order they are listed in.
func All() []extensions.Extension {
	return []extensions.Extension{
		overlay.Extension{},
		&lazyimage.Extension{},
		fusebridge.Extension{},
		permshift.Extension{},
		casefold.Extension{},
		&plugins.Extension{},
	}
}
