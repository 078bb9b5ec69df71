package spirt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/p2p"
	"github.com/spirt-ml/spirt/tensor"
)

// loop is what the goroutine of peer.run keeps: the machine and what it asked
// for that is not answered yet.
type loop struct {
	machine *round.Machine
	started time.Time
	timer   *time.Timer

	results chan result
	wg      sync.WaitGroup // of the goroutines that send results

	records  map[round.Hash]round.Record // whose states are kept
	head     round.Record
	headAt   time.Time
	own      map[uint64]computed // this peer's own averages, by height
	timeouts int
	failures int // averages that failed in a row
	warnings int
	minute   time.Duration                 // since started, of told
	told     map[int]int                   // events about each member in that minute
	stop     map[string]context.CancelFunc // of work that the machine may replace or drop
	finished *round.Finished
	writing  string             // name of the checkpoint that is being written
	waiting  *pendingCheckpoint // to be written next
	watch    stopwatch
	slow     patrol
	journal  *journal
	claims   claims
	onDisk   []round.Hash        // checkpoints that were last kept
	known    map[round.Hash]bool // rosters that the machine was told of

	validation *validation // the last that was begun on this chain, or nil
}

// validation is one of the model that follows a record, for the chain that goes
// on from there.
type validation struct {
	record round.Record
	last   round.Hash // the record up to which this peer followed that chain
	stop   context.CancelFunc
	done   chan struct{}    // closed at the end
	result round.Validation // Count 0: there is none
}

// lastValidation is how long a peer that is stopped waits for a validation.
const lastValidation = 10 * time.Second

// end waits so long for the result, and does without it then.
func (v *validation) end(patience time.Duration) {
	if v == nil {
		return
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-v.done:
	case <-timer.C:
		v.stop()
		<-v.done
	}
}

// result is what a goroutine found, and an error that ends the peer.
type result struct {
	event  round.Event
	own    computed // of a gradient, for the height
	height uint64
	err    error
	done   func() // called once the event was handled or dropped; may be nil

	dropped func() error // not nil once the work was replaced or is not wanted
}

func (r result) close() {
	if r.done != nil {
		r.done()
	}
}

// computed is what is told of this peer's own average.
type computed struct {
	loss    *float64 // mean over the minibatches; nil if no function told it
	samples int
}

// maxFailures is how many averages may fail in a row before the peer gives
// up.
const maxFailures = 3

// maxWarnings bounds what one peer writes about what others do wrong.
const maxWarnings = 1000

// openLoop restores the head from the last checkpoint, or makes the state of
// genesis, and makes the machine.
func (p *peer) openLoop() error {
	slot, counter, err := readWatermark(filepath.Join(p.dir, watermarkFile))
	if err != nil {
		return err
	}
	genesis, err := p.genesis()
	if err != nil {
		return err
	}
	if p.vote, err = p.readVote(); err != nil {
		return err
	}
	checkpoints, err := p.recover()
	if err != nil {
		return err
	}
	head := genesis
	l := &p.loop
	l.timer, l.results = time.NewTimer(time.Hour), make(chan result)
	l.records = map[round.Hash]round.Record{genesis.ID(): genesis, head.ID(): head}
	l.head, l.own, l.stop, l.told, l.claims = head, map[uint64]computed{}, map[string]context.CancelFunc{}, map[int]int{}, claims{}
	_, average := p.store.codec()
	cfg := round.Config{
		Self:    round.Peer(p.n - 1),
		Genesis: genesis, Rounds: uint64(p.job.Rounds), TargetAccuracy: uint32(math.Ceil(p.job.TargetAccuracy*1e4 - 1e-6)), // 0 stays 0
		Patience: uint32(p.job.Patience), MinDelta: int64(math.Round(p.job.MinDelta * 1e6)),
		MaxGradientBytes: uint64(average), Watermark: slot, Counter: counter,
		CheckpointEvery: p.ids.rosters.genesis.CheckpointEvery, Voted: p.vote.Target, Timeouts: round.Timeouts{State: 30*time.Second + p.job.transferTime(p.store.params)}, PauseAfter: uint64(p.job.PauseAfter),
	}
	l.known = map[round.Hash]bool{}
	for _, r := range p.ids.rosters.training() {
		l.known[r.Hash()] = true
		cfg.Rosters = append(cfg.Rosters, p.rosterOf(r))
	}
	for i, c := range checkpoints {
		if i == 0 {
			head, cfg.Head, cfg.Links = c.record, c.record, c.links
			if v := c.pending; v != nil && v.Result.Count > 0 {
				l.validation = &validation{record: round.Record{Height: v.Round}, last: head.ID(), stop: func() {}, done: make(chan struct{}), result: v.Result}
				close(l.validation.done)
			}
			p.log.Info("going on from a checkpoint", "round", head.Height)
		} else if i <= 4 {
			cfg.Kept = append(cfg.Kept, c.record)
		}
		l.records[c.record.ID()] = c.record
	}
	before, err := readJournal(filepath.Join(p.dir, journalFile), p.ids.job.String())
	if err != nil {
		p.warn("%v: what it says of the bill and of the last steps is lost", err)
	}
	// Of a head in the middle of a validation the result would be lost.
	if r := before.Head.Record; r != nil && r.Height > head.Height && p.job.pending(r.Height) == 0 && p.kept(r) {
		l.validation = nil
		if cfg.OnDisk = genesis.ID(); head.Height > 0 {
			cfg.OnDisk = head.ID()
			cfg.Kept = append([]round.Record{head}, cfg.Kept[:min(len(cfg.Kept), 4)]...)
		}
		head, cfg.Head, cfg.Links = *r, *r, before.Head.Links
		l.records[r.ID()] = *r
	}
	l.head = head
	l.machine, err = round.New(cfg)
	p.resumed(before)
	return err
}

