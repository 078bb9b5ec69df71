package p2p

import (
	"sync"
	"time"
)

// An Event is a Connected, Disconnected, Message or Refused.
type Event interface{ event() }

// Connected says that messages now flow to and from a member.
type Connected struct{ Member int }

// Disconnected says that they no longer do, and why.
type Disconnected struct {
	Member int
	Reason string
}

// Message is one message that Check accepted, handed over once. The reader
// owns Data but must not change it: it may still be passed on to others.
type Message struct {
	Data []byte
	Meta Meta
}

// Refused says that someone was turned away, or that an address was answered
// by another identity than the one expected. Such events are thinned out when
// there are many; Stats counts all.
type Refused struct {
	Remote  PeerID
	Address string
	Reason  string
}

func (Connected) event()    {}
func (Disconnected) event() {}
func (Message) event()      {}
func (Refused) event()      {}

// eventQueue hands events to one reader in order. put never blocks; those who
// add much ask for room first, so that about twice the bound can wait: in
// pending, and in the batch that is being handed over.
type eventQueue struct {
	out   chan Event
	bound int

	mu      sync.Mutex
	pending []Event
	wake    chan struct{} // holds one token when pending may be non-empty
	room    chan struct{} // closed and replaced when pending is taken
	waiting bool          // someone waits for room

	refusals float64 // tokens left of refusalBurst
	refused  time.Time
}

const (
	refusalBurst = 16
	refusalRate  = 4 // a second
)

func newEventQueue(bound int) *eventQueue {
	return &eventQueue{
		out: make(chan Event), bound: bound,
		wake: make(chan struct{}, 1), room: make(chan struct{}),
		refusals: refusalBurst,
	}
}

func (q *eventQueue) put(e Event) {
	q.mu.Lock()
	q.pending = append(q.pending, e)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// putRefused drops the event where there are too many of its kind.
func (q *eventQueue) putRefused(e Refused, now time.Time) {
	q.mu.Lock()
	if !q.refused.IsZero() {
		q.refusals = min(refusalBurst, q.refusals+refusalRate*now.Sub(q.refused).Seconds())
	}
	q.refused = now
	ok := q.refusals >= 1 && len(q.pending) < q.bound
	if ok {
		q.refusals--
	}
	q.mu.Unlock()
	if ok {
		q.put(e)
	}
}

// full reports whether waitRoom would wait.
func (q *eventQueue) full() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.pending) >= q.bound
}

// waitRoom waits until the queue is below its bound, or for stop.
func (q *eventQueue) waitRoom(stop <-chan struct{}) error {
	for {
		q.mu.Lock()
		if len(q.pending) < q.bound {
			q.mu.Unlock()
			return nil
		}
		room := q.room
		q.waiting = true
		q.mu.Unlock()
		select {
		case <-room:
		case <-stop:
			return errClosed
		}
	}
}

// run passes events on until stop, then closes out.
func (q *eventQueue) run(stop <-chan struct{}) {
	defer close(q.out)
	var batch []Event
	for {
		q.mu.Lock()
		batch, q.pending = q.pending, batch[:0]
		if q.waiting {
			close(q.room)
			q.room, q.waiting = make(chan struct{}), false
		}
		q.mu.Unlock()
		if len(batch) == 0 {
			select {
			case <-q.wake:
				continue
			case <-stop:
				return
			}
		}
		for i, e := range batch {
			select {
			case q.out <- e:
				batch[i] = nil
			case <-stop:
				return
			}
		}
	}
}
