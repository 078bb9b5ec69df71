package round

// Progress says what a machine is at, for people: nothing depends on it.
type Progress struct {
	// Step is "compute", "gather", "ballot", "fetch", "apply", "record",
	// "pause" or "pursue"; "start" before the first slot and "observe" where
	// this peer does not take part or pauses; "end" at the last record.
	Step string
	// Slot is the one that it works at, Height that of the record it would make.
	Slot, Height uint64
}

// Progress returns what the machine is at.
func (m *Machine) Progress() Progress {
	step := "start"
	switch m.phase {
	case phaseObserve:
		step = "observe"
	case phaseGather:
		if step = "gather"; !m.announced {
			step = "compute"
		}
	case phaseBallot:
		step = "ballot"
	case phaseFetch:
		step = "fetch"
	case phaseApply:
		step = "apply"
	case phaseRecord:
		step = "record"
	case phasePause:
		step = "pause"
	case phasePursue:
		step = "pursue"
	case phaseFinal, phaseDone:
		step = "end"
	}
	return Progress{Step: step, Slot: m.slot, Height: m.head.rec.Height + 1}
}

// WaitingFor returns the members whose word, body or state the machine waits
// for at its step; this peer itself where its own gradient or update is not
// there yet. None where it waits for time to pass only.
func (m *Machine) WaitingFor() []Peer {
	var out []Peer
	missing := func(done func(p Peer, h *heard) bool) {
		for p, w := range m.wait {
			h := m.here(Peer(p))
			if w && m.present(Peer(p)) && (h == nil || !done(Peer(p), h)) && !m.passed(Peer(p)) {
				out = append(out, Peer(p))
			}
		}
	}
	switch m.phase {
	case phaseGather:
		if !m.announced {
			out = append(out, m.cfg.Self)
		}
		missing(m.announceDone)
	case phaseBallot:
		missing(ballotDone)
	case phaseFetch:
		for _, e := range m.set {
			if b := m.bodies[e.Gradient]; b == nil || b.status != bodyHeld {
				out = append(out, e.Peer)
			}
		}
	case phaseApply:
		out = append(out, m.cfg.Self)
	case phaseRecord:
		missing(recordDone)
	case phasePursue:
		out = m.holders(m.pursued)
	case phaseFinal:
		for p := range m.peers {
			if m.other(Peer(p)) && m.peers[p].connected && m.latest[p].node != m.head {
				out = append(out, Peer(p))
			}
		}
	}
	return out
}
