package sim

import (
	"slices"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
)

// What a real host does for its machine, and what a liar does.

func (w *world) start(p *peer) {
	if p.up {
		return
	}
	p.up, p.paused, p.backlog = true, false, nil
	p.life++
	p.states = map[state]bool{{p.checkpoint.Model, p.checkpoint.State}: true}
	p.bodies = map[round.Hash]bool{}
	p.messages, p.known = nil, map[round.Hash]bool{}
	p.view = make([]bool, w.cfg.Peers)
	rounds := w.cfg.Rounds
	if rounds == 0 {
		rounds = 1 << 30
	}
	cfg := round.Config{
		Self: round.Peer(p.id), N: w.cfg.Peers, F: w.cfg.F, Genesis: w.genesis, Rounds: rounds,
		Watermark: p.watermark, Counter: p.counter, Timeouts: w.cfg.Timeouts,
	}
	if p.checkpoint.Height > 0 {
		cfg.Head = p.checkpoint
	}
	m, err := w.cfg.New(cfg)
	if err != nil {
		w.fail("starting peer %d: %v", p.id, err)
		return
	}
	p.machine = m
	p.height, p.head = p.checkpoint.Height, p.checkpoint.ID()
	w.trace("peer %d starts at height %d watermark %d", p.id, p.height, p.watermark)
	w.step(p, round.Start{})
	w.relink(0, 100*time.Millisecond)
}

func (w *world) crash(p *peer) {
	if !p.up {
		return
	}
	p.up, p.paused, p.backlog = false, false, nil
	p.life++
	w.trace("peer %d crashes", p.id)
	w.relink(20*time.Millisecond, 0)
}

// deliver gives an event to a peer that may be paused.
func (w *world) deliver(p *peer, ev round.Event) {
	if !p.up {
		return
	}
	life := p.life
	if p.paused {
		p.backlog = append(p.backlog, func() {
			if p.life == life {
				w.deliver(p, ev)
			}
		})
		return
	}
	w.step(p, ev)
}

func (w *world) mix(v uint64) {
	w.result.Digest = (w.result.Digest ^ v) * 0x9e3779b97f4a7c15
	w.result.Digest ^= w.result.Digest >> 29
}

func (w *world) step(p *peer, ev round.Event) {
	// What the host got is kept from when the machine knows of it.
	switch ev := ev.(type) {
	case round.GradientReady:
		p.bodies[ev.Gradient] = true
	case round.BodyReady:
		p.bodies[ev.Gradient] = true
	case round.Applied:
		p.states[state{ev.Model, ev.State}] = true
	case round.StateReady:
		p.states[stateOf(w.records[ev.Record])] = true
	}
	w.result.Steps++
	w.mix(uint64(w.now))
	w.mix(uint64(p.id))
	if w.cfg.Trace != nil {
		w.trace("%d <- %T%+v", p.id, ev, short(ev))
	}
	actions := p.machine.Step(w.now, ev)
	life := p.life
	for _, a := range actions {
		if w.cfg.Trace != nil {
			w.trace("%d    %v", p.id, a)
		}
		if w.err != nil || p.life != life {
			return
		}
		w.execute(p, a)
	}
	if p.liar {
		return
	}
	st := p.machine.Stats()
	n := w.cfg.Peers
	if st.Records > 140*(n+2) || st.Bodies > 12*n+12 || st.Messages > 8*n || st.States > 5 || len(p.states) > 12 || len(p.bodies) > 16*n+16 {
		w.fail("P11: peer %d remembers %+v, its host %d states and %d bodies", p.id, st, len(p.states), len(p.bodies))
	}
}

func short(ev round.Event) any {
	if r, ok := ev.(round.Received); ok {
		return r.Message.String()
	}
	return ev
}

func stateOf(r round.Record) state { return state{r.Model, r.State} }