// kept reports whether the state of a record that was the head is in the
// database still, as it is where that did not end with the peer.
func (p *peer) kept(r *round.Record) bool {
	params, opt := p.store.stateKeys(*r)
	model, err := p.db.Hash(params)
	state, err2 := p.db.Hash(opt)
	if err != nil || err2 != nil || model != treehash.Hash(r.Model) || state != treehash.Hash(r.State) || p.ids.rosters.get(r.Roster) == nil {
		return false
	}
	p.store.offer(model, params)
	p.store.offer(state, opt)
	return true
}

// resumed tells where this peer goes on, and has its meter go on too.
func (p *peer) resumed(before past) {
	l := &p.loop
	l.journal = openJournal(p.dir, p.ids.job.String(), before, func(err error) {
		p.warn("the journal cannot be written: %v: this peer trains on, and would forget its bill when it is killed", err)
	})
	l.journal.step = p.cfg.step
	p.onClose(l.journal.close)
	var used bill.Usage
	if u := before.Head.Used; u != nil {
		used = *u
	}
	p.meter.restore(used, time.Duration(before.Head.Elapsed)*time.Millisecond)
	if before.Entries == 0 {
		return
	}
	e := Event{Event: "resume", Round: l.head.Height, Slot: before.Slot, Step: before.Step}
	switch {
	case before.Step == stepStop || before.Step == stepEnd:
		e.Message = fmt.Sprintf("stopped after round %d, goes on from there", l.head.Height)
	case l.head.Height == before.Head.Round:
		e.Message = fmt.Sprintf("ended at the step %s of round %d, goes on from round %d", before.Step, before.Round, l.head.Height)
	default:
		e.Message = fmt.Sprintf("ended at the step %s of round %d, goes on from the checkpoint of round %d; the rounds since come from the others, or are computed again", before.Step, before.Round, l.head.Height)
	}
	p.log.Info("resumed", "step", before.Step, "round", l.head.Height)
	p.emit(e)
}

// rosterOf is what the machine needs to know of a roster.
func (p *peer) rosterOf(r *membership.Roster) round.Roster {
	out := round.Roster{
		Hash: r.Hash(), Previous: r.Previous, F: int(r.F), Emergency: r.Emergency,
		Minibatches: sharesOf(r.Members, p.job.BatchesPerRound).dealt(),
	}
	for _, m := range r.Members {
		out.Members = append(out.Members, round.Peer(m.Index))
	}
	return out
}

// learnRosters tells the machine and the network of rosters that are new in
// the run folder or came over the network.
func (p *peer) learnRosters(ctx context.Context) error {
	l := &p.loop
	if err := p.checkKey(); err != nil {
		return err
	}
	p.spread()
	for _, r := range p.ids.rosters.training() {
		id := r.Hash()
		if l.known[id] {
			continue
		}
		l.known[id] = true
		if err := p.setMembers(); err != nil {
			return fmt.Errorf("roster %s: %w", id.Short(), err)
		}
		if err := p.step(ctx, round.RosterKnown{Roster: p.rosterOf(r)}); err != nil {
			return err
		}
	}
	return nil
}

// broadcast signs a message and floods it.
func (p *peer) broadcast(m round.Message) error {
	data, id, err := round.Sign(p.signerUnder(m.Roster), p.ids.job, m)
	if err != nil {
		return err
	}
	return p.host.Broadcast(data, p2p.Meta{ID: id, From: p.n - 1, Slot: m.Slot, Sticky: sticky(m)})
}

// genesis makes the state that every peer of the job starts from, and returns
// its record.
func (p *peer) genesis() (round.Record, error) {
	params := make([]float32, p.model.NumParams())
	p.model.Init(params, p.job.Seed)
	state := make([]float32, p.store.state)
	model, optimizer, err := p.store.putState(tensor.Bytes(params), tensor.Bytes(state), 0)
	if err != nil {
		return round.Record{}, fmt.Errorf("storing the initial parameters: %w", err)
	}
	return round.Genesis(p.ids.job, p.ids.roster, model, optimizer), nil
}

