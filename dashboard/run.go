package dashboard

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

// run follows a run folder for all who look at it.
type run struct {
	dir, name string

	mu     sync.Mutex
	tail   *events.Tail
	view   events.View
	info   spirt.RunInfo
	told   bool   // info is known
	infos  uint64 // grows when it is another one
	prices *bill.Table
	err    string // why it cannot be read now
	serial uint64 // grows with each event
	read   time.Time
	file   os.FileInfo // of the events, as they were opened
	size   int64       // at the last look
	life   uint64      // grows when the file is another one
}

// reread is how old what was read may be.
const reread = updateEvery / 2

// refresh reads what has been added to the folder. The caller holds mu.
func (r *run) refresh() {
	if time.Since(r.read) < reread {
		return
	}
	r.read = time.Now()
	before := r.err
	r.err = ""
	defer func() {
		if r.err != before {
			r.serial++
		}
	}()
	path := filepath.Join(r.dir, "events.jsonl")
	now, err := os.Stat(path)
	if r.tail != nil && (err != nil || !os.SameFile(now, r.file) || now.Size() < r.size) {
		r.tail.Close()
		r.tail, r.view, r.info, r.told = nil, events.View{}, spirt.RunInfo{}, false // it is another run now, or none
		r.life++
		r.serial++
	}
	if err == nil {
		r.size = now.Size()
	}
	if r.tail == nil {
		tail, err := spirt.EventsOf(r.dir)
		if err != nil {
			r.err = "there are no events here (yet)"
			if !errors.Is(err, fs.ErrNotExist) {
				r.err = fmt.Sprintf("the events cannot be read: %v", err)
			}
			return
		}
		r.tail, r.file, r.prices = tail, now, prices(r.dir)
	}
	done := r.view.Done != nil
	n := uint64(0)
	err = r.tail.Each(func(e *events.Event) {
		n++
		r.view.Add(e)
	})
	if err != nil {
		r.err = fmt.Sprintf("the events cannot be read: %v", err)
	}
	r.serial += n
	// The event is written before run.json: until both say the same, it is read
	// again.
	over := r.view.Done != nil
	if !r.told || n > 0 && (over || done) || over == (r.info.State == "running") {
		if info, err := spirt.ReadRun(r.dir); err == nil {
			if !r.told || info.State != r.info.State || n > 0 {
				r.infos++
				r.serial++
			}
			r.info, r.told = info, true
		}
	}
}

// Summary is a run in the list of runs.
type Summary struct {
	Name    string    `json:"name"`
	State   string    `json:"state"` // running, done, failed, interrupted; empty where nothing says
	Model   string    `json:"model"`
	Data    string    `json:"data"`
	Peers   int       `json:"peers"`
	Rounds  int       `json:"rounds"`
	Started time.Time `json:"started"`
}

func (r *run) summary() Summary {
	s := Summary{Name: r.name}
	info, err := spirt.ReadRun(r.dir)
	if err != nil {
		return s
	}
	s.State, s.Model, s.Data, s.Peers, s.Rounds, s.Started = info.State, info.Job.Model, info.Job.Data, info.Job.Peers, info.Job.Rounds, info.Started
	return s
}

// cursor is how far somebody has followed a run.
type cursor struct {
	serial uint64
	begun  bool
	life   uint64
	infos  uint64
	round  uint64         // curves up to here are known
	stride uint64         // of all curves, summed
	rounds map[int]uint64 // the timeline's last round, by peer
	told   int            // faults
}

// Update is what has changed for a follower: everything the first time, when
// Full is set; afterwards points of curves from the first round that they name
// on, new rounds of the timeline and new faults.
type Update struct {
	Changed bool   `json:"-"`
	Full    bool   `json:"full,omitempty"`
	Error   string `json:"error,omitempty"`

	Name    string         `json:"name"`
	Info    *spirt.RunInfo `json:"info,omitempty"` // with Full, and when it changes
	Done    *events.Event  `json:"done,omitempty"`
	Started time.Time      `json:"started"`
	Elapsed float64        `json:"elapsed"` // seconds
	Left    float64        `json:"left"`    // seconds; 0: not known
	Round   uint64         `json:"round"`
	Final   uint64         `json:"final"`
	Rate    float64        `json:"samples_per_second"`

	Curves    map[string]Curve `json:"curves"`
	Peers     []Peer           `json:"peers"`
	Steps     []string         `json:"steps"`
	StepMS    []float64        `json:"step_ms"`
	Functions events.Functions `json:"functions"`
	GBSeconds float64          `json:"gb_seconds"`
	Prices    *bill.Table      `json:"prices,omitempty"`
	Cost      bill.Cost        `json:"cost"`
	TotalUSD  bill.Money       `json:"total_usd"`
	Causes    map[string]int   `json:"causes"`
	Faults    []events.Fault   `json:"faults"`
}

