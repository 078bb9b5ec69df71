package round

import (
	"fmt"
	"slices"
)

// One slot, from its beginning to the signed record.

// final reports whether the run ends at a record.
func (m *Machine) final(r *Record) bool {
	_, ok := m.reason(r)
	return ok
}

func (m *Machine) reason(r *Record) (Reason, bool) {
	v := r.Validation
	if t := uint64(m.cfg.TargetAccuracy); t > 0 && v.Count > 0 && uint64(v.Correct)*10000 >= t*uint64(v.Count) {
		return TargetReached, true
	}
	switch {
	case m.cfg.Patience > 0 && r.Convergence.Stale >= m.cfg.Patience:
		return Converged, true
	case r.Stop == StopTime:
		return OutOfTime, true
	case r.Stop == StopMoney:
		return OutOfMoney, true
	}
	return RoundsReached, m.cfg.Rounds > 0 && r.Height >= m.cfg.Rounds
}

func (m *Machine) fUsed(set int) int { return min(m.ros.F, (set-1)/2) }

// nextSlot is the next that this peer may begin on the head.
func (m *Machine) nextSlot() uint64 {
	floor := m.floor
	if m.mutant.ignoreWatermark {
		floor = 0
	}
	if m.mutant.repeatSlot {
		return max(m.head.rec.Slot, floor) + 1
	}
	return max(m.head.rec.Slot, m.head.ownLast, floor) + 1
}

// ahead returns the highest slot that others work at on the head, if it is
// later than the given one, and charges the peer that said so.
func (m *Machine) ahead(slot uint64) uint64 {
	best, who := slot, -1
	for p := range m.peers {
		s := &m.peers[p]
		if !s.connected || !m.other(Peer(p)) || s.jumped && m.head.rec.Height < s.jumpedAt+jumpHeights {
			continue
		}
		for i := range s.inbox {
			h := &s.inbox[i]
			if (h.announced || h.returned) && h.parent == m.head.id && h.slot > best && h.slot-slot <= maxJump {
				best, who = h.slot, p
			}
		}
	}
	if who >= 0 {
		m.peers[who].jumped = true
		m.peers[who].jumpedAt = m.head.rec.Height
	}
	return best
}

// jump leaves the slot for a later one that others work at on the same head.
func (m *Machine) jump() bool {
	if !m.later {
		return false
	}
	m.later = false
	slot := m.ahead(m.slot)
	if slot == m.slot {
		return false
	}
	m.trim()
	m.beginAt(slot)
	return true
}

// beginSlot begins the next slot on the head.
func (m *Machine) beginSlot() {
	slot := m.nextSlot()
	m.beginAt(m.ahead(slot))
}

func (m *Machine) beginAt(slot uint64) {
	if slot > MaxSlot {
		m.phase = phaseDone
		return
	}
	m.prevSlot, m.prevParent, m.prevBegan = m.slot, m.parent, m.began
	m.parent = m.head.id
	m.begun++
	m.slot, m.began = slot, m.now
	m.head.ownLast = slot
	m.phase = phaseGather
	m.timedOut, m.hurried, m.announced, m.recorded = false, false, false, false
	m.set, m.target, m.own, m.pursued = nil, nil, nil, nil
	m.expel, m.justify, m.succeed = nil, Checkpoint{}, Hash{}
	m.retried = m.retried[:0]
	m.dirty, m.later = true, true
	// A gradient whose body was given up meanwhile is computed again.
	m.gradients = slices.DeleteFunc(m.gradients, func(g ownGradient) bool {
		return g.parent != m.head.id || g.ready && m.bodies[g.value.Gradient] == nil
	})
	if pause := m.paused(); pause || !m.taking {
		if pause && m.taking {
			m.report(Paused, m.cfg.Self, m.final_.ID, fmt.Sprintf("nothing after height %d is final and less than a quorum is connected: this peer waits", m.final_.Height))
		}
		m.phase = phaseObserve
		m.retain()
		return
	}
	m.deadline = max(m.now+m.gradientTimeout(), m.startDeadline())
	for p := range m.peers {
		if h := m.here(Peer(p)); h != nil && (h.announced || h.returned) {
			m.returns(Peer(p))
		}
		m.wait[p] = m.peers[p].waiting && m.present(Peer(p))
	}
	m.cover(slot)
	if m.head.rec.Height > 0 && (m.fails > 0 || m.begun == 1 || !m.head.rec.Has(m.cfg.Self) || m.moved()) {
		m.sayReturn()
	}
	m.compute(slot, m.head)
	m.announce()
	for p := range m.peers {
		if h := m.here(Peer(p)); h != nil && h.announced && m.other(Peer(p)) {
			m.wantBody(Peer(p), &h.announce)
		}
	}
	m.retain()
}

