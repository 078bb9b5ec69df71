package round

import (
	"fmt"
	"time"
)

// What members said, and who is waited for.

// heard is what one peer said about one slot on one parent.
type heard struct {
	slot      uint64
	parent    Hash
	announced bool
	balloted  bool
	returned  bool
	announce  Announce
	ballot    Ballot
	record    *node
	messages  [TypeRecord + 1]Hash // the IDs of what was said
}

// peerState is what this peer knows of a member.
type peerState struct {
	connected bool
	met       bool // was connected once
	heard     bool // said something once
	waiting   bool // is one to wait for when connected
	misses    int  // slots in a row that it was waited for in vain
	guilty    bool // there is a proof against it
	votes     []voteHeard
	jumped    bool
	jumpedAt  uint64 // height of the last jump on its word
	inbox     []heard
}

// present reports whether p can be expected to say something. At the start
// connections may come and go, and what p says may come through others before
// its connection is there.
func (m *Machine) present(p Peer) bool {
	s := &m.peers[p]
	return s.connected || m.now < m.startEnd && !(s.met && s.heard)
}

func (m *Machine) connected(p Peer) {
	if !m.inRange(p) || p == m.cfg.Self || m.peers[p].connected {
		return
	}
	m.peers[p].connected = true
	m.peers[p].met = true
	m.peers[p].jumped = false
	m.later = true
	m.wantBodies()
	for _, n := range m.tree.nodes {
		n.unavailable = 0
	}
	m.dirty = true
}

func (m *Machine) disconnected(p Peer) {
	if !m.inRange(p) || !m.peers[p].connected {
		return
	}
	m.peers[p].connected = false
	m.dirty = true
	if !m.present(p) {
		m.lose(p, "connection lost")
	}
}

// lose takes p out of the wait-set, until it announces again.
func (m *Machine) lose(p Peer, why string) {
	m.wait[p] = false
	if m.peers[p].waiting {
		m.peers[p].waiting = false
		m.report(PeerLost, p, Hash{}, fmt.Sprintf("peer %s: %s", p, why))
	}
}

// returns takes p back into the wait-set.
func (m *Machine) returns(p Peer) {
	s := &m.peers[p]
	if !s.connected || !m.other(p) {
		return
	}
	s.misses = 0
	if !s.waiting {
		s.waiting = true
		m.report(PeerReturned, p, Hash{}, fmt.Sprintf("peer %s takes part again", p))
	}
	if m.phase == phaseGather {
		m.wait[p] = true
	}
}

// hear returns the place for what p says about a slot on a parent; nil if
// there are better things to remember.
func (m *Machine) hear(p Peer, slot uint64, parent Hash) *heard {
	if h := m.find(p, slot, parent); h != nil {
		return h
	}
	s := &m.peers[p]
	if len(s.inbox) < inboxSlots {
		s.inbox = append(s.inbox, heard{slot: slot, parent: parent})
		return &s.inbox[len(s.inbox)-1]
	}
	here := slot == m.slot && parent == m.head.id
	var oldest *heard
	for i := range s.inbox {
		h := &s.inbox[i]
		if h.slot == m.slot && h.parent == m.head.id {
			continue
		}
		if oldest == nil || h.slot < oldest.slot {
			oldest = h
		}
	}
	if !here && oldest.slot >= slot {
		return nil
	}
	*oldest = heard{slot: slot, parent: parent}
	return oldest
}

func (m *Machine) find(p Peer, slot uint64, parent Hash) *heard {
	inbox := m.peers[p].inbox
	for i := range inbox {
		if inbox[i].slot == slot && inbox[i].parent == parent {
			return &inbox[i]
		}
	}
	return nil
}

// here returns what p said about the current slot, nil if nothing.
func (m *Machine) here(p Peer) *heard { return m.find(p, m.slot, m.head.id) }

func (m *Machine) received(msg *Message, id Hash) {
	p := msg.From
	if !m.inRange(p) || msg.validate() != nil {
		return
	}
	switch b := msg.Body.(type) {
	case Proof:
		m.proven(&b, false)
		return
	case Vote:
		if m.rosters[msg.Roster] != nil {
			m.receivedVote(p, msg, &b.Target, id)
		}
		return
	case RosterNotice, Contact, Petition:
		return
	}
	if m.peers[p].guilty && !m.mutant.keepGuilty {
		return
	}
	if n := m.tree.byID[msg.Parent]; n != nil && n.rec.Roster != msg.Roster {
		m.report(InvalidMessage, p, msg.Parent, fmt.Sprintf("peer %s speaks under another roster than its parent's", p))
		return
	}
	m.peers[p].heard = true
	if s, ok := msg.Body.(SignedRecord); ok {
		m.receivedRecord(p, &s, msg, id)
		return
	}
	if p == m.cfg.Self { // a message of before a restart, or one's own echo
		if r, ok := msg.Body.(Return); ok {
			m.counter = max(m.counter, r.Counter)
		}
		return
	}
	m.holder(p, msg.Parent)
	m.later = m.later || msg.Slot > m.slot
	h := m.hear(p, msg.Slot, msg.Parent)
	if h == nil {
		return
	}
	switch b := msg.Body.(type) {
	case Announce:
		m.receivedAnnounce(p, msg, b, h, id)
	case Ballot:
		if h.balloted {
			if h.messages[TypeBallot] != id {
				m.accuse(p, h.messages[TypeBallot], id, "ballots")
			}
			return
		}
		h.balloted, h.ballot, h.messages[TypeBallot] = true, b, id
		m.wantBodies()
		if m.phase == phaseBallot && h == m.here(p) {
			m.answers.add(m.now - m.ballotAt)
		}
		m.hurry()
	case Return:
		if !h.returned {
			h.returned = true
			m.receivedReturn(p, &b, msg, id)
		}
		m.maybeReturns(p, msg.Slot, msg.Parent)
	}
}

