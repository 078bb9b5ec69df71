// Package sim runs many peers' round machines in one thread on a virtual
// clock, with a network and hosts that fail as a seed says, and checks at every
// step what must always hold.
//
// Call Run. The same Config gives the same run, step for step; a failing one
// is run again with a Trace to read what happened. The machines are the real
// ones; the hosts are models: a gradient, a model and a state are hashes of
// what they follow from.
//
// What is checked all the time, by the numbers of the design: P1 no two final
// checkpoints conflict; P2 a record's
// model follows from its parent's and its set; P3 no peer signs two different
// messages of one type for one slot and parent, or one counter twice, or
// anything that its disk would not remember after a restart; P4 every entry of
// a record was announced for its slot and parent; P5 every ballot's bodies are
// held, and every entry was balloted by another than its announcer; P7 nothing
// becomes final without the votes of a quorum; P10 no head leaves what its peer
// knew to be final; P11 the machines' memory is bounded. At the end: P6, P9 and
// P14, after all faults have healed the heads of all members, those that joined
// too, meet and go on within Settle; P8 who is proven guilty at one honest peer
// is so at all; P10 the heads follow everything that ever was final.
package sim

import (
	"container/heap"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/treehash"
)

// Config describes one run.
type Config struct {
	Seed   uint64
	Peers  int
	F      int
	Rounds uint64 // 0: so many that the run does not end by itself
	// Budget is the height from which on peers wish to stop, each a few heights
	// after another. 0: they do not.
	Budget uint64

	Chaos  time.Duration // how long there are faults
	Settle time.Duration // how long the heads may take to meet afterwards. 0: 20 s

	Loss      float64 // of messages, each way
	Duplicate float64 // of messages
	Delay     time.Duration
	Slow      []int   // peers that take five times as long to compute
	Failures  float64 // of computing a gradient
	// CrashWrites is the chance that a peer crashes at a durable write, before
	// or after it reached the disk.
	CrashWrites float64
	// Draw says how many faults to draw from the seed, where Faults is nil.
	Draw
	// Faults are those that strike, and members that come and go, at their
	// times: what a scenario file lists.
	Faults []Fault

	// Liars do what Lies says. They go on after Chaos.
	Liars []int
	Lies  Lies // zero: all of them
	// Bridge leaves the liars connected to both sides of a partition.
	Bridge bool
	// Signed encodes, signs and opens every message.
	Signed bool
	// CheckpointEvery is the interval of checkpoints. 0: 8.
	CheckpointEvery uint64

	Timeouts round.Timeouts // zero: Timeouts()
	// New makes a machine; nil: round.New.
	New func(round.Config) (*round.Machine, error)
	// Stop ends the run early when it is closed; nil: never.
	Stop <-chan struct{}
	// Trace gets a line for every event and action; nil: none.
	Trace io.Writer
}

// Timeouts are the machine's timeouts scaled to the simulated rounds of about
// a tenth of a second.
func Timeouts() round.Timeouts {
	return round.Timeouts{
		Start: time.Second, GradientMin: 300 * time.Millisecond, GradientMax: 1500 * time.Millisecond,
		BallotMin: 150 * time.Millisecond, BallotMax: 500 * time.Millisecond,
		Fetch: 600 * time.Millisecond, State: 900 * time.Millisecond, Retry: time.Second,
		Orphan: 300 * time.Millisecond, Linger: 2 * time.Second,
	}
}

// Result is what a run came to.
type Result struct {
	Steps    int
	Time     time.Duration // virtual
	Met      time.Duration // after the end of Chaos
	Heights  []uint64
	Finished []round.Hash // the record each peer finished at
	Ends     []uint64     // its height; who was killed afterwards is lower again
	Sets     [][]round.Entry
	Timeouts int
	Lost     int
	Digest   uint64         // of all events and actions
	Final    uint64         // the highest final checkpoint
	Expelled int            // liars that were proven guilty
	Faults   map[string]int // how often each kind of fault struck
	Messages uint64         // that peers sent to each other, those that were lost too
	Bytes    uint64         // in them
	Stall    time.Duration  // longest virtual time in which no peer got higher than any had been
	Round    time.Duration  // mean virtual time of a round, from the second on
}

type item struct {
	at  time.Duration
	seq uint64
	run func()
}

type queue []item

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(item)) }
func (q *queue) Pop() any {
	old := *q
	x := old[len(old)-1]
	old[len(old)-1] = item{}
	*q = old[:len(old)-1]
	return x
}

// state names a model with its optimizer's state.
type state struct{ model, state round.Hash }

// stored is a message in a peer's network layer.
type stored struct {
	id       round.Hash
	number   int // of all IDs of the run, as they came up
	bytes    int // of the envelope
	msg      round.Message
	envelope []byte // where the run is signed
}

// bits is a set of small numbers.
type bits []uint64

func (b bits) has(n int) bool { return n/64 < len(b) && b[n/64]&(1<<(n%64)) != 0 }

