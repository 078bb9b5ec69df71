package round

import (
	"fmt"
	"slices"
)

// Checkpoints, votes, and what follows from them.

// votesKept is how many votes of one member are remembered.
const votesKept = 8

// link is a checkpoint and those below it on one chain.
type link struct {
	Checkpoint
	prev *link  // nil: genesis, or not known
	low  uint64 // the lowest height that is known
}

// voteHeard is a vote of one member.
type voteHeard struct {
	target    Hash
	height    uint64
	justified uint64 // height of its source
	message   Hash
}

// relation is what is known of where a record stands to a checkpoint.
type relation uint8

const (
	apart   relation = iota // on another branch, or below
	unknown                 // its ancestors down to there are not known
	on                      // the checkpoint itself, or a descendant
)

// relate reports where n stands to a checkpoint.
func relate(n *node, c *Checkpoint) relation {
	if n.id == c.ID || c.Height == 0 {
		return on
	}
	if n.rec.Height <= c.Height {
		return apart
	}
	l := n.links
	for l != nil && l.Height > c.Height {
		l = l.prev
	}
	switch {
	case l == nil || l.Height < c.Height:
		return unknown
	case l.ID == c.ID:
		return on
	}
	return apart
}

// Links returns the checkpoints below the head down to the last final one,
// highest first: what Config.Links wants where the head is restored.
func (m *Machine) Links() []Checkpoint {
	var links []Checkpoint
	for l := m.head.links; l != nil && l.Height >= m.final_.Height; l = l.prev {
		if l.ID != m.head.id {
			links = append(links, l.Checkpoint)
		}
	}
	return links
}

// restore sets what a restored record knows of the checkpoints below it.
func (n *node) restore(below []Checkpoint) {
	var prev *link
	for i := len(below) - 1; i >= 0; i-- {
		prev = &link{Checkpoint: below[i], prev: prev, low: below[len(below)-1].Height}
	}
	switch {
	case prev == nil || prev.Height >= n.rec.Height:
	case n.links.ID == n.id:
		n.links.prev, n.links.low = prev, prev.low
	default:
		n.links = prev
	}
}

// boundary reports whether a record is a checkpoint.
func (m *Machine) boundary(r *Record) bool {
	return r.Height > 0 && r.Height%m.cfg.CheckpointEvery == 0
}

// checkpoint asks for the head on disk where it is a checkpoint.
func (m *Machine) checkpoint() {
	n := m.head
	if m.boundary(&n.rec) && (n.rec.Height > m.voted.Height || m.mutant.voteTwice) && m.taking {
		m.emit(WriteCheckpoint{Record: n.rec, ID: n.id, Links: m.Links()})
	}
}

// vote votes for the newest checkpoint on disk, once everything allows it: it
// is on this peer's branch, a quorum stands on it (a minority would burn its
// heights), and no earlier vote forbids it.
func (m *Machine) vote() {
	n := m.candidate
	if n == nil || m.voting || !m.taking {
		return
	}
	t := &n.rec
	again := t.Height <= m.voted.Height || t.Justified.Height < m.voted.Justified.Height
	if again && !m.mutant.voteTwice || relate(m.head, &Checkpoint{Height: t.Height, ID: n.id}) == apart {
		m.candidate = nil
		return
	}
	r := m.rosters[t.Roster]
	if r == nil || !r.has(m.cfg.Self) {
		return
	}
	standing := 0
	c := n.checkpoint()
	for _, p := range r.Members {
		if l := m.latest[p].node; l != nil && relate(l, &c) == on {
			standing++
		}
	}
	if standing < m.quorum(len(r.Members)) {
		return
	}
	m.voting = true
	if m.mutant.forgetVotes {
		m.votePersisted(n.id)
		return
	}
	m.emit(PersistVote{Target: *t, Certificate: m.certificate(&t.Justified)})
}

func (m *Machine) quorum(n int) int { return Quorum(n) - m.mutant.lowQuorum }

// certificate returns the messages that justify a checkpoint.
func (m *Machine) certificate(c *Checkpoint) []Hash {
	var out []Hash
	for p := range m.peers {
		for _, v := range m.peers[p].votes {
			if v.target == c.ID {
				out = append(out, v.message)
			}
		}
	}
	return out
}

func (m *Machine) votePersisted(target Hash) {
	n := m.candidate
	if !m.voting {
		return
	}
	m.voting = false
	if n == nil || n.id != target {
		return
	}
	m.candidate = nil
	m.voted, m.votedID = n.rec, n.id
	m.castVote()
}

// castVote sends this peer's last vote.
func (m *Machine) castVote() {
	msg := Message{From: m.cfg.Self, Slot: m.voted.Height, Parent: m.votedID, Roster: m.voted.Roster, Body: Vote{Target: m.voted}}
	m.emit(Send{msg})
	m.countVote(m.cfg.Self, &msg, &m.voted, ID(m.genesis.rec.Parent, msg))
}

