package events

import (
	"math"
	"slices"
	"strings"
	"time"

	"github.com/spirt-ml/spirt/bill"
)

// Limits of a View.
const (
	maxViewPeers   = 256
	maxFaults      = 200 // the last so many are kept
	maxRounds      = 64  // likewise, of each peer, for the timeline
	maxCauses      = 64
	maxMessageText = 4 << 10
	maxName        = 128 // bytes of any other text
	maxRoundSteps  = 16  // of a round

	// Events of several processes come out of order by less than clockSlack;
	// that long after a clock was set a peer has told of it.
	clockSlack   = 5 * time.Second
	maxUncertain = 1024 // points of Clock that a warning may still correct
)

// View is a run as its events tell it. The zero value is one of no events; it
// is not safe for concurrent use.
type View struct {
	Started time.Time     // of the first event
	Latest  time.Time     // of the last
	Paused  time.Duration // between them, when the run was not going on, and by how much clocks were set
	Round   uint64        // the highest that a peer has finished

	Peers []*PeerView // ascending by number

	Clock          Series // Elapsed in seconds when a round was finished: mean over the peers
	Loss           Series // mean over the peers' minibatches, by round
	ValidationLoss Series // by the round of the model
	Accuracy       Series // likewise: fractions
	Cost           Series // of one peer's round in dollars: mean over the peers
	RoundSeconds   Series // mean over the peers

	Samples   int64      // that gradients were computed of, by all peers
	Steps     []float64  // milliseconds, as Steps, summed over rounds and peers
	Functions Functions  // of all peers
	Usage     bill.Usage // of all peers, invocations to the last one
	Spent     bill.Money // as the peers reckon it, of their rounds
	Final     uint64     // the highest round that a peer knows to be final

	Faults []Fault        // the last ones, oldest first
	Told   int            // how many there were
	Causes map[string]int // how many faults of each cause or state
	Done   *Event         // once the run is over; nil again when it goes on

	elapsed time.Duration
	step    time.Duration // the longest of late between two events
	stepped time.Time     // when it ended
	clocked []uint64      // rounds in Clock since
}

// PeerView is one peer in a View.
type PeerView struct {
	Peer      int
	State     string // started, finished, stopped, failed or crashed; lost or expelled as others tell
	PID       int
	Round     uint64
	Slot      uint64
	Model     string
	Loss      float64
	Members   []int // of its last round
	Seconds   float64
	Degraded  bool
	Seen      time.Time // of its last event
	Instances int
	Functions Functions
	Usage     bill.Usage
	Spent     bill.Money
	Timeouts  int
	Waiting   *Event // the last event of that kind, nil after the next round
	Rounds    []RoundView
	In, Out   map[int]int64 // bytes from and to each other peer
	timeouts  int           // since it was last started
}

// RoundView is one round at one peer.
type RoundView struct {
	Round uint64    `json:"round"`
	Began time.Time `json:"began"`
	How   string    `json:"how"`
	Steps []Step    `json:"steps"`
}

// Functions counts invocations.
type Functions struct {
	Invocations int64   `json:"invocations"`
	Cold        int64   `json:"cold"`
	Failed      int64   `json:"failed"`
	BilledMS    int64   `json:"billed_ms"`
	QueueMS     float64 `json:"queue_ms"`
	MS          float64 `json:"ms"`
	PeakMB      int     `json:"peak_mb"`
}

func (f *Functions) add(i *Invocation) {
	f.Invocations++
	if i.Cold {
		f.Cold++
	}
	if i.Error != "" {
		f.Failed++
	}
	f.BilledMS += i.BilledMS
	if i.QueueMS > 0 && i.QueueMS < maxValue {
		f.QueueMS += i.QueueMS
	}
	if i.MS > 0 && i.MS < maxValue {
		f.MS += i.MS
	}
	if i.PeakMB <= maxMemoryMB {
		f.PeakMB = max(f.PeakMB, i.PeakMB)
	}
}