// holder notes that p is at a record and so has its state, which may be asked
// for again then: once for each member, or a liar could have it asked for
// without end.
func (m *Machine) holder(p Peer, id Hash) {
	if n := m.tree.byID[id]; n != nil && !n.holders.has(p) {
		n.holders.add(p)
		if n.unavailable > 0 {
			n.unavailable, n.failures = 0, 0
			m.dirty = true
		}
	}
}

func (m *Machine) receivedAnnounce(p Peer, msg *Message, a Announce, h *heard, id Hash) {
	if h.announced {
		if h.messages[TypeAnnounce] != id {
			m.accuse(p, h.messages[TypeAnnounce], id, "announcements")
		}
		return
	}
	h.messages[TypeAnnounce] = id
	if a.Bytes > m.cfg.MaxGradientBytes {
		m.report(InvalidMessage, p, Hash{}, fmt.Sprintf("peer %s announces a gradient of %d bytes, more than %d: it is left out", p, a.Bytes, m.cfg.MaxGradientBytes))
		a = Announce{BaseModel: a.BaseModel}
	}
	if n := m.tree.byID[msg.Parent]; n != nil && a.BaseModel != n.rec.Model {
		m.report(InvalidMessage, p, n.id, fmt.Sprintf("peer %s announces a gradient at another model than its parent's: it is left out", p))
		a = Announce{BaseModel: a.BaseModel}
	}
	h.announced, h.announce = true, a
	m.maybeReturns(p, msg.Slot, msg.Parent)
	if msg.Slot == m.slot && msg.Parent == m.head.id {
		m.wantBody(p, &h.announce)
		if m.phase > phaseGather && m.phase < phasePause && !a.Abstains() {
			m.late(p, m.began)
		}
	} else if msg.Slot == m.prevSlot && msg.Parent == m.prevParent && !a.Abstains() {
		m.late(p, m.prevBegan)
	}
}

func (m *Machine) late(p Peer, began time.Duration) {
	m.arrivals.add(m.now - began)
	m.report(LateGradient, p, Hash{}, fmt.Sprintf("the gradient of peer %s came too late", p))
}

// maybeReturns takes a peer back that says it is at a recent record of this
// chain, or in this slot or a later one.
func (m *Machine) maybeReturns(p Peer, slot uint64, parent Hash) {
	n := m.tree.byID[parent]
	if n == nil || slot+recent < m.slot || !m.head.descends(n) {
		return
	}
	m.returns(p)
}

func (m *Machine) receivedRecord(p Peer, s *SignedRecord, msg *Message, message Hash) {
	r := &s.Record
	id := m.tree.id(r)
	if p == m.cfg.Self {
		if n := m.tree.byID[id]; n != nil && n.signers.has(p) {
			return // one's own echo
		}
		// Signed before a restart. Where the disk forgot that, remember.
		m.counter = max(m.counter, s.Counter)
		m.floor = max(m.floor, r.Slot)
	}
	invalid := func(why string) {
		m.report(InvalidMessage, p, id, fmt.Sprintf("peer %s signed a record that %s", p, why))
	}
	ros := m.rosters[msg.Roster]
	if ros == nil || !ros.has(p) {
		return
	}
	if int(r.FUsed) != min(ros.F, (len(r.Set)-1)/2) {
		invalid("uses a wrong f")
		return
	}
	if m.cfg.Rounds > 0 && r.Height > m.cfg.Rounds {
		invalid("is beyond the end of the run")
		return
	}
	for _, n := range m.tree.siblings(r.Parent) {
		if n.rec.Slot == r.Slot && n.id != id && n.signers.has(p) {
			var before Hash
			if h := m.find(p, r.Slot, r.Parent); h != nil {
				before = h.messages[TypeRecord]
			}
			m.accuse(p, before, message, "records for one slot")
			return
		}
	}
	if m.latest[p].contradicts(s.Counter, id) {
		m.accuse(p, m.latest[p].message, message, "votes for a head with one counter")
		return
	}
	n := m.learn(id, r)
	if n == nil {
		invalid("does not fit its parent")
		return
	}
	if !n.signers.has(p) {
		n.signers.add(p)
		n.failures, n.unavailable = 0, 0
	}
	m.latest[p].follow(s.Counter, n, message)
	if n != m.own && n != m.head {
		m.dirty = true
	}
	if p == m.cfg.Self {
		return
	}
	if h := m.hear(p, r.Slot, r.Parent); h != nil {
		h.record, h.messages[TypeRecord] = n, message
		if m.phase == phaseRecord && h == m.here(p) {
			m.answers.add(m.now - m.recordAt)
		}
	}
}

