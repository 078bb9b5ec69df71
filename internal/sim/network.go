package sim

import (
	"time"

	"github.com/spirt-ml/spirt/internal/round"
)

// The network between the peers.

// linked reports whether bytes can go from p to q.
func (w *world) linked(p, q *peer) bool {
	if p == q || !p.up || !q.up || p.paused || q.paused || p.gated[q.id] || q.gated[p.id] {
		return false
	}
	return w.group[p.id] == w.group[q.id] || w.cfg.Bridge && (p.liar || q.liar)
}

// mesh is up to how many peers all are neighbours, as in package p2p.
const mesh = 24

// connect makes the neighbours: all, or on a larger roster those at the
// distances 1, 2, 4 ... on a ring, both ways.
func (w *world) connect() {
	n := len(w.peers)
	for _, p := range w.peers {
		if n <= mesh {
			p.neighbours = w.peers
			continue
		}
		for d := 1; d <= n/2; d *= 2 {
			for _, i := range []int{(p.id + d) % n, (p.id + n - d) % n} {
				if !p.near.has(i) {
					p.near.add(i)
					p.neighbours = append(p.neighbours, w.peers[i])
				}
			}
		}
	}
}

// reaches reports whether what p says comes to q, over others where they are no
// neighbours.
func (w *world) reaches(p, q *peer) bool {
	if len(w.peers) <= mesh {
		return w.linked(p, q)
	}
	return p != q && p.up && q.up && !p.gated[q.id] && !q.gated[p.id] && w.part[p.id] == w.part[q.id]
}

// explore works out who reaches whom over neighbours.
func (w *world) explore() {
	w.part = make([]int, len(w.peers))
	var next []*peer
	for i, p := range w.peers {
		if w.part[i] != 0 {
			continue
		}
		w.part[i] = i + 1
		for next = append(next, p); len(next) > 0; {
			p := next[len(next)-1]
			next = next[:len(next)-1]
			for _, q := range p.neighbours {
				if w.part[q.id] == 0 && w.linked(p, q) {
					w.part[q.id] = i + 1
					next = append(next, q)
				}
			}
		}
	}
}

// relink has each machine told of lost connections within down, of new ones
// within up.
func (w *world) relink(down, up time.Duration) {
	if len(w.peers) > mesh {
		w.explore()
		for _, p := range w.peers {
			if p.up && !p.surveys {
				p.surveys = true
				life := p.life
				w.after(w.between(max(down, up)/2, max(down, up)), func() { w.survey(p, life) })
			}
		}
		return
	}
	for _, p := range w.peers {
		for _, q := range w.peers {
			if !p.up || p == q || p.view[q.id] == w.linked(p, q) {
				continue
			}
			d := w.between(0, up)
			if p.view[q.id] {
				d = w.between(down/2, down)
			}
			life := p.life
			w.after(d, func() { w.look(p, q, life) })
		}
	}
}

// survey has p look at all others.
func (w *world) survey(p *peer, life int) {
	if p.life != life {
		return
	}
	p.surveys = false
	for _, q := range w.peers {
		w.look(p, q, life)
	}
}

func (w *world) look(p, q *peer, life int) {
	if p.life != life || !p.up || p.view[q.id] == w.reaches(p, q) {
		return
	}
	p.view[q.id] = !p.view[q.id]
	if !p.view[q.id] {
		w.deliver(p, round.Disconnected{Peer: round.Peer(q.id)})
		return
	}
	w.deliver(p, round.Connected{Peer: round.Peer(q.id)})
	if w.adjoin(p, q) { // whoever knows of the connection first has nobody yet to send to
		w.sync(q, p)
		w.sync(p, q)
	}
}

// adjoin reports whether p and q are neighbours.
func (w *world) adjoin(p, q *peer) bool { return len(w.peers) <= mesh || p.near.has(q.id) }

