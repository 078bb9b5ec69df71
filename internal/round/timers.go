package round

import (
	"fmt"
	"slices"
	"time"
)

// Timeouts, and durations to learn them from.

// startDeadline is when members that are not there yet are no longer waited
// for; zero if there are none.
func (m *Machine) startDeadline() time.Duration {
	if m.now < m.startEnd {
		for p := range m.peers {
			if m.peers[p].waiting && !m.peers[p].connected {
				return m.startEnd
			}
		}
	}
	return 0
}

func (m *Machine) timeout(kind ReportKind, what string) {
	m.timedOut = true
	missing := []byte{}
	for p, w := range m.wait {
		if w {
			h := m.here(Peer(p))
			var done bool
			switch kind {
			case TimeoutGradient:
				done = h != nil && m.announceDone(Peer(p), h)
			case TimeoutBallot:
				done = h != nil && h.balloted
			default:
				done = h != nil && h.record != nil
			}
			if !done {
				missing = fmt.Appendf(missing, " %s", Peer(p))
			}
		}
	}
	if kind == TimeoutGradient && !m.announced {
		missing = fmt.Appendf(missing, " %s (this peer)", m.cfg.Self)
	}
	m.report(kind, m.cfg.Self, Hash{}, fmt.Sprintf("waited %v for %s, missing:%s", m.now-m.began, what, missing))
}

// setTimer asks for a wake-up at the phase's deadline, or at the end of the
// start if somebody is waited for until then.
func (m *Machine) setTimer() {
	var at time.Duration
	switch m.phase {
	case phaseIdle, phaseObserve, phaseApply, phaseDone:
	default:
		at = m.deadline
		if s := m.startDeadline(); s > 0 {
			at = min(at, s)
		}
		if p := m.paceEnd(); p > m.now {
			at = min(at, p)
		}
	}
	if at != m.timer {
		m.timer = at
		m.emit(SetTimer{At: at})
	}
}

// durations is a ring of samples.
type durations struct {
	ring [samples]time.Duration
	n    int
}

func (d *durations) add(v time.Duration) {
	d.ring[d.n%samples] = v
	d.n++
}

// sorted returns the samples in ascending order.
func (d *durations) sorted(buf *[samples]time.Duration) []time.Duration {
	*buf = d.ring
	s := buf[:min(d.n, samples)]
	slices.Sort(s)
	return s
}

func (m *Machine) gradientTimeout() time.Duration {
	if m.arrivals.n < fewSamples {
		return m.limits.GradientMax
	}
	var buf [samples]time.Duration
	s := m.arrivals.sorted(&buf)
	t := max(s[(len(s)-1)*9/10]*3/2, 3*s[len(s)/2], m.limits.GradientMin)
	return min(t, m.limits.GradientMax)
}

// paceEnd is when this peer may go on from its announcement; zero if it may at
// once. With less than a quorum there is less to wait for: a peer that has lost
// the others for a moment would run ahead, and end the run before they are
// back. So it takes the time that slots took before.
func (m *Machine) paceEnd() time.Duration {
	if m.phase != phaseGather || m.quorate() {
		return 0
	}
	pace := m.limits.Pace
	if m.paces.n > 0 {
		var buf [samples]time.Duration
		s := m.paces.sorted(&buf)
		pace = min(s[len(s)/2], m.limits.GradientMin)
	}
	return m.began + pace
}

func (m *Machine) answerTimeout() time.Duration {
	if m.answers.n < fewSamples {
		return m.limits.BallotMax
	}
	var buf [samples]time.Duration
	s := m.answers.sorted(&buf)
	return min(max(4*s[(len(s)-1)*99/100], m.limits.BallotMin), m.limits.BallotMax)
}
