// Package sim runs many peers' round machines in one thread on a virtual
// clock, with a network and hosts that fail as a seed says, and checks at every
// step what must always hold.
//
// Call Run. The same Config gives the same run, step for step; a failing one
// is run again with a Trace to read what happened. The machines are the real
// ones; the hosts are models: a gradient, a model and a state are hashes of
// what they follow from.
//
// What is checked all the time, by the numbers of the design: P2 a record's
// model follows from its parent's and its set; P3 no peer signs two different
// messages of one type for one slot and parent, or one counter twice, or
// anything that its disk would not remember after a restart; P4 every entry of
// a record was announced for its slot and parent; P5 every ballot's bodies are
// held, and every entry was balloted by another than its announcer; P11 the
// machines' memory is bounded. At the end: P6 and P14, after all faults have
// healed the heads meet and go on within Settle.
package sim

import (
	"container/heap"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/treehash"
)

// Config describes one run. Counts of faults are over the time of Chaos.
type Config struct {
	Seed   uint64
	Peers  int
	F      int
	Rounds uint64 // 0: so many that the run does not end by itself

	Chaos  time.Duration // how long there are faults
	Settle time.Duration // how long the heads may take to meet afterwards. 0: 20 s

	Loss       float64 // of messages, each way
	Duplicate  float64 // of messages
	Delay      time.Duration
	Slow       []int // peers that take five times as long to compute
	Crashes    int   // with a restart from the last checkpoint
	Partitions int   // into two parts, healing
	Pauses     int   // of one peer, as by SIGSTOP
	Failures   float64
	PowerCuts  int   // of all peers at once, with restarts
	Late       []int // peers that start only after Timeouts.Start
	Dead       []int // peers that crash in Chaos and never return
	// Liars equivocate, sign records whose model does not follow, withhold
	// bodies and flood. They go on after Chaos.
	Liars []int

	Timeouts round.Timeouts // zero: Timeouts()
	// New makes a machine; nil: round.New.
	New func(round.Config) (*round.Machine, error)
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
	Sets     [][]round.Entry
	Timeouts int
	Lost     int
	Digest   uint64 // of all events and actions
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
	id  round.Hash
	msg round.Message
}

type peer struct {
	id      int
	liar    bool
	up      bool
	paused  bool
	backlog []func()
	life    int // counts starts, so that what was for an earlier one is dropped
	machine *round.Machine

	// On disk.
	watermark, counter uint64
	checkpoint         round.Record

	// In memory.
	states   map[state]bool
	bodies   map[round.Hash]bool
	messages []stored
	known    map[round.Hash]bool
	view     []bool // connections as last told to the machine
	compute  int
	fetch    int
	timer    int
	speed    time.Duration
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

	genesis  round.Record
	records  map[round.Hash]round.Record
	said     map[saidKey]round.Hash
	counters map[[2]uint64]round.Hash
	ballots  map[balloted][]round.Peer
	adopted  map[uint64]map[int]round.Hash // by height
	healed   bool
	healedAt time.Duration
	goal     uint64 // height to meet at
	met      time.Duration
	result   Result
	err      error
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
	if cfg.Delay == 0 {
		cfg.Delay = 10 * time.Millisecond
	}
	w := &world{
		cfg: cfg, rng: rand.New(rand.NewPCG(cfg.Seed, 0x5b1)), group: make([]int, cfg.Peers),
		records: map[round.Hash]round.Record{}, said: map[saidKey]round.Hash{},
		counters: map[[2]uint64]round.Hash{}, ballots: map[balloted][]round.Peer{},
		adopted: map[uint64]map[int]round.Hash{},
	}
	w.genesis = round.Genesis(hash("job"), hash("model"), hash("state"))
	w.records[w.genesis.ID()] = w.genesis
	w.result.Finished = make([]round.Hash, cfg.Peers)
	for i := range cfg.Peers {
		p := &peer{id: i, checkpoint: w.genesis, speed: time.Duration(60+w.rng.IntN(40)) * time.Millisecond}
		if slices.Contains(cfg.Slow, i) {
			p.speed *= 5
		}
		p.liar = slices.Contains(cfg.Liars, i)
		w.peers = append(w.peers, p)
	}
	w.plan()
	limit := cfg.Chaos + cfg.Settle
	for w.err == nil && len(w.queue) > 0 && !w.done() {
		it := heap.Pop(&w.queue).(item)
		w.now = it.at
		if w.now > limit {
			break
		}
		it.run()
	}
	w.end()
	return w.result, w.err
}

