package round

import (
	"fmt"
	"slices"
	"time"
)

// Where the head is, and how this peer gets there.

// adopt makes n, whose state is held, the head, and goes on from there.
func (m *Machine) adopt(n *node, how How) {
	old := m.head
	reorganised := old != n && old.parent != nil && !n.descends(old)
	m.head = n
	m.back = old
	changed := n.rec.Roster != old.rec.Roster
	m.enlist()
	m.trim()
	m.fails = 0
	if how == Recomputed && m.quorate() {
		m.paces.add(m.now - m.began)
	}
	m.emit(Adopt{Record: n.rec, ID: n.id, How: how, Reorganised: reorganised})
	if reorganised {
		m.report(Reorganisation, m.cfg.Self, n.id, fmt.Sprintf("the head moved from %s (height %d) to another branch", old.id.Short(), old.rec.Height))
	}
	if n.rec.Degraded(m.ros.F) {
		m.report(DegradedRecord, m.cfg.Self, n.id, fmt.Sprintf("only %d gradients: fewer than %d", len(n.rec.Set), 2*m.ros.F+1))
	}
	if changed {
		m.report(RosterChanged, m.cfg.Self, n.id, fmt.Sprintf("the roster has %d members from height %d on", len(m.ros.Members), n.rec.Height+1))
	}
	m.checkpoint()
	if m.ended() {
		return
	}
	if m.final(&n.rec) {
		m.enterFinal()
		return
	}
	m.beginSlot()
}

// stands reports whether n may be the head still: meanwhile another branch may
// have become justified.
func (m *Machine) stands(n *node) bool {
	c := m.justified.checkpoint()
	return !m.strays(n, &c)
}

// arrive adopts a record whose state took a while to get.
func (m *Machine) arrive(n *node, how How) {
	if m.stands(n) {
		m.adopt(n, how)
		return
	}
	m.pursued = nil
	m.rechoose()
}

// redirect follows the fork choice where it leads elsewhere.
func (m *Machine) redirect() bool {
	if !m.dirty {
		return false
	}
	m.dirty = false
	n := m.choose()
	if n == m.head || n == m.target {
		return false
	}
	if n.parent == m.head && n.rec.Slot == m.slot && !m.recorded &&
		(m.phase == phaseGather || m.phase == phaseBallot || m.phase == phaseFetch) && m.follow(n) {
		return true
	}
	m.pursue(n)
	return true
}

// follow goes for a record of the current slot that enough others have agreed
// on, by computing it, so that it can be signed here as well.
func (m *Machine) follow(n *node) bool {
	for _, p := range n.rec.Expelled {
		if !m.inRange(p) || !m.peers[p].guilty && !slices.Contains(m.head.rec.Expelled, p) {
			return false // not without the proof
		}
	}
	for _, e := range n.rec.Set {
		if h := m.here(e.Peer); h == nil || !h.announced || h.announce.Gradient != e.Gradient {
			return false
		}
	}
	m.target, m.set = n, n.rec.Set
	m.phase = phaseFetch
	m.deadline = m.now + m.limits.Fetch
	m.retried = m.retried[:0]
	return true
}

// pursue goes to a head elsewhere: by its state if it is held, by computing it
// if everything is here, else by fetching the state.
func (m *Machine) pursue(n *node) {
	m.target, m.own = nil, nil
	if !n.held && !m.recomputable(n) {
		// Perhaps there is a step of the way that can be computed.
		for a := n.parent; a != nil; a = a.parent {
			if !a.held && m.recomputable(a) && !a.differs {
				n = a
				break
			}
		}
	}
	m.pursued = n
	switch {
	case n.held:
		m.adopt(n, Kept)
	case m.recomputable(n) && !n.differs:
		m.phase = phaseApply
		m.set = n.rec.Set
		m.emit(Apply{Slot: n.rec.Slot, Height: n.rec.Height, Parent: n.rec.Parent, Set: n.rec.Set, FUsed: n.rec.FUsed})
	default:
		m.phase = phasePursue
		m.deadline = m.now + m.limits.State
		m.emit(FetchState{Record: n.rec, ID: n.id, Holders: m.holders(n)})
	}
}

// settle is how long the goal of a pursuit may still move: a peer that comes
// late hears of old records first, whose states nobody keeps.
const settle = 500 * time.Millisecond

// repursue goes for a later head if that becomes known early in a pursuit.
// Afterwards the goal stands, or a fast run would always be ahead.
func (m *Machine) repursue() bool {
	if !m.dirty || m.now > m.deadline-m.limits.State+settle {
		return false
	}
	m.dirty = false
	if n := m.choose(); n != m.pursued && n != m.head {
		deadline := m.deadline
		if m.pursue(n); m.phase == phasePursue {
			m.deadline = deadline // else a fast run would move the goal without end
		}
		return true
	}
	return false
}

// holders lists the connected members, those first that should have the state
// of n as their head or its parent.
func (m *Machine) holders(n *node) []Peer {
	if n == m.genesis {
		return nil
	}
	var likely, others []Peer
	for p := range m.peers {
		if !m.peers[p].connected || m.peers[p].guilty {
			continue
		}
		if l := m.latest[p].node; l != nil && (l == n || l.parent == n) {
			likely = append(likely, Peer(p))
		} else {
			others = append(others, Peer(p))
		}
	}
	return append(likely, others...)
}

// stateLost passes a head over until a holder appears.
func (m *Machine) stateLost(kind ReportKind) {
	n := m.pursued
	m.pursued = nil
	n.unavailable = m.now + m.limits.Retry<<min(n.failures, 4)
	n.failures++
	// Who goes on keeps its head's state and the one before: what is further
	// back is not to be had either, and asking for it record by record would
	// leave no time to go on from a state that is here.
	for a := n.parent; a != nil && !m.obtainedBy(a); a = a.parent {
		a.unavailable = max(a.unavailable, n.unavailable)
	}
	if kind == TimeoutState {
		m.timedOut = true
	}
	m.report(kind, m.cfg.Self, n.id, fmt.Sprintf("nobody gave the state of %s (height %d)", n.id.Short(), n.rec.Height))
	m.rechoose()
}

// obtainedBy reports whether the state of a is here, or somebody is at a or just
// went on from it.
func (m *Machine) obtainedBy(a *node) bool {
	if a.held || m.recomputable(a) {
		return true
	}
	for p := range m.peers {
		if l := m.latest[p].node; m.peers[p].connected && l != nil && (l == a || l.parent == a) {
			return true
		}
	}
	return false
}

// rechoose goes on from wherever the fork choice leads now.
func (m *Machine) rechoose() {
	m.dirty = false
	n := m.choose()
	switch {
	case n != m.head:
		m.pursue(n)
	case m.final(&m.head.rec):
		m.enterFinal()
	default:
		m.beginSlot()
	}
}