func (m *Machine) receivedVote(p Peer, msg *Message, t *Record, id Hash) {
	if !m.boundary(t) || t.Justified.Height%m.cfg.CheckpointEvery != 0 {
		m.report(InvalidMessage, p, msg.Parent, fmt.Sprintf("peer %s votes for height %d, which is no checkpoint", p, t.Height))
		return
	}
	if p == m.cfg.Self && t.Height > m.voted.Height {
		m.voted, m.votedID = *t, msg.Parent // of before a restart, and the disk forgot it
	}
	for _, v := range m.peers[p].votes {
		if v.target == msg.Parent {
			return
		}
		if v.height == t.Height || (v.height < t.Height) == (t.Justified.Height < v.justified) && t.Justified.Height != v.justified {
			m.accuse(p, v.message, id, "votes")
		}
	}
	m.countVote(p, msg, t, id)
}

// countVote notes a vote and what follows from it. Who is guilty counts too:
// a certificate must say the same to everyone.
func (m *Machine) countVote(p Peer, msg *Message, t *Record, id Hash) {
	s := &m.peers[p]
	if len(s.votes) == votesKept {
		i := 0
		for j := range s.votes {
			if s.votes[j].height < s.votes[i].height {
				i = j
			}
		}
		if s.votes[i].height > t.Height {
			return
		}
		s.votes = slices.Delete(s.votes, i, i+1)
	}
	s.votes = append(s.votes, voteHeard{target: msg.Parent, height: t.Height, justified: t.Justified.Height, message: id})
	m.weigh(msg.Parent, t)
}

// justifies reports whether a quorum of its roster, and of its source's,
// voted for a target. With an emergency in between, that of its own.
func (m *Machine) justifies(id Hash, t *Record) bool {
	own := m.rosters[t.Roster]
	if own == nil {
		return false
	}
	enough := func(r *Roster) bool {
		n := 0
		for _, p := range r.Members {
			if slices.ContainsFunc(m.peers[p].votes, func(v voteHeard) bool { return v.target == id }) {
				n++
			}
		}
		return n >= m.quorum(len(r.Members))
	}
	if !enough(own) {
		return false
	}
	source := m.sourceRoster(t)
	for r := own; r != nil && r.Hash != source; r = m.rosters[r.Previous] {
		if r.Emergency {
			return true
		}
	}
	r := m.rosters[source]
	return r != nil && enough(r)
}

func (m *Machine) sourceRoster(t *Record) Hash {
	if t.Justified.Height == 0 {
		return m.genesis.rec.Roster
	}
	return t.Justified.Roster
}

// weigh sees whether a target is justified, and its source final by that.
func (m *Machine) weigh(id Hash, t *Record) {
	if t.Height <= m.final_.Height || !m.justifies(id, t) {
		return
	}
	if t.Height == t.Justified.Height+m.cfg.CheckpointEvery && t.Justified.Height > m.final_.Height {
		if n := m.tree.byID[t.Justified.ID]; n != nil && relate(n, &m.final_) == apart {
			m.report(FinalityBroken, m.cfg.Self, t.Justified.ID, fmt.Sprintf("the final checkpoint %s (height %d) is not on the branch of %s (height %d), which is final too: a third of the members or more lie", m.final_.ID.Short(), m.final_.Height, t.Justified.ID.Short(), t.Justified.Height))
		}
		m.final_ = t.Justified
		m.emit(Final{Checkpoint: m.final_})
		for l := m.head.links; l != nil; l = l.prev {
			if l.Height <= m.final_.Height {
				l.prev = nil // what is below is not asked for any more
			}
		}
	}
	if t.Height > m.justified.rec.Height {
		n := m.tree.add(id, *t, m.now)
		if n == nil {
			return // it contradicts its own parent: more than f lie
		}
		m.justified = n
		m.dirty = true
	}
}

// proposal returns the justified checkpoint that this peer would write into
// the next record; zero if the head names it, or is not known to follow it.
func (m *Machine) proposal() Checkpoint {
	c := m.justified.checkpoint()
	if c.Height <= m.head.rec.Justified.Height || c.Height > m.head.rec.Height || relate(m.head, &c) != on {
		return Checkpoint{}
	}
	return c
}

// succession returns the roster that this peer would write into the next
// record; zero if there is none. Members change once for each justified
// checkpoint, so that the quorums of one and the next have an honest peer in
// common.
func (m *Machine) succession() Hash {
	var best Hash
	for h, r := range m.rosters {
		if r.Previous == m.head.rec.Roster && m.maySucceed(&m.head.rec, r) && (best == (Hash{}) || lessHash(h, best)) {
			best = h
		}
	}
	return best
}