func (w *world) execute(p *peer, a round.Action) {
	life := p.life
	alive := func(f func()) func() {
		return func() {
			if p.life == life {
				f()
			}
		}
	}
	switch a := a.(type) {
	case round.Persist:
		p.watermark, p.counter = a.Watermark, a.Counter
	case round.Send:
		w.send(p, a.Message)
	case round.Compute:
		parent := w.records[a.Parent]
		if !p.liar && !p.states[stateOf(parent)] {
			w.fail("peer %d computes on %s without its state", p.id, a.Parent.Short())
		}
		p.compute++
		job := p.compute
		d := w.between(p.speed*3/4, p.speed*5/4)
		failed := w.rng.Float64() < w.cfg.Failures
		w.after(d, alive(func() {
			if p.compute != job {
				return
			}
			if failed {
				w.deliver(p, round.GradientFailed{Slot: a.Slot, Parent: a.Parent})
				return
			}
			g := hash("gradient", p.id, parent.Model, a.Height)
			w.deliver(p, round.GradientReady{Slot: a.Slot, Parent: a.Parent, Gradient: g, Bytes: 1000,
				Validation: round.Validation{LossMicro: int64(1000 + p.id), Correct: uint32(p.id), Count: 100}})
		}))
	case round.Fetch:
		w.fetchBody(p, a, 3)
	case round.Apply:
		parent := w.records[a.Parent]
		if !p.liar && !p.states[stateOf(parent)] {
			w.fail("peer %d applies on %s without its state", p.id, a.Parent.Short())
		}
		for _, e := range a.Set {
			if !p.liar && !p.bodies[e.Gradient] {
				w.fail("peer %d applies a gradient of %d that it does not hold", p.id, e.Peer)
			}
		}
		s := follows(parent, a.Set)
		w.after(w.between(time.Millisecond, 5*time.Millisecond), alive(func() {
			w.deliver(p, round.Applied{Slot: a.Slot, Parent: a.Parent, Set: a.Set, Model: s.model, State: s.state})
		}))
	case round.FetchState:
		p.fetch++
		w.fetchState(p, a, p.fetch, 2)
	case round.Adopt:
		w.adopt(p, a)
	case round.Retain:
		for s := range p.states {
			if !slices.ContainsFunc(a.States, func(r round.Record) bool { return stateOf(r) == s }) {
				delete(p.states, s)
			}
		}
		for g := range p.bodies {
			if !slices.Contains(a.Gradients, g) {
				delete(p.bodies, g)
			}
		}
		p.messages = slices.DeleteFunc(p.messages, func(s stored) bool { return s.msg.Slot < a.BelowSlot })
	case round.SetTimer:
		p.timer++
		t := p.timer
		if a.At > 0 {
			w.after(max(0, a.At-w.now), alive(func() {
				if p.timer == t {
					w.deliver(p, round.Timer{})
				}
			}))
		}
	case round.Report:
		if a.Kind.Timeout() {
			w.result.Timeouts++
		}
		switch a.Kind {
		case round.PeerLost:
			w.result.Lost++
		case round.Conflict, round.InvalidMessage, round.ModelDiffers:
			if len(w.cfg.Liars) == 0 {
				w.fail("P3: peer %d: %s", p.id, a.Text)
			}
		}
	case round.Finished:
		p.finished = a.ID
		w.result.Finished[p.id] = a.ID
	}
}

// follows is the model host's update.
func follows(parent round.Record, set []round.Entry) state {
	return state{hash("model", parent.Model, set), hash("state", parent.State, set)}
}

func (w *world) adopt(p *peer, a round.Adopt) {
	if !p.liar && !p.states[stateOf(a.Record)] {
		w.fail("peer %d adopts %s without its state", p.id, a.ID.Short())
	}
	p.height, p.head = a.Record.Height, a.ID
	if p.height%5 == 0 {
		p.checkpoint = a.Record
	}
	w.mix(a.Record.Height)
	if w.adopted[p.height] == nil {
		w.adopted[p.height] = map[int]round.Hash{}
	}
	w.adopted[p.height][p.id] = a.ID
	if w.cfg.Rounds > 0 && p.id == 0 {
		w.result.Sets = append(w.result.Sets, a.Record.Set)
	}
	if !p.liar && len(w.cfg.Liars) <= w.cfg.F && a.Record.Height > 0 && follows(w.records[a.Record.Parent], a.Record.Set) != stateOf(a.Record) {
		w.fail("P2: peer %d adopts %s, whose model does not follow from its set", p.id, a.ID.Short())
	}
	if !w.healed || p.liar || p.height < w.goal || w.met > 0 {
		return
	}
	for _, q := range w.peers {
		if q.up && !q.liar && w.adopted[p.height][q.id] != a.ID {
			return
		}
	}
	w.met = w.now - w.healedAt
}