func hash(parts ...any) round.Hash { return treehash.Sum(fmt.Append(nil, parts...)) }

func (w *world) fail(format string, args ...any) {
	if w.err == nil {
		w.err = fmt.Errorf("seed %d at %v: %s", w.cfg.Seed, w.now, fmt.Sprintf(format, args...))
		w.trace("VIOLATION %v", w.err)
	}
}

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

// plan draws all faults.
func (w *world) plan() {
	for _, p := range w.peers {
		at := w.between(0, 300*time.Millisecond)
		if slices.Contains(w.cfg.Late, p.id) {
			at += w.cfg.Timeouts.Start
		}
		w.after(at, func() { w.start(p) })
	}
	chaos := w.cfg.Chaos
	for range w.cfg.Crashes {
		p := w.peers[w.rng.IntN(w.cfg.Peers)]
		at := w.between(0, chaos)
		down := w.between(50*time.Millisecond, max(chaos/2, 100*time.Millisecond))
		w.after(at, func() {
			w.crash(p)
			life := p.life
			w.after(down, func() {
				if p.life == life {
					w.start(p)
				}
			})
		})
	}
	for _, i := range w.cfg.Dead {
		w.after(w.between(chaos/4, chaos), func() { w.crash(w.peers[i]) })
	}
	for range w.cfg.PowerCuts {
		w.after(w.between(chaos/4, chaos), func() {
			for _, p := range w.peers {
				if !p.up {
					continue
				}
				w.crash(p)
				life := p.life
				w.after(w.between(50*time.Millisecond, 500*time.Millisecond), func() {
					if p.life == life {
						w.start(p)
					}
				})
			}
		})
	}
	for range w.cfg.Partitions {
		at, length := w.between(0, chaos), w.between(100*time.Millisecond, max(chaos/2, 200*time.Millisecond))
		side := w.rng.Uint64()
		w.after(at, func() {
			for i := range w.group {
				w.group[i] = int(side >> i & 1)
			}
			w.trace("partition %v", w.group)
			w.relink(2*time.Second, 0)
			w.after(length, func() {
				clear(w.group)
				w.trace("healed")
				w.relink(0, 100*time.Millisecond)
			})
		})
	}
	for range w.cfg.Pauses {
		p := w.peers[w.rng.IntN(w.cfg.Peers)]
		at, length := w.between(0, chaos), w.between(50*time.Millisecond, max(chaos/2, 100*time.Millisecond))
		w.after(at, func() {
			if !p.up || p.paused {
				return
			}
			p.paused = true
			w.trace("peer %d paused", p.id)
			w.relink(2*time.Second, 0)
			w.after(length, func() { w.resume(p) })
		})
	}
	w.after(chaos, w.heal)
	w.gossip()
}