func (m *Machine) enterFinal() {
	m.phase = phaseFinal
	m.set, m.target, m.own, m.pursued = nil, nil, nil, nil
	m.dirty = true
	m.deadline = m.now + m.limits.Linger
	m.slot = m.nextSlot()
	m.retain()
	if m.taking && m.latest[m.cfg.Self].node != m.head {
		m.cover(m.slot)
		m.sayReturn()
	}
}

// moved reports whether this peer went to a head that it did not sign, and
// signed nothing that follows it: its latest vote then is for where it no
// longer is.
func (m *Machine) moved() bool {
	l := m.latest[m.cfg.Self].node
	return l == nil || !l.descends(m.head)
}

// sayReturn says that this peer is at the head, and votes for it where its
// latest vote is for something else.
func (m *Machine) sayReturn() {
	r := Return{Head: m.head.rec}
	if m.moved() {
		m.counter++
		r.Counter = m.counter
		m.latest[m.cfg.Self] = latestSigned{counter: m.counter, node: m.head}
	}
	m.send(r)
}

// hurry shortens the wait for announcements once enough others gave theirs up:
// they will not wait long for this peer's ballot.
func (m *Machine) hurry() {
	if m.phase != phaseGather || m.hurried {
		return
	}
	n := 0
	for p := range m.peers {
		if h := m.here(Peer(p)); h != nil && h.balloted {
			n++
		}
	}
	if n >= m.threshold(m.ros) && n > 0 {
		m.hurried = true
		m.deadline = min(m.deadline, m.now+m.answerTimeout()/2)
	}
}

func (m *Machine) castBallot() {
	var set []Entry
	for p := range m.peers {
		h := m.here(Peer(p))
		if h == nil || !h.announced || h.announce.Abstains() || !m.members[p] {
			continue
		}
		if b := m.bodies[h.announce.Gradient]; b != nil && b.status == bodyHeld || m.mutant.ballotUnheld {
			set = append(set, Entry{Peer(p), h.announce.Gradient})
		}
	}
	b := Ballot{Entries: set, Justified: m.proposal(), Roster: m.succession()}
	for _, p := range m.ros.Members {
		if _, known := slices.BinarySearch(m.head.rec.Expelled, p); m.peers[p].guilty && !known && !m.mutant.keepGuilty {
			b.Expelled = append(b.Expelled, p)
		}
	}
	h := m.hear(m.cfg.Self, m.slot, m.head.id)
	h.balloted, h.ballot = true, b
	m.phase = phaseBallot
	m.ballotAt = m.now
	m.deadline = m.now + m.answerTimeout()
	m.dirty = true
	m.send(b)
}

// candidate is an entry with the ballots for it, its announcer's not counted.
type candidate struct {
	gradient Hash
	support  int
}

// tally returns what most of at least need ballots want, ties to the smaller
// hash; zero if nothing has so many.
func tally[T comparable](m *Machine, ballots []*Ballot, need int, of func(*Ballot) T, less func(a, b T) bool) T {
	var best, none T
	votes := 0
	for i, b := range ballots {
		v := of(b)
		if v == none || slices.ContainsFunc(ballots[:i], func(x *Ballot) bool { return of(x) == v }) {
			continue
		}
		n := 0
		for _, x := range ballots[i:] {
			if of(x) == v {
				n++
			}
		}
		if n >= need && (n > votes || n == votes && less(v, best)) {
			best, votes = v, n
		}
	}
	return best
}

