package round

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
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
	phaseIdle   phase = iota // before Start
	phaseGather              // for announcements and bodies
	phaseBallot              // for ballots
	phaseFetch               // for bodies that the record needs
	phaseApply               // for the host to compute the record's model
	phaseRecord              // for records
	phasePause               // between slots that failed at once
	phasePursue              // for the state of another head
	phaseFinal               // at the last record, for those that are not
	phaseDone
)

// heard is what one peer said about one slot on one parent.
type heard struct {
	slot      uint64
	parent    Hash
	announced bool
	balloted  bool
	returned  bool
	announce  Announce
	ballot    []Entry
	record    *node
}

// peerState is what this peer knows of a member.
type peerState struct {
	connected bool
	met       bool // was connected once
	heard     bool // said something once
	waiting   bool // is one to wait for when connected
	misses    int  // slots in a row that it was waited for in vain
	jumped    bool
	jumpedAt  uint64 // height of the last jump on its word
	inbox     []heard
}

type bodyStatus uint8

const (
	bodyWanted bodyStatus = iota // nobody who has it is connected yet
	bodyFetching
	bodyHeld
	bodyRefused
	bodyUnavailable
)

type body struct {
	status  bodyStatus
	lastUse uint64 // number of the begun slot
}

// ownGradient is this peer's gradient at one parent: a slot that fails is
// tried again with the same.
type ownGradient struct {
	parent Hash
	ready  bool
	failed bool
	value  Announce
}

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
	dirty     bool // the fork choice may have another outcome
	startEnd  time.Duration

	arrivals durations // of gradients, from the beginning of a slot
	answers  durations // of ballots and records, from one's own

	timer   time.Duration
	limits  Timeouts
	mutant  mutant
	scratch []candidate
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
}

// New checks the configuration. The machine does nothing before Start.
func New(cfg Config) (*Machine, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("round: %w", err)
	}
	cfg.setDefaults()
	m := &Machine{
		cfg:          cfg,
		tree:         newTree(),
		latest:       make([]latestSigned, cfg.N),
		peers:        make([]peerState, cfg.N),
		wait:         make([]bool, cfg.N),
		bodies:       map[Hash]*body{},
		floor:        cfg.Watermark,
		counter:      cfg.Counter,
		mayWatermark: cfg.Watermark,
		mayCounter:   cfg.Counter,
		limits:       cfg.Timeouts,
	}
	m.genesis = m.tree.add(cfg.Genesis.ID(), cfg.Genesis, 0)
	m.head = m.genesis
	if cfg.Head.Height > 0 {
		m.head = m.tree.add(cfg.Head.ID(), cfg.Head, 0)
		if m.head == nil {
			return nil, errors.New("round: the restored head does not follow from genesis: its run folder belongs to another job")
		}
	}
	m.hold(m.head)
	return m, nil
}

func (c *Config) validate() error {
	if c.N < 1 || c.N > MaxPeers {
		return fmt.Errorf("a roster of %d peers: 1 to %d are possible", c.N, MaxPeers)
	}
	if int(c.Self) >= c.N {
		return fmt.Errorf("peer %d is not on a roster of %d", c.Self, c.N)
	}
	if c.F < 0 || c.F > MaxFaulty(c.N) {
		return fmt.Errorf("f is %d, but %d peers tolerate at most %d Byzantine ones", c.F, c.N, MaxFaulty(c.N))
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
	if c.Head.Height > 0 && (c.Head.Slot < c.Head.Height || len(c.Head.Set) == 0) {
		return errors.New("the restored head is not a record")
	}
	t := &c.Timeouts
	for _, d := range []time.Duration{
		t.Start, t.GradientMin, t.GradientMax, t.BallotMin, t.BallotMax,
		t.Fetch, t.State, t.Retry, t.Orphan, t.Linger,
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
}

// Head returns the head and its ID.
func (m *Machine) Head() (Record, Hash) { return m.head.rec, m.head.id }

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
		m.received(&ev.Message)
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
			m.adopt(m.pursued, Fetched)
		}
	case StateUnavailable:
		if m.phase == phasePursue && m.pursued.id == ev.Record {
			m.stateLost(StateUnreachable)
		}
	case Timer:
	}
	for m.advance() {
	}
	m.setTimer()
	return m.out
}

// early notes what happens before Start.
func (m *Machine) early(ev Event) {
	if ev, ok := ev.(Connected); ok && m.other(ev.Peer) {
		m.peers[ev.Peer].connected = true
		m.peers[ev.Peer].met = true
	}
	if ev, ok := ev.(Disconnected); ok && m.other(ev.Peer) {
		m.peers[ev.Peer].connected = false
	}
}

func (m *Machine) emit(a Action) { m.out = append(m.out, a) }

func (m *Machine) report(kind ReportKind, p Peer, record Hash, text string) {
	m.emit(Report{Kind: kind, Peer: p, Slot: m.slot, Height: m.head.rec.Height, Record: record, Text: text})
}

func (m *Machine) other(p Peer) bool { return int(p) < m.cfg.N && p != m.cfg.Self }

func (m *Machine) start() {
	m.startEnd = m.now + m.limits.Start
	for p := range m.peers {
		m.peers[p].waiting = m.other(Peer(p))
	}
	if m.final(&m.head.rec) {
		m.enterFinal()
		return
	}
	m.beginSlot()
}

