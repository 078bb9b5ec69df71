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
	seen     time.Duration

	ownLast uint64 // last slot that this peer began on this record
	held    bool   // the host holds its state
	differs bool   // recomputing it gave another model

	failures    int // to get its state, since the last new signer
	unavailable time.Duration

	// Scratch of one fork choice, valid where stamp is the choice's number.
	stamp  uint64
	weight int    // connected latest signers in the subtree, and this peer
	live   bool   // one of them is another peer
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
}

// tree holds the records. Its order of nodes is that of arrival, so nothing
// depends on the order of a map.
type tree struct {
	byID    map[Hash]*node
	nodes   []*node
	orphans map[Hash][]*node // by the parent's ID, which is not in the tree
	choices uint64           // fork choices and sweeps made
	descent uint64           // descents made
	roots   []*node          // scratch
}

func newTree() tree {
	return tree{byID: map[Hash]*node{}, orphans: map[Hash][]*node{}}
}

// fits reports whether child can follow parent.
func fits(parent, child *Record) bool {
	return child.Height == parent.Height+1 && child.Slot > parent.Slot
}

// add returns the record's node, a new one where there was none; nil if the
// record does not fit the parent that it names.
func (t *tree) add(id Hash, r Record, now time.Duration) *node {
	if n := t.byID[id]; n != nil {
		return n
	}
	n := &node{id: id, rec: r, seen: now}
	if parent := t.byID[r.Parent]; parent != nil {
		if !fits(&parent.rec, &r) {
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
		if fits(&r, &c.rec) {
			c.parent = n
			n.children = append(n.children, c)
		}
	}
	delete(t.orphans, id)
	return n
}

// siblings returns the known records with this parent.
func (t *tree) siblings(parent Hash) []*node {
	if n := t.byID[parent]; n != nil {
		return n.children
	}
	return t.orphans[parent]
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

// threshold is how many latest signers a record needs to be gone to: at least
// one honest peer must be among them, or all others that are connected or may
// still connect at the start.
func (m *Machine) threshold() int {
	others := 0
	for p := range m.peers {
		if m.other(Peer(p)) && m.present(Peer(p)) {
			others++
		}
	}
	return max(1, min(m.cfg.F+1, others)-m.mutant.lowThreshold)
}

// choose is the fork choice: from the root of the tree to the child whose
// subtree has most latest signers, and on. It returns the head unless there is
// a better record whose state can be had. Only this peer's and connected
// members' signatures count: how long one remembers those that are gone
// differs from peer to peer, and nobody could give the state.
func (m *Machine) choose() *node {
	t := &m.tree
	t.choices++
	stamp := t.choices
	roots := t.roots[:0]
	for p := range m.latest {
		here := m.peers[p].connected
		if !here && Peer(p) != m.cfg.Self {
			continue
		}
		for n := m.latest[p].node; n != nil; n = n.parent {
			if n.stamp != stamp {
				n.stamp, n.weight, n.live, n.lowest, n.tip = stamp, 0, false, Peer(p), 0
				if n.parent == nil {
					roots = append(roots, n)
				}
			}
			n.weight++
			n.live = n.live || here
			n.tip = max(n.tip, m.latest[p].node.rec.Height)
		}
	}
	t.roots = roots
	need := m.threshold()
	own := m.head.root()
	if own.stamp != stamp {
		own.stamp, own.weight, own.live, own.tip = stamp, 0, false, 0
	}
	best := own
	for _, r := range roots {
		if r == best || r.weight < need || !r.live {
			continue
		}
		better := r.weight > best.weight
		if r.weight == best.weight {
			// No link is known, so there is no child of a common ancestor to
			// compare: the first peer in roster order decides, the same
			// wherever one looks from.
			better = r.lowest < best.lowest && (best != own || m.now-r.seen >= m.cfg.Timeouts.Orphan)
		}
		if better {
			best = r
		}
	}
	if best.weight < need && m.fails >= scattered {
		// All restarted from different records, and nobody knows how they are
		// linked: not to stand still for ever, take the one that most are at,
		// or else the highest.
		for _, r := range roots {
			if !r.live && r != own {
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
	if n == nil {
		// Where too few signed, the head would stay at the parent, but nobody
		// has that state any more: take the best of what there is.
		n = m.end(own, 1)
	}
	if n == nil {
		n = m.head
	}
	return n
}

// end returns the record to end at in the tree of root, nil if no state there
// can be had.
func (m *Machine) end(root *node, need int) *node {
	m.tree.descent++
	return m.descend(root, need)
}

func (m *Machine) descend(n *node, need int) *node {
	for {
		var best *node
		for _, c := range n.children {
			if c.stamp != m.tree.choices || c.weight < need || c.tried == m.tree.descent {
				continue
			}
			if best == nil || c.weight > best.weight || c.weight == best.weight && lessHash(c.id, best.id) {
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

// obtainable reports whether the state of n is here, or may be got.
func (m *Machine) obtainable(n *node) bool {
	switch {
	case n.held || n == m.genesis:
		return true
	case n.differs:
		return false
	case m.recomputable(n):
		return true
	}
	return n.live && m.now >= n.unavailable
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