// Curve is one of loss, accuracy, validation_loss, seconds, cost and clock.
type Curve struct {
	Rounds []uint64  `json:"rounds"`
	Values []float64 `json:"values"`
}

// Peer is one of a run's.
type Peer struct {
	Peer      int                `json:"peer"`
	State     string             `json:"state"`
	Round     uint64             `json:"round"`
	Loss      float64            `json:"loss"`
	Seconds   float64            `json:"seconds"`
	Degraded  bool               `json:"degraded,omitempty"`
	Model     string             `json:"model"`
	Members   []int              `json:"members"`
	Instances int                `json:"instances"`
	Functions events.Functions   `json:"functions"`
	Cost      bill.Money         `json:"cost_usd"`
	Timeouts  int                `json:"timeouts"`
	Waiting   string             `json:"waiting,omitempty"`
	In        map[int]int64      `json:"in"`
	Out       map[int]int64      `json:"out"`
	Rounds    []events.RoundView `json:"rounds"`
}

// update returns what has changed since c, and moves c on.
func (r *run) update(c *cursor) Update {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refresh()
	u := Update{Changed: !c.begun || c.serial != r.serial}
	if !u.Changed {
		return u
	}
	v := &r.view
	stride := v.Loss.Stride() + v.Accuracy.Stride() + v.ValidationLoss.Stride() + v.RoundSeconds.Stride() + v.Cost.Stride() + v.Clock.Stride()
	if !c.begun || c.stride != stride || c.life != r.life {
		*c = cursor{stride: stride, life: r.life, rounds: map[int]uint64{}}
		u.Full = true
	}
	c.begun, c.serial = true, r.serial
	u.Error, u.Name, u.Done, u.Started, u.Elapsed = r.err, r.name, v.Done, v.Started, v.Elapsed().Seconds()
	u.Left, u.Round, u.Final, u.Rate = v.Left(uint64(max(0, r.info.Job.Rounds))).Seconds(), v.Round, v.Final, v.SamplesPerSecond()
	if r.told && (u.Full || c.infos != r.infos) {
		info := r.info
		u.Info = &info
	}
	c.infos = r.infos
	from := uint64(0)
	if late := lateRounds * v.Loss.Stride(); !u.Full && c.round > late {
		from = c.round - late
	}
	u.Curves = map[string]Curve{}
	for name, s := range map[string]*events.Series{
		"loss": &v.Loss, "accuracy": &v.Accuracy, "validation_loss": &v.ValidationLoss, "seconds": &v.RoundSeconds, "cost": &v.Cost, "clock": &v.Clock,
	} {
		rounds, values := s.After(from)
		u.Curves[name] = Curve{rounds, values}
	}
	c.round = v.Round
	u.Steps, u.StepMS, u.Functions, u.GBSeconds = events.Steps, v.Steps, v.Functions, v.Usage.GBSeconds()
	if r.prices != nil {
		u.Cost = r.prices.Cost(v.Usage)
		u.TotalUSD = u.Cost.Total()
		if u.Full {
			u.Prices = r.prices
		}
	}
	u.Causes = v.Causes
	u.Faults = v.Faults[max(0, len(v.Faults)-(v.Told-c.told)):]
	c.told = v.Told
	for _, p := range v.Peers {
		q := Peer{
			Peer: p.Peer, State: p.State, Round: p.Round, Loss: p.Loss, Seconds: p.Seconds, Degraded: p.Degraded, Model: p.Model, Members: p.Members,
			Instances: p.Instances, Functions: p.Functions, Timeouts: p.Timeouts, In: p.In, Out: p.Out,
		}
		if r.prices != nil {
			q.Cost = r.prices.Cost(p.Usage).Total()
		}
		if p.Waiting != nil {
			q.Waiting = p.Waiting.Message
		}
		for _, round := range p.Rounds {
			if round.Round > c.rounds[p.Peer] || u.Full {
				q.Rounds = append(q.Rounds, round)
			}
		}
		c.rounds[p.Peer] = p.Round
		u.Peers = append(u.Peers, q)
	}
	// What is sent lives on after mu is released.
	u.Causes = clone(u.Causes)
	u.StepMS = append([]float64{}, u.StepMS...)
	u.Faults = append([]events.Fault{}, u.Faults...)
	for i := range u.Peers {
		u.Peers[i].In, u.Peers[i].Out = clone(u.Peers[i].In), clone(u.Peers[i].Out)
		u.Peers[i].Rounds = append([]events.RoundView{}, u.Peers[i].Rounds...)
		u.Peers[i].Members = append([]int{}, u.Peers[i].Members...)
	}
	return u
}

// lateRounds is how many points back a peer that lags, or a validation, may
// still change a curve for those who follow. A validation is told up to a few
// hundred rounds later.
const lateRounds = 128

func clone[K comparable, V any](m map[K]V) map[K]V {
	out := make(map[K]V, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}
