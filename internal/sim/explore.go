package sim

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
)

// Exploration is many runs, one for each seed.
type Exploration struct {
	Peers, Byzantine int
	First            uint64        // seed
	Seeds            int           // how many. 0: until Duration is over
	Duration         time.Duration // no run begins after it. 0: no limit
	Rounds           uint64        // each run ends at this height. 0: when the heads have met
	Calm             bool          // no faults, no liars
	Workers          int           // runs at once. 0: GOMAXPROCS
	// New makes a machine; nil: round.New.
	New func(round.Config) (*round.Machine, error)
	// Progress is called after each run, by one goroutine at a time; nil: not.
	Progress func(*Summary)
}

// Summary is what the runs came to.
type Summary struct {
	Seeds      int
	Heights    uint64         // of the highest head of each run, together
	Met        time.Duration  // the latest meeting of the heads, after all faults healed
	Finals     int            // runs in which something became final
	Final      uint64         // the highest final checkpoint
	Faults     map[string]int // how often each kind struck
	Messages   uint64
	Bytes      uint64
	Expelled   int           // liars that were proven guilty
	Violations int           // runs that broke a property
	Failed     *Config       // the one with the lowest seed of those
	Err        error         // what it broke
	Round      time.Duration // virtual time of a round in the last run
}

// Config returns the run of one seed.
func (e *Exploration) Config(seed uint64) Config {
	c := Config{Seed: seed, Peers: e.Peers, F: round.MaxFaulty(e.Peers)}
	if !e.Calm {
		c = Plan(seed, e.Peers, e.Byzantine)
	}
	c.Rounds, c.New = e.Rounds, e.New
	if c.Rounds > 0 {
		c.Settle = time.Minute + time.Duration(c.Rounds)*time.Second
	}
	return c.Explicit()
}

// Explore runs the seeds on all cores. After the first run that breaks a
// property no other begins. It returns early when ctx ends, with what there is.
func Explore(ctx context.Context, e Exploration) Summary {
	if e.Workers == 0 {
		e.Workers = runtime.GOMAXPROCS(0)
	}
	if e.Seeds > 0 {
		e.Workers = min(e.Workers, e.Seeds)
	}
	var mu sync.Mutex
	s := Summary{Faults: map[string]int{}}
	next, started := 0, time.Now()
	take := func() (seed uint64, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		over := e.Seeds > 0 && next == e.Seeds || e.Duration > 0 && time.Since(started) >= e.Duration
		if over || s.Err != nil || ctx.Err() != nil {
			return 0, false
		}
		next++
		return e.First + uint64(next-1), true
	}
	var all sync.WaitGroup
	for range e.Workers {
		all.Go(func() {
			for {
				seed, ok := take()
				if !ok {
					return
				}
				c := e.Config(seed)
				c.Stop = ctx.Done()
				r, err := run(c)
				if ctx.Err() != nil {
					return
				}
				mu.Lock()
				s.add(&c, r, err)
				if e.Progress != nil {
					e.Progress(&s)
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	return s
}

// run runs c. A panic of a machine is a violation too.
func run(c Config) (r Result, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("seed %d: panic: %v\n%s", c.Seed, p, debug.Stack())
		}
	}()
	return Run(c)
}

// add adds a run.
func (s *Summary) add(c *Config, r Result, err error) {
	if r.Final > 0 {
		s.Finals++
	}
	s.Seeds++
	var height uint64
	for _, h := range r.Heights {
		height = max(height, h)
	}
	s.Heights += height
	s.Met = max(s.Met, r.Met)
	s.Final = max(s.Final, r.Final)
	for kind, n := range r.Faults {
		s.Faults[kind] += n
	}
	s.Messages += r.Messages
	s.Bytes += r.Bytes
	s.Expelled += r.Expelled
	s.Round = r.Round
	if err != nil {
		s.Violations++
		if s.Err == nil || c.Seed < s.Failed.Seed {
			s.Failed, s.Err = c, err
		}
	}
}

// RunOne runs one scenario, with a trace where one is wanted.
func RunOne(ctx context.Context, c Config, new func(round.Config) (*round.Machine, error), trace io.Writer) (Summary, error) {
	c.New, c.Trace, c.Stop = new, trace, ctx.Done()
	s := Summary{Faults: map[string]int{}}
	r, err := run(c)
	if ctx.Err() != nil {
		return s, context.Cause(ctx)
	}
	s.add(&c, r, err)
	return s, nil
}
