package round

import (
	"cmp"
	"slices"
	"time"
)

// window is how many records below a head or a latest signature are kept to
// see where branches meet. What forks deeper has no known link.
const window = 64

// scattered is how many slots must fail before peers on branches without a
// known link, each with too few signers, gather on one.
const scattered = 2

// node is a record in the tree of records that this peer knows.
type node struct {
	id       Hash
	rec      Record
	parent   *node // nil: genesis, or not known
	children []*node
	signers  peerSet
	holders  peerSet // who said that it is at this record
	seen     time.Duration

	links   *link  // its checkpoint, or the nearest below it, and those below
	ownLast uint64 // last slot that this peer began on this record
	held    bool   // the host holds its state
	differs bool   // recomputing it gave another model

	failures    int // to get its state, since the last new signer
	unavailable time.Duration

	// Scratch of one fork choice, valid where stamp is the choice's number.
	stamp  uint64
	weight int    // connected latest signers in the subtree, and this peer
	live   bool   // one of them is another peer
	claims bool   // that it follows what is justified is their word only
	lowest Peer   // the first of them in roster order
	tip    uint64 // height of the highest of them
	tried  uint64
}

// peerSet is a set of members.
type peerSet [MaxPeers / 64]uint64

func (s *peerSet) add(p Peer)      { s[p/64] |= 1 << (p % 64) }
func (s *peerSet) has(p Peer) bool { return s[p/64]&(1<<(p%64)) != 0 }

// latestSigned is the record that a peer signed with its highest counter.
type latestSigned struct {
	counter uint64
	node    *node // nil: none, or below the window
	message Hash
}

// tree holds the records. Its order of nodes is that of arrival, so nothing
// depends on the order of a map.
type tree struct {
	every   uint64 // heights between checkpoints
	fits    func(parent, child *Record) bool
	byID    map[Hash]*node
	nodes   []*node
	orphans map[Hash][]*node // by the parent's ID, which is not in the tree
	choices uint64           // fork choices and sweeps made
	descent uint64           // descents made
	roots   []*node          // scratch
}

func newTree(every uint64, fits func(parent, child *Record) bool) tree {
	return tree{every: every, fits: fits, byID: map[Hash]*node{}, orphans: map[Hash][]*node{}}
}

// fits reports whether child can follow parent.
func (m *Machine) fits(parent, child *Record) bool {
	if child.Height != parent.Height+1 || child.Slot <= parent.Slot || child.Justified.Height < parent.Justified.Height {
		return false
	}
	if child.Justified.Height == parent.Justified.Height && child.Justified != parent.Justified {
		return false
	}
	for _, p := range parent.Expelled {
		if _, ok := slices.BinarySearch(child.Expelled, p); !ok {
			return false
		}
	}
	if r := m.rosters[parent.Roster]; r != nil && child.Position != min(parent.Position+r.Minibatches, MaxSlot) {
		return false
	}
	if child.Convergence != parent.Convergence.after(child.Validation, m.cfg.MinDelta) {
		return false
	}
	if child.Roster == parent.Roster {
		return true
	}
	next := m.rosters[child.Roster]
	return next == nil || m.maySucceed(parent, next)
}

// relink sets what n and its descendants know of the checkpoints below them. A
// record without a known parent names one at least.
func (t *tree) relink(n *node) {
	var below *link
	if n.parent != nil {
		below = n.parent.links
	} else if n.rec.Height > 0 {
		below = &link{Checkpoint: n.rec.Justified, low: n.rec.Justified.Height}
	}
	if n.rec.Height%t.every == 0 {
		l := &link{Checkpoint: Checkpoint{Height: n.rec.Height, ID: n.id, Roster: n.rec.Roster}, prev: below, low: n.rec.Height}
		if below != nil {
			l.low = below.low
		}
		below = l
	}
	if n.links != nil && below != nil && n.links.low < below.low {
		return // it knew more already
	}
	n.links = below
	for _, c := range n.children {
		t.relink(c)
	}
}