// decide makes the set from the ballots, and what else the record says.
func (m *Machine) decide() {
	var ballots []*Ballot
	voters := make([]Peer, 0, len(m.ros.Members))
	collect := func() {
		ballots, voters = ballots[:0], voters[:0]
		for p := range m.peers {
			if !m.members[p] || slices.Contains(m.expel, Peer(p)) {
				continue
			}
			if h := m.here(Peer(p)); h != nil && h.balloted {
				ballots, voters = append(ballots, &h.ballot), append(voters, Peer(p))
			}
		}
	}
	collect()
	// A proof is flooded before the ballot that names the guilty.
	m.expel = nil
	for _, b := range ballots {
		for _, p := range b.Expelled {
			_, known := slices.BinarySearch(m.head.rec.Expelled, p)
			if !known && m.inRange(p) && m.peers[p].guilty && m.ros.has(p) && !slices.Contains(m.expel, p) {
				m.expel = append(m.expel, p)
			}
		}
	}
	slices.Sort(m.expel)
	if len(m.expel) > 0 {
		collect()
	}
	need := min(m.ros.F+1, len(ballots))
	m.justify = tally(m, ballots, need, func(b *Ballot) Checkpoint { return b.Justified }, func(a, b Checkpoint) bool {
		return a.Height > b.Height || a.Height == b.Height && lessHash(a.ID, b.ID)
	})
	if m.justify.Height > m.head.rec.Height || m.justify.Height <= m.head.rec.Justified.Height {
		m.justify = Checkpoint{}
	}
	m.succeed = tally(m, ballots, need, func(b *Ballot) Hash { return b.Roster }, lessHash)
	if r := m.rosters[m.succeed]; r == nil || !m.maySucceed(&m.head.rec, r) {
		m.succeed = Hash{}
	}

	byPeer := make([][]candidate, len(m.peers))
	balloted := make([]bool, len(m.peers))
	for i, b := range ballots {
		balloted[voters[i]] = true
		for _, e := range b.Entries {
			if !m.inRange(e.Peer) || !m.members[e.Peer] || slices.Contains(m.expel, e.Peer) {
				continue
			}
			c := byPeer[e.Peer]
			k := slices.IndexFunc(c, func(c candidate) bool { return c.gradient == e.Gradient })
			if k < 0 {
				k = len(c)
				c = append(c, candidate{gradient: e.Gradient})
				byPeer[e.Peer] = c
			}
			if e.Peer != voters[i] {
				c[k].support++
			}
		}
	}
	m.set = nil
	for p, c := range byPeer {
		if len(c) == 0 {
			continue
		}
		best := c[0]
		for _, x := range c[1:] {
			if x.support > best.support || x.support == best.support && lessHash(x.gradient, best.gradient) {
				best = x
			}
		}
		if len(ballots) == 1 { // this peer's
			if Peer(p) == m.cfg.Self {
				m.set = append(m.set, Entry{Peer(p), best.gradient})
			}
			continue
		}
		others := len(ballots)
		if balloted[p] {
			others--
		}
		if best.support >= max(1, min(m.ros.F+1, others)) {
			m.set = append(m.set, Entry{Peer(p), best.gradient})
		}
	}
	if len(m.set) == 0 {
		m.failSlot("no gradient has enough ballots")
		return
	}
	m.phase = phaseFetch
	m.deadline = m.now + m.limits.Fetch
}

// collect waits for the announcements and bodies of the set, then has it
// applied.
func (m *Machine) collect(expired bool) bool {
	missing := false
	for _, e := range m.set {
		h := m.here(e.Peer)
		if h == nil || !h.announced {
			missing = true
			continue
		}
		if h.announce.Gradient != e.Gradient {
			m.failSlot(fmt.Sprintf("peer %s announced something else to others", e.Peer))
			return true
		}
		b := m.bodies[e.Gradient]
		if b != nil && b.status == bodyHeld {
			continue
		}
		missing = true
		if b != nil && (b.status == bodyFetching || b.status == bodyWanted) {
			continue
		}
		if b != nil && (b.status == bodyRefused || slices.Contains(m.retried, e.Gradient)) {
			m.failSlot(fmt.Sprintf("the gradient of peer %s cannot be had", e.Peer))
			return true
		}
		m.retried = append(m.retried, e.Gradient)
		m.wantBody(e.Peer, &h.announce)
	}
	if !missing {
		m.phase = phaseApply
		m.emit(Apply{Slot: m.slot, Height: m.head.rec.Height + 1, Parent: m.head.id, Set: m.set, FUsed: uint16(m.fUsed(len(m.set)))})
		return true
	}
	if expired {
		m.timedOut = true
		m.report(TimeoutFetch, m.cfg.Self, Hash{}, fmt.Sprintf("waited %v for the gradients of the record", m.limits.Fetch))
		m.failSlot("a gradient of the record could not be had in time")
		return true
	}
	return false
}