// Fault is something that went wrong: a warning, or a peer that was lost,
// crashed or expelled.
type Fault struct {
	Time    time.Time `json:"time"`
	Peer    int       `json:"peer"`            // who tells; 0: the process that started the peers
	About   int       `json:"about,omitempty"` // whom it is about
	Cause   string    `json:"cause"`
	Message string    `json:"message"`
}

// Peer returns what is known of a peer, nil if nothing is.
func (v *View) Peer(n int) *PeerView {
	if i, ok := slices.BinarySearchFunc(v.Peers, n, func(p *PeerView, n int) int { return p.Peer - n }); ok {
		return v.Peers[i]
	}
	return nil
}

// peer is Peer, made if it is new. It returns nil for numbers that no run has.
func (v *View) peer(n int) *PeerView {
	if p := v.Peer(n); p != nil {
		return p
	}
	if n < 1 || len(v.Peers) >= maxViewPeers {
		return nil
	}
	p := &PeerView{Peer: n, In: map[int]int64{}, Out: map[int]int64{}}
	i, _ := slices.BinarySearchFunc(v.Peers, n, func(p *PeerView, n int) int { return p.Peer - n })
	v.Peers = slices.Insert(v.Peers, i, p)
	return p
}

// Add takes the next event.
func (v *View) Add(e *Event) {
	p := v.peer(e.Peer)
	if e.Event == "peer" && e.By != 0 {
		p = nil // another peer tells
	}
	v.time(p, e)
	if p != nil {
		p.Seen = e.Time
	}
	switch e.Event {
	case "round":
		if p != nil {
			v.round(p, e)
		}
	case "invocation":
		i := e.Invocation
		if p == nil || i == nil || i.BilledMS < 0 || i.BilledMS > maxBilledMS || i.MemoryMB < 0 || i.MemoryMB > maxMemoryMB {
			return // a Bill leaves it out too
		}
		p.Functions.add(i)
		v.Functions.add(i)
		u := i.Usage()
		p.Usage, v.Usage = p.Usage.Add(u), v.Usage.Add(u)
	case "validation":
		if e.Accuracy != nil { // every peer tells the same
			v.Accuracy.Add(e.Round, *e.Accuracy)
		}
		if e.Loss != nil {
			v.ValidationLoss.Add(e.Round, *e.Loss)
		}
	case "finished":
		if p != nil {
			p.State, p.Round, p.Model, p.Waiting = "finished", e.Round, clip(e.Model, maxName), nil
			v.Round = max(v.Round, e.Round)
		}
	case "final":
		v.Final = max(v.Final, e.Round)
	case "waiting":
		if p != nil {
			p.Waiting = &Event{Time: e.Time, Event: "waiting", Peer: e.Peer, Step: clip(e.Step, maxName), Slot: e.Slot, Round: e.Round, Seconds: e.Seconds,
				Members: firstOf(e.Members, maxViewPeers), Message: clip(e.Message, maxMessageText)}
		}
	case "peer":
		v.state(p, e)
	case "warning":
		v.fault(Fault{Time: e.Time, Peer: e.Peer, About: e.About, Cause: e.Cause, Message: e.Message})
	case "done":
		v.Done = doneOf(e)
	}
}

// time moves on to an event. The clock may have been set since the last one: back
// where a peer contradicts itself, forward only where a peer warns of it, as a
// round may take long.
func (v *View) time(p *PeerView, e *Event) {
	if v.Started.IsZero() {
		v.Started, v.Latest = e.Time, e.Time
		return
	}
	d := e.Time.Sub(v.Latest)
	set := clockSet(e)
	switch {
	case e.Event == "run": // resumed, by a clock that may be any other
		v.Done = nil
		v.pause(e.Time)
	case d < 0 && set < 0, d < -clockSlack && p != nil && e.Time.Before(p.Seen.Add(-clockSlack)):
		v.pause(e.Time)
	case d > 0:
		v.Latest, v.elapsed = e.Time, sum(v.elapsed, d)
		if d >= v.step || e.Time.Sub(v.stepped) > clockSlack {
			v.step, v.stepped, v.clocked = d, e.Time, v.clocked[:0]
		}
	}
	if set > 0 && v.step > set/2 && e.Time.Sub(v.stepped).Abs() <= clockSlack {
		set = min(set, v.step)
		v.elapsed -= set
		v.Paused = sum(v.Paused, set)
		for _, round := range v.clocked {
			v.Clock.change(round, -set.Seconds())
		}
		v.step, v.clocked = 0, v.clocked[:0] // further peers tell of the same
	}
}

