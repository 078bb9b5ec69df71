package spirt

import (
	"slices"
	"sync"
	"time"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
	"github.com/spirt-ml/spirt/function"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/p2p"
)

// meter counts what a peer uses of what has a price, since it first started.
// The events of a peer add up: a round's "spent" is the sum of the invocations
// told since its round before, and of the time and bytes in between. Its
// methods may be called from several goroutines.
type meter struct {
	emit     func(Event)
	prices   *bill.Table
	database bool // there is a machine for the database alone

	mu      sync.Mutex
	used    bill.Usage
	elapsed time.Duration // of training, up to since
	told    bill.Usage    // in rounds so far
	since   time.Time     // zero: training has not begun
	sent    int64         // of the bytes in used, by this process
	links   map[int]p2p.Traffic
}

// invoked is the label of an invocation.
type invoked struct {
	task      string
	round     uint64
	minibatch int
}

// invocation counts an attempt that has ended, and tells of it.
func (m *meter) invocation(i function.Invocation) {
	e := events.Invocation{
		Attempt: i.Attempt, Instance: i.Instance, Cold: i.Cold, QueueMS: milliseconds(i.Queue), InitMS: milliseconds(i.Init),
		MS: milliseconds(i.Duration), BilledMS: i.Billed.Milliseconds(), MemoryMB: i.MemoryMB, PeakMB: i.PeakMemoryMB, Error: i.Error,
	}
	if l, ok := i.Label.(invoked); ok {
		e.Task, e.Round, e.Minibatch = l.task, l.round, l.minibatch
	}
	m.mu.Lock() // also while it is told: before the round that it counts for
	defer m.mu.Unlock()
	m.used = m.used.Add(e.Usage())
	m.emit(Event{Event: "invocation", Invocation: &e})
}

func milliseconds(d time.Duration) float64 {
	return float64(d.Round(time.Microsecond)) / float64(time.Millisecond)
}

// restore takes in what was counted before a restart.
func (m *meter) restore(used bill.Usage, elapsed time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used, m.told, m.elapsed = m.used.Add(used), m.told.Add(used), elapsed
}

// begin counts time from now on.
func (m *meter) begin(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.since = now
}

// settle takes in the time and the bytes up to now.
func (m *meter) settle(now time.Time, sent int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count(now, sent)
}

// count takes in the time and the bytes up to now.
func (m *meter) count(now time.Time, sent int64) {
	if !m.since.IsZero() {
		d := now.Sub(m.since).Truncate(time.Millisecond) // the rest counts next time
		m.elapsed += d
		m.since = m.since.Add(d)
		m.used.PeerMillis += d.Milliseconds()
		if m.database {
			m.used.DBMillis += d.Milliseconds()
		}
	}
	m.used.BytesOut += max(0, sent-m.sent)
	m.sent = max(m.sent, sent)
}

// round tells of a round, with what it took.
func (m *meter) round(e Event, now time.Time, sent int64, links []p2p.Traffic) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count(now, sent)
	spent := m.used.Sub(m.told)
	m.told = m.used
	e.Spent = &events.Spent{Usage: spent, CostUSD: m.prices.Cost(spent).Total()}
	if m.links == nil {
		m.links = map[int]p2p.Traffic{}
	}
	for _, t := range links {
		before := m.links[t.Member]
		if t.In < before.In || t.Out < before.Out { // it has a new key, and is counted anew
			before = p2p.Traffic{}
		}
		if t.In > before.In || t.Out > before.Out {
			e.Traffic = append(e.Traffic, events.Traffic{Peer: t.Member + 1, In: int64(t.In - before.In), Out: int64(t.Out - before.Out)})
		}
		m.links[t.Member] = t
	}
	m.emit(e)
}

// totals returns what was used and how long training has gone on, and what
// that costs.
func (m *meter) totals() (used bill.Usage, elapsed time.Duration, cost bill.Money) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used, m.elapsed, m.prices.Cost(m.used).Total()
}

// stopwatch notes how long the steps of a round take.
type stopwatch struct {
	steps []events.Step
	step  string
	began time.Time // of the round
	since time.Time // of the step
}

// maxSteps bounds the steps of one round that are told apart.
const maxSteps = 24

// turn notes that a step begins, if it is another one.
func (s *stopwatch) turn(step string, now time.Time) (changed bool) {
	if step == s.step {
		return false
	}
	s.end(now)
	s.step, s.since = step, now
	return true
}

// end notes the present step up to now.
func (s *stopwatch) end(now time.Time) {
	if s.step == "" || !(now.After(s.since)) {
		return
	}
	took := events.Step{Step: s.step, At: milliseconds(s.since.Sub(s.began)), MS: milliseconds(now.Sub(s.since))}
	if len(s.steps) == maxSteps {
		s.steps[maxSteps-1].MS += took.MS
		return
	}
	s.steps = append(s.steps, took)
}

// lap ends the round and returns its steps.
func (s *stopwatch) lap(now time.Time) []events.Step {
	steps := s.steps
	s.steps, s.began, s.since = nil, now, now
	return steps
}

// claims are what the members said that the run has cost them.
type claims map[round.Peer]uint64

// maxClaim is how many times the median of all claims, by their shares of the
// minibatches, one claim counts at most.
const maxClaim = 4

// total returns what the run has cost all members of a roster, as well as it is
// known: what one says counts for at most maxClaim times the median, so that f
// liars of 3f+1 cannot make it up. Who has said nothing counts as the median.
func (c claims) total(members shares) bill.Money {
	var rates []float64 // nano-dollars a minibatch
	for _, s := range members {
		if claim, ok := c[round.Peer(s.member)]; ok {
			rates = append(rates, float64(claim)/float64(max(1, s.minibatches)))
		}
	}
	if len(rates) == 0 {
		return 0
	}
	slices.Sort(rates)
	middle := rates[(len(rates)-1)/2]
	sum := 0.0
	for _, s := range members {
		n := float64(max(1, s.minibatches))
		rate := middle
		if claim, ok := c[round.Peer(s.member)]; ok {
			rate = min(float64(claim)/n, maxClaim*middle)
		}
		sum += rate * n
	}
	return bill.Money(min(sum*1e3, float64(bill.MaxMoney/2)))
}