// add returns the record's node, a new one where there was none; nil if the
// record does not fit the parent that it names.
func (t *tree) add(id Hash, r Record, now time.Duration) *node {
	if n := t.byID[id]; n != nil {
		return n
	}
	n := &node{id: id, rec: r, seen: now}
	if parent := t.byID[r.Parent]; parent != nil {
		if !t.fits(&parent.rec, &r) {
			return nil
		}
		n.parent = parent
		parent.children = append(parent.children, n)
	} else {
		t.orphans[r.Parent] = append(t.orphans[r.Parent], n)
	}
	t.byID[id] = n
	t.nodes = append(t.nodes, n)
	for _, c := range t.orphans[id] {
		if t.fits(&r, &c.rec) {
			c.parent = n
			n.children = append(n.children, c)
		}
	}
	delete(t.orphans, id)
	t.relink(n)
	return n
}

// id returns a record's ID, of one that is known without hashing it.
func (t *tree) id(r *Record) Hash {
	for _, n := range t.siblings(r.Parent) {
		if n.rec.equal(r) {
			return n.id
		}
	}
	return r.ID()
}

// siblings returns the known records with this parent.
func (t *tree) siblings(parent Hash) []*node {
	if n := t.byID[parent]; n != nil {
		return n.children
	}
	return t.orphans[parent]
}

func (n *node) checkpoint() Checkpoint {
	return Checkpoint{Height: n.rec.Height, ID: n.id, Roster: n.rec.Roster}
}

func (n *node) root() *node {
	for n.parent != nil {
		n = n.parent
	}
	return n
}

// descends reports whether n is a, or a known descendant of it.
func (n *node) descends(a *node) bool {
	for n != nil && n.rec.Height > a.rec.Height {
		n = n.parent
	}
	return n == a
}

// sweep forgets what is more than a window below the head and below every
// latest signature. It returns the highest slot that this peer began on a
// record that is gone.
func (t *tree) sweep(genesis, head *node, latest []latestSigned, connected func(Peer) bool, keep []*node) (floor uint64) {
	t.choices++
	stamp := t.choices
	mark := func(n *node) *node { // returns where the window ends
		for i := 0; ; i++ {
			n.stamp = stamp
			if n.parent == nil || i == window {
				return n
			}
			n = n.parent
			if n.stamp == stamp {
				return n
			}
		}
	}
	base := mark(head)
	for p := range latest {
		n := latest[p].node
		if n == nil || n.stamp == stamp {
			continue
		}
		linked := false // into the head's window
		for i, a := 0, n; a != nil && i <= window && !linked; i, a = i+1, a.parent {
			linked = a.stamp == stamp
		}
		// An ancestor of the base weighs only on what is gone, and a peer that
		// is away on a branch that lost long ago may sign again.
		if !linked && (base.descends(n) || !connected(Peer(p))) {
			latest[p].node = nil
			continue
		}
		mark(n)
	}
	genesis.stamp = stamp
	for _, n := range keep {
		n.stamp = stamp
	}
	kept := t.nodes[:0]
	for _, n := range t.nodes {
		if n.stamp == stamp {
			kept = append(kept, n)
			continue
		}
		floor = max(floor, n.ownLast)
		delete(t.byID, n.id)
		n.parent, n.children = nil, nil
	}
	clear(t.nodes[len(kept):])
	t.nodes = kept
	clear(t.orphans)
	for _, n := range t.nodes {
		n.children = slices.DeleteFunc(n.children, func(c *node) bool { return c.stamp != stamp })
		if n.parent != nil && t.byID[n.parent.id] != n.parent {
			n.parent = nil
		}
		if n.parent == nil && n != genesis {
			t.orphans[n.rec.Parent] = append(t.orphans[n.rec.Parent], n)
		}
	}
	return floor
}

// threshold is how many latest signers a record made under a roster needs to be
// gone to: at least one honest peer must be among them, or all others that are
// connected or may still connect at the start.
func (m *Machine) threshold(r *Roster) int {
	if r == nil {
		return 1
	}
	others := 0
	for _, p := range r.Members {
		if p != m.cfg.Self && !m.peers[p].guilty && m.present(p) {
			others++
		}
	}
	return max(1, min(r.F+1, others)-m.mutant.lowThreshold)
}

