package sim

import (
	"slices"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
)

// What a real host does for its machine, and what a liar does.

func (w *world) start(p *peer) {
	if p.up || p.gone {
		return
	}
	p.up, p.paused, p.backlog = true, false, nil
	p.life++
	head := w.genesis
	p.states = map[state]bool{}
	for _, r := range p.checkpoints {
		if r.Height > head.Height || r.Height == head.Height && lessHash(r.ID(), head.ID()) {
			head = r
		}
	}
	for _, r := range p.checkpoints {
		p.states[stateOf(r)] = true
	}
	p.states[stateOf(head)] = true
	p.bodies = map[round.Hash]bool{}
	p.messages, p.known = nil, nil
	p.view, p.surveys = make([]bool, w.cfg.Peers), false
	rounds := w.cfg.Rounds
	if rounds == 0 {
		rounds = 1 << 30
	}
	cfg := round.Config{
		Self: round.Peer(p.id), Rosters: p.rosters, Genesis: w.genesis, Rounds: rounds,
		Watermark: p.watermark, Counter: p.counter, Timeouts: w.cfg.Timeouts,
		CheckpointEvery: w.cfg.CheckpointEvery, Voted: p.voted,
	}
	if head.Height > 0 {
		cfg.Head, cfg.Links = head, p.links[head.ID()]
		for id, r := range p.checkpoints {
			if id != head.ID() {
				cfg.Kept = append(cfg.Kept, r)
			}
		}
		slices.SortFunc(cfg.Kept, func(a, b round.Record) int { // map order must not matter
			x, y := a.ID(), b.ID()
			return slices.Compare(x[:], y[:])
		})
	}
	m, err := w.cfg.New(cfg)
	if err != nil {
		w.fail("starting peer %d: %v", p.id, err)
		return
	}
	p.machine = m
	p.height, p.head, p.final, p.writing = head.Height, head.ID(), round.Checkpoint{}, false
	clear(p.gated)
	w.trace("peer %d starts at height %d watermark %d", p.id, p.height, p.watermark)
	w.step(p, round.Start{})
	for _, s := range p.certificate {
		if w.keep(p, s) {
			w.deliver(p, round.Received{Message: s.msg, ID: s.id})
		}
	}
	w.relink(0, 100*time.Millisecond)
}

// wish is what a peer wishes when it has a gradient for a height.
func (w *world) wish(p *peer, height uint64) round.Stop {
	if w.cfg.Budget > 0 && height >= w.cfg.Budget+uint64(p.id)*2 {
		return round.StopMoney
	}
	return round.GoOn
}

// restart starts a crashed peer again, unless something else happens to it.
func (w *world) restart(p *peer, down time.Duration) {
	life := p.life
	w.after(down, func() {
		if p.life == life && !p.left {
			w.start(p)
		}
	})
}

// dies crashes p at a durable write, where that is due.
func (w *world) dies(p *peer) bool {
	if w.cfg.CrashWrites == 0 || w.rng.Float64() >= w.cfg.CrashWrites {
		return false
	}
	w.strike("crash at a write")
	w.crash(p)
	w.restart(p, w.between(50*time.Millisecond, time.Second))
	return true
}

