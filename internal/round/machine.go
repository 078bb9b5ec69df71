package round

import (
	"errors"
	"fmt"
	"time"
)

const (
	// maxKept is how many checkpoints besides the head a start may restore.
	maxKept = 8
	// inboxSlots is how many (slot, parent) pairs of one peer are kept.
	inboxSlots = 8
	// recent is how many slots a peer may be behind and still ask to be
	// waited for: it is catching up.
	recent = 16
	// missesAllowed is how many slots in a row a connected peer may miss
	// before it is no longer waited for.
	missesAllowed = 3
	// jumpHeights is how many heights must pass between two jumps ahead on
	// the word of one peer, unless a slot failed, and maxJump how far one goes.
	jumpHeights = 64
	maxJump     = 1 << 20
	// samples is how many durations the adaptive timeouts look back on, and
	// fewSamples how many they need.
	samples    = 64
	fewSamples = 8
	// Slots that fail without a timeout are paused after, ever longer.
	pauseFirst = 50 * time.Millisecond
	pauseMax   = 2 * time.Second
)

// phase is where the machine stands in its slot.
type phase uint8

const (
	phaseIdle    phase = iota // before Start
	phaseObserve              // for others: this peer does not take part yet, or pauses
	phaseGather               // for announcements and bodies
	phaseBallot               // for ballots
	phaseFetch                // for bodies that the record needs
	phaseApply                // for the host to compute the record's model
	phaseRecord               // for records
	phasePause                // between slots that failed at once
	phasePursue               // for the state of another head
	phaseFinal                // at the last record, for those that are not
	phaseDone
)

// Machine is one peer's state. It is not safe for concurrent use.
type Machine struct {
	cfg Config
	out []Action
	now time.Duration

	tree    tree
	genesis *node
	head    *node
	back    *node // the head before
	latest  []latestSigned
	held    []*node // states that the host keeps

	rosters map[Hash]*Roster
	ros     *Roster // the head's
	members []bool  // who takes part: on the head's roster and not expelled
	taking  bool    // this peer is among them
	took    bool    // and was so once

	justified *node      // the highest that is known
	final_    Checkpoint // likewise
	candidate *node      // newest checkpoint on disk that this peer has not voted for
	onDisk    Hash       // newest checkpoint on disk
	kept      []*node    // other checkpoints that were there at the start
	voted     Record     // target of the last vote
	votedID   Hash
	voting    bool // a vote is on its way to the disk

	peers  []peerState
	bodies map[Hash]*body

	floor        uint64 // nothing at or below it is signed on any record
	counter      uint64 // last one used
	mayWatermark uint64 // covered by the last Persist
	mayCounter   uint64

	phase    phase
	begun    uint64 // slots begun, a number for housekeeping
	slot     uint64
	began    time.Duration
	deadline time.Duration
	wait     []bool // who is waited for in this slot
	timedOut bool   // a timeout fired in this slot
	hurried  bool
	fails    int // slots in a row without a new head

	announced bool
	recorded  bool
	set       []Entry
	expel     []Peer // what else the slot's record says
	justify   Checkpoint
	succeed   Hash
	retried   []Hash // bodies asked for a second time in this slot
	target    *node  // record of this slot that others agreed on already
	own       *node  // record that this peer signed in this slot
	pursued   *node  // head that is being gone to
	ballotAt  time.Duration
	recordAt  time.Duration

	prevSlot   uint64 // the slot before, for late arrivals
	prevParent Hash
	prevBegan  time.Duration
	parent     Hash // of the current slot

	gradients []ownGradient
	wanting   bool // there may be a body that nobody could be asked for
	later     bool // others may be at a later slot on the head
	dirty     bool // the fork choice may have another outcome
	startEnd  time.Duration

	arrivals durations // of gradients, from the beginning of a slot
	paces    durations // of slots with a quorum that gave a record
	answers  durations // of ballots and records, from one's own

	timer  time.Duration
	limits Timeouts
	mutant mutant
	needs  []rosterNeed
}

// mutant switches safety rules off, so that tests can show that they see it.
type mutant struct {
	lowThreshold    int  // subtracted in the fork choice
	ignoreWatermark bool // sign below it after a restart
	believe         bool // sign what others signed without computing it
	ballotUnheld    bool // ballot what is announced, held or not
	repeatSlot      bool // begin a failed slot again under its number
	noPersist       bool // sign before the watermark is on disk
	holdAll         bool // forget nothing
	lowQuorum       int  // subtracted from the votes that justify
	voteTwice       bool // vote without looking at earlier votes
	forgetVotes     bool // vote before the vote is on disk, and forget it in a restart
	blindFork       bool // fork choice without looking at what is justified
	keepGuilty      bool // let proven ones take part
}