// final reports whether the run ends at a record.
func (m *Machine) final(r *Record) bool {
	_, ok := m.reason(r)
	return ok
}

func (m *Machine) reason(r *Record) (Reason, bool) {
	v := r.Validation
	if t := uint64(m.cfg.TargetAccuracy); t > 0 && v.Count > 0 && uint64(v.Correct)*10000 >= t*uint64(v.Count) {
		return TargetReached, true
	}
	return RoundsReached, m.cfg.Rounds > 0 && r.Height >= m.cfg.Rounds
}

// present reports whether p can be expected to say something. At the start
// connections may come and go, and what p says may come through others before
// its connection is there.
func (m *Machine) present(p Peer) bool {
	s := &m.peers[p]
	return s.connected || m.now < m.startEnd && !(s.met && s.heard)
}

func (m *Machine) connected(p Peer) {
	if !m.other(p) || m.peers[p].connected {
		return
	}
	m.peers[p].connected = true
	m.peers[p].met = true
	m.wantBodies()
	for _, n := range m.tree.nodes {
		n.unavailable = 0
	}
	m.dirty = true
}

func (m *Machine) disconnected(p Peer) {
	if !m.other(p) || !m.peers[p].connected {
		return
	}
	m.peers[p].connected = false
	m.dirty = true
	if !m.present(p) {
		m.lose(p, "connection lost")
	}
}

// lose takes p out of the wait-set, until it announces again.
func (m *Machine) lose(p Peer, why string) {
	m.wait[p] = false
	if m.peers[p].waiting {
		m.peers[p].waiting = false
		m.report(PeerLost, p, Hash{}, fmt.Sprintf("peer %s: %s", p, why))
	}
}

// returns takes p back into the wait-set.
func (m *Machine) returns(p Peer) {
	s := &m.peers[p]
	if !s.connected {
		return
	}
	s.misses = 0
	if !s.waiting {
		s.waiting = true
		m.report(PeerReturned, p, Hash{}, fmt.Sprintf("peer %s takes part again", p))
	}
	if m.phase == phaseGather {
		m.wait[p] = true
	}
}

// hear returns the place for what p says about a slot on a parent; nil if
// there are better things to remember.
func (m *Machine) hear(p Peer, slot uint64, parent Hash) *heard {
	if h := m.find(p, slot, parent); h != nil {
		return h
	}
	s := &m.peers[p]
	if len(s.inbox) < inboxSlots {
		s.inbox = append(s.inbox, heard{slot: slot, parent: parent})
		return &s.inbox[len(s.inbox)-1]
	}
	here := slot == m.slot && parent == m.head.id
	var oldest *heard
	for i := range s.inbox {
		h := &s.inbox[i]
		if h.slot == m.slot && h.parent == m.head.id {
			continue
		}
		if oldest == nil || h.slot < oldest.slot {
			oldest = h
		}
	}
	if !here && oldest.slot >= slot {
		return nil
	}
	*oldest = heard{slot: slot, parent: parent}
	return oldest
}

func (m *Machine) find(p Peer, slot uint64, parent Hash) *heard {
	inbox := m.peers[p].inbox
	for i := range inbox {
		if inbox[i].slot == slot && inbox[i].parent == parent {
			return &inbox[i]
		}
	}
	return nil
}

// here returns what p said about the current slot, nil if nothing.
func (m *Machine) here(p Peer) *heard { return m.find(p, m.slot, m.head.id) }

func (m *Machine) received(msg *Message) {
	p := msg.From
	if int(p) >= m.cfg.N || msg.validateFor(m.cfg.N) != nil {
		return
	}
	m.peers[p].heard = true
	if s, ok := msg.Body.(SignedRecord); ok {
		m.receivedRecord(p, &s)
		return
	}
	if p == m.cfg.Self {
		return // a message of before a restart, or one's own echo
	}
	h := m.hear(p, msg.Slot, msg.Parent)
	if h == nil {
		return
	}
	switch b := msg.Body.(type) {
	case Announce:
		m.receivedAnnounce(p, msg, b, h)
	case Ballot:
		if h.balloted {
			if !slices.Equal(h.ballot, b.Entries) {
				m.conflict(msg)
			}
			return
		}
		h.balloted, h.ballot = true, b.Entries
		m.wantBodies()
		if m.phase == phaseBallot && h == m.here(p) {
			m.answers.add(m.now - m.ballotAt)
		}
		m.hurry()
	case Return:
		if !h.returned {
			h.returned = true
			m.learn(msg.Parent, &b.Head)
		}
		m.maybeReturns(p, msg.Slot, msg.Parent)
	}
}

func (m *Machine) conflict(msg *Message) {
	m.report(Conflict, msg.From, Hash{}, fmt.Sprintf("peer %s signed two different messages of type %s for slot %d: the second is ignored", msg.From, msg.Type(), msg.Slot))
}

