// Package plan says what a job would cost and take on AWS Lambda, from a few
// measured rounds. Fold the events of these with Measurement.Add, then call
// Grid.Estimates.
//
// The model is simple, and docs/bill.md has its formulas and where they come from. A
// function has CPU in proportion to its memory, one vCPU at 1,769 MB, and uses
// one thread, so more than that is no gain. The same measurement and the same
// assumptions give the same plan on every machine. It knows nothing of
// throttling, of neighbours, or of instances that Lambda takes away in between.
package plan

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/spirt-ml/spirt/bill"
)

// What AWS documents of Lambda.
const (
	MBPerCPU  = 1769  // https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html
	MinMemory = 128   // likewise, MB
	MaxMemory = 10240 // likewise
	// MaxAtOnce is how many functions an account may run at once in a region
	// unless it asks for more, MaxSeconds what one invocation may take:
	// https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
	MaxAtOnce  = 1000
	MaxSeconds = 900
)

// Work is what a job does, wherever it runs.
type Work struct {
	Peers             int   `json:"peers"`
	Rounds            int   `json:"rounds"`
	Minibatches       int   `json:"minibatches"` // of a peer in a round
	Validations       int   `json:"validations"` // of a peer in the run
	Params            int64 `json:"params"`      // of the model, 4 bytes each
	SampleBytes       int64 `json:"sample_bytes"`
	BatchSize         int   `json:"batch_size"`
	ValidationSamples int   `json:"validation_samples"`
	AverageBytes      int64 `json:"average_bytes"` // a peer's average as it travels
}

// Assumptions are what a machine cannot measure of another. Every field has to
// be set; DefaultAssumptions has values to start from.
type Assumptions struct {
	CPUFactor     float64 `json:"cpu_factor"`     // speed of a Lambda vCPU, where a core of the measuring machine is 1
	Bandwidth     float64 `json:"bandwidth"`      // bytes a second of one function
	PeerBandwidth float64 `json:"peer_bandwidth"` // bytes a second of a peer's machine, for its functions together, and to other peers
	LatencyMS     float64 `json:"latency_ms"`     // there and back, function to database or peer to peer
	InvokeMS      float64 `json:"invoke_ms"`      // from the call to the handler of a warm function and back, not billed
	ColdMS        float64 `json:"cold_ms"`        // until a new instance starts the program, not billed
	Margin        float64 `json:"margin"`         // memory over the most that was measured
	AtOnce        int     `json:"at_once"`        // functions of the account
	Databases     bool    `json:"databases"`      // each database has a machine of its own
}

// DefaultAssumptions are for functions and peers in one region.
func DefaultAssumptions() Assumptions {
	return Assumptions{CPUFactor: 1, Bandwidth: 75e6, PeerBandwidth: 600e6, LatencyMS: 1, InvokeMS: 25, ColdMS: 250, Margin: 1.25, AtOnce: MaxAtOnce}
}

// Validate reports what no plan can be made with.
func (a *Assumptions) Validate() error {
	for _, v := range []struct {
		name     string
		v        float64
		min, max float64
	}{
		{"the CPU factor", a.CPUFactor, 0.01, 100},
		{"the bandwidth of a function", a.Bandwidth, 1e3, 1e12},
		{"the bandwidth of a peer", a.PeerBandwidth, 1e3, 1e12},
		{"the latency", a.LatencyMS, 0, 60e3},
		{"the time to invoke", a.InvokeMS, 0, 60e3},
		{"the time of a cold start", a.ColdMS, 0, 600e3},
		{"the margin of memory", a.Margin, 1, 100},
		{"the number of functions at once", float64(a.AtOnce), 1, 1e6},
	} {
		if !(v.v >= v.min && v.v <= v.max) {
			return fmt.Errorf("%s is %v: take %v to %v", v.name, v.v, v.min, v.max)
		}
	}
	return nil
}

// Grid is what to estimate.
type Grid struct {
	Work     Work
	Measured *Measured
	Assumed  Assumptions
	Prices   *bill.Table
	Memory   []int // MB; nil: usual sizes
	Parallel []int // functions of each peer at once; nil: 1, 2, 4, ...
}

