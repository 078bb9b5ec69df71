package p2p

import (
	"context"
	"sync"
	"time"
)

const (
	firstWindow = 2
	maxWindow   = 32
	// Chunks may queue on their way for so long; less, and more are asked for
	// ahead; over twice as long, and fewer are.
	queueTime = 25 * time.Millisecond
	// From this rate on, in bytes a second, two chunks are always under way:
	// that queues for 25 ms at most, and keeps a connection busy.
	twoFrom = 10 << 20
)

// link is what is known of how chunks come over one connection, and how many
// are under way. All fetches from the member share it: whatever the member
// sends waits behind these chunks, its messages too. So there are as many as
// keep the connection busy and queue for a short time only, and one at least.
// The zero value is a new one.
type link struct {
	mu     sync.Mutex
	window int // may be under way; zero: firstWindow
	out    int // are
	base   time.Duration
	rate   float64   // bytes a second, zero: not known
	last   time.Time // when a chunk came last
	freed  chan struct{}
}

// take reserves the way for one chunk, if there is room.
func (l *link) take() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.takeLocked()
}

func (l *link) takeLocked() bool {
	if l.window == 0 {
		l.window = firstWindow
	}
	if l.out >= l.window {
		return false
	}
	l.out++
	return true
}

// wait reserves it once there is room.
func (l *link) wait(ctx context.Context) error {
	for {
		l.mu.Lock()
		if l.takeLocked() {
			l.mu.Unlock()
			return nil
		}
		if l.freed == nil {
			l.freed = make(chan struct{})
		}
		freed := l.freed
		l.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// free gives back what was reserved for n chunks.
func (l *link) free(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.freeLocked(n)
}

func (l *link) freeLocked(n int) {
	if l.out -= n; l.freed != nil {
		close(l.freed)
		l.freed = nil
	}
}

// came takes note of a chunk that was asked for at that time and is here now,
// in so many bytes, and gives back its reservation.
func (l *link) came(asked, now time.Time, bytes int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	took := now.Sub(asked)
	// The shortest time of late: routes change.
	if l.base == 0 || took < l.base {
		l.base = took
	} else {
		l.base += (took - l.base) / 64
	}
	queued := took - l.base
	full := l.out >= l.window
	least := 1
	if l.rate >= twoFrom {
		least = 2
	}
	switch {
	case queued < queueTime && full:
		l.window = min(maxWindow, l.window+1)
	case queued > 2*queueTime:
		l.window = max(least, l.window-1)
	}
	// While this one was under way others came, so it did not have all the time.
	since := asked
	if l.last.After(since) {
		since = l.last
	}
	l.last = now
	rate := float64(bytes) / max(now.Sub(since), time.Microsecond).Seconds()
	if l.rate == 0 {
		l.rate = rate
	} else {
		l.rate += (rate - l.rate) / 4
	}
	l.freeLocked(1)
}

// speed is the rate at which chunks came of late, in bytes a second.
func (l *link) speed() float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rate
}

// packs says whether chunks should come packed.
func (l *link) packs(p Packing, local bool) bool {
	if p != PackAuto {
		return p == PackAlways
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return !local && l.rate > 0 && l.rate < packBelow
}
