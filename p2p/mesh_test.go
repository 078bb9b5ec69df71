package p2p

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// startSparse runs all members, each knowing the addresses of all, and waits
// until all are there for all.
func (g *group) startSparse() {
	g.t.Helper()
	for i := range g.peers {
		g.start(i)
	}
	for _, p := range g.peers {
		for _, o := range g.peers {
			if o != p {
				p.dials(o)
			}
		}
	}
	for _, p := range g.peers {
		p.wait("all there", func() bool { return len(p.connected) == len(g.peers)-1 })
	}
}

// degree is the number of neighbours among n members.
func degree(n int) int {
	near := map[int]bool{}
	for d := 1; d <= n/2; d *= 2 {
		near[d], near[n-d] = true, true
	}
	return len(near)
}

// TestFortyPeers are not connected to all others, yet hear all, notice who is
// gone, and fetch from anyone.
func TestFortyPeers(t *testing.T) {
	const n = 40
	g := newGroup(t, n)
	g.beat = 300 * time.Millisecond
	g.startSparse()
	for _, p := range g.peers {
		poll(t, "neighbours are connected, others are not", func() bool { return p.Stats().Links == degree(n) })
	}
	before := make([]Stats, n)
	for i, p := range g.peers {
		before[i] = p.Stats()
	}
	for i, p := range g.peers {
		p.says(1, fmt.Sprint("from ", i))
	}
	for i, p := range g.peers {
		for j := range g.peers {
			if i != j {
				p.hears(fmt.Sprint("from ", j))
			}
		}
	}
	// Traffic goes by the degree, not by the number of members: each message
	// comes at most once from each neighbour.
	for i, p := range g.peers {
		s := p.Stats()
		if in := s.MessagesIn - before[i].MessagesIn; in < n-1 || in > n*uint64(degree(n)) {
			t.Errorf("peer %d got %d messages of %d signers, with %d neighbours", i, in, n, degree(n))
		}
		if s.Connected != n-1 || s.Bad+s.Malformed+s.Banned != 0 {
			t.Errorf("peer %d: %+v", i, s)
		}
	}

	// With time neighbours that bring little new offer instead of passing on.
	for slot := uint64(10); ; slot++ {
		for i, p := range g.peers {
			p.says(slot, fmt.Sprint(slot, " from ", i))
		}
		for _, p := range g.peers {
			p.wait("hears all", func() bool { return len(p.texts) == int(slot-8)*(n-1) })
		}
		muted := 0
		for i, p := range g.peers {
			p.Host.mu.Lock()
			if n := p.relaysLocked(); n < relays {
				t.Errorf("only %d neighbours pass on to peer %d", n, i)
			}
			for _, s := range p.sessions {
				if s.muted {
					muted++
				}
			}
			p.Host.mu.Unlock()
		}
		if muted > n {
			break
		}
		if slot > 100 {
			t.Fatalf("%d of %d neighbours only offer", muted, n*degree(n))
		}
	}

	// A body of one that is no neighbour.
	a, b := g.peers[0], g.peers[11]
	body := randomBody(2*treehash.ChunkSize + 1)
	mustFetch(t, a, b.shelf.put(body), body, 11)

	// One is killed: no good-bye.
	gone := g.peers[20]
	gone.Host.mu.Lock()
	for _, s := range gone.sessions {
		go s.conn.Close()
	}
	gone.Host.mu.Unlock()
	for _, p := range g.peers {
		if p != gone {
			if err := p.SetAddresses(20, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	gone.Close()
	for i, p := range g.peers {
		if p == gone {
			continue
		}
		p.wait("it is gone", func() bool { return !p.connected[20] })
		p.says(1000, fmt.Sprint("still here ", i))
	}
	for i, p := range g.peers {
		for j := range g.peers {
			if i != j && p != gone && g.peers[j] != gone {
				p.hears(fmt.Sprint("still here ", j))
			}
		}
	}
}

// TestConnectionsOnDemandEnd when nothing is fetched over them, and are few.
func TestConnectionsOnDemandEnd(t *testing.T) {
	const n = 12
	g := newGroup(t, n)
	g.limits.Neighbours = 4
	g.beat = testHeartbeat
	g.startSparse()
	a := g.peers[0]
	body := randomBody(100)
	hash := g.peers[3].shelf.put(body)
	poll(t, "neighbours are connected", func() bool { return a.Stats().Links == degree(n) })
	mustFetch(t, a, hash, body, 3) // the distances of neighbours are 1, 2 and 4
	if s := a.Stats(); s.Links != degree(n)+1 {
		t.Errorf("%d connections, want those to neighbours and one more", s.Links)
	}
	poll(t, "closed", func() bool { return a.Stats().Links == degree(n) })
	a.look(func() {
		if !a.connected[3] {
			t.Errorf("gone: %v", a.reasons[3])
		}
	})
	// More than are allowed at once: nobody there, so all wait for one.
	a.Host.mu.Lock()
	for i := range onDemand {
		m := a.roster.members[5]
		far := &member{index: 100 + i, id: m.id, demand: a.now() + time.Hour}
		a.roster.members = append(a.roster.members, far)
	}
	a.Host.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := a.Fetch(ctx, hash, 100, []int{3}); err == nil || !strings.Contains(err.Error(), "64 others that are no neighbours are") {
		t.Errorf("error %v", err)
	}
	a.Host.mu.Lock()
	a.roster.members = a.roster.members[:n]
	a.Host.mu.Unlock()
}

// TestRosterGrowsBeyondAMeshAndBack without anybody seeming gone.
func TestRosterGrowsBeyondAMeshAndBack(t *testing.T) {
	const n = 14
	g := newGroup(t, n)
	g.limits.Neighbours = 5
	g.beat = testHeartbeat
	few := g.roster(0, 1, 2, 3, 4)
	for i := range n {
		g.start(i, func(c *Config) {
			if i < len(few) {
				c.Members = few
			}
		})
	}
	for i, p := range g.peers {
		for j, o := range g.peers {
			if i != j && (i >= len(few) || j < len(few)) {
				p.dials(o)
			}
		}
	}
	for _, p := range g.peers[:len(few)] {
		p.wait("the few are connected", func() bool { return len(p.connected) == len(few)-1 })
	}
	for i, p := range g.peers[:len(few)] {
		mustSet(t, p, g.roster())
		for j, o := range g.peers {
			if i != j {
				p.dials(o)
			}
		}
	}
	for _, p := range g.peers {
		p.wait("all there", func() bool { return len(p.connected) == n-1 })
	}
	for _, p := range g.peers {
		poll(t, "only neighbours", func() bool { return p.Stats().Links == degree(n) })
	}
	for _, p := range g.peers[:len(few)] {
		mustSet(t, p, few)
	}
	for i, p := range g.peers[:len(few)] {
		poll(t, "all connected", func() bool { return p.Stats().Links == len(few)-1 })
		p.wait("the others left", func() bool { return len(p.connected) == len(few)-1 })
		p.look(func() {
			for j := range few {
				if len(p.reasons[j]) > 0 {
					t.Errorf("for %d, %d was gone: %v", i, j, p.reasons[j])
				}
			}
		})
	}
}

// TestAgesGrow: two that tell each other of a third do not keep it alive.
func TestAgesGrow(t *testing.T) {
	g := newGroup(t, 6)
	g.limits.Neighbours = 3
	a, b := g.start(0), g.start(1)
	step := a.cfg.Heartbeat / ageSteps
	a.Host.mu.Lock()
	a.roster.at[5].heard = a.now()
	a.Host.mu.Unlock()
	last := byte(0)
	for i := 0; ; i++ {
		from, to := a, b
		if i%2 == 1 {
			from, to = b, a
		}
		from.Host.mu.Lock()
		ages := from.agesLocked()
		from.Host.mu.Unlock()
		if ages[5] <= last {
			t.Fatalf("age %d after %d: it grows young", ages[5], last)
		}
		if last = ages[5]; last == ageUnknown {
			break
		}
		to.ages(ages)
		to.Host.mu.Lock()
		heard := to.now() - to.roster.at[5].heard
		to.Host.mu.Unlock()
		if heard < time.Duration(last)*step {
			t.Fatalf("told of %d steps, it takes it for %v", last, heard)
		}
		from.Host.mu.Lock()
		from.roster.at[5].heard = 0 // it forgets, so that only the other knows
		from.Host.mu.Unlock()
	}
}