// New checks the configuration. The machine does nothing before Start.
func New(cfg Config) (*Machine, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("round: %w", err)
	}
	cfg.setDefaults()
	m := &Machine{
		cfg:          cfg,
		rosters:      map[Hash]*Roster{},
		bodies:       map[Hash]*body{},
		floor:        cfg.Watermark,
		counter:      cfg.Counter,
		mayWatermark: cfg.Watermark,
		mayCounter:   cfg.Counter,
		limits:       cfg.Timeouts,
	}
	for _, r := range cfg.Rosters {
		m.rosters[r.Hash] = &r
		m.grow(&r)
	}
	m.tree = newTree(m.cfg.CheckpointEvery, m.fits)
	m.genesis = m.tree.add(cfg.Genesis.ID(), cfg.Genesis, 0)
	m.justified, m.final_, m.voted = m.genesis, cfg.Genesis.Checkpoint(), cfg.Voted
	m.head = m.genesis
	if cfg.Head.Height > 0 {
		m.head = m.tree.add(cfg.Head.ID(), cfg.Head, 0)
		if m.head == nil {
			return nil, errors.New("round: the restored head does not follow from genesis: its run folder belongs to another job")
		}
	}
	if m.rosters[m.head.rec.Roster] == nil {
		return nil, errors.New("round: the roster of the restored head is not among those that are known")
	}
	if m.head != m.genesis {
		if m.onDisk = m.cfg.OnDisk; m.onDisk == (Hash{}) {
			m.onDisk = m.head.id
		}
		m.head.restore(cfg.Links)
	}
	for _, r := range cfg.Kept {
		if n := m.tree.add(r.ID(), r, 0); n != nil && m.rosters[r.Roster] != nil && n != m.head {
			m.hold(n)
			m.kept = append(m.kept, n)
		}
	}
	if m.voted.Height > 0 {
		m.votedID = m.voted.ID()
	}
	m.hold(m.head)
	m.enlist()
	return m, nil
}

func (c *Config) validate() error {
	if c.Self >= MaxPeers {
		return fmt.Errorf("peer %d: the highest index is %d", c.Self, MaxPeers-1)
	}
	known := false
	for i := range c.Rosters {
		if err := c.Rosters[i].validate(); err != nil {
			return err
		}
		known = known || c.Rosters[i].Hash == c.Genesis.Roster
	}
	if !known {
		return errors.New("the roster of genesis is not among those that are known")
	}
	if c.CheckpointEvery > 1<<20 {
		return fmt.Errorf("a checkpoint every %d heights: at most %d", c.CheckpointEvery, 1<<20)
	}
	if c.Genesis.Height != 0 || c.Genesis.Slot != 0 {
		return errors.New("genesis must have height and slot 0")
	}
	if c.Rounds == 0 && c.TargetAccuracy == 0 {
		return errors.New("neither a number of rounds nor a target accuracy: the run would not end")
	}
	if c.Rounds > MaxSlot || c.Watermark > MaxSlot || c.Counter > MaxSlot || c.Head.Slot > MaxSlot {
		return fmt.Errorf("rounds, watermark, counter and slots are at most %d", uint64(MaxSlot))
	}
	if c.TargetAccuracy > 10000 {
		return fmt.Errorf("target accuracy %d is more than 10000 ten thousandths", c.TargetAccuracy)
	}
	if c.MinDelta < 0 {
		return fmt.Errorf("a minimal improvement of %d millionths is negative", c.MinDelta)
	}
	if len(c.Kept) > maxKept {
		return fmt.Errorf("%d checkpoints besides the head, more than %d", len(c.Kept), maxKept)
	}
	if c.Head.Height > 0 && (c.Head.Slot < c.Head.Height || len(c.Head.Set) == 0) {
		return errors.New("the restored head is not a record")
	}
	t := &c.Timeouts
	for _, d := range []time.Duration{
		t.Start, t.GradientMin, t.GradientMax, t.BallotMin, t.BallotMax,
		t.Fetch, t.State, t.Retry, t.Orphan, t.Linger, t.Restart, t.Pace,
	} {
		if d < 0 {
			return fmt.Errorf("a timeout of %v is negative", d)
		}
	}
	return nil
}