func (m *Machine) applied(ev *Applied) {
	if m.phase != phaseApply {
		return
	}
	if n := m.pursued; n != nil {
		if ev.Slot != n.rec.Slot || ev.Parent != n.rec.Parent || !slices.Equal(ev.Set, n.rec.Set) {
			return
		}
		m.pursued = nil
		if m.differs(n, ev) {
			m.rechoose()
			return
		}
		m.hold(n)
		m.arrive(n, Recomputed)
		return
	}
	if ev.Slot != m.slot || ev.Parent != m.head.id || !slices.Equal(ev.Set, m.set) {
		return
	}
	parent := &m.head.rec
	r := Record{
		Slot: m.slot, Height: parent.Height + 1, Parent: m.head.id, Set: m.set,
		FUsed: uint16(m.fUsed(len(m.set))), Validation: m.medianValidation(),
		Model: ev.Model, State: ev.State,
		Position: min(parent.Position+m.ros.Minibatches, MaxSlot), Roster: parent.Roster, Justified: parent.Justified,
		Expelled: union(parent.Expelled, m.expel), Stop: m.wish(),
	}
	r.Convergence = parent.Convergence.after(r.Validation, m.cfg.MinDelta)
	if m.succeed != (Hash{}) {
		r.Roster = m.succeed
	}
	if m.justify != (Checkpoint{}) {
		r.Justified = m.justify
	}
	if n := m.target; n != nil {
		// What enough others agreed on; the proofs are here, see follow.
		r.Roster, r.Justified, r.Expelled = n.rec.Roster, n.rec.Justified, n.rec.Expelled
		switch {
		case m.mutant.believe:
			r = n.rec
		case m.differs(n, ev):
			m.failSlot("its model differs from the others'")
			return
		case r.ID() != n.id:
			// The same model, but an announcement with another validation
			// result: the record is theirs, and not signed here.
			m.hold(n)
			m.arrive(n, Recomputed)
			return
		}
	}
	m.sign(r)
}

// union returns the members of two ascending sets.
func union(a, b []Peer) []Peer {
	if len(b) == 0 {
		return a
	}
	out := append(slices.Clone(a), b...)
	slices.Sort(out)
	return slices.Compact(out)
}

// differs checks a record against what the host computed from its set.
func (m *Machine) differs(n *node, ev *Applied) bool {
	if n.rec.Model == ev.Model && n.rec.State == ev.State || m.mutant.believe {
		return false
	}
	n.differs = true
	m.report(ModelDiffers, m.cfg.Self, n.id, fmt.Sprintf("record %s (height %d) names model %s, but its set gives %s here", n.id.Short(), n.rec.Height, n.rec.Model.Short(), ev.Model.Short()))
	return true
}

func (m *Machine) applyFailed(ev *ApplyFailed) {
	if m.phase != phaseApply {
		return
	}
	if n := m.pursued; n != nil {
		if ev.Slot == n.rec.Slot && ev.Parent == n.rec.Parent {
			n.differs = true
			m.pursued = nil
			m.rechoose()
		}
		return
	}
	if ev.Slot == m.slot && ev.Parent == m.head.id {
		m.failSlot("the update failed: " + ev.Reason)
	}
}

