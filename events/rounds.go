package events

import "github.com/spirt-ml/spirt/bill"

// RoundSum is one round as the peers that have finished it tell of it. The zero
// value has seen none.
type RoundSum struct {
	Samples int64      // that gradients were computed of
	Cost    bill.Money // of all of them, as they reckon it

	told, losses  int
	loss, seconds float64
}

// Add takes what a peer tells, an event of the kind round.
func (s *RoundSum) Add(e *Event) {
	s.told++
	s.seconds += e.Seconds
	if n := int64(e.Samples); n > 0 && n < 1<<40 {
		s.Samples += n
	}
	if e.Loss != nil {
		s.losses++
		s.loss += *e.Loss
	}
	if e.Spent != nil {
		s.Cost += min(max(e.Spent.CostUSD, 0), bill.MaxMoney-s.Cost)
	}
}

// Loss is the mean over the peers; ok is false if none has told its loss.
func (s *RoundSum) Loss() (mean float64, ok bool) {
	if s.losses == 0 {
		return 0, false
	}
	return s.loss / float64(s.losses), true
}

// Seconds is how long the round took, the mean over the peers.
func (s *RoundSum) Seconds() float64 {
	if s.told == 0 {
		return 0
	}
	return s.seconds / float64(s.told)
}