func (b *bits) add(n int) {
	for n/64 >= len(*b) {
		*b = append(*b, 0)
	}
	(*b)[n/64] |= 1 << (n % 64)
}

type peer struct {
	id int
	// neighbours are those that it has connections to.
	neighbours []*peer
	near       bits
	liar       bool
	up         bool
	paused     bool
	backlog    []func()
	life       int // counts starts, so that what was for an earlier one is dropped
	machine    *round.Machine

	// On disk.
	watermark, counter uint64
	checkpoints        map[round.Hash]round.Record
	links              map[round.Hash][]round.Checkpoint
	voted              round.Record
	certificate        []*stored
	full               bool // the disk
	writing            bool // a vote

	rosters []round.Roster // on disk too
	left    bool
	gone    bool // crashed for good
	gated   map[int]bool
	forged  uint64 // slot that a liar forged a record for
	fooled  bool   // followed liars while hardly anyone else was connected
	final   round.Checkpoint

	// In memory.
	states   map[state]bool
	bodies   map[round.Hash]bool
	messages []*stored
	known    bits   // by number
	view     []bool // connections as last told to the machine
	compute  int
	fetch    int
	timer    int
	speed    time.Duration
	surveys  bool // is about to look at who can be reached
	head     round.Hash
	height   uint64
	finished round.Hash
}

// saidKey is what an honest peer may sign one message for.
type saidKey struct {
	from   round.Peer
	typ    round.Type
	slot   uint64
	parent round.Hash
}

type balloted struct {
	slot   uint64
	parent round.Hash
	entry  round.Entry
}

type world struct {
	cfg   Config
	rng   *rand.Rand
	now   time.Duration
	seq   uint64
	queue queue
	peers []*peer
	group []int // partition that each peer is in
	part  []int // where not all are neighbours: which peers reach each other
	parts int   // partitions so far

	rosters   []round.Roster
	member    []bool
	final     map[uint64]round.Hash       // by height
	highest   round.Checkpoint            // of those
	voters    map[round.Hash]map[int]bool // of each target
	accused   map[int]bool
	lastProof time.Duration
	seen      map[seenKey]round.Hash // what honest peers got of liars
	keys      []ed25519.PrivateKey
	genesis   round.Record
	numbers   map[round.Hash]int  // of messages
	believed  map[round.Hash]bool // forged records that peers with hardly anyone else connected went to
	records   map[round.Hash]round.Record
	said      map[saidKey]round.Hash
	counters  map[[2]uint64]round.Hash
	ballots   map[balloted][]round.Peer
	adopted   map[uint64]map[int]round.Hash // by height
	healed    bool
	healedAt  time.Duration
	goal      uint64 // height to meet at
	met       time.Duration
	top       uint64        // height that anyone was at
	topAt     time.Duration // when the first got there
	firstAt   time.Duration // when the first was at height 1
	result    Result
	err       error
}

// Run simulates. The error says which property was violated, and when.
func Run(cfg Config) (Result, error) {
	if cfg.New == nil {
		cfg.New = round.New
	}
	if cfg.Timeouts == (round.Timeouts{}) {
		cfg.Timeouts = Timeouts()
	}
	if cfg.Settle == 0 {
		cfg.Settle = 20 * time.Second
	}
	if cfg.CheckpointEvery == 0 {
		cfg.CheckpointEvery = 8
	}
	if cfg.Lies == 0 {
		cfg.Lies = AllLies
	}
	if cfg.Delay == 0 {
		cfg.Delay = 10 * time.Millisecond
	}
	cfg = cfg.Explicit()
	w := &world{
		cfg: cfg, rng: rand.New(rand.NewPCG(cfg.Seed, 0x5b1)), group: make([]int, cfg.Peers),
		numbers: map[round.Hash]int{}, believed: map[round.Hash]bool{}, records: map[round.Hash]round.Record{}, said: map[saidKey]round.Hash{},
		counters: map[[2]uint64]round.Hash{}, ballots: map[balloted][]round.Peer{},
		adopted: map[uint64]map[int]round.Hash{},
		final:   map[uint64]round.Hash{}, voters: map[round.Hash]map[int]bool{}, accused: map[int]bool{}, seen: map[seenKey]round.Hash{},
	}
	w.result.Faults = map[string]int{}
	w.setUpRoster()
	w.genesis = round.Genesis(job, w.rosters[0].Hash, hash("model"), hash("state"))
	w.records[w.genesis.ID()] = w.genesis
	w.result.Finished, w.result.Ends = make([]round.Hash, cfg.Peers), make([]uint64, cfg.Peers)
	for i := range cfg.Peers {
		p := &peer{id: i, checkpoints: map[round.Hash]round.Record{}, links: map[round.Hash][]round.Checkpoint{}, rosters: slices.Clone(w.rosters), gated: map[int]bool{}, speed: time.Duration(60+w.rng.IntN(40)) * time.Millisecond}
		if slices.Contains(cfg.Slow, i) {
			p.speed *= 5
		}
		p.liar = slices.Contains(cfg.Liars, i)
		w.peers = append(w.peers, p)
	}
	w.connect()
	w.plan()
	limit := cfg.Chaos + cfg.Settle
	steps := 0
	for w.err == nil && len(w.queue) > 0 && !w.done() {
		it := heap.Pop(&w.queue).(item)
		w.now = it.at
		if w.now > limit {
			break
		}
		it.run()
		if steps++; steps%1024 == 0 && w.stopped() {
			return w.result, errStopped
		}
	}
	w.end()
	return w.result, w.err
}