// sign signs this peer's record of the slot.
func (m *Machine) sign(r Record) {
	m.cover(m.slot)
	m.counter++
	id := r.ID()
	m.send(SignedRecord{Record: r, Counter: m.counter, TimedOut: m.timedOut})
	n := m.tree.add(id, r, m.now)
	if n == nil {
		m.failSlot("the record does not fit its parent")
		return
	}
	n.signers.add(m.cfg.Self)
	m.hold(n)
	m.latest[m.cfg.Self] = latestSigned{counter: m.counter, node: n}
	m.hear(m.cfg.Self, m.slot, m.head.id).record = n
	m.own, m.recorded, m.target = n, true, nil
	m.phase = phaseRecord
	m.recordAt = m.now
	m.deadline = m.now + m.answerTimeout()
	m.dirty = true
	if !m.final(&r) {
		m.compute(max(m.slot, m.floor)+1, n)
	}
}

// conclude ends a slot in which this peer signed.
func (m *Machine) conclude() {
	m.dirty = false
	n := m.choose()
	switch {
	case m.own != nil && n.descends(m.own) && m.stands(m.own):
		m.adopt(m.own, Recomputed)
	case n == m.head:
		m.failSlot("too few signed the same record")
	default:
		m.pursue(n)
	}
}

// failSlot goes on to the next slot on the same head. Everyone who is
// connected is waited for again: who does not wait, signs alone.
func (m *Machine) failSlot(why string) {
	m.report(SlotFailed, m.cfg.Self, Hash{}, fmt.Sprintf("slot %d: %s", m.slot, why))
	m.trim()
	m.target, m.own = nil, nil
	m.fails++
	for p := range m.peers {
		m.peers[p].jumped = false
		if m.peers[p].connected && !m.peers[p].waiting {
			m.returns(Peer(p))
		}
	}
	if m.timedOut {
		m.beginSlot()
		return
	}
	m.phase = phasePause
	m.deadline = m.now + min(pauseFirst<<min(m.fails-1, 10), pauseMax)
	m.dirty = true
}

func (m *Machine) medianValidation() Validation {
	var losses []int64
	var counts []Validation
	for _, e := range m.set {
		if h := m.here(e.Peer); h != nil && h.announce.Validation.Count > 0 {
			losses = append(losses, h.announce.Validation.LossMicro)
			counts = append(counts, h.announce.Validation)
		}
	}
	if len(losses) == 0 || len(losses) < min(m.ros.F+1, len(m.set)) {
		return Validation{} // perhaps liars only, where none was due
	}
	slices.Sort(losses)
	slices.SortFunc(counts, func(a, b Validation) int {
		x, y := uint64(a.Correct)*uint64(b.Count), uint64(b.Correct)*uint64(a.Count)
		switch {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return int(int64(a.Count) - int64(b.Count))
	})
	mid := (len(losses) - 1) / 2
	return Validation{LossMicro: losses[mid], Correct: counts[mid].Correct, Count: counts[mid].Count}
}

// wish returns the reason to stop that enough of the set have, the more
// frequent one where there are two.
func (m *Machine) wish() (best Stop) {
	var wishes [StopMoney + 1]int
	for _, e := range m.set {
		if h := m.here(e.Peer); h != nil {
			wishes[h.announce.Stop]++
		}
	}
	for s := StopTime; s <= StopMoney; s++ {
		if n := wishes[s]; n >= min(m.ros.F+1, len(m.set)) && (best == GoOn || n > wishes[best]) {
			best = s
		}
	}
	return best
}

// finish ends the run once all connected members are at the head.
func (m *Machine) finish() bool {
	expired := m.now >= m.deadline
	if !expired && !m.quorate() {
		return false // those that are back soon may have gone another way
	}
	for p := range m.peers {
		if !m.other(Peer(p)) || !m.peers[p].connected || m.latest[p].node == m.head {
			continue
		}
		at := slices.ContainsFunc(m.peers[p].inbox, func(h heard) bool {
			return h.returned && h.parent == m.head.id
		})
		if !at && !expired {
			return false
		}
		if !at {
			m.report(LingerExpired, Peer(p), m.head.id, fmt.Sprintf("peer %s is not at the last record", Peer(p)))
		}
	}
	reason, _ := m.reason(&m.head.rec)
	m.emit(Finished{Record: m.head.rec, ID: m.head.id, Reason: reason})
	m.phase = phaseDone
	return false
}
