// Package plugin is for programs that serve layers to Sluice: trees of files that an overlay is made of, by //NAME/DATA/PATH
// in lowerdir.
//
// A plug-in is a program that Sluice starts, with one end of a SOCK_SEQPACKET socket as descriptor 3, or a Plugin that is
// compiled in. docs/layer-plugins.md is the protocol; nothing of Sluice is needed to speak it. In Go:
//
//	func main() {
//		if err := plugin.Main(images{}); err != nil {
//			fmt.Fprintln(os.Stderr, err)
//			os.Exit(1)
//		}
//	}
package plugin
