package round

import (
	"testing"
	"time"
)

// The computation for the record that this peer signed replaces one for the
// head that came late. When nobody else signs the record, the one for the
// head is asked for again: else this peer would never announce there.
func TestReplacedComputationIsAskedForAgain(t *testing.T) {
	o := newOthers(t, 4)
	m, genesis := o.m, o.m.head
	var set []Entry
	for p := Peer(1); p < 4; p++ {
		g := h(p.String())
		set = append(set, Entry{p, g})
		m.Step(0, said(Message{From: p, Slot: m.slot, Parent: genesis.id, Body: Announce{Gradient: g, Bytes: 4, BaseModel: genesis.rec.Model}}))
		m.Step(0, BodyReady{Peer: p, Gradient: g})
	}
	m.Step(time.Minute, Timer{}) // without this peer's own
	for p := Peer(1); p < 4; p++ {
		m.Step(time.Minute, said(Message{From: p, Slot: m.slot, Parent: genesis.id, Body: Ballot{Entries: set}}))
	}
	if m.phase != phaseApply {
		t.Fatalf("the phase is %d", m.phase)
	}
	var computes []Compute
	look := func(actions []Action) {
		for _, a := range actions {
			if c, ok := a.(Compute); ok {
				computes = append(computes, c)
			}
		}
	}
	look(m.Step(time.Minute, Applied{Slot: m.slot, Parent: genesis.id, Set: set, Model: h("m1"), State: h("s1")}))
	if len(computes) != 1 || computes[0].Parent != m.own.id {
		t.Fatalf("after signing: %v", computes)
	}
	look(m.Step(2*time.Minute, Timer{})) // nobody else signed
	if m.head != genesis || m.phase != phaseGather {
		t.Fatalf("the head has height %d, the phase is %d", m.head.rec.Height, m.phase)
	}
	if len(computes) != 2 || computes[1].Parent != genesis.id || computes[1].Height != 1 {
		t.Errorf("after the failed slot: %v, want one for height 1 at the end", computes)
	}
}
