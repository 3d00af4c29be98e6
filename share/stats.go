package share

import "github.com/sluicefs/sluice/fsbackend"

// Stats implements fsbackend.Statser: it adds up the parts. Isolated ones are not asked, for their code may hang.
func (s *Share) Stats() (sum fsbackend.Stats) {
	for _, p := range s.snapshot() {
		if p.Statser != nil && !p.info.Isolated {
			sum.Add(p.Statser.Stats())
		}
	}
	return sum
}
