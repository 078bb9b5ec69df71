package spirt

import (
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/spirt-ml/spirt/events"
)

// patrolEvery is how often a peer looks whether it hangs.
const patrolEvery = time.Second

// A step hangs when it takes longer than hangLeast, and than hangFactor times
// the median round. It is told again each time that has doubled.
const (
	hangLeast  = 5 * time.Second
	hangFactor = 8
	clockSlack = 2 * time.Second // between two looks at the clocks
	lapsKept   = 64
)

// patrol notices what a peer should tell of by itself: that it hangs and for
// whom it waits, that the wall clock jumped, and that this machine stood still.
type patrol struct {
	since time.Time // of the present step
	told  time.Duration
	laps  []time.Duration // of the last rounds
	at    time.Time       // of the last look, with both clocks
	gone  []time.Time     // when members were lost of late
}

// atOnce is how far apart losses of members are that have one cause.
const atOnce = 15 * time.Second

// lost notes the loss of a member and reports whether several were lost at
// once and none is left: then it is rather this peer that is cut off.
func (w *patrol) lost(now time.Time, left int) bool {
	w.gone = slices.DeleteFunc(append(w.gone, now), func(at time.Time) bool { return now.Sub(at) > atOnce })
	if left > 0 || len(w.gone) < 2 {
		return false
	}
	w.gone = nil
	return true
}

// networkState says what this machine's interfaces say of its network.
func networkState() string {
	all, err := net.Interfaces()
	if err != nil {
		return "its network is the likely cause"
	}
	for _, i := range all {
		addrs, err := i.Addrs()
		if i.Flags&net.FlagUp != 0 && i.Flags&net.FlagLoopback == 0 && err == nil && len(addrs) > 0 {
			return "its network is the likely cause, though " + i.Name + " is up: look at the cable, the Wi-Fi or the router"
		}
	}
	return "this machine has no network interface that is up"
}

func (w *patrol) reset(now time.Time) { w.since, w.told = now, 0 }

func (w *patrol) round(took time.Duration) {
	if len(w.laps) >= lapsKept {
		w.laps = slices.Delete(w.laps, 0, 1)
	}
	w.laps = append(w.laps, took)
}

// hangs reports whether the present step has gone on for so long that it is to
// be told.
func (w *patrol) hangs(now time.Time) bool {
	limit := hangLeast
	if n := len(w.laps); n > 0 {
		sorted := slices.Sorted(slices.Values(w.laps))
		limit = max(limit, hangFactor*sorted[n/2])
	}
	d := now.Sub(w.since)
	if w.since.IsZero() || d < max(limit, 2*w.told) {
		return false
	}
	w.told = d
	return true
}

// clocks returns how far the wall clock went beside the monotonic one since the
// last look, if that is worth telling.
func (w *patrol) clocks(now time.Time) (jump time.Duration, ok bool) {
	before := w.at
	w.at = now
	if before.IsZero() {
		return 0, false
	}
	jump = now.Round(0).Sub(before.Round(0)) - now.Sub(before)
	return jump, jump.Abs() >= clockSlack
}

// patrol tells what is out of the ordinary now.
func (p *peer) patrol(now time.Time) {
	l := &p.loop
	if jump, ok := l.slow.clocks(now); ok {
		p.warnWith(Event{Cause: events.CauseClock, Seconds: jump.Seconds()}, "the clock of this machine was set by %v: rounds do not depend on it, but logs and invites do", jump.Round(time.Millisecond))
	}
	if !l.slow.hangs(now) {
		return
	}
	at := l.machine.Progress()
	e := Event{Event: "waiting", Step: at.Step, Slot: at.Slot, Round: at.Height, Seconds: now.Sub(l.slow.since).Seconds()}
	for _, m := range l.machine.WaitingFor() {
		e.Members = append(e.Members, int(m)+1)
	}
	needs := 0
	if others := len(p.memberKeys()) - 1; p.host.Stats().Connected == 0 && e.Step != "end" {
		needs = min(p.faultyAt(l.head)+1, others)
	}
	e.Message = waitingText(e, p.n, needs)
	p.log.Warn("waiting", "step", e.Step, "round", e.Round, "for", e.Members, "seconds", e.Seconds)
	p.emit(e)
}

// waitingText says for people what a peer waits for, and if no other peer is
// connected how many it needs.
func waitingText(e Event, self, needs int) string {
	what := map[string]string{
		"start": "for training to begin", "observe": "for a quorum, or to be a member", "compute": "for its own gradient",
		"gather": "for the averages", "ballot": "for the ballots", "fetch": "for averages that the record needs", "apply": "for its database to aggregate and update",
		"record": "for the records", "pause": "before it tries again", "pursue": "for the state of the others' head", "end": "for those that have not finished",
	}[e.Step]
	text := fmt.Sprintf("round %d: waits %s", e.Round, what)
	of := slices.DeleteFunc(slices.Clone(e.Members), func(m int) bool { return m == self })
	if len(of) > 0 {
		text += " of peers"
		for i, m := range of {
			if i > 0 {
				text += ","
			}
			text += fmt.Sprintf(" %d", m)
		}
	}
	text += fmt.Sprintf(", since %.0f s", e.Seconds)
	if needs > 0 {
		text += fmt.Sprintf("; no other peer is connected, and who has missed rounds believes no fewer than %d", needs)
	}
	return text
}
