package function

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// waiter is a caller for whom there was neither an idle instance nor room for another.
type waiter struct {
	grant chan grant // holds one, so that nobody who grants waits
}

// grant is what a caller gets: an idle instance, or, if in and err are nil, the room to start one.
type grant struct {
	in  *instance
	err error
}

// How long a caller waits for an instance that has answered to poll again or to end, before it starts another, or is
// refused if there is room for none. A new instance costs about as much as the wait; a refusal costs the caller its call,
// and an instance whose function panicked may take a while to end on a machine that is busy.
const (
	patience        = 20 * time.Millisecond
	refusalPatience = 2 * time.Second
)

// acquire takes the idle instance that was used last, or room for a new one, or waits its turn for either.
func (p *Platform) acquire(ctx context.Context, wait bool) grant {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return grant{err: ErrClosed}
	}
	// Whoever waits gets the first instance or room that comes to be, so nothing is idle while somebody waits. Room there
	// may be: an instance that has answered and is about to poll is worth a moment, as a cold start takes longer.
	if n := len(p.idle); n > 0 {
		in := p.idle[n-1]
		p.idle = p.idle[:n-1]
		in.takeLocked()
		p.mu.Unlock()
		return grant{in: in}
	}
	patient := len(p.waiters) < p.returning && (p.slots < p.cfg.Concurrency || !wait)
	if p.slots < p.cfg.Concurrency && !patient {
		p.slots++
		p.mu.Unlock()
		return grant{}
	}
	if !wait && !patient {
		p.stats.Throttled++
		p.mu.Unlock()
		return grant{err: errThrottled}
	}
	w := &waiter{grant: make(chan grant, 1)}
	p.waiters = append(p.waiters, w)
	p.event("wait", 0)
	p.mu.Unlock()

	var expired, refused <-chan time.Time
	if patient {
		timer := time.NewTimer(patience)
		defer timer.Stop()
		expired = timer.C
	}
	if !wait {
		timer := time.NewTimer(refusalPatience)
		defer timer.Stop()
		refused = timer.C
	}
wait:
	for {
		select {
		case g := <-w.grant:
			return g
		case <-expired:
			if p.startInstead(w) {
				return grant{}
			}
		case <-refused:
			break wait
		case <-ctx.Done():
			break wait
		}
	}
	p.mu.Lock()
	if i := slices.Index(p.waiters, w); i >= 0 {
		p.waiters = slices.Delete(p.waiters, i, i+1)
	} else { // it was granted something in the same moment, which goes to the next
		select {
		case g := <-w.grant:
			switch {
			case ctx.Err() == nil:
				p.mu.Unlock()
				return g
			case g.in != nil:
				p.idleLocked(g.in)
			case g.err == nil:
				p.roomLocked()
			}
		default: // Close took the waiter and is about to say so
		}
	}
	if ctx.Err() == nil {
		p.stats.Throttled++
		p.mu.Unlock()
		return grant{err: errThrottled}
	}
	p.mu.Unlock()
	return grant{err: fmt.Errorf("waiting for an instance of %s: %w", p.cfg.Name, context.Cause(ctx))}
}

// startInstead takes w from the queue if there is room to start an instance.
func (p *Platform) startInstead(w *waiter) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.waiters, w)
	if i < 0 || p.slots >= p.cfg.Concurrency {
		return false
	}
	p.waiters = slices.Delete(p.waiters, i, i+1)
	p.slots++
	return true
}

// idleLocked gives an instance that polls for work to the first waiter, or keeps it.
func (p *Platform) idleLocked(in *instance) {
	if in.state == stateDead || in.doomed != nil {
		return
	}
	if len(p.waiters) > 0 {
		w := p.waiters[0]
		p.waiters = slices.Delete(p.waiters, 0, 1)
		in.takeLocked()
		w.grant <- grant{in: in}
		return
	}
	in.state = stateIdle
	p.idle = append(p.idle, in)
	if p.cfg.IdleTimeout > 0 {
		in.reaper = time.AfterFunc(p.cfg.IdleTimeout, in.reap)
	}
	p.event("idle", in.pid)
}

// unidleLocked takes an instance out of the idle ones and reports whether it was one.
func (p *Platform) unidleLocked(in *instance) bool {
	i := slices.Index(p.idle, in)
	if i < 0 {
		return false
	}
	p.idle = slices.Delete(p.idle, i, i+1)
	in.takeLocked()
	return true
}

// roomLocked gives the room that an instance leaves to the first waiter.
func (p *Platform) roomLocked() {
	if len(p.waiters) > 0 {
		w := p.waiters[0]
		p.waiters = slices.Delete(p.waiters, 0, 1)
		w.grant <- grant{}
		return
	}
	p.slots--
}

func (p *Platform) event(what string, pid int) {
	if p.onEvent != nil {
		p.onEvent(what, pid)
	}
}

// Instance describes one process of the platform.
type Instance struct {
	PID          int
	State        string // "starting", "idle", "busy" or "ending"
	Started      time.Time
	Invocations  int // attempts it was given
	MemoryMB     int // resident now; 0 where the system does not tell
	PeakMemoryMB int // most resident so far
}

// Instances lists the processes that live now, the oldest first.
func (p *Platform) Instances() []Instance {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]Instance, 0, len(p.all))
	for in := range p.all {
		state := in.state
		if in.doomed != nil {
			state = stateDead
		}
		list = append(list, Instance{
			PID: in.pid, State: state.String(), Started: in.started, Invocations: in.given,
			MemoryMB: megabytes(in.resident), PeakMemoryMB: megabytes(in.peak),
		})
	}
	slices.SortFunc(list, func(a, b Instance) int { return a.Started.Compare(b.Started) })
	return list
}
