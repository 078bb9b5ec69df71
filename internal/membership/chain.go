package membership

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"
)

// ErrUnknownPrevious says that a roster follows one that the chain does not
// have: get that one first.
var ErrUnknownPrevious = errors.New("the roster before it is not known here")

// Chain holds the verified rosters of a job. There may be several that follow
// one: where admins contradict each other, the records of the run decide which
// counts. It is not safe for concurrent use.
type Chain struct {
	genesis *Genesis
	job     Hash
	nodes   map[Hash]*node
	head    *node
}

type node struct {
	roster     *Roster
	hash       Hash
	parent     *node
	started    bool                // this roster or one before it has Start
	introduced []ed25519.PublicKey // keys that none before it had
}

// NewChain returns the empty chain of a job.
func NewChain(g *Genesis) *Chain {
	return &Chain{genesis: g, job: g.ID(), nodes: map[Hash]*node{}}
}

// Genesis returns that of the job.
func (c *Chain) Genesis() *Genesis { return c.genesis }

// Job returns the job's ID.
func (c *Chain) Job() Hash { return c.job }

// Add verifies a roster and keeps it; the chain owns it from then on. One that
// is here already is no error, and changes nothing. The error wraps
// ErrUnknownPrevious where the roster before it is missing.
func (c *Chain) Add(r *Roster) error {
	if err := c.add(r); err != nil {
		return fmt.Errorf("roster of epoch %d: %w", r.Epoch, err)
	}
	return nil
}

func (c *Chain) add(r *Roster) error {
	if err := r.Validate(); err != nil {
		return err
	}
	if r.Job != c.job {
		return fmt.Errorf("it is of job %s, not %s", r.Job.Short(), c.job.Short())
	}
	n := &node{roster: r, hash: r.Hash(), started: r.Start}
	if c.nodes[n.hash] != nil {
		return nil
	}
	if len(c.nodes) >= MaxRosters {
		return fmt.Errorf("there are %d rosters already", len(c.nodes))
	}
	if err := r.verify(c.genesis); err != nil {
		return err
	}
	before := &Roster{}
	if r.Epoch > 0 {
		if n.parent = c.nodes[r.Previous]; n.parent == nil {
			return fmt.Errorf("%w: %s", ErrUnknownPrevious, r.Previous.Short())
		}
		before = n.parent.roster
		n.started = n.started || n.parent.started
		if before.Epoch+1 != r.Epoch {
			return fmt.Errorf("it follows that of epoch %d", before.Epoch)
		}
	}
	if err := c.follows(n, before); err != nil {
		return err
	}
	c.nodes[n.hash] = n
	if c.head == nil || better(n, c.head) {
		c.head = n
	}
	return nil
}

// better orders rosters: the later one, and of one epoch the one with the
// smaller hash, so that all choose alike.
func better(a, b *node) bool {
	if a.roster.Epoch != b.roster.Epoch {
		return a.roster.Epoch > b.roster.Epoch
	}
	return bytes.Compare(a.hash[:], b.hash[:]) < 0
}

// follows checks the step from the roster before to the one of n.
func (c *Chain) follows(n *node, before *Roster) error {
	r := n.roster
	started := n.parent != nil && n.parent.started
	switch {
	case r.Start && started:
		return errors.New("training has started under an earlier one")
	case r.Emergency && !started:
		return errors.New("before training starts there is no emergency")
	}
	added, changed, weighed := 0, 0, false
	for _, m := range r.Members {
		old, ok := before.Member(m.Index)
		switch {
		case !ok && int(m.Index) != int(before.Next)+added:
			return fmt.Errorf("peer %d: the next index is that of peer %d", int(m.Index)+1, int(before.Next)+added+1)
		case !ok:
			added++
		case old.Name != m.Name || old.Private != m.Private || !old.Key.Equal(m.Key) && old.Minibatches != m.Minibatches:
			return fmt.Errorf("peer %d: more than its key or its share has changed", int(m.Index)+1)
		case !old.Key.Equal(m.Key):
			changed++
		case old.Minibatches != m.Minibatches:
			weighed = true
		}
		if !ok || !old.Key.Equal(m.Key) {
			if at := n.parent.of(m.Key); at >= 0 {
				return fmt.Errorf("the key of peer %d was on the roster of epoch %d: who comes back takes a new identity", int(m.Index)+1, at)
			}
			n.introduced = append(n.introduced, m.Key)
		}
	}
	if int(r.Next) != int(before.Next)+added {
		return fmt.Errorf("the next index is %d, not %d", int(before.Next)+added, r.Next)
	}
	removed := len(before.Members) + added - len(r.Members)
	if steps := added + removed + changed; started && !r.Emergency && (steps > 1 || steps == 1 && weighed || steps == 0 && !weighed) {
		return errors.New("after the start one thing changes at a time: one member comes, goes or takes a new key, or shares change")
	}
	return nil
}

// of returns the epoch that introduced a key in this roster or one before, -1
// if none has.
func (n *node) of(public ed25519.PublicKey) int {
	for ; n != nil; n = n.parent {
		if slices.ContainsFunc(n.introduced, func(k ed25519.PublicKey) bool { return k.Equal(public) }) {
			return int(n.roster.Epoch)
		}
	}
	return -1
}

// Len returns the number of rosters.
func (c *Chain) Len() int { return len(c.nodes) }

// Latest returns the roster of the highest epoch, of several the one with the
// smallest hash; nil of an empty chain.
func (c *Chain) Latest() *Roster {
	if c.head == nil {
		return nil
	}
	return c.head.roster
}

// Get returns a roster by its hash.
func (c *Chain) Get(h Hash) (*Roster, bool) {
	n := c.nodes[h]
	if n == nil {
		return nil, false
	}
	return n.roster, true
}

// All returns all rosters, by ascending epoch, those of one epoch by hash.
func (c *Chain) All() []*Roster {
	nodes := make([]*node, 0, len(c.nodes))
	for _, n := range c.nodes {
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b *node) int {
		if a.roster.Epoch == b.roster.Epoch && better(a, b) || a.roster.Epoch < b.roster.Epoch {
			return -1
		}
		return 1
	})
	out := make([]*Roster, len(nodes))
	for i, n := range nodes {
		out[i] = n.roster
	}
	return out
}

// Start returns the roster that training starts under, on the way to Latest;
// nil before there is one.
func (c *Chain) Start() *Roster {
	for n := c.head; n != nil; n = n.parent {
		if n.roster.Start {
			return n.roster
		}
	}
	return nil
}

// Was reports whether a key was on the way to Latest, and is a member's no
// more.
func (c *Chain) Was(public ed25519.PublicKey) bool {
	if c.head == nil || c.head.of(public) < 0 {
		return false
	}
	_, ok := c.head.roster.Find(public)
	return !ok
}