func (m *Machine) maySucceed(parent *Record, next *Roster) bool {
	current := parent.Justified.Roster
	if parent.Justified.Height == 0 {
		current = m.genesis.rec.Roster
	}
	return next.Previous == parent.Roster && (next.Emergency || current == parent.Roster)
}

// accuse has two messages of one member made into a proof.
func (m *Machine) accuse(p Peer, a, b Hash, what string) {
	m.report(Conflict, p, Hash{}, fmt.Sprintf("peer %s signed two different %s, of which an honest peer signs one: the second is ignored", p, what))
	if a != (Hash{}) && b != (Hash{}) && !m.peers[p].guilty && p != m.cfg.Self {
		m.emit(Accuse{Peer: p, A: a, B: b})
	}
}

// proven acts on a proof against a member.
func (m *Machine) proven(proof *Proof, own bool) {
	p := proof.Peer
	if int(p) >= len(m.peers) || m.peers[p].guilty {
		return
	}
	m.peers[p].guilty = true
	if m.taking && (own || p != m.cfg.Self) {
		m.emit(Send{Message{From: m.cfg.Self, Slot: max(m.slot, 1), Parent: m.head.id, Roster: m.head.rec.Roster, Body: *proof}})
	}
	m.report(PeerExpelled, p, Hash{}, fmt.Sprintf("peer %s is expelled: it signed two messages of which an honest peer signs one, and both are here", p))
	if p != m.cfg.Self {
		m.emit(Gate{Peer: p, Text: "there is a proof that it signed two contradicting messages"})
	}
	m.wait[p] = m.wait[p] && m.mutant.keepGuilty
	m.enlist()
	m.dirty = true
}

// enlist works out who takes part under the head's roster.
func (m *Machine) enlist() {
	m.ros = m.rosters[m.head.rec.Roster]
	clear(m.members)
	m.taking, m.later, m.wanting = false, true, true
	for _, p := range m.ros.Members {
		if _, gone := slices.BinarySearch(m.head.rec.Expelled, p); gone || m.peers[p].guilty && !m.mutant.keepGuilty {
			continue
		}
		m.members[p] = true
		m.taking = m.taking || p == m.cfg.Self
	}
}

// rosterKnown takes a new roster.
func (m *Machine) rosterKnown(r Roster) {
	if m.rosters[r.Hash] != nil || r.validate() != nil {
		return
	}
	m.rosters[r.Hash] = &r
	m.grow(&r)
	m.dirty = true
}

// grow makes room for the members of a roster.
func (m *Machine) grow(r *Roster) {
	for n := int(r.Members[len(r.Members)-1]) + 1; len(m.peers) < n; {
		m.peers = append(m.peers, peerState{})
		m.latest = append(m.latest, latestSigned{})
		m.wait = append(m.wait, false)
		m.members = append(m.members, false)
	}
}

func (r *Roster) validate() error {
	if err := validatePeers(r.Members); err != nil {
		return fmt.Errorf("roster %s: %w", r.Hash.Short(), err)
	}
	if n := len(r.Members); n < 1 || r.F < 0 || r.F > MaxFaulty(n) {
		return fmt.Errorf("roster %s: f is %d, but %d peers tolerate at most %d Byzantine ones", r.Hash.Short(), r.F, n, MaxFaulty(max(n, 1)))
	}
	return nil
}

// gone reports whether this peer was a member once and is none any more, and
// why.
func (m *Machine) gone() (Reason, bool) {
	if m.taking {
		m.took = true
		return 0, false
	}
	if _, out := slices.BinarySearch(m.head.rec.Expelled, m.cfg.Self); out || m.inRange(m.cfg.Self) && m.peers[m.cfg.Self].guilty {
		return Expelled, true
	}
	if m.ros.has(m.cfg.Self) || !m.took {
		return 0, false
	}
	for _, r := range m.rosters { // it may be a member again on this branch
		for a := r; a != nil && r.has(m.cfg.Self); a = m.rosters[a.Previous] {
			if a == m.ros {
				return 0, false
			}
		}
	}
	return Left, true
}

func (m *Machine) inRange(p Peer) bool { return int(p) < len(m.peers) }

// paused reports whether this peer must not go on before more are connected.
func (m *Machine) paused() bool {
	if m.cfg.PauseAfter == 0 || m.head.rec.Height < m.final_.Height+m.cfg.PauseAfter {
		return false
	}
	return !m.quorate()
}

// quorate reports whether a quorum is connected, this peer included.
func (m *Machine) quorate() bool {
	n := 1
	for p := range m.peers {
		if m.other(Peer(p)) && m.peers[p].connected {
			n++
		}
	}
	return n >= Quorum(len(m.ros.Members))
}
