package p2p

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
)

func benchmarkFetch(b *testing.B, size int) {
	g := newGroup(b, 2)
	g.startAll()
	body := randomBody(size)
	hash := g.peers[0].shelf.put(body)
	ctx := context.Background()
	var times []time.Duration
	b.SetBytes(int64(size))
	for b.Loop() {
		begin := time.Now()
		if _, err := g.peers[1].Fetch(ctx, hash, int64(size), []int{0}); err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(begin))
	}
	reportPercentiles(b, times)
}

func reportPercentiles(b *testing.B, times []time.Duration) {
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds())/1e3, "p50-ms")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds())/1e3, "p99-ms")
	b.ReportMetric(float64(times[0].Microseconds())/1e3, "min-ms")
}

// BenchmarkFetch247KB fetches the parameters of LeNet-5: one chunk.
func BenchmarkFetch247KB(b *testing.B) { benchmarkFetch(b, 61_706*4) }

func BenchmarkFetch45MB(b *testing.B) { benchmarkFetch(b, 45_000_000) }

// BenchmarkSum45MB is the part of BenchmarkFetch45MB that is hashing.
func BenchmarkSum45MB(b *testing.B) {
	body := randomBody(45_000_000)
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		treehash.Sum(body)
	}
}

// BenchmarkBroadcastLatency is the time from Broadcast to the last of three
// others having the message, signature checked.
func BenchmarkBroadcastLatency(b *testing.B) {
	g := newGroup(b, 4)
	g.limits.Rate = 1 << 20 // as fast as it goes
	hosts := startSilent(b, g)
	got := make(chan int, 64)
	for i, h := range hosts[1:] {
		go func() {
			for e := range h.Events() {
				if _, ok := e.(Message); ok {
					got <- i
				}
			}
		}()
	}
	go func() {
		for range hosts[0].Events() {
		}
	}()
	var times []time.Duration
	slot := uint64(0)
	for b.Loop() {
		slot++
		data, meta := seal(g.keys[0], 0, slot, fmt.Sprint(slot))
		begin := time.Now()
		if err := hosts[0].Broadcast(data, meta); err != nil {
			b.Fatal(err)
		}
		for range 3 {
			<-got
		}
		times = append(times, time.Since(begin))
		for _, h := range hosts {
			h.Forget(slot - min(slot, 3))
		}
	}
	reportPercentiles(b, times)
}

// BenchmarkRound is the traffic of one round of four peers: three kinds of
// message from each, and each one's body of 247 KB fetched by the others.
func BenchmarkRound(b *testing.B) {
	g := newGroup(b, 4)
	g.limits.Rate = 1 << 20 // as fast as it goes
	hosts := startSilent(b, g)
	body := randomBody(61_706 * 4)
	hash := treehash.Sum(body)
	got := make(chan int, 64)
	for i, h := range hosts {
		h.cfg.Bodies.(*shelf).put(body)
		go func() {
			for e := range h.Events() {
				if _, ok := e.(Message); ok {
					got <- i
				}
			}
		}()
	}
	slot := uint64(0)
	for b.Loop() {
		slot++
		for kind := range 3 {
			for i, h := range hosts {
				data, meta := seal(g.keys[i], i, slot, fmt.Sprintf("%200d", kind))
				if err := h.Broadcast(data, meta); err != nil {
					b.Fatal(err)
				}
			}
			for range 12 {
				<-got
			}
			if kind > 0 {
				continue
			}
			errs := make(chan error, 12)
			for i, h := range hosts {
				for j := range hosts {
					if i != j {
						go func() {
							_, err := h.Fetch(context.Background(), hash, int64(len(body)), []int{j})
							errs <- err
						}()
					}
				}
			}
			for range 12 {
				if err := <-errs; err != nil {
					b.Fatal(err)
				}
			}
		}
		for _, h := range hosts {
			h.Forget(slot - min(slot, 3))
		}
	}
}

// startSilent starts all members, connects them, and leaves their events to
// the caller.
func startSilent(b *testing.B, g *group) []*Host {
	b.Helper()
	var hosts []*Host
	for i := range g.peers {
		c := g.config(i)
		c.Bodies = &shelf{}
		h, err := New(c)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { h.Close() })
		hosts = append(hosts, h)
	}
	for i, h := range hosts {
		for j, o := range hosts {
			if i < j {
				if err := h.SetAddresses(j, o.Addrs()); err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	for _, h := range hosts {
		for connected := 0; connected < len(hosts)-1; {
			if _, ok := (<-h.Events()).(Connected); ok {
				connected++
			}
		}
	}
	return hosts
}

// BenchmarkSparse is one message of each of 40 members to all others, where
// each is connected to 10.
func BenchmarkSparse(b *testing.B) {
	const n = 40
	g := newGroup(b, n)
	g.beat = defaultHeartbeat
	g.limits.Rate = 1 << 20 // as fast as it goes
	g.startSparse()
	var times []time.Duration
	slot := uint64(0)
	round := func() {
		begin := time.Now()
		slot++
		for i, p := range g.peers {
			p.says(slot, fmt.Sprintf("%d %d %300d", slot, i, 0))
		}
		for _, p := range g.peers {
			want := (n - 1) * int(slot)
			p.wait("hears all", func() bool { return len(p.texts) == want })
		}
		times = append(times, time.Since(begin))
		for _, p := range g.peers {
			p.Forget(slot - min(slot, 3))
		}
	}
	for range 20 { // until neighbours know who passes on
		round()
	}
	times = times[:0]
	before := uint64(0)
	for _, p := range g.peers {
		before += p.Stats().MessagesIn
	}
	for b.Loop() {
		round()
	}
	after := uint64(0)
	for _, p := range g.peers {
		after += p.Stats().MessagesIn
	}
	reportPercentiles(b, times)
	b.ReportMetric(float64(after-before)/float64(n*(n-1)*len(times)), "copies")
}