func (m *Machine) receivedAnnounce(p Peer, msg *Message, a Announce, h *heard) {
	if h.announced {
		if h.announce != a {
			m.conflict(msg)
		}
		return
	}
	if a.Bytes > m.cfg.MaxGradientBytes {
		m.report(InvalidMessage, p, Hash{}, fmt.Sprintf("peer %s announces a gradient of %d bytes, more than %d: it is left out", p, a.Bytes, m.cfg.MaxGradientBytes))
		a = Announce{BaseModel: a.BaseModel}
	}
	if n := m.tree.byID[msg.Parent]; n != nil && a.BaseModel != n.rec.Model {
		m.report(InvalidMessage, p, n.id, fmt.Sprintf("peer %s announces a gradient at another model than its parent's: it is left out", p))
		a = Announce{BaseModel: a.BaseModel}
	}
	h.announced, h.announce = true, a
	m.maybeReturns(p, msg.Slot, msg.Parent)
	if msg.Slot == m.slot && msg.Parent == m.head.id {
		m.wantBody(p, &h.announce)
		if m.phase > phaseGather && m.phase < phasePause && !a.Abstains() {
			m.late(p, m.began)
		}
	} else if msg.Slot == m.prevSlot && msg.Parent == m.prevParent && !a.Abstains() {
		m.late(p, m.prevBegan)
	}
}

func (m *Machine) late(p Peer, began time.Duration) {
	m.arrivals.add(m.now - began)
	m.report(LateGradient, p, Hash{}, fmt.Sprintf("the gradient of peer %s came too late", p))
}

// maybeReturns takes a peer back that says it is at a recent record of this
// chain, or in this slot or a later one.
func (m *Machine) maybeReturns(p Peer, slot uint64, parent Hash) {
	n := m.tree.byID[parent]
	if n == nil || slot+recent < m.slot || !m.head.descends(n) {
		return
	}
	m.returns(p)
}

func (m *Machine) receivedRecord(p Peer, s *SignedRecord) {
	r := &s.Record
	id := r.ID()
	if p == m.cfg.Self {
		if n := m.tree.byID[id]; n != nil && n.signers.has(p) {
			return // one's own echo
		}
		// Signed before a restart. Where the disk forgot that, remember.
		m.counter = max(m.counter, s.Counter)
		m.floor = max(m.floor, r.Slot)
	}
	invalid := func(why string) {
		m.report(InvalidMessage, p, id, fmt.Sprintf("peer %s signed a record that %s", p, why))
	}
	if int(r.FUsed) != m.fUsed(len(r.Set)) {
		invalid("uses a wrong f")
		return
	}
	if m.cfg.Rounds > 0 && r.Height > m.cfg.Rounds {
		invalid("is beyond the end of the run")
		return
	}
	for _, n := range m.tree.siblings(r.Parent) {
		if n.rec.Slot == r.Slot && n.id != id && n.signers.has(p) {
			m.conflict(&Message{From: p, Slot: r.Slot, Body: *s})
			return
		}
	}
	l := &m.latest[p]
	if s.Counter == l.counter && l.node != nil && l.node.id != id {
		m.conflict(&Message{From: p, Slot: r.Slot, Body: *s})
		return
	}
	n := m.learn(id, r)
	if n == nil {
		invalid("does not fit its parent")
		return
	}
	if !n.signers.has(p) {
		n.signers.add(p)
		n.failures, n.unavailable = 0, 0
	}
	if s.Counter >= l.counter {
		l.counter, l.node = s.Counter, n
	}
	m.dirty = true
	if p == m.cfg.Self {
		return
	}
	if h := m.hear(p, r.Slot, r.Parent); h != nil {
		h.record = n
		if m.phase == phaseRecord && h == m.here(p) {
			m.answers.add(m.now - m.recordAt)
		}
	}
}

// learn puts a record into the tree; nil if it does not fit its parent.
func (m *Machine) learn(id Hash, r *Record) *node {
	if len(m.tree.nodes) >= m.maxNodes() {
		m.sweep()
	}
	before := len(m.tree.nodes)
	n := m.tree.add(id, *r, m.now)
	m.dirty = m.dirty || len(m.tree.nodes) > before
	return n
}

// maxNodes bounds the tree: each latest signature and the head may hold a
// window, and as much again may gather before the next sweep.
func (m *Machine) maxNodes() int { return 2 * (window + 2) * (m.cfg.N + 2) }

func (m *Machine) sweep() {
	if m.mutant.holdAll {
		return
	}
	keep := make([]*node, 0, len(m.held)+4)
	keep = append(keep, m.held...)
	for _, n := range []*node{m.own, m.target, m.pursued, m.back} {
		if n != nil {
			keep = append(keep, n)
		}
	}
	m.floor = max(m.floor, m.tree.sweep(m.genesis, m.head, m.latest, func(p Peer) bool {
		return p == m.cfg.Self || m.peers[p].connected
	}, keep))
}

func (m *Machine) fUsed(set int) int { return min(m.cfg.F, (set-1)/2) }

// wantBody has a body fetched that was announced for the current slot.
func (m *Machine) wantBody(p Peer, a *Announce) {
	if a.Abstains() {
		return
	}
	b := m.bodies[a.Gradient]
	if b == nil {
		b = &body{}
		m.bodies[a.Gradient] = b
	}
	b.lastUse = m.begun
	if b.status != bodyWanted && b.status != bodyUnavailable {
		return
	}
	holders := []Peer{}
	if m.other(p) && m.peers[p].connected {
		holders = append(holders, p)
	}
	for q := range m.peers {
		if Peer(q) == p || !m.other(Peer(q)) || !m.peers[q].connected {
			continue
		}
		if h := m.here(Peer(q)); h != nil && h.balloted && slices.Contains(h.ballot, Entry{p, a.Gradient}) {
			holders = append(holders, Peer(q))
		}
	}
	b.status = bodyWanted
	if len(holders) > 0 {
		b.status = bodyFetching
		m.emit(Fetch{Peer: p, Gradient: a.Gradient, Bytes: a.Bytes, Holders: holders})
	}
}

