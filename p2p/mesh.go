package p2p

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"time"
)

// Up to Limits.Neighbours members are all connected to each other. Larger
// rosters are not: each peer keeps connections to those at the distances 1, 2,
// 4 ... on both sides of it in the roster, taken as a ring, and messages reach
// the others through them. Who is there it learns from ages that neighbours
// gossip: how long ago was each member heard by anyone?
const (
	onDemand     = 64              // connections to others, dialled for a body
	onDemandIdle = 40              // heartbeats without a fetch, and such a one is closed
	onDemandWait = 5 * time.Second // for one to come up

	ageSteps   = 4   // of an age, in a heartbeat interval
	ageUnknown = 255 // and what is older than 254 steps
)

// meshLocked decides who is a neighbour.
func (h *Host) meshLocked() {
	all := h.roster.members
	n := len(all)
	was := h.sparse
	h.sparse = n > h.cfg.Limits.Neighbours
	// The others get the roster a little sooner or later. Who knows a larger
	// one closes connections that are needed where it is not known.
	switch {
	case was && !h.sparse:
		h.lenient = h.now() + h.goneAfter()
	case h.sparse && !was:
		for _, m := range all {
			if m.session() != nil {
				m.demand = max(m.demand, h.now()+h.onDemandIdle())
			}
		}
	}
	for i, m := range all {
		m.near = !h.sparse
		if m == h.self {
			h.position = i
		}
	}
	for d := 1; h.sparse && d <= n/2; d *= 2 {
		all[(h.position+d)%n].near = true
		all[(h.position+n-d)%n].near = true
	}
	for _, m := range all {
		m.poke() // its dialler may have something to do
	}
}

// wantsLocked reports whether a connection to m is to be made.
func (h *Host) wantsLocked(m *member) bool {
	return !m.expelled && (m.near || h.now() < m.demand)
}

// goneAfter is the age at which a member that is no neighbour counts as gone:
// eight missed heartbeats, and the time that an age takes on its way here.
func (h *Host) goneAfter() time.Duration {
	return time.Duration(missedHeartbeats+2*bits.Len(uint(len(h.roster.members)))) * h.cfg.Heartbeat
}

func (h *Host) onDemandIdle() time.Duration { return onDemandIdle * h.cfg.Heartbeat }

// crowdedLocked reports whether there is no room for one more connection that a
// member which is no neighbour dialled.
func (h *Host) crowdedLocked(s *session) bool {
	if s.member.near || s.dialled {
		return false
	}
	others := 0
	for _, m := range h.roster.members {
		if !m.near && m != s.member && len(m.sessions) > 0 && !m.sessions[0].dialled {
			others++
		}
	}
	return others >= 2*h.cfg.Limits.Neighbours
}

// noticeLocked tells the application when a member came or went.
func (h *Host) noticeLocked(m *member, why string) {
	there := len(m.sessions) > 0
	if !there && (h.sparse || h.now() < h.lenient) && !m.expelled && h.roster.has(m) {
		there = m.heard > 0 && h.now()-m.heard < h.goneAfter()
	}
	if there == m.present {
		return
	}
	if m.present = there; there {
		h.events.put(Connected{Member: m.index})
	} else {
		h.events.put(Disconnected{Member: m.index, Reason: why})
	}
}

// watchLocked looks for members that have not been heard for too long, and for
// connections that are not needed any more.
func (h *Host) watchLocked() {
	if !h.sparse && h.lenient == 0 {
		return
	}
	now := h.now()
	if h.sparse {
		h.unmuteLocked()
	} else if now >= h.lenient {
		h.lenient = 0
	}
	for _, m := range h.roster.members {
		if m.present {
			h.noticeLocked(m, "nobody heard of it for "+(now-m.heard).Round(time.Millisecond).String())
		}
		s := m.session()
		if s == nil || m.near || !s.dialled {
			continue // the side that dialled it closes it
		}
		if len(s.conn.GetStreams()) > 1 || now-s.upAt < h.onDemandIdle() {
			m.demand = max(m.demand, now+h.onDemandIdle())
		} else if now >= m.demand {
			h.dropLocked(s, "it is not needed any more")
		}
	}
}

// agesLocked is what this peer gossips: a byte for each index. One step more
// than has passed, so that an age that goes round and round still grows.
func (h *Host) agesLocked() []byte {
	now := h.now()
	out := make([]byte, h.roster.highest+1)
	for i := range out {
		out[i] = ageUnknown
	}
	step := h.cfg.Heartbeat / ageSteps
	for _, m := range h.roster.members {
		if m == h.self {
			out[m.index] = 0
			continue
		}
		if s := m.session(); s != nil {
			m.heard = max(m.heard, time.Duration(s.heard.Load()))
		}
		if m.heard > 0 {
			out[m.index] = byte(min(ageUnknown, (now-m.heard)/step+1))
		}
	}
	return out
}