// run feeds the machine until it has finished or ctx is cancelled.
func (p *peer) run(ctx context.Context) error {
	l, outer := &p.loop, ctx
	ctx, cancel := context.WithCancel(ctx)
	defer l.wg.Wait()
	defer func() { l.validation.end(0) }()
	defer cancel()
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		p.discover(ctx)
	}()
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		p.discoverNetwork(ctx)
	}()
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		p.catchUp(ctx)
	}()
	p.log.Info("peer started", "peer", p.n, "addresses", p.host.Addrs())
	l.started = time.Now()
	if l.machine == nil {
		pending, err := p.lobby(ctx)
		if err == nil {
			err = p.openLoop()
		}
		if err != nil {
			return err
		}
		l.started = time.Now()
		for _, e := range pending {
			if err := p.network(ctx, e); err != nil {
				return err
			}
		}
	}
	l.headAt = time.Now()
	l.watch.lap(l.headAt)
	p.meter.begin(l.headAt)
	tick := time.NewTicker(patrolEvery)
	defer tick.Stop()
	if err := p.step(ctx, round.Start{}); err != nil {
		return err
	}
	if err := p.replayVotes(ctx); err != nil {
		return err
	}
	for l.finished == nil {
		var err error
		select {
		case <-ctx.Done():
			l.validation.end(lastValidation)
			l.wg.Wait()
			err := p.leaveHead(l.head)
			if err == nil {
				p.note(stepStop, "")
			} else {
				p.warn("this peer stops without a checkpoint of round %d, and goes on from the one before: %v", l.head.Height, err)
			}
			return errors.Join(ErrInterrupted, err)
		case <-tick.C:
			p.patrol(time.Now())
		case e := <-p.host.Events():
			err = p.network(ctx, e)
		case <-p.ids.rosters.changed:
			err = p.learnRosters(ctx)
		case petition := <-p.relayed:
			p.tell(p.standing(), round.Petition{Data: petition})
		case r := <-l.results:
			if err = r.err; err == nil && r.dropped() == nil { // it may have been dropped in the moment it was sent
				err = p.result(ctx, r)
			}
			r.close()
		case <-l.timer.C:
			err = p.step(ctx, round.Timer{})
		}
		if err != nil {
			return err
		}
	}
	cancel()
	l.wg.Wait()
	err := p.finish()
	p.seeOff(outer)
	return err
}

// seeOff stays while others still fetch a state, the last one perhaps, as long
// as one may take: they would never have it once all who do have left.
func (p *peer) seeOff(ctx context.Context) {
	const poll = 100 * time.Millisecond
	tick := time.NewTicker(poll)
	defer tick.Stop()
	end := time.After(p.job.transferTime(p.store.params))
	for p.store.serving(20*poll) && p.host.Stats().Connected > 0 {
		select {
		case <-p.host.Events():
		case <-tick.C:
		case <-end:
			return
		case <-ctx.Done():
			return
		}
	}
}

// network passes on what happened on the network.
func (p *peer) network(ctx context.Context, e p2p.Event) error {
	switch e := e.(type) {
	case p2p.Connected:
		p.emitMember(e.Member, Event{State: "connected"})
		p.greet()
		return p.step(ctx, round.Connected{Peer: round.Peer(e.Member)})
	case p2p.Disconnected:
		if p.loop.head.Height+1 < uint64(p.job.Rounds) { // at the end they leave
			p.emitMember(e.Member, Event{State: "lost", Message: e.Reason})
			if l := &p.loop; l.slow.lost(time.Now(), p.host.Stats().Connected) {
				p.warnOf(events.CauseNetwork, 0, "this peer has lost all others at once: %s", networkState())
			}
		}
		return p.step(ctx, round.Disconnected{Peer: round.Peer(e.Member)})
	case p2p.Message:
		m, err := p.take(e)
		if err != nil {
			return fmt.Errorf("a message that was accepted before: %w", err)
		}
		if p.hosted(m) {
			return nil
		}
		if a, ok := m.Body.(round.Announce); ok && p.job.BudgetUSD > 0 {
			p.loop.claims[m.From] = max(p.loop.claims[m.From], a.Spent)
		}
		return p.step(ctx, round.Received{Message: m, ID: e.Meta.ID})
	case p2p.Refused:
		p.warnBounded("refused %s at %s: %s", e.Remote, e.Address, e.Reason)
	}
	return nil
}

// A member that comes and goes without end fills no disk: of each so many
// events are told in a minute.
const maxMemberEvents = 60

// emitMember tells what became of a member.
func (p *peer) emitMember(member int, e Event) {
	l := &p.loop
	if minute := time.Since(l.started) / time.Minute; minute != l.minute {
		l.minute, l.told = minute, map[int]int{}
	}
	if l.told[member]++; l.told[member] <= maxMemberEvents {
		e.Event, e.Peer = "peer", member+1
		p.emit(e)
	}
}

