package sim

import (
	"fmt"
	"slices"
	"time"

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
	w.checkCounter(p, b.Counter, id)
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
		if w.cfg.Liars != nil && !p.bodies[e.Gradient] {
			w.fail("P5: peer %d signs a record with a gradient of %d that it does not hold", p.id, e.Peer)
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

// checkCounter checks what a peer votes for as head with a counter.
func (w *world) checkCounter(p *peer, counter uint64, id round.Hash) {
	k := [2]uint64{uint64(p.id), counter}
	if before, ok := w.counters[k]; ok && before != id {
		w.fail("P3: peer %d votes for two heads with counter %d", p.id, counter)
	}
	w.counters[k] = id
	if counter > p.counter {
		w.fail("P3: peer %d signs with counter %d, above %d on disk", p.id, counter, p.counter)
	}
}

// rounds notes how long rounds take: from when the first peer is at height 1 to
// when the first is at the highest.
func (w *world) rounds(height uint64) {
	switch {
	case height <= w.top:
		return
	case w.top == 0:
		w.firstAt = w.now
	default:
		w.result.Stall = max(w.result.Stall, w.now-w.topAt)
		w.result.Round = (w.now - w.firstAt) / time.Duration(height-1)
	}
	w.top, w.topAt = height, w.now
}

// done reports whether the run has shown what it is for.
func (w *world) done() bool {
	if w.cfg.Rounds == 0 {
		return w.met > 0
	}
	for _, p := range w.peers {
		if !p.liar && !p.left && w.member[p.id] && (p.up || p.life == 0) && p.finished == (round.Hash{}) {
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
	w.result.Final = w.highest.Height
	for i := range w.accused {
		if w.peers[i].liar {
			w.result.Expelled++
		}
	}
	if w.err != nil {
		return
	}
	for _, p := range w.peers {
		if !p.up || p.liar || !w.member[p.id] || w.met == 0 {
			continue
		}
		if w.highest.Height > 0 && !w.follows(w.records[p.head], w.highest) {
			w.fail("P10: the head of peer %d (height %d) does not follow the final checkpoint of height %d", p.id, p.height, w.highest.Height)
		}
	}
	w.checkProofs()
	if w.cfg.Rounds == 0 && w.met == 0 {
		w.fail("P6: %v after all faults healed the heads have not met at height %d or more: %v", w.cfg.Settle, w.goal, w.result.Heights)
	}
	if w.cfg.Rounds > 0 {
		for _, p := range w.peers {
			if p.up && w.member[p.id] && !p.liar && p.finished == (round.Hash{}) {
				w.fail("P14: peer %d has not finished: heights %v", p.id, w.result.Heights)
			}
		}
	}
}

// follows reports whether a record is a checkpoint or descends from it.
func (w *world) follows(r round.Record, c round.Checkpoint) bool {
	for r.Height > c.Height {
		parent, ok := w.records[r.Parent]
		if !ok {
			return false
		}
		r = parent
	}
	return r.ID() == c.ID
}

func (w *world) checkVote(p *peer, v round.Vote) {
	id := v.Target.ID()
	if w.voters[id] == nil {
		w.voters[id] = map[int]bool{}
	}
	w.voters[id][p.id] = true
	source := v.Target.Justified
	if source.Height > 0 && !w.follows(v.Target, source) {
		w.fail("peer %d votes for a target of height %d that does not follow its source", p.id, v.Target.Height)
	}
}

// checkFinal checks P1, and that a quorum stands behind what is final (P7).
func (w *world) checkFinal(p *peer, c round.Checkpoint) {
	if p.liar {
		return
	}
	p.final = c
	honest, need := 0, round.Quorum(len(w.roster(c.Roster).Members))-len(w.cfg.Liars)
	if w.voters[c.ID] != nil {
		honest = len(w.voters[c.ID])
	}
	if honest < need {
		w.fail("P7: peer %d takes the checkpoint of height %d for final with the votes of %d honest peers, %d are needed", p.id, c.Height, honest, need)
	}
	if other, ok := w.final[c.Height]; ok && other != c.ID {
		w.fail("P1: two checkpoints of height %d are final", c.Height)
	}
	if w.final[c.Height] == c.ID {
		return
	}
	w.final[c.Height] = c.ID
	r := w.records[c.ID]
	switch {
	case c.Height > w.highest.Height && w.highest.Height > 0 && !w.follows(r, w.highest):
		w.fail("P1: the final checkpoint of height %d does not follow that of height %d", c.Height, w.highest.Height)
	case c.Height < w.highest.Height && !w.follows(w.records[w.highest.ID], c):
		w.fail("P1: the final checkpoint of height %d does not follow that of height %d", w.highest.Height, c.Height)
	}
	if c.Height > w.highest.Height {
		w.highest = c
	}
}

// seenKey is what a liar may say one thing for.
type seenKey struct {
	by, life int
	said     saidKey
}

// note sees an honest peer get a second message of a liar for one thing: from
// then on there has to be a proof (P8).
func (w *world) note(q *peer, s *stored) {
	liar := int(s.msg.From)
	if q.liar || !w.peers[liar].liar || !q.up || q.paused {
		return
	}
	switch s.msg.Type() {
	case round.TypeAnnounce, round.TypeBallot:
	default:
		return
	}
	// Only what the machine looks at: the slot that it is in.
	if s.msg.Parent != q.head {
		return
	}
	k := seenKey{q.id, q.life, saidKey{s.msg.From, s.msg.Type(), s.msg.Slot, s.msg.Parent}}
	if before, ok := w.seen[k]; ok && before != s.id && w.member[liar] {
		w.accused[liar] = true
	}
	w.seen[k] = s.id
}

// checkProofs checks P8: who was proven guilty, or said two things to one
// honest peer, is gated by all that stayed connected.
func (w *world) checkProofs() {
	if !w.healed || w.met == 0 {
		return
	}
	for liar := range w.peers {
		guilty := 0
		for _, p := range w.peers {
			if p.up && !p.liar && w.member[p.id] && p.gated[liar] {
				guilty++
			}
		}
		if guilty == 0 {
			continue
		}
		for _, p := range w.peers {
			if p.up && !p.liar && w.member[p.id] && !p.gated[liar] && !slices.Contains(w.records[p.head].Expelled, round.Peer(liar)) && w.now > w.lastProof+time.Second {
				w.fail("P8: peer %d is proven guilty at %d others, and not at peer %d", liar, guilty, p.id)
			}
		}
	}
}
