package round

import (
	"fmt"
	"slices"
)

// Gradients, their bodies, and what the host keeps.

type bodyStatus uint8

const (
	bodyWanted bodyStatus = iota // nobody who has it is connected yet
	bodyFetching
	bodyHeld
	bodyRefused
	bodyUnavailable
)

type body struct {
	status  bodyStatus
	lastUse uint64 // number of the begun slot
}

// ownGradient is this peer's gradient at one parent: a slot that fails is
// tried again with the same.
type ownGradient struct {
	parent Hash
	ready  bool
	failed bool
	value  Announce
}

// wantBody has a body fetched that was announced for the current slot.
func (m *Machine) wantBody(p Peer, a *Announce) {
	if a.Abstains() {
		return
	}
	b := m.bodies[a.Gradient]
	if b == nil {
		b = &body{}
		m.bodies[a.Gradient] = b
	}
	b.lastUse = m.begun
	if b.status != bodyWanted && b.status != bodyUnavailable {
		return
	}
	holders := []Peer{}
	if m.other(p) && m.peers[p].connected {
		holders = append(holders, p)
	}
	for q := range m.peers {
		if Peer(q) == p || !m.other(Peer(q)) || !m.peers[q].connected {
			continue
		}
		if h := m.here(Peer(q)); h != nil && h.balloted && h.ballot.has(Entry{p, a.Gradient}) {
			holders = append(holders, Peer(q))
		}
	}
	b.status = bodyWanted
	m.wanting = m.wanting || len(holders) == 0
	if len(holders) > 0 {
		b.status = bodyFetching
		m.emit(Fetch{Peer: p, Gradient: a.Gradient, Bytes: a.Bytes, Holders: holders})
	}
}

// wantBodies has those bodies fetched for which there was nobody to ask.
func (m *Machine) wantBodies() {
	if !m.wanting {
		return
	}
	m.wanting = false
	for p := range m.peers {
		if h := m.here(Peer(p)); h != nil && h.announced && !h.announce.Abstains() && m.other(Peer(p)) {
			if b := m.bodies[h.announce.Gradient]; b != nil && b.status == bodyWanted {
				m.wantBody(Peer(p), &h.announce)
			}
		}
	}
}

func (m *Machine) bodyReady(p Peer, g Hash) {
	b := m.bodies[g]
	if b == nil || b.status == bodyHeld {
		return
	}
	b.status = bodyHeld
	if m.inRange(p) && m.phase == phaseGather {
		if h := m.here(p); h != nil && h.announced && h.announce.Gradient == g {
			m.arrivals.add(m.now - m.began)
		}
	}
	m.dirty = true // a record may be recomputable now
}

func (m *Machine) bodyLost(p Peer, g Hash, status bodyStatus, why string) {
	b := m.bodies[g]
	if b == nil || b.status != bodyFetching {
		return
	}
	b.status = status
	m.emit(Report{Kind: BodyDropped, Peer: p, Slot: m.slot, Height: m.head.rec.Height, Refused: status == bodyRefused,
		Text: fmt.Sprintf("the gradient of peer %s %s", p, why)})
}

func (m *Machine) gradient(parent Hash) *ownGradient {
	for i := range m.gradients {
		if m.gradients[i].parent == parent {
			return &m.gradients[i]
		}
	}
	return nil
}

// compute asks for this peer's gradient at n unless it is there or under way.
func (m *Machine) compute(slot uint64, n *node) {
	if g := m.gradient(n.id); g != nil && !g.failed {
		return
	} else if g != nil {
		g.failed = false
	} else {
		m.gradients = append(m.gradients, ownGradient{parent: n.id})
	}
	// The host gives up what it computed before: that is asked for again where
	// it is needed after all.
	m.gradients = slices.DeleteFunc(m.gradients, func(g ownGradient) bool { return g.parent != n.id && !g.ready && !g.failed })
	m.emit(Compute{Slot: slot, Height: n.rec.Height + 1, Parent: n.id})
}

func (m *Machine) gradientReady(ev *GradientReady) {
	g := m.gradient(ev.Parent)
	if g == nil || g.ready || g.failed || ev.Bytes == 0 {
		return
	}
	g.ready = true
	g.value = Announce{Gradient: ev.Gradient, Bytes: ev.Bytes, Codec: ev.Codec, Validation: ev.Validation, Spent: ev.Spent, Stop: ev.Stop}
	m.bodies[ev.Gradient] = &body{status: bodyHeld, lastUse: m.begun + 1}
	if ev.Parent == m.head.id {
		if m.phase == phaseGather {
			m.arrivals.add(m.now - m.began)
			m.announce()
		} else if m.phase > phaseGather && m.phase < phasePause && !m.announced {
			m.late(m.cfg.Self, m.began)
		}
	}
}

func (m *Machine) gradientFailed(ev *GradientFailed) {
	g := m.gradient(ev.Parent)
	if g == nil || g.ready {
		return
	}
	g.failed = true
	if ev.Parent == m.head.id && m.phase == phaseGather {
		m.announce()
	}
}

// announce says what this peer has for the slot, once.
func (m *Machine) announce() {
	g := m.gradient(m.head.id)
	if m.announced || g == nil || !g.ready && !g.failed {
		return
	}
	m.announced = true
	a := g.value
	if g.failed {
		a = Announce{}
		m.report(GradientMissing, m.cfg.Self, Hash{}, "this peer has no gradient for the slot")
	} else {
		m.bodies[a.Gradient].lastUse = m.begun
	}
	a.BaseModel = m.head.rec.Model
	h := m.hear(m.cfg.Self, m.slot, m.head.id)
	h.announced, h.announce = true, a
	m.send(a)
}

func (m *Machine) retain() {
	if m.head.rec.Height%window == 0 || len(m.tree.nodes) >= m.maxNodes() {
		m.sweep()
	}
	r := Retain{States: make([]Record, 0, len(m.held))}
	for _, n := range m.held {
		r.States = append(r.States, n.rec)
	}
	for g, b := range m.bodies {
		if b.lastUse+1 < m.begun && !m.mutant.holdAll {
			delete(m.bodies, g)
		} else {
			r.Gradients = append(r.Gradients, g)
		}
	}
	slices.SortFunc(r.Gradients, func(a, b Hash) int { return slices.Compare(a[:], b[:]) })
	var candidate Hash
	if m.candidate != nil {
		candidate = m.candidate.id
	}
	for _, n := range m.kept {
		if n.held {
			r.Checkpoints = append(r.Checkpoints, n.id)
		}
	}
	for _, id := range []Hash{m.justified.id, m.onDisk, m.votedID, candidate} {
		if id != (Hash{}) && id != m.genesis.id && !slices.Contains(r.Checkpoints, id) {
			r.Checkpoints = append(r.Checkpoints, id)
		}
	}
	r.BelowSlot = m.head.rec.Slot - min(m.head.rec.Slot, window)
	m.emit(r)
}

// hold notes that the host holds the state of n.
func (m *Machine) hold(n *node) {
	if !n.held {
		n.held = true
		m.held = append(m.held, n)
	}
}

// trim gives up the states that are not needed: kept are the head's, its
// parent's to step back, the one of the head before for those who come this
// way, the record signed in this slot, and the justified checkpoint's.
func (m *Machine) trim() {
	m.held = slices.DeleteFunc(m.held, func(n *node) bool {
		n.held = n == m.head || n == m.head.parent || n == m.back || n == m.own || n == m.justified || n == m.candidate ||
			n.rec.Height >= m.justified.rec.Height && slices.Contains(m.kept, n)
		return !n.held
	})
}