// Estimate is one way to run the job.
type Estimate struct {
	MemoryMB     int        `json:"memory_mb"`
	Parallel     int        `json:"parallel"` // functions of each peer at once
	Seconds      float64    `json:"seconds"`
	RoundSeconds float64    `json:"round_seconds"`
	ComputeMS    float64    `json:"compute_ms"` // of a round, until its last gradient is there
	Usage        bill.Usage `json:"usage"`
	Cost         bill.Cost  `json:"cost"`
	TotalUSD     bill.Money `json:"total_usd"`
	Cheapest     bool       `json:"cheapest,omitempty"`
	Fastest      bool       `json:"fastest,omitempty"`
	Front        bool       `json:"front,omitempty"` // none of the others is both cheaper and faster
}

// memories are the sizes that are tried when none are named.
func memories() []int {
	return []int{128, 256, 512, 768, 1024, 1536, MBPerCPU, 2048, 3072, 4096, 6144, 8192, MaxMemory}
}

// Estimates returns one estimate for each size and number that is possible,
// ascending, and why others are not.
func (g *Grid) Estimates() (out []Estimate, left []string, err error) {
	if err := g.Assumed.Validate(); err != nil {
		return nil, nil, err
	}
	w := &g.Work
	if w.Peers < 1 || w.Rounds < 1 || w.Minibatches < 1 || w.Params < 1 || w.SampleBytes < 1 || w.BatchSize < 1 || w.AverageBytes < 1 || w.Validations < 0 || w.ValidationSamples < 0 {
		return nil, nil, fmt.Errorf("nothing to plan: %+v", *w)
	}
	if err := g.Measured.check(); err != nil {
		return nil, nil, err
	}
	sizes, atOnce := slices.Clone(g.Memory), slices.Clone(g.Parallel)
	if sizes == nil {
		sizes = memories()
	}
	// Validations run beside the gradients, on an instance more.
	beside := min(1, w.Validations)
	most := min(w.Minibatches, g.Assumed.AtOnce/w.Peers-beside)
	if most < 1 {
		return nil, nil, fmt.Errorf("%d peers need %d functions at once, and an account may run %d: take fewer peers, or ask AWS for more and set it here", w.Peers, w.Peers*(1+beside), g.Assumed.AtOnce)
	}
	if atOnce == nil {
		for k := 1; k < most; k *= 2 {
			atOnce = append(atOnce, k)
		}
		atOnce = append(atOnce, most)
	}
	slices.Sort(sizes)
	slices.Sort(atOnce)
	least := max(MinMemory, int(math.Ceil(g.Assumed.Margin*float64(g.Measured.PeakMB))))
	for _, memory := range slices.Compact(sizes) {
		if memory < least || memory > MaxMemory {
			left = append(left, fmt.Sprintf("%d MB: functions take %d MB, so %d to %d MB will do", memory, g.Measured.PeakMB, least, MaxMemory))
			continue
		}
		if s := g.longest(memory); s > MaxSeconds {
			left = append(left, fmt.Sprintf("%d MB: an invocation takes %.0f s, and may take %d", memory, s, MaxSeconds))
			continue
		}
		for _, k := range slices.Compact(atOnce) {
			if k < 1 || k > most {
				if memory == sizes[len(sizes)-1] {
					left = append(left, fmt.Sprintf("%d at once: 1 to %d are of use, with %d minibatches a round and %d functions at once for %d peers", k, most, w.Minibatches, g.Assumed.AtOnce, w.Peers))
				}
				continue
			}
			out = append(out, g.estimate(memory, k))
		}
	}
	if len(out) == 0 {
		return nil, left, fmt.Errorf("no way to run this job is left: %s", left[0])
	}
	mark(out)
	return out, left, nil
}

// slowdown is how much longer a function computes with so much memory than it
// was measured.
func (g *Grid) slowdown(memory int) float64 {
	return 1 / (g.Assumed.CPUFactor * min(1, float64(memory)/MBPerCPU))
}

// transfer returns the milliseconds that a function needs for bytes, when so
// many run at once for a peer.
func (g *Grid) transfer(bytes int64, atOnce int) float64 {
	return 1e3 * float64(bytes) / min(g.Assumed.Bandwidth, g.Assumed.PeerBandwidth/float64(atOnce))
}

// gradientBytes is what every invocation reads and writes; an instance reads
// parameters once a round besides.
func (w *Work) gradientBytes() int64 { return int64(w.BatchSize)*w.SampleBytes + 4*w.Params }