// result passes on what a goroutine has done.
func (p *peer) result(ctx context.Context, r result) error {
	l := &p.loop
	switch e := r.event.(type) {
	case written:
		return p.checkpointWritten(ctx, e)
	case round.GradientReady:
		l.failures = 0
		l.own[r.height] = r.own
		e.Spent, e.Stop = p.wish(e.Parent)
		r.event = e
		p.note(stepAverage, e.Gradient.String())
	case round.BodyReady:
		p.note(stepHeld, e.Gradient.String())
	case round.Applied:
		p.note(stepApplied, e.Model.String())
	case round.StateReady:
		p.note(stepState, e.Record.String())
	case round.VotePersisted:
		p.note(stepVote, e.Target.String())
	case round.GradientFailed:
		if l.failures++; l.failures >= maxFailures {
			return fmt.Errorf("no gradient in %d rounds running, see the warnings above: if it is not finite, a smaller learning rate (--lr) may help", l.failures)
		}
	}
	return p.step(ctx, r.event)
}

// step gives the machine an event and does what it asks for.
func (p *peer) step(ctx context.Context, e round.Event) error {
	l := &p.loop
	actions := l.machine.Step(time.Since(l.started), e)
	if l.watch.turn(l.machine.Progress().Step, time.Now()) {
		l.slow.reset(time.Now())
	}
	for _, a := range actions {
		if err := p.act(ctx, a); err != nil {
			return err
		}
	}
	return nil
}

// act does one thing that the machine asked for. What takes long is done by a
// goroutine, whose result comes back to loop.
func (p *peer) act(ctx context.Context, a round.Action) error {
	l := &p.loop
	p.log.Debug(a.String())
	switch a := a.(type) {
	case round.Persist:
		if err := writeWatermark(filepath.Join(p.dir, watermarkFile), a.Watermark, a.Counter); err != nil {
			return err
		}
		p.note(stepPersist, "")
	case round.Send:
		if s, ok := a.Message.Body.(round.SignedRecord); ok { // the next gradient may build on it at once
			l.records[s.Record.ID()] = s.Record
		}
		if err := p.broadcast(a.Message); err != nil {
			return err
		}
		switch a.Message.Type() {
		case round.TypeAnnounce:
			p.note(stepAnnounce, "")
		case round.TypeBallot:
			p.note(stepBallot, "")
		case round.TypeRecord:
			p.note(stepRecord, "")
		}
	case round.WriteCheckpoint:
		p.note(stepCheckpoint, checkpointName(&a.Record))
		p.writeCheckpoint(ctx, a)
	case round.PersistVote:
		p.persistVote(ctx, a)
	case round.Accuse:
		p.accuse(ctx, a)
	case round.Gate:
		p.gate(ctx, a)
	case round.Final:
		p.emit(Event{Event: "final", Round: a.Checkpoint.Height})
	case round.SetTimer:
		l.timer.Stop()
		if a.At != 0 {
			l.timer.Reset(max(0, a.At-time.Since(l.started)))
		}
	case round.Compute:
		parent := l.records[a.Parent] // one that is not kept has no state: that fails there
		v := p.validate(ctx, parent)
		p.note(stepCompute, "")
		p.background(ctx, "compute", func(ctx context.Context) result { return p.compute(ctx, a, parent, v) })
	case round.Fetch:
		p.note(stepFetch, a.Gradient.String())
		p.background(ctx, "fetch/"+a.Gradient.String(), func(ctx context.Context) result { return p.fetch(ctx, a) })
	case round.Apply:
		parent := l.records[a.Parent]
		p.note(stepApply, "")
		p.background(ctx, "apply", func(context.Context) result { return p.apply(a, parent) })
	case round.FetchState:
		l.records[a.ID] = a.Record
		p.note(stepPursue, a.ID.String())
		p.background(ctx, "state", func(ctx context.Context) result { return p.fetchState(ctx, a) })
	case round.Adopt:
		p.adopt(ctx, a)
	case round.Retain:
		p.retain(a)
	case round.Report:
		p.report(a)
	case round.Finished:
		l.finished = &a
		p.note(stepFinish, "")
	}
	return nil
}

// note writes a step into the journal.
func (p *peer) note(step, name string) {
	at := p.loop.machine.Progress()
	p.loop.journal.note(entry{Step: step, Slot: at.Slot, Round: at.Height, Name: name})
}

// wish returns what this peer says of its budget with its average: what the run
// has cost it, in billionths of a dollar, and whether the run should stop.
func (p *peer) wish(parent round.Hash) (spent uint64, stop round.Stop) {
	l := &p.loop
	p.meter.settle(time.Now(), p.sent())
	_, elapsed, cost := p.meter.totals()
	spent = uint64(cost / 1000)
	if limit := p.job.MaxTime; limit > 0 && elapsed >= limit {
		return spent, round.StopTime
	}
	if p.job.BudgetUSD > 0 {
		l.claims[round.Peer(p.n-1)] = spent
		r := l.records[parent]
		total := l.claims.total(p.sharesAt(r))
		next := total / bill.Money(r.Height+1) // what a round takes: this one is not all paid, and the next begins before it ends
		if (total + 2*next).Dollars() > p.job.BudgetUSD {
			return spent, round.StopMoney
		}
	}
	return spent, round.GoOn
}

