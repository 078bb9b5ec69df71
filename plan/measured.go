package plan

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/spirt-ml/spirt/events"
)

// maxTimes bounds the durations of a Times that are kept; of more every second,
// then every fourth and so on.
const maxTimes = 4096

// maxMS is more than any invocation takes.
const maxMS = 24 * 3600 * 1000

// Times is a distribution of durations in milliseconds.
type Times struct {
	Count int     `json:"count"`
	Mean  float64 `json:"mean"` // of those kept
	P50   float64 `json:"p50"`
	P95   float64 `json:"p95"`
	Max   float64 `json:"max"`

	ms     []float64 // kept; ascending once done
	stride int
}

func (t *Times) add(ms float64) {
	if !(ms >= 0 && ms <= maxMS) {
		return
	}
	t.stride = max(t.stride, 1)
	if t.Count%t.stride == 0 {
		if len(t.ms) == maxTimes {
			for i := range maxTimes / 2 {
				t.ms[i] = t.ms[2*i]
			}
			t.ms, t.stride = t.ms[:maxTimes/2], 2*t.stride
		}
		t.ms = append(t.ms, ms)
	}
	t.Count++
}

// done sorts what was added and sums it up.
func (t *Times) done() {
	if len(t.ms) == 0 {
		return
	}
	slices.Sort(t.ms)
	sum := 0.0
	for _, ms := range t.ms {
		sum += ms
	}
	t.Mean, t.P50, t.P95, t.Max = sum/float64(len(t.ms)), t.at(0.5), t.at(0.95), t.at(1)
}

// at returns a quantile, linear between the values there are; 0 if there are
// none.
func (t *Times) at(q float64) float64 {
	n := len(t.ms)
	if n == 0 {
		return 0
	}
	at := q * float64(n-1)
	i := min(int(at), n-1)
	v := t.ms[i]
	if i+1 < n {
		v += (at - float64(i)) * (t.ms[i+1] - v)
	}
	return v
}

// billed returns the mean of what is billed when each takes so many times as
// long and a time more.
func (t *Times) billed(slow, more float64) float64 {
	if len(t.ms) == 0 {
		return 0
	}
	sum := 0.0
	for _, ms := range t.ms {
		sum += math.Ceil(roundOff(ms*slow + more))
	}
	return sum / float64(len(t.ms))
}

// roundOff takes a picosecond for an error of arithmetic: 8.000000000001 ms is
// billed as 8.
func roundOff(ms float64) float64 { return math.Round(ms*1e9) / 1e9 }

// Measurement folds the events of a few rounds.
type Measurement struct {
	warm, cold, evalWarm, evalCold, init Times

	attempts, failed int
	memory, peak     int
	rounds           int
	compute          float64 // milliseconds of that step, of all rounds
	computed         int     // rounds that had it
	protocol, apply  float64
	bytes            float64
	pairs            int // peer and other peer, of all rounds
}

// Add takes the next event.
func (m *Measurement) Add(e *events.Event) {
	switch {
	case e.Event == "invocation" && e.Invocation != nil:
		i := e.Invocation
		m.attempts++
		if i.PeakMB > 0 && i.PeakMB <= 1<<20 {
			m.peak = max(m.peak, i.PeakMB)
		}
		if i.MemoryMB > 0 && i.MemoryMB <= 1<<20 {
			m.memory = i.MemoryMB
		}
		if i.Cold && i.InitMS > 0 {
			m.init.add(i.InitMS)
		}
		switch {
		case i.Error != "":
			m.failed++
		case i.Task == "evaluate" && i.Cold:
			m.evalCold.add(i.MS)
		case i.Task == "evaluate":
			m.evalWarm.add(i.MS)
		case i.Cold:
			m.cold.add(i.MS)
		default:
			m.warm.add(i.MS)
		}
	case e.Event == "round":
		m.rounds++
		for _, s := range e.Steps[:min(len(e.Steps), 2*len(events.Steps))] {
			if !(s.MS >= 0 && s.MS <= maxMS) {
				continue
			}
			switch s.Step {
			case "compute":
				m.compute += s.MS
				m.computed++
			case "ballot", "record":
				m.protocol += s.MS
			case "apply":
				m.apply += s.MS
			}
		}
		for _, t := range e.Traffic[:min(len(e.Traffic), 256)] {
			if t.Out > 0 && t.Out < 1<<50 {
				m.bytes += float64(t.Out)
				m.pairs++
			}
		}
	}
}

// Measured is what was measured.
type Measured struct {
	MemoryMB   int     `json:"memory_mb"` // of the functions
	PeakMB     int     `json:"peak_mb"`   // the most that one took; 0: not known
	Rounds     int     `json:"rounds"`    // of all peers
	Gradient   Times   `json:"gradient_ms"`
	Evaluate   Times   `json:"evaluate_ms"`
	Init       Times   `json:"init_ms"`
	Attempts   int     `json:"attempts"`
	Failed     int     `json:"failed"`
	OverheadMS float64 `json:"overhead_ms"` // of the peer for each invocation
	ProtocolMS float64 `json:"protocol_ms"` // of a round: ballot and record
	ApplyMS    float64 `json:"apply_ms"`    // of a round: aggregate and update
	BytesEach  float64 `json:"bytes_each"`  // of a round, to each other peer; 0: not measured
}

// Measured sums up, of a job with so many minibatches a round and functions at
// once.
func (m *Measurement) Measured(minibatches, atOnce int) *Measured {
	out := &Measured{MemoryMB: m.memory, PeakMB: m.peak, Rounds: m.rounds, Attempts: m.attempts, Failed: m.failed, Gradient: m.warm, Evaluate: m.evalWarm, Init: m.init}
	if out.Gradient.Count == 0 {
		out.Gradient = m.cold
	}
	if out.Evaluate.Count == 0 {
		out.Evaluate = m.evalCold
	}
	for _, t := range []*Times{&out.Gradient, &out.Evaluate, &out.Init} {
		t.ms = slices.Clone(t.ms)
		t.done()
	}
	if m.rounds > 0 {
		out.ProtocolMS, out.ApplyMS = m.protocol/float64(m.rounds), m.apply/float64(m.rounds)
	}
	if m.computed > 0 && minibatches > 0 {
		waves := math.Ceil(float64(minibatches) / float64(max(atOnce, 1)))
		// Starting instances is not part of it.
		first := m.init.sum() / float64(m.computed) / float64(max(atOnce, 1))
		out.OverheadMS = max(0, (m.compute/float64(m.computed)-first)/waves-out.Gradient.Mean)
	}
	if m.pairs > 0 {
		out.BytesEach = m.bytes / float64(m.pairs)
	}
	return out
}

func (t *Times) sum() float64 {
	sum := 0.0
	for _, ms := range t.ms {
		sum += ms
	}
	return sum * float64(max(t.stride, 1))
}

func (m *Measured) failureRate() float64 {
	if m.Attempts == 0 {
		return 0
	}
	return float64(m.Failed) / float64(m.Attempts)
}

// check reports what no plan can be made from.
func (m *Measured) check() error {
	if m.Gradient.Count == 0 {
		return errors.New("no invocation that computed a gradient was measured: the run has to have functions and a few rounds")
	}
	if f := m.failureRate(); f > 0.5 {
		return fmt.Errorf("%d of %d attempts failed: see what is wrong before you plan with them", m.Failed, m.Attempts)
	}
	return nil
}