// wantBodies has those bodies fetched for which there was nobody to ask.
func (m *Machine) wantBodies() {
	for p := range m.peers {
		if h := m.here(Peer(p)); h != nil && h.announced && !h.announce.Abstains() && m.other(Peer(p)) {
			if b := m.bodies[h.announce.Gradient]; b != nil && b.status == bodyWanted {
				m.wantBody(Peer(p), &h.announce)
			}
		}
	}
}

func (m *Machine) bodyReady(p Peer, g Hash) {
	b := m.bodies[g]
	if b == nil || b.status == bodyHeld {
		return
	}
	b.status = bodyHeld
	if int(p) < m.cfg.N && m.phase == phaseGather {
		if h := m.here(p); h != nil && h.announced && h.announce.Gradient == g {
			m.arrivals.add(m.now - m.began)
		}
	}
	m.dirty = true // a record may be recomputable now
}

func (m *Machine) bodyLost(p Peer, g Hash, status bodyStatus, why string) {
	b := m.bodies[g]
	if b == nil || b.status != bodyFetching {
		return
	}
	b.status = status
	m.report(BodyDropped, p, Hash{}, fmt.Sprintf("the gradient of peer %s %s", p, why))
}

func (m *Machine) gradient(parent Hash) *ownGradient {
	for i := range m.gradients {
		if m.gradients[i].parent == parent {
			return &m.gradients[i]
		}
	}
	return nil
}

// compute asks for this peer's gradient at n unless it is there or under way.
func (m *Machine) compute(slot uint64, n *node) {
	if g := m.gradient(n.id); g != nil && !g.failed {
		return
	} else if g != nil {
		g.failed = false
	} else {
		m.gradients = append(m.gradients, ownGradient{parent: n.id})
	}
	m.emit(Compute{Slot: slot, Height: n.rec.Height + 1, Parent: n.id})
}

func (m *Machine) gradientReady(ev *GradientReady) {
	g := m.gradient(ev.Parent)
	if g == nil || g.ready || g.failed || ev.Bytes == 0 {
		return
	}
	g.ready = true
	g.value = Announce{Gradient: ev.Gradient, Bytes: ev.Bytes, Codec: CodecFloat32, Validation: ev.Validation}
	m.bodies[ev.Gradient] = &body{status: bodyHeld, lastUse: m.begun + 1}
	if ev.Parent == m.head.id {
		if m.phase == phaseGather {
			m.arrivals.add(m.now - m.began)
			m.announce()
		} else if m.phase > phaseGather && m.phase < phasePause && !m.announced {
			m.late(m.cfg.Self, m.began)
		}
	}
}

func (m *Machine) gradientFailed(ev *GradientFailed) {
	g := m.gradient(ev.Parent)
	if g == nil || g.ready {
		return
	}
	g.failed = true
	if ev.Parent == m.head.id && m.phase == phaseGather {
		m.announce()
	}
}

// announce says what this peer has for the slot, once.
func (m *Machine) announce() {
	g := m.gradient(m.head.id)
	if m.announced || g == nil || !g.ready && !g.failed {
		return
	}
	m.announced = true
	a := g.value
	if g.failed {
		a = Announce{}
		m.report(GradientMissing, m.cfg.Self, Hash{}, "this peer has no gradient for the slot")
	} else {
		m.bodies[a.Gradient].lastUse = m.begun
	}
	a.BaseModel = m.head.rec.Model
	h := m.hear(m.cfg.Self, m.slot, m.head.id)
	h.announced, h.announce = true, a
	m.send(a)
}