func (c *Config) setDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if c.CheckpointEvery == 0 {
		c.CheckpointEvery = 64
	}
	if c.Reserve == 0 {
		c.Reserve = 16
	}
	if c.MaxGradientBytes == 0 {
		c.MaxGradientBytes = MaxGradientBytes
	}
	t := &c.Timeouts
	def(&t.Start, 15*time.Second)
	def(&t.GradientMin, 3*time.Second)
	def(&t.GradientMax, 30*time.Second)
	def(&t.BallotMin, 2*time.Second)
	def(&t.BallotMax, 10*time.Second)
	def(&t.Fetch, 10*time.Second)
	def(&t.State, 30*time.Second)
	def(&t.Retry, 5*time.Second)
	def(&t.Orphan, 2*time.Second)
	def(&t.Linger, 10*time.Second)
	def(&t.Restart, 3*time.Second)
	def(&t.Pace, 100*time.Millisecond)
}

// Head returns the head and its ID.
func (m *Machine) Head() (Record, Hash) { return m.head.rec, m.head.id }

// Finality returns the highest checkpoints that this peer knows to be justified
// and final.
func (m *Machine) Finality() (justified, final Checkpoint) {
	return m.justified.rec.Checkpoint(), m.final_
}

// Step takes one event and returns what to do about it, in order. now is any
// clock that does not go back; a smaller value than before counts as the same.
// The slice is valid until the next Step.
func (m *Machine) Step(now time.Duration, ev Event) []Action {
	m.out = m.out[:0]
	m.now = max(m.now, now)
	if m.phase == phaseDone {
		return nil
	}
	if _, ok := ev.(Start); ok == (m.phase != phaseIdle) {
		if !ok {
			m.early(ev)
		}
		return nil
	}
	switch ev := ev.(type) {
	case Start:
		m.start()
	case Connected:
		m.connected(ev.Peer)
	case Disconnected:
		m.disconnected(ev.Peer)
	case Received:
		m.received(&ev.Message, ev.ID)
	case RosterKnown:
		m.rosterKnown(ev.Roster)
	case Evidence:
		m.proven(&ev.Proof, true)
	case Checkpointed:
		m.onDisk = ev.Record
		if n := m.tree.byID[ev.Record]; n != nil && m.boundary(&n.rec) && (m.candidate == nil || !m.voting && n.rec.Height > m.candidate.rec.Height) {
			m.candidate = n
		}
	case VotePersisted:
		m.votePersisted(ev.Target)
	case GradientReady:
		m.gradientReady(&ev)
	case GradientFailed:
		m.gradientFailed(&ev)
	case BodyReady:
		m.bodyReady(ev.Peer, ev.Gradient)
	case BodyRefused:
		m.bodyLost(ev.Peer, ev.Gradient, bodyRefused, "was refused: "+ev.Reason)
	case BodyUnavailable:
		m.bodyLost(ev.Peer, ev.Gradient, bodyUnavailable, "could not be had")
	case Applied:
		m.applied(&ev)
	case ApplyFailed:
		m.applyFailed(&ev)
	case StateReady:
		if m.phase == phasePursue && m.pursued.id == ev.Record {
			m.hold(m.pursued)
			m.arrive(m.pursued, Fetched)
		}
	case StateUnavailable:
		if m.phase == phasePursue && m.pursued.id == ev.Record {
			m.stateLost(StateUnreachable)
		}
	case Timer:
	}
	for i := 0; m.advance(); i++ {
		if i > 1000 {
			for _, a := range m.out[max(0, len(m.out)-12):] {
				fmt.Println(a)
			}
			panic("round: no end of a step")
		}
	}
	m.vote()
	m.setTimer()
	return m.out
}

// early notes what happens before Start.
func (m *Machine) early(ev Event) {
	switch ev := ev.(type) {
	case Connected:
		if m.inRange(ev.Peer) && ev.Peer != m.cfg.Self {
			m.peers[ev.Peer].connected = true
			m.peers[ev.Peer].met = true
		}
	case Disconnected:
		if m.inRange(ev.Peer) {
			m.peers[ev.Peer].connected = false
		}
	case RosterKnown:
		m.rosterKnown(ev.Roster)
	}
}

func (m *Machine) emit(a Action) { m.out = append(m.out, a) }

func (m *Machine) report(kind ReportKind, p Peer, record Hash, text string) {
	m.emit(Report{Kind: kind, Peer: p, Slot: m.slot, Height: m.head.rec.Height, Record: record, Text: text})
}

