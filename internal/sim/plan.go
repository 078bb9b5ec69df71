package sim

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
)

// Fault is one thing that happens to the peers at a time. Peers count from 0.
type Fault struct {
	At   time.Duration
	Kind FaultKind
	Peer int           // whom it is about
	For  time.Duration // how long it lasts. A crash for no time is for good
	// Parts are the sides of a partition: all peers, each once.
	Parts [][]int
}

// FaultKind is the word for a fault in a scenario.
type FaultKind string

// The kinds of faults.
const (
	Start     FaultKind = "start"     // of one peer, later than the others
	Crash     FaultKind = "crash"     // and a restart from what is on disk
	FullDisk  FaultKind = "full-disk" // takes no checkpoint
	PowerCut  FaultKind = "power-cut" // of all peers at once; each is back within the time
	Partition FaultKind = "partition" // lost connections are noticed within two seconds
	Split     FaultKind = "split"     // a partition that is noticed within half a second
	Pause     FaultKind = "pause"     // as by SIGSTOP
	Join      FaultKind = "join"      // the roster
	Leave     FaultKind = "leave"     // the roster
)

// Draw is how many faults of each kind to draw, over the time of Chaos.
type Draw struct {
	Crashes    int   // with a restart from the last checkpoint
	Partitions int   // into two parts, healing
	Pauses     int   // of one peer
	PowerCuts  int   // of all peers at once, with restarts
	FullDisks  int   // a peer's disk takes no checkpoint for a while
	Late       []int // peers that start only after Timeouts.Start
	Dead       []int // peers that crash and never return
	// Joiners are no members at first: a roster adds each. Leavers are taken
	// off the roster.
	Joiners, Leavers []int
	// Split is a partition for three quarters of Chaos, with half of the honest
	// peers on each side.
	Split bool
}

// Explicit returns the same run with the faults that it would draw as a list.
func (c Config) Explicit() Config {
	d := c.Draw
	c.Draw = Draw{}
	if c.Faults != nil {
		return c
	}
	r := rand.New(rand.NewPCG(c.Seed, 0xfa))
	between := func(lo, hi time.Duration) time.Duration { return lo + time.Duration(r.Int64N(int64(hi-lo)+1)) }
	add := func(f Fault) {
		f.At, f.For = f.At.Round(time.Microsecond), f.For.Round(time.Microsecond)
		c.Faults = append(c.Faults, f)
	}
	start := c.Timeouts.Start
	if start == 0 {
		start = Timeouts().Start
	}
	chaos := c.Chaos
	for _, i := range d.Late {
		add(Fault{At: start + between(0, 300*time.Millisecond), Kind: Start, Peer: i})
	}
	for range d.Crashes {
		add(Fault{Peer: r.IntN(c.Peers), At: between(0, chaos), Kind: Crash, For: between(50*time.Millisecond, max(chaos/2, 100*time.Millisecond))})
	}
	for range d.FullDisks {
		add(Fault{Peer: r.IntN(c.Peers), At: between(0, chaos), Kind: FullDisk, For: between(time.Millisecond, max(chaos, time.Millisecond))})
	}
	for _, i := range d.Joiners {
		add(Fault{At: between(0, chaos), Kind: Join, Peer: i})
	}
	for _, i := range d.Leavers {
		add(Fault{At: between(0, chaos), Kind: Leave, Peer: i})
	}
	for _, i := range d.Dead {
		add(Fault{At: between(chaos/4, chaos), Kind: Crash, Peer: i})
	}
	for range d.PowerCuts {
		add(Fault{At: between(chaos/4, chaos), Kind: PowerCut, For: 500 * time.Millisecond})
	}
	for range d.Partitions {
		at, length := between(0, chaos), between(100*time.Millisecond, max(chaos/2, 200*time.Millisecond))
		var parts [2][]int
		for i := range c.Peers {
			side := r.IntN(2)
			parts[side] = append(parts[side], i)
		}
		if len(parts[0]) > 0 && len(parts[1]) > 0 {
			add(Fault{At: at, Kind: Partition, For: length, Parts: parts[:]})
		}
	}
	if d.Split && c.Peers > 1 {
		var parts [2][]int
		honest := 0
		for i, p := range r.Perm(c.Peers) {
			side := i % 2
			if !slices.Contains(c.Liars, p) {
				side = honest % 2
				honest++
			}
			parts[side] = append(parts[side], p)
		}
		slices.Sort(parts[0])
		slices.Sort(parts[1])
		if len(parts[1]) > 0 && len(parts[0]) > 0 {
			add(Fault{At: chaos / 8, Kind: Split, For: chaos * 3 / 4, Parts: parts[:]})
		}
	}
	for range d.Pauses {
		add(Fault{Peer: r.IntN(c.Peers), At: between(0, chaos), Kind: Pause, For: between(50*time.Millisecond, max(chaos/2, 100*time.Millisecond))})
	}
	slices.SortStableFunc(c.Faults, func(a, b Fault) int { return int(a.At - b.At) })
	return c
}