func (m *Machine) send(b Body) {
	m.emit(Send{Message{From: m.cfg.Self, Slot: m.slot, Parent: m.head.id, Body: b}})
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

// nextSlot is the next that this peer may begin on the head.
func (m *Machine) nextSlot() uint64 {
	floor := m.floor
	if m.mutant.ignoreWatermark {
		floor = 0
	}
	if m.mutant.repeatSlot {
		return max(m.head.rec.Slot, floor) + 1
	}
	return max(m.head.rec.Slot, m.head.ownLast, floor) + 1
}

// ahead returns the highest slot that others work at on the head, if it is
// later than the given one, and charges the peer that said so.
func (m *Machine) ahead(slot uint64) uint64 {
	best, who := slot, -1
	for p := range m.peers {
		s := &m.peers[p]
		if !s.connected || s.jumped && m.head.rec.Height < s.jumpedAt+jumpHeights {
			continue
		}
		for i := range s.inbox {
			h := &s.inbox[i]
			if (h.announced || h.returned) && h.parent == m.head.id && h.slot > best && h.slot-slot <= maxJump {
				best, who = h.slot, p
			}
		}
	}
	if who >= 0 {
		m.peers[who].jumped = true
		m.peers[who].jumpedAt = m.head.rec.Height
	}
	return best
}

// jump leaves the slot for a later one that others work at on the same head.
func (m *Machine) jump() bool {
	slot := m.ahead(m.slot)
	if slot == m.slot {
		return false
	}
	m.trim()
	m.beginAt(slot)
	return true
}

// beginSlot begins the next slot on the head.
func (m *Machine) beginSlot() {
	slot := m.nextSlot()
	m.beginAt(m.ahead(slot))
}

func (m *Machine) beginAt(slot uint64) {
	if slot > MaxSlot {
		m.phase = phaseDone
		return
	}
	m.prevSlot, m.prevParent, m.prevBegan = m.slot, m.parent, m.began
	m.parent = m.head.id
	m.begun++
	m.slot, m.began = slot, m.now
	m.head.ownLast = slot
	m.phase = phaseGather
	m.timedOut, m.hurried, m.announced, m.recorded = false, false, false, false
	m.set, m.target, m.own, m.pursued = nil, nil, nil, nil
	m.retried = m.retried[:0]
	m.dirty = true
	m.deadline = max(m.now+m.gradientTimeout(), m.startDeadline())
	for p := range m.peers {
		if h := m.here(Peer(p)); h != nil && (h.announced || h.returned) {
			m.returns(Peer(p))
		}
		m.wait[p] = m.peers[p].waiting && m.present(Peer(p))
	}
	m.gradients = slices.DeleteFunc(m.gradients, func(g ownGradient) bool { return g.parent != m.head.id })
	m.cover(slot)
	if m.head.rec.Height > 0 && (m.fails > 0 || m.begun == 1 || !m.head.rec.Has(m.cfg.Self)) {
		m.send(Return{Head: m.head.rec})
	}
	m.compute(slot, m.head)
	m.announce()
	for p := range m.peers {
		if h := m.here(Peer(p)); h != nil && h.announced && m.other(Peer(p)) {
			m.wantBody(Peer(p), &h.announce)
		}
	}
	m.retain()
}

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

func (m *Machine) retain() {
	if m.head.rec.Height%window == 0 || len(m.tree.nodes) >= m.maxNodes() {
		m.sweep()
	}
	r := Retain{States: make([]Record, 0, len(m.held))}
	for _, n := range m.held {
		r.States = append(r.States, n.rec)
	}
	for g, b := range m.bodies {
		if b.lastUse+1 < m.begun && !m.mutant.holdAll {
			delete(m.bodies, g)
		} else {
			r.Gradients = append(r.Gradients, g)
		}
	}
	slices.SortFunc(r.Gradients, func(a, b Hash) int { return slices.Compare(a[:], b[:]) })
	r.BelowSlot = m.head.rec.Slot - min(m.head.rec.Slot, window)
	m.emit(r)
}

// hold notes that the host holds the state of n.
func (m *Machine) hold(n *node) {
	if !n.held {
		n.held = true
		m.held = append(m.held, n)
	}
}

// trim gives up the states that are not needed: kept are the head's, its
// parent's to step back, the one of the head before for those who come this
// way, and the record signed in this slot.
func (m *Machine) trim() {
	m.held = slices.DeleteFunc(m.held, func(n *node) bool {
		n.held = n == m.head || n == m.head.parent || n == m.back || n == m.own
		return !n.held
	})
}

// adopt makes n, whose state is held, the head, and goes on from there.
func (m *Machine) adopt(n *node, how How) {
	old := m.head
	reorganised := old != n && old.parent != nil && !n.descends(old)
	m.head = n
	m.back = old
	m.trim()
	m.fails = 0
	m.emit(Adopt{Record: n.rec, ID: n.id, How: how, Reorganised: reorganised})
	if reorganised {
		m.report(Reorganisation, m.cfg.Self, n.id, fmt.Sprintf("the head moved from %s (height %d) to another branch", old.id.Short(), old.rec.Height))
	}
	if n.rec.Degraded(m.cfg.F) {
		m.report(DegradedRecord, m.cfg.Self, n.id, fmt.Sprintf("only %d gradients: fewer than %d", len(n.rec.Set), 2*m.cfg.F+1))
	}
	if m.final(&n.rec) {
		m.enterFinal()
		return
	}
	m.beginSlot()
}

func (m *Machine) enterFinal() {
	m.phase = phaseFinal
	m.set, m.target, m.own, m.pursued = nil, nil, nil, nil
	m.dirty = true
	m.deadline = m.now + m.limits.Linger
	m.slot = m.nextSlot()
	m.retain()
	if m.latest[m.cfg.Self].node != m.head {
		m.cover(m.slot)
		m.send(Return{Head: m.head.rec})
	}
}

// passed reports whether p has gone on from the current slot.
func (m *Machine) passed(p Peer) bool {
	for i := range m.peers[p].inbox {
		h := &m.peers[p].inbox[i]
		if h.slot <= m.slot {
			continue
		}
		if h.parent == m.head.id {
			return true
		}
		if n := m.tree.byID[h.parent]; n != nil && n.parent == m.head {
			return true
		}
	}
	return false
}

// waited reports whether somebody is waited for of whom done is false.
func (m *Machine) waited(done func(p Peer, h *heard) bool) bool {
	for p, w := range m.wait {
		if !w {
			continue
		}
		if !m.present(Peer(p)) {
			m.lose(Peer(p), "did not take part in time")
			continue
		}
		if h := m.here(Peer(p)); (h == nil || !done(Peer(p), h)) && !m.passed(Peer(p)) {
			return true
		}
	}
	return false
}

func (m *Machine) announceDone(_ Peer, h *heard) bool {
	if !h.announced {
		return false
	}
	if h.announce.Abstains() {
		return true
	}
	b := m.bodies[h.announce.Gradient]
	return b != nil && b.status != bodyFetching && b.status != bodyWanted
}

func ballotDone(_ Peer, h *heard) bool { return h.balloted }
func recordDone(_ Peer, h *heard) bool { return h.record != nil }

// giveUp takes those out of the slot's wait-set that did not do what was
// waited for; unless hardly anybody did, for then it may be this peer that is
// cut off.
func (m *Machine) giveUp(done func(p Peer, h *heard) bool, miss bool) {
	answered := 0
	for p := range m.peers {
		if h := m.here(Peer(p)); m.other(Peer(p)) && h != nil && done(Peer(p), h) {
			answered++
		}
	}
	for p, w := range m.wait {
		if h := m.here(Peer(p)); !w || h != nil && done(Peer(p), h) {
			continue
		}
		if miss {
			m.peers[p].misses++
			if m.peers[p].misses >= missesAllowed && m.fails == 0 {
				m.lose(Peer(p), fmt.Sprintf("missed %d rounds", missesAllowed))
			}
		}
		if answered >= m.threshold() {
			m.wait[p] = false
		}
	}
}

// advance goes one step further where the slot allows it.
func (m *Machine) advance() bool {
	expired := m.now >= m.deadline
	switch m.phase {
	case phaseGather:
		if m.redirect() {
			return true
		}
		if m.jump() {
			return true
		}
		if m.announced && !m.waited(m.announceDone) {
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
				if n := m.choose(); n != m.own && n.descends(m.own) {
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

// redirect follows the fork choice where it leads elsewhere.
func (m *Machine) redirect() bool {
	if !m.dirty {
		return false
	}
	m.dirty = false
	n := m.choose()
	if n == m.head || n == m.target {
		return false
	}
	if n.parent == m.head && n.rec.Slot == m.slot && !m.recorded &&
		(m.phase == phaseGather || m.phase == phaseBallot || m.phase == phaseFetch) && m.follow(n) {
		return true
	}
	m.pursue(n)
	return true
}

// follow goes for a record of the current slot that enough others have agreed
// on, by computing it, so that it can be signed here as well.
func (m *Machine) follow(n *node) bool {
	for _, e := range n.rec.Set {
		if h := m.here(e.Peer); h == nil || !h.announced || h.announce.Gradient != e.Gradient {
			return false
		}
	}
	m.target, m.set = n, n.rec.Set
	m.phase = phaseFetch
	m.deadline = m.now + m.limits.Fetch
	m.retried = m.retried[:0]
	return true
}

// pursue goes to a head elsewhere: by its state if it is held, by computing it
// if everything is here, else by fetching the state.
func (m *Machine) pursue(n *node) {
	m.target, m.own = nil, nil
	if !n.held && !m.recomputable(n) {
		// Perhaps there is a step of the way that can be computed.
		for a := n.parent; a != nil; a = a.parent {
			if !a.held && m.recomputable(a) && !a.differs {
				n = a
				break
			}
		}
	}
	m.pursued = n
	switch {
	case n.held:
		m.adopt(n, Kept)
	case m.recomputable(n) && !n.differs:
		m.phase = phaseApply
		m.set = n.rec.Set
		m.emit(Apply{Slot: n.rec.Slot, Height: n.rec.Height, Parent: n.rec.Parent, Set: n.rec.Set, FUsed: n.rec.FUsed})
	default:
		m.phase = phasePursue
		m.deadline = m.now + m.limits.State
		m.emit(FetchState{Record: n.rec, ID: n.id, Holders: m.holders(n)})
	}
}

// settle is how long the goal of a pursuit may still move: a peer that comes
// late hears of old records first, whose states nobody keeps.
const settle = 500 * time.Millisecond

// repursue goes for a later head if that becomes known early in a pursuit.
// Afterwards the goal stands, or a fast run would always be ahead.
func (m *Machine) repursue() bool {
	if !m.dirty || m.now > m.deadline-m.limits.State+settle {
		return false
	}
	m.dirty = false
	if n := m.choose(); n != m.pursued && n != m.head {
		m.pursue(n)
		return true
	}
	return false
}

// holders lists the connected members, those first that should have the state
// of n as their head or its parent.
func (m *Machine) holders(n *node) []Peer {
	if n == m.genesis {
		return nil
	}
	var likely, others []Peer
	for p := range m.peers {
		if !m.peers[p].connected {
			continue
		}
		if l := m.latest[p].node; l != nil && (l == n || l.parent == n) {
			likely = append(likely, Peer(p))
		} else {
			others = append(others, Peer(p))
		}
	}
	return append(likely, others...)
}

// stateLost passes a head over until a holder appears.
func (m *Machine) stateLost(kind ReportKind) {
	n := m.pursued
	m.pursued = nil
	n.unavailable = m.now + m.limits.Retry<<min(n.failures, 4)
	n.failures++
	if kind == TimeoutState {
		m.timedOut = true
	}
	m.report(kind, m.cfg.Self, n.id, fmt.Sprintf("nobody gave the state of %s (height %d)", n.id.Short(), n.rec.Height))
	m.rechoose()
}

// rechoose goes on from wherever the fork choice leads now.
func (m *Machine) rechoose() {
	m.dirty = false
	n := m.choose()
	switch {
	case n != m.head:
		m.pursue(n)
	case m.final(&m.head.rec):
		m.enterFinal()
	default:
		m.beginSlot()
	}
}

// hurry shortens the wait for announcements once enough others gave theirs up:
// they will not wait long for this peer's ballot.
func (m *Machine) hurry() {
	if m.phase != phaseGather || m.hurried {
		return
	}
	n := 0
	for p := range m.peers {
		if h := m.here(Peer(p)); h != nil && h.balloted {
			n++
		}
	}
	if n >= m.threshold() && n > 0 {
		m.hurried = true
		m.deadline = min(m.deadline, m.now+m.answerTimeout()/2)
	}
}

func (m *Machine) castBallot() {
	var set []Entry
	for p := range m.peers {
		h := m.here(Peer(p))
		if h == nil || !h.announced || h.announce.Abstains() {
			continue
		}
		if b := m.bodies[h.announce.Gradient]; b != nil && b.status == bodyHeld || m.mutant.ballotUnheld {
			set = append(set, Entry{Peer(p), h.announce.Gradient})
		}
	}
	h := m.hear(m.cfg.Self, m.slot, m.head.id)
	h.balloted, h.ballot = true, set
	m.phase = phaseBallot
	m.ballotAt = m.now
	m.deadline = m.now + m.answerTimeout()
	m.dirty = true
	m.send(Ballot{Entries: set})
}

// candidate is an entry with the ballots for it, its announcer's not counted.
type candidate struct {
	entry   Entry
	support int
}

// decide makes the set from the ballots.
func (m *Machine) decide() {
	ballots, c := 0, m.scratch[:0]
	for p := range m.peers {
		h := m.here(Peer(p))
		if h == nil || !h.balloted {
			continue
		}
		ballots++
		for _, e := range h.ballot {
			i := slices.IndexFunc(c, func(c candidate) bool { return c.entry == e })
			if i < 0 {
				i = len(c)
				c = append(c, candidate{entry: e})
			}
			if e.Peer != Peer(p) {
				c[i].support++
			}
		}
	}
	slices.SortFunc(c, func(a, b candidate) int {
		switch {
		case a.entry.Peer != b.entry.Peer:
			return int(a.entry.Peer) - int(b.entry.Peer)
		case a.support != b.support:
			return b.support - a.support
		}
		return slices.Compare(a.entry.Gradient[:], b.entry.Gradient[:])
	})
	m.scratch = c
	m.set = nil
	for i, x := range c {
		if i > 0 && c[i-1].entry.Peer == x.entry.Peer {
			continue // a peer's best supported one only
		}
		if ballots == 1 { // this peer's
			if x.entry.Peer == m.cfg.Self {
				m.set = append(m.set, x.entry)
			}
			continue
		}
		others := ballots
		if h := m.here(x.entry.Peer); h != nil && h.balloted {
			others--
		}
		if x.support >= max(1, min(m.cfg.F+1, others)) {
			m.set = append(m.set, x.entry)
		}
	}
	if len(m.set) == 0 {
		m.failSlot("no gradient has enough ballots")
		return
	}
	m.phase = phaseFetch
	m.deadline = m.now + m.limits.Fetch
}

// collect waits for the announcements and bodies of the set, then has it
// applied.
func (m *Machine) collect(expired bool) bool {
	missing := false
	for _, e := range m.set {
		h := m.here(e.Peer)
		if h == nil || !h.announced {
			missing = true
			continue
		}
		if h.announce.Gradient != e.Gradient {
			m.failSlot(fmt.Sprintf("peer %s announced something else to others", e.Peer))
			return true
		}
		b := m.bodies[e.Gradient]
		if b != nil && b.status == bodyHeld {
			continue
		}
		missing = true
		if b != nil && (b.status == bodyFetching || b.status == bodyWanted) {
			continue
		}
		if b != nil && (b.status == bodyRefused || slices.Contains(m.retried, e.Gradient)) {
			m.failSlot(fmt.Sprintf("the gradient of peer %s cannot be had", e.Peer))
			return true
		}
		m.retried = append(m.retried, e.Gradient)
		m.wantBody(e.Peer, &h.announce)
	}
	if !missing {
		m.phase = phaseApply
		m.emit(Apply{Slot: m.slot, Height: m.head.rec.Height + 1, Parent: m.head.id, Set: m.set, FUsed: uint16(m.fUsed(len(m.set)))})
		return true
	}
	if expired {
		m.timedOut = true
		m.report(TimeoutFetch, m.cfg.Self, Hash{}, fmt.Sprintf("waited %v for the gradients of the record", m.limits.Fetch))
		m.failSlot("a gradient of the record could not be had in time")
		return true
	}
	return false
}

func (m *Machine) applied(ev *Applied) {
	if m.phase != phaseApply {
		return
	}
	if n := m.pursued; n != nil {
		if ev.Slot != n.rec.Slot || ev.Parent != n.rec.Parent || !slices.Equal(ev.Set, n.rec.Set) {
			return
		}
		m.pursued = nil
		if m.differs(n, ev) {
			m.rechoose()
			return
		}
		m.hold(n)
		m.adopt(n, Recomputed)
		return
	}
	if ev.Slot != m.slot || ev.Parent != m.head.id || !slices.Equal(ev.Set, m.set) {
		return
	}
	r := Record{
		Slot: m.slot, Height: m.head.rec.Height + 1, Parent: m.head.id, Set: m.set,
		FUsed: uint16(m.fUsed(len(m.set))), Validation: m.medianValidation(),
		Model: ev.Model, State: ev.State,
	}
	if n := m.target; n != nil {
		switch {
		case m.mutant.believe:
			r = n.rec
		case m.differs(n, ev):
			m.failSlot("its model differs from the others'")
			return
		case r.ID() != n.id:
			// The same model, but an announcement with another validation
			// result: the record is theirs, and not signed here.
			m.hold(n)
			m.adopt(n, Recomputed)
			return
		}
	}
	m.sign(r)
}

// differs checks a record against what the host computed from its set.
func (m *Machine) differs(n *node, ev *Applied) bool {
	if n.rec.Model == ev.Model && n.rec.State == ev.State || m.mutant.believe {
		return false
	}
	n.differs = true
	m.report(ModelDiffers, m.cfg.Self, n.id, fmt.Sprintf("record %s (height %d) names model %s, but its set gives %s here", n.id.Short(), n.rec.Height, n.rec.Model.Short(), ev.Model.Short()))
	return true
}

func (m *Machine) applyFailed(ev *ApplyFailed) {
	if m.phase != phaseApply {
		return
	}
	if n := m.pursued; n != nil {
		if ev.Slot == n.rec.Slot && ev.Parent == n.rec.Parent {
			n.differs = true
			m.pursued = nil
			m.rechoose()
		}
		return
	}
	if ev.Slot == m.slot && ev.Parent == m.head.id {
		m.failSlot("the update failed: " + ev.Reason)
	}
}

// sign signs this peer's record of the slot.
func (m *Machine) sign(r Record) {
	m.cover(m.slot)
	m.counter++
	id := r.ID()
	m.send(SignedRecord{Record: r, Counter: m.counter, TimedOut: m.timedOut})
	n := m.tree.add(id, r, m.now)
	n.signers.add(m.cfg.Self)
	m.hold(n)
	m.latest[m.cfg.Self] = latestSigned{counter: m.counter, node: n}
	m.hear(m.cfg.Self, m.slot, m.head.id).record = n
	m.own, m.recorded, m.target = n, true, nil
	m.phase = phaseRecord
	m.recordAt = m.now
	m.deadline = m.now + m.answerTimeout()
	m.dirty = true
	if !m.final(&r) {
		m.compute(max(m.slot, m.floor)+1, n)
	}
}

// conclude ends a slot in which this peer signed.
func (m *Machine) conclude() {
	m.dirty = false
	n := m.choose()
	switch {
	case m.own != nil && n.descends(m.own):
		m.adopt(m.own, Recomputed)
	case n == m.head:
		m.failSlot("too few signed the same record")
	default:
		m.pursue(n)
	}
}

// failSlot goes on to the next slot on the same head. Everyone who is
// connected is waited for again: who does not wait, signs alone.
func (m *Machine) failSlot(why string) {
	m.report(SlotFailed, m.cfg.Self, Hash{}, fmt.Sprintf("slot %d: %s", m.slot, why))
	m.trim()
	m.target, m.own = nil, nil
	m.fails++
	for p := range m.peers {
		m.peers[p].jumped = false
		if m.peers[p].connected && !m.peers[p].waiting {
			m.returns(Peer(p))
		}
	}
	if m.timedOut {
		m.beginSlot()
		return
	}
	m.phase = phasePause
	m.deadline = m.now + min(pauseFirst<<min(m.fails-1, 10), pauseMax)
	m.dirty = true
}

func (m *Machine) medianValidation() Validation {
	var losses []int64
	var counts []Validation
	for _, e := range m.set {
		if h := m.here(e.Peer); h != nil && h.announce.Validation.Count > 0 {
			losses = append(losses, h.announce.Validation.LossMicro)
			counts = append(counts, h.announce.Validation)
		}
	}
	if len(losses) == 0 {
		return Validation{}
	}
	slices.Sort(losses)
	slices.SortFunc(counts, func(a, b Validation) int {
		x, y := uint64(a.Correct)*uint64(b.Count), uint64(b.Correct)*uint64(a.Count)
		switch {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return int(int64(a.Count) - int64(b.Count))
	})
	mid := (len(losses) - 1) / 2
	return Validation{LossMicro: losses[mid], Correct: counts[mid].Correct, Count: counts[mid].Count}
}

// finish ends the run once all connected members are at the head.
func (m *Machine) finish() bool {
	expired := m.now >= m.deadline
	for p := range m.peers {
		if !m.peers[p].connected || m.latest[p].node == m.head {
			continue
		}
		at := slices.ContainsFunc(m.peers[p].inbox, func(h heard) bool {
			return h.returned && h.parent == m.head.id
		})
		if !at && !expired {
			return false
		}
		if !at {
			m.report(LingerExpired, Peer(p), m.head.id, fmt.Sprintf("peer %s is not at the last record", Peer(p)))
		}
	}
	reason, _ := m.reason(&m.head.rec)
	m.emit(Finished{Record: m.head.rec, ID: m.head.id, Reason: reason})
	m.phase = phaseDone
	return false
}

// setTimer asks for a wake-up at the phase's deadline, or at the end of the
// start if somebody is waited for until then.
func (m *Machine) setTimer() {
	var at time.Duration
	switch m.phase {
	case phaseIdle, phaseApply, phaseDone:
	default:
		at = m.deadline
		if s := m.startDeadline(); s > 0 {
			at = min(at, s)
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

func (m *Machine) answerTimeout() time.Duration {
	if m.answers.n < fewSamples {
		return m.limits.BallotMax
	}
	var buf [samples]time.Duration
	s := m.answers.sorted(&buf)
	return min(max(4*s[(len(s)-1)*99/100], m.limits.BallotMin), m.limits.BallotMax)
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