// pause moves the clock on, or back, without the run going on.
func (v *View) pause(to time.Time) {
	v.Paused = sum(v.Paused, to.Sub(v.Latest))
	v.Latest, v.step, v.clocked = to, 0, v.clocked[:0]
}

// sum is a+b as far as there are such durations.
func sum(a, b time.Duration) time.Duration {
	switch {
	case a > 0 && b > math.MaxInt64-a:
		return math.MaxInt64
	case a < 0 && b < math.MinInt64-a:
		return math.MinInt64
	}
	return a + b
}

// clockSet returns by how much the clock was set of which an event warns, 0 if
// it does not, or not what a Duration holds.
func clockSet(e *Event) time.Duration {
	if e.Event != "warning" || e.Cause != CauseClock || !(math.Abs(e.Seconds) < 9e9) {
		return 0
	}
	return time.Duration(e.Seconds * float64(time.Second))
}

// round takes a round that a peer has finished.
func (v *View) round(p *PeerView, e *Event) {
	v.Done = nil
	v.Round = max(v.Round, e.Round)
	seconds := e.Seconds
	if !(seconds >= 0 && seconds < 1e9) {
		seconds = 0
	}
	p.Round, p.Slot, p.Model, p.Seconds, p.Degraded = e.Round, e.Slot, clip(e.Model, maxName), seconds, e.Degraded
	p.Members, p.Instances, p.Waiting = firstOf(e.Members, maxViewPeers), e.Instances, nil
	if p.State == "" || p.State == "lost" {
		p.State = "started"
	}
	if e.Loss != nil {
		p.Loss = *e.Loss
		v.Loss.Add(e.Round, *e.Loss)
	}
	v.RoundSeconds.Add(e.Round, seconds)
	v.Clock.Add(e.Round, v.Elapsed().Seconds())
	if v.step >= time.Second && len(v.clocked) < maxUncertain && e.Time.Sub(v.stepped) <= clockSlack {
		v.clocked = append(v.clocked, e.Round)
	}
	if n := int64(e.Samples); n > 0 && n < 1<<40 {
		v.Samples += n
	}
	if e.Used != nil {
		n := max(e.Used.Timeouts, 0)
		if n < p.timeouts { // it was started again
			p.timeouts = 0
		} else if n-p.timeouts < 1<<20 {
			p.Timeouts += n - p.timeouts
		}
		p.timeouts = n
	}
	if s := e.Spent; s != nil {
		if s.Invocations >= 0 && s.MBMillis >= 0 && !outside(s.PeerMillis) && !outside(s.DBMillis) && !outside(s.BytesOut) {
			u := s.Usage
			u.Invocations, u.MBMillis = 0, 0 // counted one by one
			p.Usage, v.Usage = p.Usage.Add(u), v.Usage.Add(u)
		}
		cost := max(s.CostUSD, 0)
		p.Spent += min(cost, bill.MaxMoney-p.Spent)
		v.Spent += min(cost, bill.MaxMoney-v.Spent)
		v.Cost.Add(e.Round, cost.Dollars())
	}
	if v.Steps == nil {
		v.Steps = make([]float64, len(Steps))
	}
	steps := make([]Step, 0, min(len(e.Steps), maxRoundSteps))
	for _, s := range e.Steps[:min(len(e.Steps), maxRoundSteps)] {
		i := slices.Index(Steps, s.Step)
		if i < 0 {
			continue
		}
		s.Step = Steps[i] // not the text that came with the event
		steps = append(steps, s)
		if s.MS >= 0 && s.MS < maxValue {
			v.Steps[i] += s.MS
		}
	}
	for _, t := range e.Traffic[:min(len(e.Traffic), maxViewPeers)] {
		if t.Peer >= 1 && len(p.In) < maxViewPeers {
			p.In[t.Peer] += min(max(t.In, 0), math.MaxInt64-p.In[t.Peer])
			p.Out[t.Peer] += min(max(t.Out, 0), math.MaxInt64-p.Out[t.Peer])
		}
	}
	began := e.Time.Add(-time.Duration(seconds * float64(time.Second)))
	if began.Year() < 0 || began.Year() > 9999 { // JSON has no such time
		began = e.Time
	}
	if len(p.Rounds) >= maxRounds {
		p.Rounds = slices.Delete(p.Rounds, 0, 1)
	}
	p.Rounds = append(p.Rounds, RoundView{Round: e.Round, Began: began, How: clip(e.How, maxName), Steps: steps})
}

