package sim

import (
	"crypto/ed25519"
	"slices"

	"github.com/spirt-ml/spirt/internal/round"
)

// Rosters, and messages as they are on the wire.

// setUpRoster makes the roster that the run starts with.
func (w *world) setUpRoster() {
	w.member = make([]bool, w.cfg.Peers)
	r := round.Roster{Hash: hash("roster", 0), F: w.cfg.F}
	for i := range w.cfg.Peers {
		if w.cfg.startsAsMember(i) {
			w.member[i] = true
			r.Members = append(r.Members, round.Peer(i))
		}
	}
	r.F = min(r.F, round.MaxFaulty(len(r.Members)))
	r.Minibatches = uint64(len(r.Members))
	w.rosters = []round.Roster{r}
	if w.cfg.Signed {
		for i := range w.cfg.Peers {
			seed := hash("key", i)
			w.keys = append(w.keys, ed25519.NewKeyFromSeed(seed[:]))
		}
	}
}

func (w *world) roster(h round.Hash) *round.Roster {
	for i := range w.rosters {
		if w.rosters[i].Hash == h {
			return &w.rosters[i]
		}
	}
	return &w.rosters[0]
}

// change signs a roster with one member more or less, and spreads it.
func (w *world) change(i int, join bool) {
	last := w.rosters[len(w.rosters)-1]
	r := round.Roster{Hash: hash("roster", len(w.rosters)), Previous: last.Hash, Members: slices.Clone(last.Members)}
	p := round.Peer(i)
	if join {
		w.strike("join")
		r.Members = append(r.Members, p)
		slices.Sort(r.Members)
	} else {
		w.strike("leave")
		r.Members = slices.DeleteFunc(r.Members, func(q round.Peer) bool { return q == p })
	}
	w.member[i] = join
	r.F = min(w.cfg.F, round.MaxFaulty(len(r.Members)))
	r.Minibatches = uint64(len(r.Members))
	w.rosters = append(w.rosters, r)
	w.trace("roster %d: %d", len(w.rosters)-1, r.Members)
	for _, q := range w.peers {
		w.after(w.between(0, 5*w.cfg.Delay), func() { w.learn(q) })
	}
	if join {
		w.after(w.between(0, 10*w.cfg.Delay), func() {
			w.learn(w.peers[i])
			if !w.peers[i].up {
				w.start(w.peers[i])
			}
		})
	}
}

// learn tells a peer of the rosters that it does not know, in their order.
func (w *world) learn(p *peer) {
	for len(p.rosters) < len(w.rosters) {
		r := w.rosters[len(p.rosters)]
		p.rosters = append(p.rosters, r)
		if p.up {
			w.deliver(p, round.RosterKnown{Roster: r})
		}
	}
}

// seal gives a message its ID, and takes it through signature and encoding
// where the run is to do so.
func (w *world) seal(m round.Message) *stored {
	id, bytes := round.Measure(job, m)
	number, known := w.numbers[id]
	if !known {
		number = len(w.numbers)
		w.numbers[id] = number
	}
	s := &stored{id: id, number: number, bytes: bytes, msg: m}
	if !w.cfg.Signed {
		return s
	}
	envelope, signed, err := round.Sign(w.keys[m.From], job, m)
	if err != nil {
		if !w.peers[m.From].liar {
			w.fail("P3: peer %d cannot sign: %v", m.From, err)
		}
		return s
	}
	opened, openedID, err := round.Open(envelope, job, w.openKeys)
	if err != nil || openedID != signed || signed != id || len(envelope) != bytes {
		if !w.peers[m.From].liar {
			w.fail("P3: peer %d signed what others refuse: %v", m.From, err)
		}
		return s
	}
	s.msg, s.envelope = opened, envelope
	return s
}

func (w *world) openKeys(roster round.Hash) ([]ed25519.PublicKey, bool) {
	keys := make([]ed25519.PublicKey, w.cfg.Peers)
	known := false
	for _, r := range w.rosters {
		if r.Hash == roster {
			known = true
			for _, p := range r.Members {
				keys[p] = w.keys[p].Public().(ed25519.PublicKey)
			}
		}
	}
	return keys, known
}

// prove makes a proof of two messages if the peer still has both.
func (w *world) prove(p *peer, a round.Accuse) {
	var two []*stored
	for _, s := range p.messages {
		if s.id == a.A || s.id == a.B {
			two = append(two, s)
		}
	}
	if len(two) < 2 {
		return
	}
	proof := round.Proof{Peer: a.Peer, A: two[0].id[:], B: two[1].id[:]}
	if w.cfg.Signed {
		var err error
		if proof, err = round.NewProof(two[0].envelope, two[1].envelope, job, w.openKeys); err != nil {
			w.fail("P8: peer %d accuses %d without a proof: %v", p.id, a.Peer, err)
		}
	}
	w.strike("proof")
	w.lastProof = w.now
	w.deliver(p, round.Evidence{Proof: proof})
}

// keepSticky bounds what a peer keeps of votes and proofs.
func (w *world) keepSticky(p *peer) {
	const kept = 32
	counts := map[round.Peer]int{}
	for i := len(p.messages) - 1; i >= 0; i-- {
		if m := &p.messages[i].msg; m.Type().Sticky() {
			if counts[m.From]++; counts[m.From] > kept {
				p.messages = slices.Delete(p.messages, i, i+1)
			}
		}
	}
}

// strike counts a fault.
func (w *world) strike(kind string) { w.result.Faults[kind]++ }