// heal ends all faults.
func (w *world) heal() {
	clear(w.group)
	w.cfg.Loss, w.cfg.Duplicate, w.cfg.Failures = 0, 0, 0
	for _, p := range w.peers {
		w.resume(p)
		if !p.up && !slices.Contains(w.cfg.Dead, p.id) {
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

func (w *world) start(p *peer) {
	if p.up {
		return
	}
	p.up, p.paused, p.backlog = true, false, nil
	p.life++
	p.states = map[state]bool{{p.checkpoint.Model, p.checkpoint.State}: true}
	p.bodies = map[round.Hash]bool{}
	p.messages, p.known = nil, map[round.Hash]bool{}
	p.view = make([]bool, w.cfg.Peers)
	rounds := w.cfg.Rounds
	if rounds == 0 {
		rounds = 1 << 30
	}
	cfg := round.Config{
		Self: round.Peer(p.id), N: w.cfg.Peers, F: w.cfg.F, Genesis: w.genesis, Rounds: rounds,
		Watermark: p.watermark, Counter: p.counter, Timeouts: w.cfg.Timeouts,
	}
	if p.checkpoint.Height > 0 {
		cfg.Head = p.checkpoint
	}
	m, err := w.cfg.New(cfg)
	if err != nil {
		w.fail("starting peer %d: %v", p.id, err)
		return
	}
	p.machine = m
	p.height, p.head = p.checkpoint.Height, p.checkpoint.ID()
	w.trace("peer %d starts at height %d watermark %d", p.id, p.height, p.watermark)
	w.step(p, round.Start{})
	w.relink(0, 100*time.Millisecond)
}

func (w *world) crash(p *peer) {
	if !p.up {
		return
	}
	p.up, p.paused, p.backlog = false, false, nil
	p.life++
	w.trace("peer %d crashes", p.id)
	w.relink(20*time.Millisecond, 0)
}

// linked reports whether bytes can go from p to q.
func (w *world) linked(p, q *peer) bool {
	return p != q && p.up && q.up && !p.paused && !q.paused && w.group[p.id] == w.group[q.id]
}

// relink has each machine told of lost connections within down, of new ones
// within up.
func (w *world) relink(down, up time.Duration) {
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

func (w *world) look(p, q *peer, life int) {
	if p.life != life || !p.up || p.view[q.id] == w.linked(p, q) {
		return
	}
	p.view[q.id] = !p.view[q.id]
	if p.view[q.id] {
		w.deliver(p, round.Connected{Peer: round.Peer(q.id)})
		w.sync(q, p)
	} else {
		w.deliver(p, round.Disconnected{Peer: round.Peer(q.id)})
	}
}

// deliver gives an event to a peer that may be paused.
func (w *world) deliver(p *peer, ev round.Event) {
	if !p.up {
		return
	}
	life := p.life
	if p.paused {
		p.backlog = append(p.backlog, func() {
			if p.life == life {
				w.deliver(p, ev)
			}
		})
		return
	}
	w.step(p, ev)
}

func (w *world) mix(v uint64) {
	w.result.Digest = (w.result.Digest ^ v) * 0x9e3779b97f4a7c15
	w.result.Digest ^= w.result.Digest >> 29
}

func (w *world) step(p *peer, ev round.Event) {
	// What the host got is kept from when the machine knows of it.
	switch ev := ev.(type) {
	case round.GradientReady:
		p.bodies[ev.Gradient] = true
	case round.BodyReady:
		p.bodies[ev.Gradient] = true
	case round.Applied:
		p.states[state{ev.Model, ev.State}] = true
	case round.StateReady:
		p.states[stateOf(w.records[ev.Record])] = true
	}
	w.result.Steps++
	w.mix(uint64(w.now))
	w.mix(uint64(p.id))
	if w.cfg.Trace != nil {
		w.trace("%d <- %T%+v", p.id, ev, short(ev))
	}
	actions := p.machine.Step(w.now, ev)
	life := p.life
	for _, a := range actions {
		if w.cfg.Trace != nil {
			w.trace("%d    %v", p.id, a)
		}
		if w.err != nil || p.life != life {
			return
		}
		w.execute(p, a)
	}
	if p.liar {
		return
	}
	st := p.machine.Stats()
	n := w.cfg.Peers
	if st.Records > 140*(n+2) || st.Bodies > 12*n+12 || st.Messages > 8*n || st.States > 5 || len(p.states) > 12 || len(p.bodies) > 16*n+16 {
		w.fail("P11: peer %d remembers %+v, its host %d states and %d bodies", p.id, st, len(p.states), len(p.bodies))
	}
}

func short(ev round.Event) any {
	if r, ok := ev.(round.Received); ok {
		return r.Message.String()
	}
	return ev
}

func stateOf(r round.Record) state { return state{r.Model, r.State} }

func (w *world) execute(p *peer, a round.Action) {
	life := p.life
	alive := func(f func()) func() {
		return func() {
			if p.life == life {
				f()
			}
		}
	}
	switch a := a.(type) {
	case round.Persist:
		p.watermark, p.counter = a.Watermark, a.Counter
	case round.Send:
		w.send(p, a.Message)
	case round.Compute:
		parent := w.records[a.Parent]
		if !p.liar && !p.states[stateOf(parent)] {
			w.fail("peer %d computes on %s without its state", p.id, a.Parent.Short())
		}
		p.compute++
		job := p.compute
		d := w.between(p.speed*3/4, p.speed*5/4)
		failed := w.rng.Float64() < w.cfg.Failures
		w.after(d, alive(func() {
			if p.compute != job {
				return
			}
			if failed {
				w.deliver(p, round.GradientFailed{Slot: a.Slot, Parent: a.Parent})
				return
			}
			g := hash("gradient", p.id, parent.Model, a.Height)
			w.deliver(p, round.GradientReady{Slot: a.Slot, Parent: a.Parent, Gradient: g, Bytes: 1000,
				Validation: round.Validation{LossMicro: int64(1000 + p.id), Correct: uint32(p.id), Count: 100}})
		}))
	case round.Fetch:
		w.fetchBody(p, a, 3)
	case round.Apply:
		parent := w.records[a.Parent]
		if !p.liar && !p.states[stateOf(parent)] {
			w.fail("peer %d applies on %s without its state", p.id, a.Parent.Short())
		}
		for _, e := range a.Set {
			if !p.liar && !p.bodies[e.Gradient] {
				w.fail("peer %d applies a gradient of %d that it does not hold", p.id, e.Peer)
			}
		}
		s := follows(parent, a.Set)
		w.after(w.between(time.Millisecond, 5*time.Millisecond), alive(func() {
			w.deliver(p, round.Applied{Slot: a.Slot, Parent: a.Parent, Set: a.Set, Model: s.model, State: s.state})
		}))
	case round.FetchState:
		p.fetch++
		w.fetchState(p, a, p.fetch, 2)
	case round.Adopt:
		w.adopt(p, a)
	case round.Retain:
		for s := range p.states {
			if !slices.ContainsFunc(a.States, func(r round.Record) bool { return stateOf(r) == s }) {
				delete(p.states, s)
			}
		}
		for g := range p.bodies {
			if !slices.Contains(a.Gradients, g) {
				delete(p.bodies, g)
			}
		}
		p.messages = slices.DeleteFunc(p.messages, func(s stored) bool { return s.msg.Slot < a.BelowSlot })
	case round.SetTimer:
		p.timer++
		t := p.timer
		if a.At > 0 {
			w.after(max(0, a.At-w.now), alive(func() {
				if p.timer == t {
					w.deliver(p, round.Timer{})
				}
			}))
		}
	case round.Report:
		if a.Kind.Timeout() {
			w.result.Timeouts++
		}
		switch a.Kind {
		case round.PeerLost:
			w.result.Lost++
		case round.Conflict, round.InvalidMessage, round.ModelDiffers:
			if len(w.cfg.Liars) == 0 {
				w.fail("P3: peer %d: %s", p.id, a.Text)
			}
		}
	case round.Finished:
		p.finished = a.ID
		w.result.Finished[p.id] = a.ID
	}
}

// follows is the model host's update.
func follows(parent round.Record, set []round.Entry) state {
	return state{hash("model", parent.Model, set), hash("state", parent.State, set)}
}

func (w *world) adopt(p *peer, a round.Adopt) {
	if !p.liar && !p.states[stateOf(a.Record)] {
		w.fail("peer %d adopts %s without its state", p.id, a.ID.Short())
	}
	p.height, p.head = a.Record.Height, a.ID
	if p.height%5 == 0 {
		p.checkpoint = a.Record
	}
	w.mix(a.Record.Height)
	if w.adopted[p.height] == nil {
		w.adopted[p.height] = map[int]round.Hash{}
	}
	w.adopted[p.height][p.id] = a.ID
	if w.cfg.Rounds > 0 && p.id == 0 {
		w.result.Sets = append(w.result.Sets, a.Record.Set)
	}
	if !p.liar && len(w.cfg.Liars) <= w.cfg.F && a.Record.Height > 0 && follows(w.records[a.Record.Parent], a.Record.Set) != stateOf(a.Record) {
		w.fail("P2: peer %d adopts %s, whose model does not follow from its set", p.id, a.ID.Short())
	}
	if !w.healed || p.liar || p.height < w.goal || w.met > 0 {
		return
	}
	for _, q := range w.peers {
		if q.up && !q.liar && w.adopted[p.height][q.id] != a.ID {
			return
		}
	}
	w.met = w.now - w.healedAt
}

func (w *world) send(p *peer, msg round.Message) {
	if p.liar {
		w.lie(p, msg)
		return
	}
	id := hash(msg.String(), msg.Body)
	key := saidKey{msg.From, msg.Type(), msg.Slot, msg.Parent}
	if before, ok := w.said[key]; ok && before != id {
		w.fail("P3: peer %d signs a second %s for slot %d on %s", p.id, msg.Type(), msg.Slot, msg.Parent.Short())
	}
	w.said[key] = id
	if msg.Slot > p.watermark {
		w.fail("P3: peer %d signs for slot %d, above its watermark %d on disk", p.id, msg.Slot, p.watermark)
	}
	switch b := msg.Body.(type) {
	case round.Ballot:
		for _, e := range b.Entries {
			if !p.bodies[e.Gradient] {
				w.fail("P5: peer %d ballots a gradient of %d that it does not hold", p.id, e.Peer)
			}
			k := balloted{msg.Slot, msg.Parent, e}
			w.ballots[k] = append(w.ballots[k], msg.From)
		}
	case round.SignedRecord:
		w.checkRecord(p, msg, b)
	}
	w.mix(uint64(msg.Type()))
	w.mix(msg.Slot)
	w.keep(p, stored{id, msg})
	w.flood(p, stored{id, msg})
}

// lie sends what a liar makes of a message.
func (w *world) lie(p *peer, msg round.Message) {
	tell := func(q *peer, m round.Message) {
		if r, ok := m.Body.(round.SignedRecord); ok {
			w.records[r.Record.ID()] = r.Record
		}
		w.transmit(p, q, stored{hash(m.String(), m.Body), m})
	}
	if r, ok := msg.Body.(round.SignedRecord); ok {
		w.records[r.Record.ID()] = r.Record
	}
	all := func(m round.Message) {
		for _, q := range w.peers {
			tell(q, m)
		}
	}
	switch w.rng.IntN(6) {
	case 0: // say nothing
		return
	case 1: // something else to some
		other := msg
		switch b := msg.Body.(type) {
		case round.Announce:
			b.Gradient = hash("other", msg.Slot)
			b.Bytes = 1000
			other.Body = b
		case round.Ballot:
			other.Body = round.Ballot{Entries: b.Entries[:w.rng.IntN(len(b.Entries)+1)]}
		}
		for _, q := range w.peers {
			if w.rng.IntN(2) == 0 {
				tell(q, other)
			} else {
				tell(q, msg)
			}
		}
		return
	case 2: // a record with a model of one's own, the same of all liars
		parent, ok := w.records[msg.Parent]
		if ok && (parent.Height == 0 || msg.Slot > parent.Slot) {
			r := round.Record{Slot: msg.Slot, Height: parent.Height + 1, Parent: msg.Parent,
				Model: hash("lie", msg.Slot, msg.Parent), State: hash("lie")}
			for q := range w.cfg.Peers {
				r.Set = append(r.Set, round.Entry{Peer: round.Peer(q), Gradient: hash("gradient", q, parent.Model, r.Height)})
			}
			r.FUsed = uint16(min(w.cfg.F, (len(r.Set)-1)/2))
			m := msg
			m.Body = round.SignedRecord{Record: r, Counter: msg.Slot * 3}
			all(m)
		}
	case 3: // noise
		for range 5 {
			m := msg
			m.Slot += uint64(w.rng.IntN(1000))
			if w.rng.IntN(2) == 0 {
				m.Parent = hash("nowhere", w.rng.Uint64())
			}
			if w.rng.IntN(2) == 0 {
				m.Body = round.SignedRecord{Counter: uint64(w.rng.IntN(1000) + 1), Record: round.Record{
					Slot: m.Slot, Height: m.Slot - uint64(w.rng.IntN(int(m.Slot))), Parent: m.Parent,
					Set: []round.Entry{{Peer: msg.From, Gradient: hash("noise")}}, Model: hash(w.rng.Uint64()),
				}}
			}
			all(m)
		}
	}
	all(msg)
}

func (w *world) checkRecord(p *peer, msg round.Message, b round.SignedRecord) {
	id := b.Record.ID()
	w.records[id] = b.Record
	k := [2]uint64{uint64(p.id), b.Counter}
	if before, ok := w.counters[k]; ok && before != id {
		w.fail("P3: peer %d signs two records with counter %d", p.id, b.Counter)
	}
	w.counters[k] = id
	if b.Counter > p.counter {
		w.fail("P3: peer %d signs with counter %d, above %d on disk", p.id, b.Counter, p.counter)
	}
	if s := follows(w.records[b.Record.Parent], b.Record.Set); s != stateOf(b.Record) {
		w.fail("P2: peer %d signs a record whose model does not follow from its set", p.id)
	}
	if !p.states[stateOf(b.Record)] {
		w.fail("P2: peer %d signs a record whose state it does not hold", p.id)
	}
	for _, e := range b.Record.Set {
		announce := saidKey{e.Peer, round.TypeAnnounce, msg.Slot, msg.Parent}
		if _, ok := w.said[announce]; !ok && !w.peers[e.Peer].liar {
			w.fail("P4: peer %d signs a record with a gradient that %d did not announce", p.id, e.Peer)
		}
		// A record of one gradient is its announcer's, who had no ballot from
		// anyone; others that sign it hold it.
		alone := len(b.Record.Set) == 1 && p.bodies[e.Gradient]
		other := slices.ContainsFunc(w.ballots[balloted{msg.Slot, msg.Parent, e}], func(q round.Peer) bool { return q != e.Peer })
		if !alone && !other && len(w.cfg.Liars) == 0 {
			w.fail("P5: peer %d signs a record with a gradient of %d that nobody else balloted", p.id, e.Peer)
		}
	}
}

// keep stores a message in p's network layer; false if it was there.
func (w *world) keep(p *peer, s stored) bool {
	if p.known[s.id] {
		return false
	}
	p.known[s.id] = true
	p.messages = append(p.messages, s)
	return true
}

func (w *world) flood(p *peer, s stored) {
	for _, q := range w.peers {
		w.transmit(p, q, s)
		if w.cfg.Duplicate > 0 && w.rng.Float64() < w.cfg.Duplicate {
			w.transmit(p, q, s)
		}
	}
}

func (w *world) transmit(p, q *peer, s stored) {
	if !w.linked(p, q) || !p.view[q.id] || w.cfg.Loss > 0 && w.rng.Float64() < w.cfg.Loss {
		return
	}
	life := q.life
	w.after(w.between(time.Millisecond, w.cfg.Delay), func() {
		if q.life != life || w.group[p.id] != w.group[q.id] {
			return
		}
		if w.keep(q, s) {
			w.flood(q, s)
		} else if w.cfg.Duplicate == 0 {
			return
		}
		w.deliver(q, round.Received{Message: s.msg})
	})
}

// sync sends what p has and q lacks.
func (w *world) sync(p, q *peer) {
	if !w.linked(p, q) {
		return
	}
	for _, s := range p.messages {
		if !q.known[s.id] {
			w.transmit(p, q, s)
		}
	}
}

// gossip is the network's anti-entropy.
func (w *world) gossip() {
	w.after(200*time.Millisecond, func() {
		for _, p := range w.peers {
			w.sync(p, w.peers[w.rng.IntN(w.cfg.Peers)])
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
			if q := w.peers[h]; w.linked(p, q) && q.bodies[a.Gradient] && (!q.liar || w.rng.IntN(3) > 0) {
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

// done reports whether the run has shown what it is for.
func (w *world) done() bool {
	if w.cfg.Rounds == 0 {
		return w.met > 0
	}
	for _, p := range w.peers {
		if !p.liar && (p.up || p.life == 0) && p.finished == (round.Hash{}) {
			return false
		}
	}
	return w.healed || w.cfg.Chaos == 0
}

func (w *world) end() {
	w.result.Time = w.now
	w.result.Met = w.met
	for _, p := range w.peers {
		w.result.Heights = append(w.result.Heights, p.height)
	}
	if w.err != nil {
		return
	}
	if w.cfg.Rounds == 0 && w.met == 0 {
		w.fail("P6: %v after all faults healed the heads have not met at height %d or more: %v", w.cfg.Settle, w.goal, w.result.Heights)
	}
	if w.cfg.Rounds > 0 {
		for _, p := range w.peers {
			if p.up && !p.liar && p.finished == (round.Hash{}) {
				w.fail("P14: peer %d has not finished: heights %v", p.id, w.result.Heights)
			}
		}
	}
}