// Plan draws a run of so many peers from a seed. With Byzantine peers, a third
// of the seeds has honest peers only and every other fault; a third has liars,
// at most so many, of any kind; and in a third all of them sign and vote for
// everything on both sides of a long partition, against finality.
func Plan(seed uint64, peers, byzantine int) Config {
	if byzantine == 0 {
		return chaos(seed, peers)
	}
	switch seed % 3 {
	case 0:
		return chaos(seed, peers)
	case 1:
		return liars(seed, peers, byzantine)
	}
	return finality(seed, peers, byzantine)
}

// chaos draws a plan with every fault but lies.
func chaos(seed uint64, n int) Config {
	r := rand.New(rand.NewPCG(seed, 77))
	cfg := Config{
		Seed: seed, Peers: n, F: round.MaxFaulty(n), Chaos: 4 * time.Second,
		Loss: []float64{0, 0, .05, .3}[r.IntN(4)], Duplicate: []float64{0, .1}[r.IntN(2)],
		Delay:    []time.Duration{3, 10, 40}[r.IntN(3)] * time.Millisecond,
		Failures: []float64{0, 0, .1}[r.IntN(3)],
		Draw:     Draw{Crashes: r.IntN(4), Partitions: r.IntN(3), Pauses: r.IntN(3)},
	}
	if r.IntN(4) == 0 {
		cfg.Slow = []int{r.IntN(n)}
	}
	if r.IntN(6) == 0 {
		cfg.Late = []int{r.IntN(n)}
	}
	if r.IntN(6) == 0 {
		cfg.PowerCuts = 1
	}
	if n > 1 && r.IntN(4) == 0 {
		for i := range n - 1 {
			if r.IntN(2) == 0 {
				cfg.Dead = append(cfg.Dead, i)
			}
		}
	}
	cfg.CrashWrites = []float64{0, 0, .02}[r.IntN(3)]
	cfg.FullDisks = r.IntN(2)
	if n >= 3 && len(cfg.Dead) == 0 && r.IntN(3) == 0 {
		cfg.Joiners = []int{n - 1}
		if slices.Contains(cfg.Late, n-1) {
			cfg.Late = nil // it starts when it joins
		}
		if n >= 5 && r.IntN(2) == 0 {
			cfg.Leavers = []int{0}
		}
	}
	cfg.Signed = r.IntN(16) == 0
	return cfg
}

// liars draws a plan with at most f liars, and few other faults.
func liars(seed uint64, n, f int) Config {
	r := rand.New(rand.NewPCG(seed, 55))
	cfg := Config{Seed: seed, Peers: n, F: round.MaxFaulty(n), Liars: r.Perm(n)[:1+r.IntN(f)], Chaos: 3 * time.Second,
		Delay: 10 * time.Millisecond, Loss: []float64{0, .05}[r.IntN(2)]}
	slices.Sort(cfg.Liars)
	cfg.Lies = []Lies{AllLies, QuietLies, QuietLies, TwoFaced}[r.IntN(4)]
	cfg.Bridge = r.IntN(2) == 0
	cfg.Draw = Draw{Partitions: r.IntN(2), Crashes: r.IntN(2)}
	cfg.Signed = r.IntN(16) == 0
	return cfg
}

// finality draws a plan in which f liars sign and vote for everything on both
// sides of one long partition.
func finality(seed uint64, n, f int) Config {
	r := rand.New(rand.NewPCG(seed, 33))
	cfg := Config{Seed: seed, Peers: n, F: round.MaxFaulty(n), Chaos: 5 * time.Second, Bridge: true,
		Lies:            []Lies{TwoFaced, TwoFaced, VoteAll | Equivocate, QuietLies | VoteAll | SignAll}[r.IntN(4)],
		CheckpointEvery: []uint64{1, 2, 4, 8}[r.IntN(4)],
		Draw:            Draw{Split: true, Crashes: r.IntN(3), PowerCuts: r.IntN(2), FullDisks: r.IntN(2)},
		CrashWrites:     []float64{0, .03}[r.IntN(2)],
		Delay:           10 * time.Millisecond, Loss: []float64{0, .1}[r.IntN(2)], Signed: r.IntN(20) == 0}
	cfg.Liars = r.Perm(n)[:f]
	slices.Sort(cfg.Liars)
	return cfg
}