// other reports whether p is another peer that takes part.
func (m *Machine) other(p Peer) bool { return m.inRange(p) && m.members[p] && p != m.cfg.Self }

func (m *Machine) start() {
	m.startEnd = m.now + m.limits.Start
	if m.head.rec.Height > 0 {
		m.startEnd = m.now + m.limits.Restart
	}
	for p := range m.peers {
		m.peers[p].waiting = m.other(Peer(p))
	}
	if m.voted.Height > 0 {
		m.castVote() // after a loss of power of all, what was final must be known to be
	}
	if m.ended() {
		return
	}
	if m.final(&m.head.rec) {
		m.enterFinal()
		return
	}
	m.beginSlot()
}

// ended finishes where this peer is no member any more.
func (m *Machine) ended() bool {
	why, gone := m.gone()
	if gone {
		m.emit(Finished{Record: m.head.rec, ID: m.head.id, Reason: why})
		m.phase = phaseDone
	}
	return gone
}

func (m *Machine) send(b Body) {
	m.emit(Send{Message{From: m.cfg.Self, Slot: m.slot, Parent: m.head.id, Roster: m.head.rec.Roster, Body: b}})
}

// cover makes sure that the slot and the next counter are on disk as possibly
// used before anything is signed with them.
func (m *Machine) cover(slot uint64) {
	if slot <= m.mayWatermark && m.counter < m.mayCounter || m.mutant.noPersist {
		return
	}
	m.mayWatermark = max(m.mayWatermark, slot+m.cfg.Reserve-1)
	m.mayCounter = max(m.mayCounter, m.counter+m.cfg.Reserve)
	m.emit(Persist{Watermark: m.mayWatermark, Counter: m.mayCounter})
}

// advance goes one step further where the slot allows it.
func (m *Machine) advance() bool {
	expired := m.now >= m.deadline
	if m.phase != phaseDone && m.phase != phaseIdle && !m.taking && m.took && m.ended() {
		return false
	}
	switch m.phase {
	case phaseObserve:
		if m.redirect() {
			return true
		}
		if m.taking && !m.paused() {
			m.beginSlot()
			return true
		}
	case phaseGather:
		if m.redirect() {
			return true
		}
		if m.jump() {
			return true
		}
		if m.announced && !m.waited(m.announceDone) {
			if m.now < m.paceEnd() {
				return false
			}
			m.castBallot()
			return true
		}
		if expired {
			m.timeout(TimeoutGradient, "announcements")
			m.giveUp(m.announceDone, true)
			m.castBallot()
			return true
		}
	case phaseBallot:
		if m.redirect() || m.fails > 0 && m.jump() {
			return true
		}
		if m.waited(ballotDone) {
			if !expired {
				return false
			}
			m.timeout(TimeoutBallot, "ballots")
			m.giveUp(ballotDone, false)
		}
		m.decide()
		return true
	case phaseFetch:
		if m.redirect() {
			return true
		}
		return m.collect(expired)
	case phaseRecord:
		if m.waited(recordDone) {
			if m.dirty && m.own != nil {
				// Others may have gone on from this very record.
				m.dirty = false
				if n := m.choose(); n != m.own && n.descends(m.own) && m.stands(m.own) {
					m.adopt(m.own, Recomputed)
					return true
				}
			}
			if m.fails > 0 && m.jump() {
				return true
			}
			if !expired {
				return false
			}
			m.timeout(TimeoutRecord, "records")
		}
		m.conclude()
		return true
	case phasePause:
		if m.redirect() {
			return true
		}
		if expired {
			m.beginSlot()
			return true
		}
	case phasePursue:
		if expired {
			m.stateLost(TimeoutState)
			return true
		}
		return m.repursue()
	case phaseFinal:
		if m.redirect() {
			return true
		}
		return m.finish()
	}
	return false
}

// Stats counts what the machine remembers, for status pages
// and for the tests of its bounds.
type Stats struct {
	Records  int // in the tree
	Bodies   int // known of
	Messages int // slots and parents that others spoke of
	States   int // that the host holds
}

// Stats returns the counts.
func (m *Machine) Stats() Stats {
	s := Stats{Records: len(m.tree.nodes), Bodies: len(m.bodies), States: len(m.held)}
	for p := range m.peers {
		s.Messages += len(m.peers[p].inbox)
	}
	return s
}