// choose is the fork choice: from the root of the tree to the child whose
// subtree has most latest signers, and on. It returns the head unless there is
// a better record whose state can be had. Only this peer's and connected
// members' signatures count: how long one remembers those that are gone
// differs from peer to peer, and nobody could give the state. Nothing here
// depends on the roster of the head, or the head would move for ever where
// rosters differ.
func (m *Machine) choose() *node {
	t := &m.tree
	t.choices++
	stamp := t.choices
	roots := t.roots[:0]
	root := m.justified.checkpoint()
	for p := range m.latest {
		here := m.peers[p].connected && !m.peers[p].guilty
		l := m.latest[p].node
		if l == nil || !here && Peer(p) != m.cfg.Self || m.strays(l, &root) {
			continue
		}
		// To follow a checkpoint that is known to follow the justified one is
		// no higher claim.
		claims := l.rec.Justified.Height > root.Height && relate(l, &root) == unknown
		if j := t.byID[l.rec.Justified.ID]; claims && j != nil {
			claims = relate(j, &root) != on
		}
		for n := m.latest[p].node; n != nil; n = n.parent {
			if n.stamp != stamp {
				n.stamp, n.weight, n.live, n.lowest, n.tip, n.claims = stamp, 0, false, Peer(p), 0, false
				if n.parent == nil {
					roots = append(roots, n)
				}
			}
			n.weight++
			n.live = n.live || here
			n.claims = n.claims || claims
			n.tip = max(n.tip, m.latest[p].node.rec.Height)
		}
	}
	t.roots = roots
	m.needs = m.needs[:0]
	own := m.head.root()
	if m.strays(m.head, &root) {
		own = m.justified
	}
	if own.stamp != stamp {
		own.stamp, own.weight, own.live, own.tip = stamp, 0, false, 0
	}
	best := own
	for _, r := range roots {
		if r == best || r.weight < m.need(&r.rec) || !r.live || r.claims && r.weight < m.surely(&r.rec) {
			continue
		}
		better := r.weight > best.weight
		if r.weight == best.weight {
			// No link is known, so there is no child of a common ancestor to
			// compare: where as much was done the first peer in roster order
			// decides, the same wherever one looks from.
			x, y := m.reach(r, 0), m.reach(best, 0)
			better = (x > y || x == y && r.lowest < best.lowest) && (best != own || m.now-r.seen >= m.cfg.Timeouts.Orphan)
		}
		if better {
			best = r
		}
	}
	need := 0 // as the roster says
	if best.weight < m.need(&best.rec) && m.fails >= scattered {
		// All restarted from different records, and nobody knows how they are
		// linked: not to stand still for ever, take the one that most are at,
		// or else the highest.
		for _, r := range roots {
			if !r.live && r != own || r.claims && r.weight < m.surely(&r.rec) {
				continue
			}
			if c := cmp.Or(cmp.Compare(r.weight, best.weight), cmp.Compare(r.tip, best.tip), cmp.Compare(best.lowest, r.lowest)); c > 0 {
				best = r
			}
		}
		need = max(1, best.weight)
	}
	n := m.end(best, need)
	if n == nil && best != own {
		n = m.end(own, need)
	}
	if n == nil && own == m.justified && m.accompanied() {
		return own // those who voted for it have its state: ask again
	}
	if n == nil {
		// Where too few signed, the head would stay at the parent, but nobody
		// has that state any more: take the best of what there is.
		n = m.end(own, 1)
	}
	if n == nil || m.uncontested(n) {
		n = m.head
	}
	return n
}

// accompanied reports whether another member is connected.
func (m *Machine) accompanied() bool {
	for p := range m.peers {
		if m.peers[p].connected && m.other(Peer(p)) {
			return true
		}
	}
	return false
}