func lessHash(a, b round.Hash) bool { return slices.Compare(a[:], b[:]) < 0 }

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
	n := w.cfg.Peers
	if n > mesh && w.result.Steps%n != 0 {
		return // it takes as long as there are peers
	}
	st := p.machine.Stats()
	if st.Records > 140*(n+2) || st.Bodies > 12*n+12 || st.Messages > 8*n || st.States > 12 || len(p.checkpoints) > 8 || len(p.states) > 12 || len(p.bodies) > 16*n+16 {
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
		if w.dies(p) {
			return
		}
		p.watermark, p.counter = a.Watermark, a.Counter
		w.dies(p)
	case round.WriteCheckpoint:
		if p.full {
			w.strike("checkpoint refused")
			return
		}
		w.after(w.between(time.Millisecond, 30*time.Millisecond), alive(func() {
			if w.dies(p) {
				return
			}
			p.checkpoints[a.ID], p.links[a.ID] = a.Record, a.Links
			if !w.dies(p) {
				w.deliver(p, round.Checkpointed{Record: a.ID})
			}
		}))
	case round.PersistVote:
		var votes []*stored
		for _, s := range p.messages {
			if slices.Contains(a.Certificate, s.id) {
				votes = append(votes, s)
			}
		}
		w.after(w.between(time.Millisecond, 10*time.Millisecond), alive(func() {
			if w.dies(p) {
				return
			}
			p.voted, p.certificate = a.Target, votes
			if !w.dies(p) {
				w.deliver(p, round.VotePersisted{Target: a.Target.ID()})
			}
		}))
	case round.Accuse:
		if !w.peers[a.Peer].liar {
			w.fail("P3: peer %d accuses the honest peer %d", p.id, a.Peer)
		}
		w.after(0, alive(func() { w.prove(p, a) }))
	case round.Gate:
		p.gated[int(a.Peer)] = true
		if !w.peers[a.Peer].liar {
			w.fail("P3: peer %d gates the honest peer %d", p.id, a.Peer)
		}
		w.relink(0, 0)
	case round.Final:
		w.checkFinal(p, a.Checkpoint)
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
		if failed {
			w.strike("failed gradient")
		}
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
				Validation: round.Validation{LossMicro: int64(1000 + p.id), Correct: uint32(p.id % 100), Count: 100}, Stop: w.wish(p, a.Height)})
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
		p.messages = slices.DeleteFunc(p.messages, func(s *stored) bool { return !s.msg.Type().Sticky() && s.msg.Slot < a.BelowSlot })
		w.keepSticky(p)
		for id := range p.checkpoints {
			if !slices.Contains(a.Checkpoints, id) {
				delete(p.checkpoints, id)
			}
		}
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
		case round.Conflict, round.InvalidMessage:
			if !w.peers[a.Peer].liar {
				w.fail("P3: peer %d: %s", p.id, a.Text)
			}
		case round.ModelDiffers:
			if len(w.cfg.Liars) == 0 {
				w.fail("P3: peer %d: %s", p.id, a.Text)
			}
		case round.FinalityBroken:
			w.fail("P1: peer %d: %s", p.id, a.Text)
		}
	case round.Finished:
		if a.Reason == round.Left || a.Reason == round.Expelled {
			if w.member[p.id] && !p.liar {
				w.fail("peer %d ends as %v, but it is a member", p.id, a.Reason)
			}
			p.left = true
			w.crash(p)
			return
		}
		p.finished = a.ID
		w.result.Finished[p.id], w.result.Ends[p.id] = a.ID, a.Record.Height
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
	if c := p.final; !p.liar && c.Height > 0 && !w.follows(a.Record, c) {
		w.fail("P10: peer %d goes to %s (height %d), which does not follow the checkpoint of height %d that it knew to be final", p.id, a.ID.Short(), p.height, c.Height)
	}
	w.mix(a.Record.Height)
	w.rounds(a.Record.Height)
	if w.adopted[p.height] == nil {
		w.adopted[p.height] = map[int]round.Hash{}
	}
	w.adopted[p.height][p.id] = a.ID
	if w.cfg.Rounds > 0 && p.id == 0 {
		w.result.Sets = append(w.result.Sets, a.Record.Set)
	}
	// With f others or fewer connected, their word alone is believed, until
	// more are: docs/protocol.md says why.
	others := 0
	for q, up := range p.view {
		if up && w.member[q] {
			others++
		}
	}
	// Who believed them signs what follows, and may take others along.
	if !p.liar && len(w.cfg.Liars) <= w.cfg.F && a.Record.Height > 0 && follows(w.records[a.Record.Parent], a.Record.Set) != stateOf(a.Record) {
		if others <= w.cfg.F || p.fooled {
			w.believed[a.ID] = true
		} else if !w.believed[a.ID] {
			w.fail("P2: peer %d adopts %s, whose model does not follow from its set", p.id, a.ID.Short())
		}
	}
	p.fooled = p.fooled && a.How != round.Fetched || others <= w.cfg.F && len(w.cfg.Liars) > 0
	if !w.healed || p.liar || p.height < w.goal || w.met > 0 {
		return
	}
	for _, q := range w.peers {
		if w.member[q.id] && (q.up || !q.gone) && !q.liar && w.adopted[p.height][q.id] != a.ID {
			return
		}
	}
	w.met = w.now - w.healedAt
}

func (w *world) send(p *peer, msg round.Message) {
	if p.liar {
		if r, ok := msg.Body.(round.SignedRecord); ok {
			w.records[r.Record.ID()] = r.Record // its branch is real, whatever it tells
		}
		w.lie(p, msg)
		return
	}
	s := w.seal(msg)
	id := s.id
	msg = s.msg
	key := saidKey{msg.From, msg.Type(), msg.Slot, msg.Parent}
	switch msg.Type() {
	case round.TypeVote:
		key.parent = round.Hash{} // one for a height
		if p.voted.ID() != msg.Parent {
			w.fail("P3: peer %d votes before the vote is on its disk", p.id)
		}
		if _, ok := p.checkpoints[msg.Parent]; !ok && msg.Slot >= p.final.Height {
			w.fail("P10: peer %d votes for a checkpoint that is not on its disk", p.id)
		}
	case round.TypeProof:
		key.parent = id // as many as there are guilty
	}
	if before, ok := w.said[key]; ok && before != id {
		w.fail("P3: peer %d signs a second %s for slot %d on %s", p.id, msg.Type(), msg.Slot, msg.Parent.Short())
	}
	w.said[key] = id
	if msg.Slot > p.watermark && !msg.Type().Sticky() {
		w.fail("P3: peer %d signs for slot %d, above its watermark %d on disk", p.id, msg.Slot, p.watermark)
	}
	switch b := msg.Body.(type) {
	case round.Vote:
		w.checkVote(p, b)
	case round.Ballot:
		for _, e := range b.Entries {
			if p.gated[int(e.Peer)] {
				w.fail("P8: peer %d ballots a gradient of %d, against whom it has a proof", p.id, e.Peer)
			}
			if !p.bodies[e.Gradient] {
				w.fail("P5: peer %d ballots a gradient of %d that it does not hold", p.id, e.Peer)
			}
			k := balloted{msg.Slot, msg.Parent, e}
			w.ballots[k] = append(w.ballots[k], msg.From)
		}
	case round.SignedRecord:
		w.checkRecord(p, msg, b)
	case round.Return:
		if !p.states[stateOf(b.Head)] {
			w.fail("P2: peer %d says that it is at a record whose state it does not hold", p.id)
		}
		if b.Counter > 0 {
			w.checkCounter(p, b.Counter, msg.Parent)
		}
	}
	w.mix(uint64(msg.Type()))
	w.mix(msg.Slot)
	w.keep(p, s)
	w.flood(p, s, nil)
}