// background runs f and passes on its result. Work of the same name that is
// still running is cancelled and its result dropped.
func (p *peer) background(ctx context.Context, name string, f func(ctx context.Context) result) {
	l := &p.loop
	if stop := l.stop[name]; stop != nil {
		stop()
	}
	ctx, l.stop[name] = context.WithCancel(ctx)
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		r := f(ctx)
		r.dropped = ctx.Err
		select {
		case l.results <- r:
		case <-ctx.Done():
			r.close()
		}
	}()
}

// farewell is how long a member that is expelled stays connected, so that it
// gets the proof and knows: nothing that it says counts meanwhile.
const farewell = 500 * time.Millisecond

// gate cuts a guilty member off.
func (p *peer) gate(ctx context.Context, a round.Gate) {
	p.emitMember(int(a.Peer), Event{State: "expelled", Message: a.Text})
	p.loop.wg.Add(1)
	go func() {
		defer p.loop.wg.Done()
		if wait(ctx, farewell) != nil {
			return
		}
		if err := p.host.Expel(int(a.Peer), a.Text); err != nil {
			p.log.Warn("a member cannot be expelled", "peer", a.Peer+1, "err", err)
		}
	}()
}

// always runs f and passes on its result, unless the peer ends before.
func (p *peer) always(ctx context.Context, f func() result) {
	l := &p.loop
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		r := f()
		r.dropped = func() error { return nil }
		select {
		case l.results <- r:
		case <-ctx.Done():
		}
	}()
}

// validate begins the validation of the model after a record where one is due,
// and returns the one whose result the next announcement tells, nil if none.
// It goes on beside the rounds: a validation takes as long as several of them.
func (p *peer) validate(ctx context.Context, parent round.Record) *validation {
	l, id := &p.loop, parent.ID()
	if v := l.validation; v != nil && v.last != id && v.last != parent.Parent { // it is of another branch
		v.stop()
		l.validation = nil
	}
	if _, due := p.job.validates(parent.Height); due && (l.validation == nil || l.validation.record.ID() != id) {
		if v := l.validation; v != nil {
			v.stop() // it came too late
		}
		l.validation = p.beginValidation(ctx, parent)
	}
	v := l.validation
	if v == nil {
		return nil
	}
	v.last = id
	if p.job.validated(parent.Height+1) != v.record.Height {
		return nil
	}
	return v
}

// pendingAt returns the validation of a model before a record whose result
// stands in an announcement after it, nil if there is none.
func (p *peer) pendingAt(r *round.Record) *validation {
	l, id := &p.loop, r.ID()
	v := l.validation
	if v == nil || v.record.Height != p.job.pending(r.Height) {
		return nil
	}
	if next := l.records[v.last]; v.last != id && v.last != r.Parent && next.Parent != id {
		return nil // it is of another branch
	}
	return v
}

func (p *peer) beginValidation(ctx context.Context, r round.Record) *validation {
	v := &validation{record: r, done: make(chan struct{})}
	ctx, v.stop = context.WithCancel(context.WithoutCancel(ctx)) // a peer that stops waits for it
	if err := p.computer.keepForValidation(r); err != nil {
		p.warn("round %d: no validation: %v", r.Height, err)
		v.stop()
		close(v.done)
		return v
	}
	p.loop.wg.Add(1)
	go func() {
		defer p.loop.wg.Done()
		defer close(v.done)
		defer v.stop()
		result, err := p.computer.validate(ctx, r)
		if err == nil {
			v.result = result
		} else if ctx.Err() == nil {
			p.warn("round %d: no validation: %v", r.Height, err)
		}
	}()
	return v
}

// compute computes this peer's average, and waits for the validation whose
// result is announced with it.
func (p *peer) compute(ctx context.Context, a round.Compute, parent round.Record, v *validation) result {
	failed := result{event: round.GradientFailed{Slot: a.Slot, Parent: a.Parent}}
	avg, err := p.computer.average(ctx, a.Height, parent, p.sharesAt(parent))
	if err == nil {
		failed.done = avg.release
	}
	if ctx.Err() != nil {
		return failed
	}
	if err != nil {
		p.warn("round %d: no gradient: %v", a.Height, err)
		return failed
	}
	var told round.Validation
	if v != nil {
		select {
		case <-v.done:
			told = v.result
		case <-ctx.Done():
			return failed
		}
	}
	codec, size := p.store.codec()
	return result{own: computed{avg.loss, avg.samples}, height: a.Height, done: avg.release, event: round.GradientReady{
		Slot: a.Slot, Parent: a.Parent, Gradient: avg.hash, Bytes: uint64(size), Codec: codec, Validation: told,
	}}
}

