//go:build race

package permshift

const raceEnabled = true
