//go:build amd64 || arm64

package virtiofs

// pause tells the core that the thread polls: its sibling, which may be the guest's, gets what the loop does not need, and the loop's
// end does not cost the loads that were made ahead.
func pause()