// fetch gets a peer's average and checks it.
func (p *peer) fetch(ctx context.Context, a round.Fetch) result {
	if p.store.hasAverage(a.Gradient) { // fetched before, for another slot or parent
		return result{event: round.BodyReady{Peer: a.Peer, Gradient: a.Gradient}}
	}
	// The announcer may be gone, or not be connected to this peer: then others
	// have it, or will have it soon.
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	unavailable := result{event: round.BodyUnavailable{Peer: a.Peer, Gradient: a.Gradient}}
	draft, err := p.store.draft()
	if err != nil { // no memory: the round can do without this one
		p.warn("the average of peer %d is left out: %v", a.Peer+1, err)
		return unavailable
	}
	defer draft.Discard()
	// What the announcement says of the size is not looked at: whoever repeats
	// another's hash with a wrong size must not get that average refused.
	if err := p.host.FetchInto(ctx, draft.Data(), a.Gradient, p.sources(append([]round.Peer{a.Peer}, a.Holders...))); err != nil {
		p.log.Info("no body", "peer", a.Peer+1, "gradient", a.Gradient.Short(), "err", err)
		return unavailable
	}
	if err := p.store.checkAverage(draft.Data()); err != nil {
		return result{event: round.BodyRefused{Peer: a.Peer, Gradient: a.Gradient, Reason: err.Error()}}
	}
	if err := p.store.putAverage(a.Gradient, draft); err != nil {
		return result{err: err}
	}
	return result{event: round.BodyReady{Peer: a.Peer, Gradient: a.Gradient}}
}

// stateTime bounds the search for a state, and how long nothing may come of it,
// beside the time that its bytes take at the slowest rate that is waited for,
// in bytes a second.
const (
	stateTime = 3 * time.Second
	slowest   = 256 << 10
)

// fetchTime bounds the search for an average that the machine still wants.
const fetchTime = 30 * time.Second

// sources returns all other members, those first that should have what is
// sought.
func (p *peer) sources(likely []round.Peer) []int {
	var out []int
	add := func(m int) {
		if m != p.n-1 && !slices.Contains(out, m) {
			out = append(out, m)
		}
	}
	for _, m := range likely {
		add(int(m))
	}
	latest, _ := p.ids.rosters.latest()
	for _, m := range latest.Members {
		add(int(m.Index))
	}
	return out
}

// apply aggregates and updates in the database.
func (p *peer) apply(a round.Apply, parent round.Record) result {
	model, state, err := p.store.apply(parent, a.Set, p.sharesAt(parent))
	if err != nil {
		return result{event: round.ApplyFailed{Slot: a.Slot, Parent: a.Parent, Reason: err.Error()}}
	}
	return result{event: round.Applied{Slot: a.Slot, Parent: a.Parent, Set: a.Set, Model: model, State: state}}
}

// fetchState gets the state of a record by its hashes.
func (p *peer) fetchState(ctx context.Context, a round.FetchState) result {
	unavailable := result{event: round.StateUnavailable{Record: a.ID}}
	if p.store.hasState(a.Record) {
		return result{event: round.StateReady{Record: a.ID}}
	}
	if a.Record.Height == 0 {
		if _, err := p.genesis(); err != nil {
			return result{err: err}
		}
		return result{event: round.StateReady{Record: a.ID}}
	}
	// Whoever has it answers at once; where those who are connected have gone on,
	// a later state is the better one to go for.
	ctx, cancel := context.WithTimeout(ctx, stateTime+p.job.transferTime(p.store.params))
	defer cancel()
	params, opt, done := p.stateBuffers(a.Record)
	defer done()
	for _, part := range []struct {
		into []byte
		hash round.Hash
	}{{params, a.Record.Model}, {opt, a.Record.State}} {
		if len(part.into) == 0 { // as of SGD without momentum
			continue
		}
		if err := p.host.Resume(ctx, part.into, part.hash, p.sources(a.Holders), stateTime); err != nil {
			p.log.Info("no state", "round", a.Record.Height, "err", err)
			return unavailable
		}
	}
	if i := max(tensor.NonFinite(tensor.Floats(params)), tensor.NonFinite(tensor.Floats(opt))); i >= 0 {
		p.log.Warn("a state is not finite", "round", a.Record.Height, "index", i)
		return unavailable
	}
	if _, _, err := p.store.putState(params, opt, a.Record.Height); err != nil {
		p.warn("the state of round %d cannot be kept: %v", a.Record.Height, err)
		return unavailable
	}
	return result{event: round.StateReady{Record: a.ID}}
}

// transferTime is how long a state takes at the slowest rate that is waited
// for, of a model of so many parameters.
func (j *Job) transferTime(params int) time.Duration {
	return time.Duration(4*(params+j.optimizerAt(1).StateLen(params))) * time.Second / slowest
}

