package p2p

import (
	"fmt"
	"testing"
	"time"
)

func TestBucket(t *testing.T) {
	var b bucket
	took := 0
	for range 100 {
		if b.take(0, 1, 10, 20) {
			took++
		}
	}
	for ms := range 1000 {
		if b.take(time.Duration(ms)*time.Millisecond, 1, 10, 20) {
			took++
		}
	}
	if took < 29 || took > 30 {
		t.Errorf("%d taken in a second, want a burst of 20 and 10 more", took)
	}
	if b.take(time.Hour, 21, 10, 20) || !b.take(time.Hour, 20, 10, 20) {
		t.Error("the burst is not 20")
	}
}

// mostOf is how many messages of one signer may be taken since begin.
func mostOf(l Limits, begin time.Time) uint64 {
	return uint64(l.Burst) + uint64(float64(l.Rate)*time.Since(begin).Seconds()) + 1
}

// TestFloodingMemberIsTurnedAway: validly signed, but without end.
func TestFloodingMemberIsTurnedAway(t *testing.T) {
	g := newGroup(t, 3)
	g.limits = Limits{Rate: 1, Burst: 100, KeptMessages: 10}
	p, o := g.start(0), g.start(1)
	p.dials(o)
	p.wait("connected", func() bool { return p.connected[1] })
	begin := time.Now()
	r := g.dialRaw(2, p)
	r.greet(p)
	p.wait("the flooder is connected", func() bool { return p.connected[2] })
	var frames []byte
	for slot := range uint64(5000) {
		data, _ := seal(g.keys[2], 2, slot, fmt.Sprint("noise ", slot))
		frames = appendFrame(frames, frameMessage, data)
	}
	r.send(frames)
	p.wait("turned away", func() bool {
		return len(p.reasons[2]) == 1 && p.reasons[2][0] == "it sent 8 times what no honest peer sends, last more than 1 messages a second"
	})
	r.hungUp()
	s := p.Stats()
	if most := mostOf(g.limits, begin); s.Delivered > most || s.Flood != 8 || s.Banned != 1 || s.KeptMessages > 10 {
		t.Errorf("at most %d: %+v", most, s)
	}
	p.says(1, "the others go on")
	o.says(1, "in both directions")
	o.hears("the others go on")
	p.hears("in both directions")
	// The one that passed it on is not blamed.
	if s := o.Stats(); s.Banned != 0 || s.Flood != 0 || s.Delivered > mostOf(g.limits, begin) {
		t.Errorf("stats %+v", s)
	}
}

// TestRelayedFlood: what a third member signed without end is dropped, and the
// one that passes it on is read more slowly, not blamed.
func TestRelayedFlood(t *testing.T) {
	g := newGroup(t, 3)
	g.beat = testHeartbeat
	g.limits = Limits{Rate: 20, Burst: 50, KeptMessages: 10}
	p, o := g.start(0), g.start(1)
	p.dials(o)
	p.wait("connected", func() bool { return p.connected[1] })
	r := g.dialRaw(2, p)
	r.greet(p)
	p.wait("the relayer is connected", func() bool { return p.connected[2] })
	begin := time.Now()
	const n = 140
	var frames []byte
	for slot := range uint64(n) {
		data, _ := seal(g.keys[1], 1, 100+slot, fmt.Sprint("noise ", slot))
		frames = appendFrame(frames, frameMessage, data)
	}
	r.send(frames)
	poll(t, "all are read", func() bool { s := p.Stats(); return s.Delivered+s.FloodRelayed == n })
	s := p.Stats()
	if most := mostOf(g.limits, begin); s.Delivered > most || s.FloodRelayed == 0 || s.Paced == 0 || s.Banned != 0 || s.Flood != 0 {
		t.Errorf("at most %d: %+v", most, s)
	}
	if took := time.Since(begin); took < time.Second {
		// 90 in vain, of which 50 at once and 20 a second.
		t.Errorf("all were checked within %v", took)
	}
	p.look(func() {
		if !p.connected[1] || !p.connected[2] {
			t.Errorf("disconnected: %v", p.reasons)
		}
	})
}

// TestReplayDoesNotSpendTheSignersRate: an honest member is heard also while
// another sends its old messages again and again.
func TestReplayDoesNotSpendTheSignersRate(t *testing.T) {
	g := newGroup(t, 3)
	g.limits = Limits{Rate: 1, Burst: 20}
	p, o := g.start(0), g.start(1)
	p.dials(o)
	p.wait("connected", func() bool { return p.connected[1] })
	p.Forget(100)
	r := g.dialRaw(2, p)
	r.greet(p)
	old, _ := seal(g.keys[1], 1, 5, "old")
	for range 21 {
		r.send(appendFrame(nil, frameMessage, old))
	}
	poll(t, "paced", func() bool { return p.Stats().Paced > 0 })
	for slot := range uint64(18) {
		o.says(100+slot, fmt.Sprint("new ", slot))
	}
	for slot := range 18 {
		p.hears(fmt.Sprint("new ", slot))
	}
	if s := p.Stats(); s.Banned != 0 || s.Stale < 20 {
		t.Errorf("stats %+v", s)
	}
}

// TestFloodOfOtherFramesIsPaced: heartbeats that claim losses make a peer offer
// all it keeps.
func TestFloodOfOtherFramesIsPaced(t *testing.T) {
	g := newGroup(t, 3)
	g.limits = Limits{Rate: 50, Burst: 100}
	p, o := g.start(0), g.start(1)
	p.dials(o)
	p.wait("connected", func() bool { return p.connected[1] })
	r := g.dialRaw(2, p)
	r.greet(p)
	var frames []byte
	for range 1000 {
		frames = appendFrame(frames, frameHeartbeat, []byte{7})
		frames = appendFrame(frames, frameHeartbeat, []byte{4})
	}
	r.send(frames)
	poll(t, "paced", func() bool { return p.Stats().Paced > 3 })
	if in := p.Stats().HeartbeatBytesIn; in > 1500*(frameHeader+1) {
		t.Errorf("%d bytes of heartbeats were read", in)
	}
	p.says(1, "the others go on")
	o.hears("the others go on")
	p.wait("nobody is blamed", func() bool { return len(p.reasons) == 0 })
}