// receivedReturn notes where p is, and that it votes for that head where it
// says so.
func (m *Machine) receivedReturn(p Peer, b *Return, msg *Message, message Hash) {
	ros := m.rosters[msg.Roster]
	votes := b.Counter > 0 && ros != nil && ros.has(p)
	if votes && m.latest[p].contradicts(b.Counter, msg.Parent) {
		m.accuse(p, m.latest[p].message, message, "votes for a head with one counter")
		return
	}
	if n := m.learn(msg.Parent, &b.Head); n != nil && votes {
		m.latest[p].follow(b.Counter, n, message)
		m.dirty = true
	}
}

// contradicts reports whether a vote names another record than the latest one,
// with its counter.
func (l *latestSigned) contradicts(counter uint64, record Hash) bool {
	return counter == l.counter && l.node != nil && l.node.id != record
}

// follow makes a vote for a head the latest, if it is.
func (l *latestSigned) follow(counter uint64, n *node, message Hash) {
	if counter >= l.counter {
		l.counter, l.node, l.message = counter, n, message
	}
}

// learn puts a record into the tree; nil if it does not fit its parent.
func (m *Machine) learn(id Hash, r *Record) *node {
	if len(m.tree.nodes) >= m.maxNodes() {
		m.sweep()
	}
	before := len(m.tree.nodes)
	n := m.tree.add(id, *r, m.now)
	m.dirty = m.dirty || len(m.tree.nodes) > before
	return n
}

// maxNodes bounds the tree: each latest signature and the head may hold a
// window, and as much again may gather before the next sweep.
func (m *Machine) maxNodes() int { return 2 * (window + 2) * (len(m.ros.Members) + 2) }

func (m *Machine) sweep() {
	if m.mutant.holdAll {
		return
	}
	keep := make([]*node, 0, len(m.held)+8)
	keep = append(keep, m.held...)
	for _, n := range []*node{m.own, m.target, m.pursued, m.back, m.justified, m.candidate} {
		if n != nil {
			keep = append(keep, n)
		}
	}
	m.floor = max(m.floor, m.tree.sweep(m.genesis, m.head, m.latest, func(p Peer) bool {
		return p == m.cfg.Self || m.peers[p].connected
	}, keep))
}

// passed reports whether p has gone on from the current slot.
func (m *Machine) passed(p Peer) bool {
	for i := range m.peers[p].inbox {
		h := &m.peers[p].inbox[i]
		if h.slot <= m.slot {
			continue
		}
		if h.parent == m.head.id {
			return true
		}
		if n := m.tree.byID[h.parent]; n != nil && n.parent == m.head {
			return true
		}
	}
	return false
}

// waited reports whether somebody is waited for of whom done is false.
func (m *Machine) waited(done func(p Peer, h *heard) bool) bool {
	for p, w := range m.wait {
		if !w {
			continue
		}
		if !m.present(Peer(p)) {
			m.lose(Peer(p), "did not take part in time")
			continue
		}
		if h := m.here(Peer(p)); (h == nil || !done(Peer(p), h)) && !m.passed(Peer(p)) {
			return true
		}
	}
	return false
}

func (m *Machine) announceDone(_ Peer, h *heard) bool {
	if !h.announced {
		return false
	}
	if h.announce.Abstains() {
		return true
	}
	b := m.bodies[h.announce.Gradient]
	return b != nil && b.status != bodyFetching && b.status != bodyWanted
}

func ballotDone(_ Peer, h *heard) bool { return h.balloted }
func recordDone(_ Peer, h *heard) bool { return h.record != nil }

// giveUp takes those out of the slot's wait-set that did not do what was
// waited for; unless hardly anybody did, for then it may be this peer that is
// cut off.
func (m *Machine) giveUp(done func(p Peer, h *heard) bool, miss bool) {
	answered := 0
	for p := range m.peers {
		if h := m.here(Peer(p)); m.other(Peer(p)) && h != nil && done(Peer(p), h) {
			answered++
		}
	}
	for p, w := range m.wait {
		if h := m.here(Peer(p)); !w || h != nil && done(Peer(p), h) {
			continue
		}
		if miss {
			m.peers[p].misses++
			if m.peers[p].misses >= missesAllowed && m.fails == 0 {
				m.lose(Peer(p), fmt.Sprintf("missed %d rounds", missesAllowed))
			}
		}
		if answered >= m.threshold(m.ros) {
			m.wait[p] = false
		}
	}
}