// partial is what has come of a state: a fetch that is given up is resumed
// where the same state is asked for again.
type partial struct {
	model, state round.Hash
	params, opt  []byte
	used         bool // by a fetch that goes on
}

// stateBuffers returns where the state of a record goes, with what came
// before, until done is called.
func (p *peer) stateBuffers(r round.Record) (params, opt []byte, done func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.partial
	if b == nil || b.used || b.model != r.Model || b.state != r.State {
		b = &partial{model: r.Model, state: r.State, params: make([]byte, 4*p.store.params), opt: make([]byte, 4*p.store.state)}
	}
	b.used = true
	p.partial = b
	return b.params, b.opt, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		b.used = false
		if p.store.hasState(r) && p.partial == b {
			p.partial = nil
		}
	}
}

// adopt tells of a new head.
func (p *peer) adopt(ctx context.Context, a round.Adopt) {
	l := &p.loop
	l.records[a.ID] = a.Record
	l.head = a.Record
	if a.Record.Height == 0 {
		return
	}
	if a.Record.Height%p.ids.rosters.genesis.CheckpointEvery == 0 { // what was told long ago is forgotten
		p.tellContact()
	}
	now := time.Now()
	how := a.How.String()
	if a.Reorganised {
		how = "reorganised"
	}
	e := Event{
		Event: "round", Slot: a.Record.Slot, Round: a.Record.Height, Model: a.Record.Model.String(),
		Seconds: now.Sub(l.headAt).Seconds(), How: how, Degraded: a.Record.Degraded(p.faultyAt(a.Record)), Used: p.used(),
		Steps: l.watch.lap(now),
	}
	if p.platform != nil {
		e.Instances = p.platform.Stats().Instances
	}
	for _, s := range a.Record.Set {
		e.Members = append(e.Members, int(s.Peer)+1)
	}
	if own, ok := l.own[a.Record.Height]; ok && a.Record.Has(round.Peer(p.n-1)) {
		e.Loss, e.Samples = own.loss, own.samples
	}
	p.meter.round(e, now, p.sent(), p.traffic())
	l.slow.round(now.Sub(l.headAt))
	l.headAt = now
	used, elapsed, _ := p.meter.totals()
	l.journal.note(entry{Step: stepAdopt, Slot: a.Record.Slot, Round: a.Record.Height, Record: &a.Record, Links: l.machine.Links(), Used: &used, Elapsed: elapsed.Milliseconds()})
	if v, model := a.Record.Validation, p.job.validated(a.Record.Height); v.Count > 0 && model > 0 {
		accuracy, loss := float64(v.Correct)/float64(v.Count), float64(v.LossMicro)/1e6
		p.emit(Event{Event: "validation", Round: model, Accuracy: &accuracy, Loss: &loss})
	}
	for height := range l.own {
		if height+2 < a.Record.Height {
			delete(l.own, height)
		}
	}
}

// used returns what the peer has used since it was started.
func (p *peer) used() *Usage {
	u := Usage{Bytes: p.sent(), Timeouts: p.loop.timeouts}
	if p.platform != nil {
		s := p.platform.Stats()
		u.Invocations, u.GBSeconds = int(s.Invocations), s.GBSeconds
	}
	return &u
}

// sent returns the bytes sent to other peers since this one was started.
func (p *peer) sent() int64 {
	s := p.host.Stats()
	return int64(s.MessageBytesOut + s.HeartbeatBytesOut + s.BodyBytesOut)
}

// traffic returns what went between this peer and each other one.
func (p *peer) traffic() []p2p.Traffic {
	return slices.DeleteFunc(p.host.Traffic(), func(t p2p.Traffic) bool { return t.Member == p.n-1 })
}

// retain drops what the machine no longer needs.
func (p *peer) retain(a round.Retain) {
	l := &p.loop
	keep := make(map[round.Hash]round.Record, len(a.States)+1)
	for _, r := range a.States {
		keep[r.ID()] = r
	}
	keep[l.head.ID()] = l.head
	l.records = keep
	p.store.retain(a.States, a.Gradients)
	p.host.Forget(a.BelowSlot)
	p.dropCheckpoints(a.Checkpoints)
	wanted := make(map[string]bool, len(a.Gradients))
	for _, g := range a.Gradients {
		wanted["fetch/"+g.String()] = true
	}
	for name, stop := range l.stop {
		if len(name) > len("fetch/") && name[:len("fetch/")] == "fetch/" && !wanted[name] {
			stop()
			delete(l.stop, name)
		}
	}
}

