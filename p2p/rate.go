package p2p

import "time"

// bucket holds tokens that come back at a steady rate. The zero value is full.
type bucket struct {
	spent float64 // of the burst
	at    time.Duration
}

// take takes cost tokens if they are there. Now is the time since some start,
// rate in tokens a second.
func (b *bucket) take(now time.Duration, cost float64, rate, burst int) bool {
	b.spent = max(0, b.spent-float64(rate)*(now-b.at).Seconds())
	b.at = now
	if b.spent+cost > float64(burst) {
		return false
	}
	b.spent += cost
	return true
}

// pace charges a connection for work that brought nothing new. Beyond
// Limits.Rate it is read more slowly: what a member sends costs others no more
// processor time than that, and one that only passes on what a third member
// signed is not blamed for it. Only the session's reader calls it.
func (h *Host) pace(s *session, cost float64) {
	l := &h.cfg.Limits
	if cost = min(cost, float64(l.Burst)); s.work.take(h.now(), cost, l.Rate, l.Burst) {
		return
	}
	h.counts.paced.Add(1)
	s.waiting.Store(true)
	defer s.waiting.Store(false)
	for !s.work.take(h.now(), cost, l.Rate, l.Burst) {
		t := time.NewTimer(max(time.Millisecond, time.Duration((s.work.spent+cost-float64(l.Burst))/float64(l.Rate)*float64(time.Second))))
		select {
		case <-t.C:
		case <-s.done:
			t.Stop()
			return
		}
	}
	s.heard.Store(int64(h.now()))
}