// longest returns the seconds of the longest invocation.
func (g *Grid) longest(memory int) float64 {
	slow := g.slowdown(memory)
	read := g.transfer(4*g.Work.Params, 1) + 2*g.Assumed.LatencyMS
	gradient := g.Measured.Gradient.at(1)*slow + g.transfer(g.Work.gradientBytes(), 1) + read
	evaluate := g.Measured.Evaluate.at(1)*slow + g.transfer(int64(g.Work.ValidationSamples)*g.Work.SampleBytes, 1) + read
	return max(gradient, evaluate) / 1e3
}

func (g *Grid) estimate(memory, k int) Estimate {
	w, a, m := &g.Work, &g.Assumed, g.Measured
	slow := g.slowdown(memory)
	peers, rounds := float64(w.Peers), float64(w.Rounds)
	attempts := 1 / (1 - m.failureRate()) // of each minibatch, on average

	// One invocation: read samples, compute, write the gradient.
	moves := g.transfer(w.gradientBytes(), k) + 2*a.LatencyMS
	params := g.transfer(4*w.Params, k) + a.LatencyMS // the first of a round at an instance
	mean := m.Gradient.Mean * slow
	// A wave waits for the slowest of the functions at once, of all peers; the
	// expected largest of n is about the quantile n/(n+1).
	n := float64(min(k, w.Minibatches) * w.Peers)
	straggle := max(0, m.Gradient.at(n/(n+1))*slow-mean)
	waves := math.Ceil(float64(w.Minibatches) / float64(k))
	compute := waves*attempts*(mean+moves+a.InvokeMS+m.OverheadMS) + params + straggle

	// Averages to the other peers, and agreeing on them: announce, ballot,
	// fetch and record.
	sent := g.sent()
	exchange := m.ProtocolMS + m.ApplyMS
	if w.Peers > 1 {
		exchange += 1e3*sent/a.PeerBandwidth + 4*a.LatencyMS
	}
	start := a.ColdMS + m.Init.Mean*slow
	total := rounds*(compute+exchange) + start

	// What is billed, each invocation rounded up to the millisecond.
	billed := rounds * peers * attempts * (float64(k)*m.Gradient.billed(slow, moves+params) + float64(w.Minibatches-k)*m.Gradient.billed(slow, moves))
	calls := rounds * peers * attempts * float64(w.Minibatches)
	cold := peers * float64(k)
	if w.Validations > 0 {
		v := peers * attempts * float64(w.Validations)
		calls += v
		billed += v * m.Evaluate.billed(slow, g.transfer(int64(w.ValidationSamples)*w.SampleBytes+4*w.Params, k+1)+2*a.LatencyMS)
		cold += peers
	}
	billed += cold * m.Init.billed(slow, 0)

	whole := func(f float64) int64 { return int64(min(math.Round(f), 1<<60)) }
	u := bill.Usage{
		Invocations: whole(calls), MBMillis: whole(math.Round(billed) * float64(memory)),
		PeerMillis: whole(peers * total), BytesOut: whole(rounds * peers * sent),
	}
	if a.Databases {
		u.DBMillis = u.PeerMillis
	}
	c := g.Prices.Cost(u)
	return Estimate{
		MemoryMB: memory, Parallel: k, Seconds: total / 1e3, RoundSeconds: (compute + exchange) / 1e3, ComputeMS: compute,
		Usage: u, Cost: c, TotalUSD: c.Total(),
	}
}

// sent returns the bytes that a peer sends to others in a round: as many to each
// as was measured, or else its average.
func (g *Grid) sent() float64 {
	each := g.Measured.BytesEach
	if each == 0 {
		each = float64(g.Work.AverageBytes)
	}
	return each * float64(g.Work.Peers-1)
}

// mark finds the cheapest, the fastest, and those that no other beats in both.
func mark(all []Estimate) {
	order := make([]*Estimate, len(all))
	for i := range all {
		order[i] = &all[i]
	}
	slices.SortStableFunc(order, func(x, y *Estimate) int {
		return cmp.Or(cmp.Compare(x.Seconds, y.Seconds), cmp.Compare(x.TotalUSD, y.TotalUSD))
	})
	order[0].Fastest = true
	best := bill.Money(math.MaxInt64)
	var cheapest *Estimate
	for _, e := range order {
		if e.TotalUSD < best {
			best, cheapest, e.Front = e.TotalUSD, e, true
		}
	}
	cheapest.Cheapest = true
}
