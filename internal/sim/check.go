package sim

import (
	"fmt"
	"slices"

	"github.com/spirt-ml/spirt/internal/round"
)

// The properties, at every step and at the end.

func (w *world) fail(format string, args ...any) {
	if w.err == nil {
		w.err = fmt.Errorf("seed %d at %v: %s", w.cfg.Seed, w.now, fmt.Sprintf(format, args...))
		w.trace("VIOLATION %v", w.err)
	}
}

func (w *world) checkRecord(p *peer, msg round.Message, b round.SignedRecord) {
	id := b.Record.ID()
	w.records[id] = b.Record
	k := [2]uint64{uint64(p.id), b.Counter}
	if before, ok := w.counters[k]; ok && before != id {
		w.fail("P3: peer %d signs two records with counter %d", p.id, b.Counter)
	}
	w.counters[k] = id
	if b.Counter > p.counter {
		w.fail("P3: peer %d signs with counter %d, above %d on disk", p.id, b.Counter, p.counter)
	}
	if s := follows(w.records[b.Record.Parent], b.Record.Set); s != stateOf(b.Record) {
		w.fail("P2: peer %d signs a record whose model does not follow from its set", p.id)
	}
	if !p.states[stateOf(b.Record)] {
		w.fail("P2: peer %d signs a record whose state it does not hold", p.id)
	}
	for _, e := range b.Record.Set {
		announce := saidKey{e.Peer, round.TypeAnnounce, msg.Slot, msg.Parent}
		if _, ok := w.said[announce]; !ok && !w.peers[e.Peer].liar {
			w.fail("P4: peer %d signs a record with a gradient that %d did not announce", p.id, e.Peer)
		}
		// A record of one gradient is its announcer's, who had no ballot from
		// anyone; others that sign it hold it.
		alone := len(b.Record.Set) == 1 && p.bodies[e.Gradient]
		other := slices.ContainsFunc(w.ballots[balloted{msg.Slot, msg.Parent, e}], func(q round.Peer) bool { return q != e.Peer })
		if !alone && !other && len(w.cfg.Liars) == 0 {
			w.fail("P5: peer %d signs a record with a gradient of %d that nobody else balloted", p.id, e.Peer)
		}
	}
}

// done reports whether the run has shown what it is for.
func (w *world) done() bool {
	if w.cfg.Rounds == 0 {
		return w.met > 0
	}
	for _, p := range w.peers {
		if !p.liar && (p.up || p.life == 0) && p.finished == (round.Hash{}) {
			return false
		}
	}
	return w.healed || w.cfg.Chaos == 0
}

func (w *world) end() {
	w.result.Time = w.now
	w.result.Met = w.met
	for _, p := range w.peers {
		w.result.Heights = append(w.result.Heights, p.height)
	}
	if w.err != nil {
		return
	}
	if w.cfg.Rounds == 0 && w.met == 0 {
		w.fail("P6: %v after all faults healed the heads have not met at height %d or more: %v", w.cfg.Settle, w.goal, w.result.Heights)
	}
	if w.cfg.Rounds > 0 {
		for _, p := range w.peers {
			if p.up && !p.liar && p.finished == (round.Hash{}) {
				w.fail("P14: peer %d has not finished: heights %v", p.id, w.result.Heights)
			}
		}
	}
}