// keep stores a message in p's network layer; false if it was there.
func (w *world) keep(p *peer, s *stored) bool {
	if p.known.has(s.number) {
		return false
	}
	p.known.add(s.number)
	p.messages = append(p.messages, s)
	return true
}

// flood sends a message on to all but whom it came from; nil: it is p's own.
func (w *world) flood(p *peer, s *stored, from *peer) {
	for _, q := range p.neighbours {
		if q == from {
			continue
		}
		w.transmit(p, q, s)
		if w.cfg.Duplicate > 0 && w.rng.Float64() < w.cfg.Duplicate {
			w.strike("repeated message")
			w.transmit(p, q, s)
		}
	}
}

func (w *world) transmit(p, q *peer, s *stored) {
	if !w.linked(p, q) || !p.view[q.id] || !w.adjoin(p, q) {
		return
	}
	w.result.Messages++
	w.result.Bytes += uint64(s.bytes)
	if w.cfg.Loss > 0 && w.rng.Float64() < w.cfg.Loss {
		w.strike("lost message")
		return
	}
	if q.known.has(s.number) && w.cfg.Duplicate == 0 && !w.peers[s.msg.From].liar {
		return // nothing would come of it
	}
	life := q.life
	w.after(w.between(time.Millisecond, w.cfg.Delay), func() {
		if q.life != life || !w.linked(p, q) && !q.paused {
			return
		}
		w.note(q, s)
		if w.keep(q, s) {
			w.copycat(q, p, s)
			w.flood(q, s, p)
		} else if w.cfg.Duplicate == 0 {
			return
		}
		w.deliver(q, round.Received{Message: s.msg, ID: s.id})
	})
}

// sync sends what p has and q lacks.
func (w *world) sync(p, q *peer) {
	if !w.linked(p, q) {
		return
	}
	for _, s := range p.messages {
		if !q.known.has(s.number) {
			w.transmit(p, q, s)
		}
	}
}

// gossip is the network's anti-entropy.
func (w *world) gossip() {
	w.after(200*time.Millisecond, func() {
		for _, p := range w.peers {
			w.sync(p, p.neighbours[w.rng.IntN(len(p.neighbours))])
		}
		w.gossip()
	})
}

func (w *world) fetchBody(p *peer, a round.Fetch, tries int) {
	life := p.life
	w.after(w.between(2*time.Millisecond, 3*w.cfg.Delay), func() {
		if p.life != life {
			return
		}
		if p.bodies[a.Gradient] {
			w.deliver(p, round.BodyReady{Peer: a.Peer, Gradient: a.Gradient})
			return
		}
		for _, h := range a.Holders {
			if q := w.peers[h]; w.linked(p, q) && q.bodies[a.Gradient] {
				if q.liar && w.cfg.Lies&Withhold != 0 && w.rng.IntN(3) == 0 {
					w.lied(Withhold)
					continue
				}
				w.deliver(p, round.BodyReady{Peer: a.Peer, Gradient: a.Gradient})
				return
			}
		}
		if tries > 0 {
			w.fetchBody(p, a, tries-1)
			return
		}
		w.deliver(p, round.BodyUnavailable{Peer: a.Peer, Gradient: a.Gradient})
	})
}

func (w *world) fetchState(p *peer, a round.FetchState, job, tries int) {
	life := p.life
	w.after(w.between(5*time.Millisecond, 50*time.Millisecond), func() {
		if p.life != life || p.fetch != job {
			return
		}
		s := stateOf(a.Record)
		found := a.Record.Height == 0
		for _, h := range a.Holders {
			q := w.peers[h]
			found = found || w.linked(p, q) && (q.states[s] || q.liar)
		}
		switch {
		case found:
			w.deliver(p, round.StateReady{Record: a.ID})
		case tries > 0:
			w.fetchState(p, a, job, tries-1)
		default:
			w.deliver(p, round.StateUnavailable{Record: a.ID})
		}
	})
}