// report tells a person what the machine has to say.
func (p *peer) report(r round.Report) {
	level := slog.LevelInfo
	if others := r.Kind == round.Conflict || r.Kind == round.InvalidMessage; others && p.loop.warnings >= maxWarnings {
		level = slog.LevelDebug // who signs such messages without end does not fill the disk
	}
	p.log.Log(context.Background(), level, r.Kind.String(), "slot", r.Slot, "round", r.Height, "peer", r.Peer+1, "text", r.Text)
	if r.Kind.Timeout() {
		p.loop.timeouts++
	}
	switch r.Kind {
	case round.PeerLost, round.PeerReturned, round.DegradedRecord, round.Reorganisation, round.GradientMissing:
		return // events of their own tell of these
	case round.RosterChanged:
		e := Event{Event: "roster", Round: r.Height}
		for _, m := range p.sharesAt(p.loop.head) {
			e.Members = append(e.Members, m.member+1)
		}
		p.emit(e)
		if err := p.setMembers(); err != nil {
			p.warn("the members of the roster: %v", err)
		}
		return
	}
	cause, about := events.CauseProtocol, 0
	if r.Kind == round.BodyDropped && r.Refused {
		cause = events.CauseRefused
	}
	if int(r.Peer) != p.n-1 {
		about = int(r.Peer) + 1
	}
	p.warnBoundedOf(cause, about, "%s: %s", r.Kind, r.Text)
}

// warnBounded warns of what others may cause as often as they like.
func (p *peer) warnBounded(format string, args ...any) {
	p.warnBoundedOf("", 0, format, args...)
}

func (p *peer) warnBoundedOf(cause string, about int, format string, args ...any) {
	l := &p.loop
	if l.warnings++; l.warnings < maxWarnings {
		p.warnOf(cause, about, format, args...)
	} else if l.warnings == maxWarnings {
		p.warn("further warnings of this kind are not written here")
	}
}

// finish leaves the model in the run folder and a last checkpoint.
func (p *peer) finish() error {
	r := p.loop.finished.Record
	switch p.loop.finished.Reason {
	case round.Left:
		return errors.Join(ErrLeft, p.leaveHead(r))
	case round.Expelled:
		return errors.Join(errExpelled, p.leaveHead(r))
	}
	params, _ := p.store.stateKeys(r)
	ref, err := p.db.Get(params)
	if err != nil {
		return fmt.Errorf("the trained parameters: %w", err)
	}
	defer ref.Release()
	t := Trained{Model: p.model, Parameters: tensor.Floats(ref.Tensor().Data), Scale: p.data.Scale, Offset: p.data.Offset}
	if h := ref.Hash(); h != treehash.Hash(r.Model) {
		return fmt.Errorf("the trained parameters have the hash %s, the record says %s", h, r.Model)
	}
	if err := p.leave(&t); err != nil {
		return err
	}
	p.note(stepModel, "")
	p.log.Info("finished", "round", r.Height, "model", r.Model.Short(), "reason", p.loop.finished.Reason.String())
	if err := p.leaveHead(r); err != nil {
		return err
	}
	p.note(stepEnd, "")
	p.emit(Event{Event: "finished", Round: r.Height, Model: r.Model.String(), StopReason: p.loop.finished.Reason.String()})
	return nil
}

// leaveHead writes the state that a peer stops at.
func (p *peer) leaveHead(r round.Record) error {
	return p.checkpoint(headName, r, p.loop.machine.Links())()
}

// faultyAt is how many Byzantine members the roster after a record allows for.
func (p *peer) faultyAt(r round.Record) int {
	if roster := p.ids.rosters.get(r.Roster); roster != nil {
		return int(roster.F)
	}
	return p.job.Byzantine
}

// memberKeys are the members of the roster in force and of those that follow
// it: newcomers connect before they take part.
func (p *peer) memberKeys() []p2p.Member {
	var out []p2p.Member
	from := p.ids.rosters.get(p.loop.head.Roster)
	rosters := p.ids.rosters.training()
	if latest, start := p.ids.rosters.latest(); start == nil {
		rosters = []*membership.Roster{latest}
	}
	for _, r := range rosters {
		if from != nil && r.Epoch < from.Epoch {
			continue
		}
		for _, m := range r.Members {
			i := slices.IndexFunc(out, func(o p2p.Member) bool { return o.Index == int(m.Index) })
			if i < 0 {
				out = append(out, p2p.Member{Index: int(m.Index), Key: m.Key})
			} else {
				out[i].Key = m.Key
			}
		}
	}
	slices.SortFunc(out, func(a, b p2p.Member) int { return a.Index - b.Index })
	return out
}

// leave writes the trained model into the run folder. Where another model is
// there, as when this peer was started again after the others had ended and
// trained on alone, that one stays and this peer's goes into its own folder.
func (p *peer) leave(t *Trained) error {
	path := filepath.Join(p.cfg.Run, modelFile)
	if others, err := ReadModel(path); err == nil && others.Hash() != t.Hash() {
		own := filepath.Join(p.dir, modelFile)
		p.warn("the run already has a model of other peers, %s: this peer's, %s, is in %s", others.Hash().Short(), t.Hash().Short(), own)
		return t.Write(own)
	}
	return t.Write(path)
}