// uncontested reports whether the head descends from n and nobody signed for
// another branch in between: then there is no reason to step back, as after a
// restart, when the others have not been heard of yet.
func (m *Machine) uncontested(n *node) bool {
	if !m.head.descends(n) {
		return false
	}
	for a := m.head; a != n; a = a.parent {
		for _, c := range a.parent.children {
			if c != a && c.stamp == m.tree.choices {
				return false
			}
		}
	}
	return true
}

// strays reports whether n does not follow the justified checkpoint, or is not
// known to and its signers do not know of it. They will, since votes are kept
// for everyone.
func (m *Machine) strays(n *node, justified *Checkpoint) bool {
	if m.mutant.blindFork {
		return false
	}
	switch relate(n, justified) {
	case on:
		return false
	case unknown:
		own := n.rec.Justified
		return own.ID != justified.ID && own.Height <= justified.Height
	}
	return true
}

// surely is how many signers have an honest one among them, whoever is
// connected.
func (m *Machine) surely(r *Record) int {
	if ros := m.rosters[r.Roster]; ros != nil {
		return ros.F + 1
	}
	return m.ros.F + 1
}

// end returns the record to end at in the tree of root, nil if no state there
// can be had. It is not below the justified checkpoint.
func (m *Machine) end(root *node, need int) *node {
	m.tree.descent++
	if !m.mutant.blindFork && m.justified.root() == root {
		root = m.justified
	}
	return m.descend(root, need)
}

func (m *Machine) descend(n *node, need int) *node {
	for {
		var best *node
		enough := need
		if enough == 0 {
			enough = m.need(&n.rec)
		}
		for _, c := range n.children {
			if c.stamp != m.tree.choices || c.weight < enough || c.tried == m.tree.descent {
				continue
			}
			if best == nil || c.weight > best.weight || c.weight == best.weight && m.leads(c, best, need) {
				best = c
			}
		}
		if best == nil {
			break
		}
		if r := m.descend(best, need); r != nil {
			return r
		}
		best.tried = m.tree.descent
	}
	if m.obtainable(n) {
		return n
	}
	return nil
}

// stride is how many heights make a difference between branches with as many
// signers. What one hears of the others' branch is old by some rounds: if one
// round counted, each side would take its own for the higher, for ever.
const stride = 16

// leads decides between two children with as many signers: the way on goes
// where more was done, then to the smaller hash.
func (m *Machine) leads(a, b *node, need int) bool {
	if x, y := m.reach(a, need), m.reach(b, need); x != y {
		return x > y
	}
	return lessHash(a.id, b.id)
}

// reach is the height in strides up to which n's subtree has enough signers.
func (m *Machine) reach(n *node, need int) uint64 {
	height := n.rec.Height / stride
	enough := need
	if enough == 0 {
		enough = m.need(&n.rec)
	}
	for _, c := range n.children {
		if c.stamp == m.tree.choices && c.weight >= enough && c.tried != m.tree.descent {
			height = max(height, m.reach(c, need))
		}
	}
	return height
}

// need is the threshold for the children of a record, worked out once for a
// fork choice.
func (m *Machine) need(parent *Record) int {
	for _, n := range m.needs {
		if n.roster == parent.Roster {
			return n.need
		}
	}
	n := m.threshold(m.rosters[parent.Roster])
	m.needs = append(m.needs, rosterNeed{parent.Roster, n})
	return n
}

type rosterNeed struct {
	roster Hash
	need   int
}

// obtainable reports whether the state of n is here, or may be got.
func (m *Machine) obtainable(n *node) bool {
	if m.rosters[n.rec.Roster] == nil {
		return false
	}
	switch {
	case n.held || n == m.genesis:
		return true
	case n.differs:
		return false
	case m.recomputable(n):
		return true
	}
	return (n.live || n == m.justified) && m.now >= n.unavailable
}

// recomputable reports whether the host can compute n from its set.
func (m *Machine) recomputable(n *node) bool {
	if n.parent == nil || !n.parent.held {
		return false
	}
	for _, e := range n.rec.Set {
		if b := m.bodies[e.Gradient]; b == nil || b.status != bodyHeld {
			return false
		}
	}
	return true
}

func lessHash(a, b Hash) bool { return slices.Compare(a[:], b[:]) < 0 }