// ages takes in what a neighbour gossips.
func (h *Host) ages(ages []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.sparse {
		return // it has another roster still
	}
	now, step := h.now(), h.cfg.Heartbeat/ageSteps
	for _, m := range h.roster.members {
		if m == h.self || m.index >= len(ages) || ages[m.index] == ageUnknown {
			continue
		}
		if heard := now - time.Duration(ages[m.index])*step; heard > m.heard {
			m.heard = heard
			h.noticeLocked(m, "")
		}
	}
}

// sessionFor returns a connection to a member. To one that is no neighbour it
// is made now, within bounds.
func (h *Host) sessionFor(ctx context.Context, m *member) (*session, error) {
	late := time.NewTimer(onDemandWait)
	defer late.Stop()
	for {
		h.mu.Lock()
		if s := m.session(); s != nil {
			h.mu.Unlock()
			return s, nil
		}
		err := h.demandLocked(m)
		up := m.up
		h.mu.Unlock()
		if err != nil {
			return nil, err
		}
		select {
		case <-up:
		case <-late.C:
			return nil, fmt.Errorf("it is not connected, and did not become so within %v", onDemandWait)
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-h.stop:
			return nil, errClosed
		}
	}
}

func (h *Host) demandLocked(m *member) error {
	if m.near || m.expelled || len(m.addrs) == 0 || !h.roster.has(m) {
		return errors.New("it is not connected")
	}
	now, others := h.now(), 0
	for _, o := range h.roster.members {
		if o != m && !o.near && now < o.demand {
			others++
		}
	}
	if others >= onDemand {
		return fmt.Errorf("it is not connected, and %d others that are no neighbours are", others)
	}
	if now >= m.demand {
		m.fresh = true // no back-off from long ago
	}
	m.demand = now + h.onDemandIdle()
	m.poke()
	return nil
}

// Where not all are neighbours a message would come once from each neighbour.
// Those that bring little new are asked to offer (have) instead of passing on,
// until one offers what did not come from elsewhere.
const (
	relays      = 4   // neighbours that pass on, at least
	relayWindow = 128 // messages after which a neighbour is judged
	relayFresh  = 5   // one in so many must have been new
	lateParts   = 8   // of a heartbeat interval, after one of which the others offer
)

// passLocked sends a message of a third member on, or notes it for offerLate.
func (h *Host) passLocked(s *session, m *keptMessage) {
	if !s.mute {
		h.sendLocked(s, m, true)
	} else if len(s.late) < maxEntries { // else at a heartbeat
		s.late = append(s.late, m)
	}
}

// offerLate offers what mute sides have probably got from others by now.
func (h *Host) offerLate() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.sparse {
		return
	}
	age := h.cfg.Heartbeat / lateParts
	for _, s := range h.sessions {
		var list []byte
		young := 0
		for _, m := range s.late {
			switch {
			case h.now()-m.at < age:
				s.late[young] = m
				young++
			case s.known[m] == 0 && h.kept.byID[m.meta.ID] == m:
				s.known[m] = offered
				list = have{m.meta.ID, m.meta.From, m.meta.Slot, m.meta.Sticky}.append(list)
			}
		}
		clear(s.late[young:])
		if s.late = s.late[:young]; len(list) > 0 {
			h.enqueueLocked(s, outFrame{kind: frameHave, data: list})
		}
	}
}

// cameLocked counts what a neighbour passes on.
func (h *Host) cameLocked(s *session, m *keptMessage, fresh bool) {
	if !h.sparse || m.meta.From == s.member.index {
		return
	}
	if s.got++; fresh {
		s.fresh++
	}
	if s.got < relayWindow {
		return
	}
	if s.fresh*relayFresh < s.got && h.relaysLocked() > relays {
		h.muteLocked(s, true)
	}
	s.got, s.fresh = 0, 0
}

// relaysLocked is the number of neighbours that pass on what others sign.
func (h *Host) relaysLocked() (n int) {
	for _, m := range h.roster.members {
		if s := m.session(); s != nil && m.near && !s.muted {
			n++
		}
	}
	return n
}

func (h *Host) muteLocked(s *session, muted bool) {
	if s.muted == muted {
		return
	}
	s.muted, s.got, s.fresh = muted, 0, 0
	relay := []byte{1}
	if muted {
		relay[0] = 0
	}
	h.enqueueLocked(s, outFrame{kind: frameRelay, data: relay})
}

// unmuteLocked makes up for neighbours that passed on and are gone.
func (h *Host) unmuteLocked() {
	missing := relays - h.relaysLocked()
	for _, m := range h.roster.members {
		if s := m.session(); missing > 0 && s != nil && m.near && s.muted {
			h.muteLocked(s, false)
			missing--
		}
	}
}