func (w *world) send(p *peer, msg round.Message) {
	if p.liar {
		w.lie(p, msg)
		return
	}
	id := hash(msg.String(), msg.Body)
	key := saidKey{msg.From, msg.Type(), msg.Slot, msg.Parent}
	if before, ok := w.said[key]; ok && before != id {
		w.fail("P3: peer %d signs a second %s for slot %d on %s", p.id, msg.Type(), msg.Slot, msg.Parent.Short())
	}
	w.said[key] = id
	if msg.Slot > p.watermark {
		w.fail("P3: peer %d signs for slot %d, above its watermark %d on disk", p.id, msg.Slot, p.watermark)
	}
	switch b := msg.Body.(type) {
	case round.Ballot:
		for _, e := range b.Entries {
			if !p.bodies[e.Gradient] {
				w.fail("P5: peer %d ballots a gradient of %d that it does not hold", p.id, e.Peer)
			}
			k := balloted{msg.Slot, msg.Parent, e}
			w.ballots[k] = append(w.ballots[k], msg.From)
		}
	case round.SignedRecord:
		w.checkRecord(p, msg, b)
	}
	w.mix(uint64(msg.Type()))
	w.mix(msg.Slot)
	w.keep(p, stored{id, msg})
	w.flood(p, stored{id, msg})
}

// lie sends what a liar makes of a message.
func (w *world) lie(p *peer, msg round.Message) {
	tell := func(q *peer, m round.Message) {
		if r, ok := m.Body.(round.SignedRecord); ok {
			w.records[r.Record.ID()] = r.Record
		}
		w.transmit(p, q, stored{hash(m.String(), m.Body), m})
	}
	if r, ok := msg.Body.(round.SignedRecord); ok {
		w.records[r.Record.ID()] = r.Record
	}
	all := func(m round.Message) {
		for _, q := range w.peers {
			tell(q, m)
		}
	}
	switch w.rng.IntN(6) {
	case 0: // say nothing
		return
	case 1: // something else to some
		other := msg
		switch b := msg.Body.(type) {
		case round.Announce:
			b.Gradient = hash("other", msg.Slot)
			b.Bytes = 1000
			other.Body = b
		case round.Ballot:
			other.Body = round.Ballot{Entries: b.Entries[:w.rng.IntN(len(b.Entries)+1)]}
		}
		for _, q := range w.peers {
			if w.rng.IntN(2) == 0 {
				tell(q, other)
			} else {
				tell(q, msg)
			}
		}
		return
	case 2: // a record with a model of one's own, the same of all liars
		parent, ok := w.records[msg.Parent]
		if ok && (parent.Height == 0 || msg.Slot > parent.Slot) {
			r := round.Record{Slot: msg.Slot, Height: parent.Height + 1, Parent: msg.Parent,
				Model: hash("lie", msg.Slot, msg.Parent), State: hash("lie")}
			for q := range w.cfg.Peers {
				r.Set = append(r.Set, round.Entry{Peer: round.Peer(q), Gradient: hash("gradient", q, parent.Model, r.Height)})
			}
			r.FUsed = uint16(min(w.cfg.F, (len(r.Set)-1)/2))
			m := msg
			m.Body = round.SignedRecord{Record: r, Counter: msg.Slot * 3}
			all(m)
		}
	case 3: // noise
		for range 5 {
			m := msg
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
			all(m)
		}
	}
	all(msg)
}
