package sim

import (
	"slices"

	"github.com/spirt-ml/spirt/internal/round"
)

// Lies are the things that liars do, a set.
type Lies uint

// The lies. All of a run's liars do the same ones.
const (
	Silence    Lies = 1 << iota // say nothing now and then
	Equivocate                  // two messages where one is allowed, each to some
	Forge                       // records with a model of their own
	Flood                       // nonsense, and as much of it as they like
	Withhold                    // bodies that they announced
	Unheld                      // ballots for what they do not hold
	Delay                       // what they say, by up to a second
	Replay                      // what others said before, as if it were new
	Resize                      // announcements with other sizes
	VoteAll                     // a vote for every target that anyone votes for
	SignAll                     // a signature on every record that anyone signs
	lastLie

	AllLies   = lastLie - 1
	QuietLies = Silence | Forge | Withhold | Unheld | Delay | Replay | Resize // nothing that proves guilt by itself
	TwoFaced  = VoteAll | SignAll | Silence
)

// lieNames are the lies' names in scenarios and counts.
var lieNames = []string{"silence", "equivocation", "forged-record", "flood", "withheld-body", "unheld-ballot", "delay", "replay", "wrong-size", "votes-for-all", "signatures-on-all"}

// tell sends a liar's message to one peer.
func (w *world) tell(p, q *peer, m round.Message) {
	if r, ok := m.Body.(round.SignedRecord); ok {
		w.records[r.Record.ID()] = r.Record
	}
	s := w.seal(m)
	if w.cfg.Lies&Delay != 0 && w.rng.IntN(8) == 0 {
		w.lied(Delay)
		w.after(w.between(0, 1e9), func() { w.transmit(p, q, s) })
		return
	}
	w.transmit(p, q, s)
}

func (w *world) lied(l Lies) {
	for i, name := range lieNames {
		if l == 1<<i {
			w.strike(name)
		}
	}
}

func (w *world) all(p *peer, m round.Message) {
	for _, q := range w.peers {
		w.tell(p, q, m)
	}
}

// lie sends what a liar makes of a message.
func (w *world) lie(p *peer, msg round.Message) {
	var mine []Lies
	for l := Lies(1); l < lastLie; l <<= 1 {
		if w.cfg.Lies&l != 0 {
			mine = append(mine, l)
		}
	}
	if _, record := msg.Body.(round.SignedRecord); record && p.forged == msg.Slot {
		return // the forged one stands
	}
	if len(mine) == 0 || w.rng.IntN(3) == 0 {
		w.all(p, msg)
		return
	}
	l := mine[w.rng.IntN(len(mine))]
	switch l {
	case Silence:
		w.lied(l)
		return
	case Equivocate:
		other := msg
		switch b := msg.Body.(type) {
		case round.Announce:
			b.Gradient = hash("other", msg.Slot)
			b.Bytes = 1000
			other.Body = b
		case round.Ballot:
			b.Entries = b.Entries[:w.rng.IntN(len(b.Entries)+1)]
			other.Body = b
		case round.SignedRecord:
			b.Counter++
			other.Body = b
		case round.Return:
			before, ok := w.records[b.Head.Parent]
			if !ok || before.Height == 0 {
				w.all(p, msg)
				return
			}
			b.Counter, b.Head = max(b.Counter, 1), before
			other.Body, other.Parent, other.Roster = b, before.ID(), before.Roster
		case round.Vote:
			b.Target.Model = hash("other", b.Target.Height)
			other.Body, other.Parent = b, b.Target.ID()
		default:
			w.all(p, msg)
			return
		}
		w.lied(l)
		for _, q := range w.peers {
			if w.rng.IntN(2) == 0 {
				w.tell(p, q, other)
			} else {
				w.tell(p, q, msg)
			}
		}
		return
	case Forge:
		// A record with a model of one's own, the same of all liars, ahead of
		// everyone else's: and no other one for that slot.
		parent, ok := w.records[msg.Parent]
		_, ballot := msg.Body.(round.Ballot)
		if ok && ballot {
			w.lied(l)
			p.forged = msg.Slot
			m := msg
			m.Body = round.SignedRecord{Record: w.forge(msg.Slot, &parent), Counter: 1<<30 + msg.Slot}
			w.all(p, m)
		}
	case Flood:
		w.lied(l)
		for range 5 {
			m := msg
			if m.Type().Sticky() {
				break
			}
			m.Slot += uint64(w.rng.IntN(1000))
			if w.rng.IntN(2) == 0 {
				m.Parent = hash("nowhere", w.rng.Uint64())
			}
			if w.rng.IntN(2) == 0 {
				m.Body = round.SignedRecord{Counter: uint64(w.rng.IntN(1000) + 1), Record: round.Record{
					Slot: m.Slot, Height: m.Slot - uint64(w.rng.IntN(int(m.Slot))), Parent: m.Parent,
					Set: []round.Entry{{Peer: msg.From, Gradient: hash("noise")}}, Model: hash(w.rng.Uint64()),
				}}
			}
			w.all(p, m)
		}
	case Unheld:
		if b, ok := msg.Body.(round.Ballot); ok {
			w.lied(l)
			b.Entries = nil
			for _, q := range w.roster(msg.Roster).Members {
				b.Entries = append(b.Entries, round.Entry{Peer: q, Gradient: hash("gradient", int(q), w.records[msg.Parent].Model, w.records[msg.Parent].Height+1)})
			}
			msg.Body = b
		}
	case Replay:
		if len(p.messages) > 0 {
			w.lied(l)
			old := p.messages[w.rng.IntN(len(p.messages))]
			for _, q := range w.peers {
				w.transmit(p, q, old) // another's signature holds
			}
		}
	case Resize:
		if a, ok := msg.Body.(round.Announce); ok && !a.Abstains() {
			w.lied(l)
			a.Bytes = uint64(w.rng.IntN(1 << 30))
			if a.Bytes == 0 {
				a.Gradient = round.Hash{}
			}
			msg.Body = a
		}
	}
	w.all(p, msg)
}

// forge makes a record that does not follow from its parent.
func (w *world) forge(slot uint64, parent *round.Record) round.Record {
	roster := w.roster(parent.Roster)
	r := round.Record{Slot: slot, Height: parent.Height + 1, Parent: parent.ID(),
		Model: hash("lie", slot, parent.Model), State: hash("lie"),
		Position: parent.Position + roster.Minibatches, Roster: parent.Roster, Justified: parent.Justified, Expelled: parent.Expelled}
	for _, q := range roster.Members {
		if !slices.Contains(r.Expelled, q) {
			r.Set = append(r.Set, round.Entry{Peer: q, Gradient: hash("gradient", int(q), parent.Model, r.Height)})
		}
	}
	r.FUsed = uint16(min(roster.F, (len(r.Set)-1)/2))
	return r
}

// copycat has a liar vote for and sign what it sees others vote for and sign.
func (w *world) copycat(p, from *peer, s *stored) {
	if !p.liar || w.peers[s.msg.From].liar {
		return // what liars say to each other would go round for ever
	}
	m := s.msg
	m.From = round.Peer(p.id)
	switch b := m.Body.(type) {
	case round.Vote:
		if w.cfg.Lies&VoteAll == 0 {
			return
		}
		w.lied(VoteAll)
	case round.SignedRecord:
		if w.cfg.Lies&SignAll == 0 {
			return
		}
		w.lied(SignAll)
		b.Counter = uint64(w.now)
		m.Body = b
	default:
		return
	}
	for _, q := range w.peers { // to those on the side of who said so
		if w.group[q.id] == w.group[from.id] {
			w.tell(p, q, m)
		}
	}
}