var errStopped = errors.New("the simulation was stopped")

func (w *world) stopped() bool {
	select {
	case <-w.cfg.Stop:
		return true
	default:
		return false
	}
}

var job = hash("job")

func hash(parts ...any) round.Hash { return treehash.Sum(fmt.Append(nil, parts...)) }

func (w *world) trace(format string, args ...any) {
	if w.cfg.Trace != nil {
		fmt.Fprintf(w.cfg.Trace, "%-12v ", w.now)
		fmt.Fprintf(w.cfg.Trace, format, args...)
		fmt.Fprintln(w.cfg.Trace)
	}
}

func (w *world) after(d time.Duration, run func()) {
	w.seq++
	heap.Push(&w.queue, item{at: w.now + d, seq: w.seq, run: run})
}

// upTo returns a random duration from lo to hi.
func (w *world) between(lo, hi time.Duration) time.Duration {
	return lo + time.Duration(w.rng.Int64N(int64(hi-lo)+1))
}

// plan puts the starts, the faults and their end on the clock.
func (w *world) plan() {
	for _, p := range w.peers {
		late := slices.ContainsFunc(w.cfg.Faults, func(f Fault) bool { return f.Kind == Start && f.Peer == p.id })
		if w.member[p.id] && !late {
			w.after(w.between(0, 300*time.Millisecond), func() { w.start(p) })
		}
	}
	for _, f := range w.cfg.Faults {
		w.after(f.At, func() { w.inflict(f) })
	}
	for range w.cfg.Slow {
		w.strike("slow peer")
	}
	w.after(w.cfg.Chaos, w.heal)
	w.gossip()
}

// inflict has a fault strike.
func (w *world) inflict(f Fault) {
	p := w.peers[f.Peer]
	switch f.Kind {
	case Start:
		if w.member[p.id] {
			w.strike("late start")
			w.start(p)
		}
	case Crash:
		if f.For == 0 {
			w.strike("death")
			p.gone = true
			w.crash(p)
		} else if p.up {
			w.strike("crash")
			w.crash(p)
			w.restart(p, f.For)
		}
	case FullDisk:
		w.strike("full disk")
		p.full = true
		w.after(f.For, func() { p.full = false })
	case PowerCut:
		w.strike("power cut")
		for _, p := range w.peers {
			if p.up {
				w.crash(p)
				w.restart(p, w.between(min(f.For, 50*time.Millisecond), f.For))
			}
		}
	case Partition, Split:
		w.strike(string(f.Kind))
		for i, part := range f.Parts {
			for _, q := range part {
				w.group[q] = i
			}
		}
		w.parts++
		number := w.parts
		w.trace("%s %v", f.Kind, f.Parts)
		if f.Kind == Split {
			w.relink(500*time.Millisecond, 0)
		} else {
			w.relink(2*time.Second, 0)
		}
		w.after(f.For, func() {
			if w.parts == number && !w.healed {
				clear(w.group)
				w.trace("healed")
				w.relink(0, 100*time.Millisecond)
			}
		})
	case Pause:
		if !p.up || p.paused {
			return
		}
		p.paused = true
		w.strike("pause")
		w.trace("peer %d paused", p.id)
		w.relink(2*time.Second, 0)
		life := p.life
		w.after(f.For, func() {
			if p.life == life {
				w.resume(p)
			}
		})
	case Join, Leave:
		w.change(f.Peer, f.Kind == Join)
	}
}

// heal ends all faults.
func (w *world) heal() {
	clear(w.group)
	w.cfg.Loss, w.cfg.Duplicate, w.cfg.Failures, w.cfg.CrashWrites = 0, 0, 0, 0
	for _, p := range w.peers {
		w.resume(p)
		p.full = false
		if !p.up && !p.left && w.member[p.id] {
			w.start(p)
		}
		if !p.liar {
			w.goal = max(w.goal, p.height)
		}
	}
	w.goal += 3
	w.healed, w.healedAt = true, w.now
	w.trace("all faults healed")
	w.relink(0, 100*time.Millisecond)
}

func (w *world) resume(p *peer) {
	if !p.paused {
		return
	}
	p.paused = false
	w.trace("peer %d resumed", p.id)
	backlog := p.backlog
	p.backlog = nil
	for _, f := range backlog {
		w.after(0, f)
	}
	w.relink(0, 100*time.Millisecond)
}