func (v *View) state(p *PeerView, e *Event) {
	state := clip(e.State, maxName)
	if p != nil {
		p.State, p.PID, p.Waiting = state, e.PID, nil
		if e.State == "started" {
			v.Done = nil
		}
	} else if about := v.peer(e.Peer); about != nil && (e.State == "expelled" || about.State == "" && e.State == "lost") {
		about.State = state
	}
	switch e.State {
	case "lost", "crashed", "failed", "expelled":
		v.fault(Fault{Time: e.Time, Peer: e.By, About: e.Peer, Cause: state, Message: e.Message})
	}
}

// doneOf returns what a view keeps of a done.
func doneOf(e *Event) *Event {
	d := *e
	d.Event = "done"
	for _, s := range []*string{&d.Model, &d.How, &d.State, &d.Step, &d.Cause, &d.StopReason} {
		*s = clip(*s, maxName)
	}
	d.Message, d.Run = clip(d.Message, maxMessageText), clip(d.Run, maxMessageText)
	d.Members, d.Steps, d.Traffic, d.Invocation = nil, nil, nil, nil
	d.Peers = firstOf(d.Peers, maxViewPeers)
	for i := range d.Peers {
		p := &d.Peers[i]
		p.State, p.Model = clip(p.State, maxName), clip(p.Model, maxName)
	}
	return &d
}

// clip bounds a text from an event, and holds nothing of what is cut off.
func clip(s string, most int) string {
	if len(s) > most {
		return strings.Clone(strings.ToValidUTF8(s[:most], ""))
	}
	return s
}

// firstOf is likewise for what is not text: a copy of at most so many.
func firstOf[T any](of []T, most int) []T {
	return append([]T(nil), of[:min(len(of), most)]...)
}

func (v *View) fault(f Fault) {
	f.Cause, f.Message = clip(f.Cause, maxName), clip(f.Message, maxMessageText)
	if v.Causes == nil {
		v.Causes = map[string]int{}
	}
	if _, known := v.Causes[f.Cause]; known || len(v.Causes) < maxCauses {
		v.Causes[f.Cause]++
	}
	v.Told++
	if len(v.Faults) >= maxFaults {
		v.Faults = slices.Delete(v.Faults, 0, 1)
	}
	v.Faults = append(v.Faults, f)
}

// SamplesPerSecond is how many samples gradients were computed of in a second,
// from the first event to the last.
func (v *View) SamplesPerSecond() float64 {
	if d := v.Elapsed().Seconds(); d > 0 {
		return float64(v.Samples) / d
	}
	return 0
}

// Elapsed is how long the run has gone on, from the first event to the last,
// without the time between an interruption and the resumption, whatever clocks
// were set to.
func (v *View) Elapsed() time.Duration { return v.elapsed }

// Left is how long the rounds up to the last take at the pace so far; 0 if that
// is not known.
func (v *View) Left(rounds uint64) time.Duration {
	spent := v.Elapsed()
	if v.Round == 0 || v.Round >= rounds || spent <= 0 {
		return 0
	}
	return time.Duration(float64(spent) / float64(v.Round) * float64(rounds-v.Round))
}
