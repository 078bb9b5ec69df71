package events

import (
	"testing"

	"github.com/spirt-ml/spirt/bill"
)

func TestRoundSum(t *testing.T) {
	var s RoundSum
	if _, ok := s.Loss(); ok || s.Seconds() != 0 {
		t.Error("nobody has told anything")
	}
	one, two := 1.0, 2.0
	s.Add(&Event{Loss: &one, Seconds: 3, Samples: 10, Spent: &Spent{CostUSD: 5}})
	s.Add(&Event{Loss: &two, Seconds: 1, Samples: -10, Spent: &Spent{CostUSD: -5}})
	s.Add(&Event{Seconds: 2, Samples: 1}) // it has caught up
	if loss, ok := s.Loss(); !ok || loss != 1.5 || s.Seconds() != 2 || s.Samples != 11 || s.Cost != 5 {
		t.Errorf("loss %v, %+v", loss, s)
	}
	s.Add(&Event{Spent: &Spent{CostUSD: bill.MaxMoney}})
	if s.Cost != bill.MaxMoney {
		t.Error(s.Cost)
	}
}
