package p2p

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// keyBook is a Check whose keys become known one by one, as rosters do.
type keyBook struct {
	mu   sync.Mutex
	keys []ed25519.PublicKey // nil: not known yet
}

func newKeyBook(g *group, known ...int) *keyBook {
	b := &keyBook{keys: make([]ed25519.PublicKey, len(g.members))}
	for _, i := range known {
		b.keys[i] = g.members[i]
	}
	return b
}

func (b *keyBook) learn(i int, key ed25519.PublicKey) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.keys[i] = key
}

func (b *keyBook) check(data []byte) (Meta, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(data) > ed25519.SignatureSize {
		if from := int(data[ed25519.SignatureSize]); from < len(b.keys) && b.keys[from] == nil {
			return Meta{}, fmt.Errorf("member %d: %w", from, ErrNotYet)
		}
	}
	return unseal(b.keys)(data)
}

// poll waits for what no event tells of.
func poll(t testing.TB, what string, ok func() bool) {
	t.Helper()
	late := time.After(patience)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

func mustSet(t testing.TB, p *testPeer, members []Member) {
	t.Helper()
	if err := p.SetMembers(members); err != nil {
		t.Fatal(err)
	}
}

// TestIndicesWithHoles: members are named by their indices everywhere.
func TestIndicesWithHoles(t *testing.T) {
	g := newGroup(t, 9)
	some := []int{1, 5, 8}
	for _, i := range some {
		g.start(i, func(c *Config) { c.Members = g.roster(some...) })
	}
	a, b, c := g.peers[1], g.peers[5], g.peers[8]
	a.dials(b)
	b.dials(c)
	c.dials(a)
	body := randomBody(3 * treehash.ChunkSize)
	hash := c.shelf.put(body)
	for _, p := range []*testPeer{a, b, c} {
		p.wait("connected", func() bool { return len(p.connected) == 2 && !p.connected[p.index] })
		p.says(1, fmt.Sprint("from ", p.index))
	}
	b.hears("from 1", "from 8")
	mustFetch(t, a, hash, body, 8)
	for _, i := range []int{0, 2, 1, -1, 9} {
		if _, err := a.Fetch(t.Context(), hash, 5, []int{i}); err == nil || !strings.Contains(err.Error(), "is not the index of another member") {
			t.Errorf("fetching from %d: %v", i, err)
		}
		if err := a.Expel(i, "no"); err == nil {
			t.Errorf("%d was expelled", i)
		}
	}
	if err := a.SetAddresses(2, nil); err == nil {
		t.Error("addresses of a hole")
	}
	data, meta := seal(g.keys[2], 2, 1, "from a hole")
	if err := a.Broadcast(data, meta); err == nil {
		t.Error("a message of a hole")
	}
}

func TestMemberIsAddedWhileRunning(t *testing.T) {
	g := newGroup(t, 3)
	book := newKeyBook(g, 0, 1)
	for i := range 2 {
		g.start(i, func(c *Config) { c.Members = g.roster(0, 1); c.Check = book.check })
	}
	a, b := g.peers[0], g.peers[1]
	a.dials(b)
	a.wait("connected", func() bool { return a.connected[1] })
	// The newcomer knows the new roster before the others do.
	c := g.start(2, func(c *Config) { c.Heartbeat = testHeartbeat })
	c.dials(a)
	a.wait("turned away", func() bool { return len(a.refused) > 0 && a.refused[0].Remote == c.ID() })
	book.learn(2, g.members[2])
	mustSet(t, a, g.roster())
	a.wait("the newcomer connects", func() bool { return a.connected[2] })
	// b hears the newcomer through a before it has it on its own roster.
	c.says(1, "hello from the newcomer")
	a.hears("hello from the newcomer")
	poll(t, "held at b", func() bool { return b.Stats().NotYet > 0 })
	mustSet(t, b, g.roster())
	b.hears("hello from the newcomer")
	b.dials(c)
	b.wait("connected", func() bool { return b.connected[2] })
	for _, p := range g.peers {
		p.says(2, fmt.Sprint("all of us ", p.index))
	}
	for _, p := range g.peers {
		for _, o := range g.peers {
			if o != p {
				p.hears(fmt.Sprint("all of us ", o.index))
			}
		}
		if s := p.Stats(); s.Bad != 0 || s.Banned != 0 {
			t.Errorf("peer %d blamed someone: %+v", p.index, s)
		}
		p.look(func() {
			if len(p.reasons) > 0 {
				t.Errorf("peer %d: disconnected: %v", p.index, p.reasons)
			}
		})
	}
}

func TestMemberIsRemovedWhileRunning(t *testing.T) {
	checkGoroutines(t)
	g := newGroup(t, 3)
	g.startAll()
	a, b, c := g.peers[0], g.peers[1], g.peers[2]
	c.says(5, "soon gone")
	c.says(1, "sticky of c")
	for _, p := range []*testPeer{a, b} {
		p.hears("soon gone", "sticky of c")
	}
	for _, p := range []*testPeer{a, b} {
		mustSet(t, p, g.roster(0, 1))
		p.wait("disconnected", func() bool { return !p.connected[2] })
		p.look(func() {
			if got := p.reasons[2]; len(got) != 1 || got[0] != "it is not on the roster any more" {
				t.Errorf("reasons %q", got)
			}
		})
		// What it said is forgotten, except for what is sticky.
		if s := p.Stats(); s.KeptMessages != 1 || s.Connected != 1 {
			t.Errorf("stats %+v", s)
		}
	}
	a.wait("turned away", func() bool { return len(a.refused) > 0 && a.refused[0].Reason == "it is not on the roster of this job" })
	a.says(6, "without it")
	b.hears("without it")
	if err := c.SetMembers(g.roster(0, 1)); err == nil || !strings.Contains(err.Error(), "is not among the 2 members") {
		t.Errorf("a roster without this peer: %v", err)
	}
	moved := g.roster()
	moved[2].Index = 7
	if err := c.SetMembers(moved); err == nil || !strings.Contains(err.Error(), "an index is never changed") {
		t.Errorf("a roster with another index: %v", err)
	}
	for _, p := range g.peers {
		p.Close()
	}
	if err := a.SetMembers(g.roster()); !errors.Is(err, errClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestKeyIsReplacedWhileRunning(t *testing.T) {
	g := newGroup(t, 3)
	g.startAll()
	a, b, old := g.peers[0], g.peers[1], g.peers[2]
	a.Expel(2, "its key was stolen")
	a.wait("disconnected", func() bool { return !a.connected[2] && a.reasons[2][0] == "its key was stolen" })
	a.wait("turned away", func() bool { return len(a.refused) > 0 && a.refused[0].Reason == "its key was stolen" })
	b.wait("not by b", func() bool { return b.connected[2] })

	key, _ := NewKey()
	g.keys[2], g.members[2] = key, key.Public().(ed25519.PublicKey)
	for _, p := range []*testPeer{a, b} {
		mustSet(t, p, g.roster())
	}
	b.wait("disconnected", func() bool { return !b.connected[2] && b.reasons[2][0] == "its key was replaced" })
	fresh := g.start(2)
	fresh.dials(a)
	fresh.dials(b)
	for _, p := range []*testPeer{a, b} {
		p.wait("the new key connects", func() bool { return p.connected[2] })
	}
	fresh.says(1, "sealed with the new key")
	// unseal reads g.members, which every Check shares.
	a.hears("sealed with the new key")
	old.Close()
	a.wait("still there", func() bool { return a.connected[2] })
}

// TestExpelledMember stays out, whatever it tries, while the others go on.
func TestExpelledMember(t *testing.T) {
	g := newGroup(t, 3)
	g.startAll()
	a, b, c := g.peers[0], g.peers[1], g.peers[2]
	for _, p := range []*testPeer{a, b} {
		if err := p.Expel(2, "it signed two ballots"); err != nil {
			t.Fatal(err)
		}
	}
	mustSet(t, a, g.roster()) // the roster that still has it
	c.wait("alone", func() bool { return len(c.connected) == 0 })
	c.dials(a)
	a.wait("turned away", func() bool {
		return len(a.refused) > 0 && a.refused[0].Remote == c.ID() && a.refused[0].Reason == "it signed two ballots"
	})
	a.says(1, "go on")
	b.hears("go on")
	c.look(func() {
		if _, ok := c.texts["go on"]; ok {
			t.Error("the expelled member heard a message")
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Fetch(ctx, treehash.Hash{}, 1, []int{0}); err == nil {
		t.Error("the expelled member got a body")
	}
}

// TestStickyMessages: they outlast Forget, their signer, and a flood of plain
// ones, and come first.
func TestStickyMessages(t *testing.T) {
	g := newGroup(t, 4)
	g.limits.KeptMessages = 8
	for i := range 3 {
		g.start(i)
	}
	a, b, c := g.peers[0], g.peers[1], g.peers[2]
	c.dials(a)
	a.wait("connected", func() bool { return a.connected[2] })
	for slot := range uint64(stickyMessages + 3) {
		c.says(slot, fmt.Sprint("sticky ", slot))
	}
	a.hears(fmt.Sprint("sticky ", stickyMessages+2))
	c.Close()
	for slot := range uint64(100) {
		a.says(slot, fmt.Sprint("noise ", slot))
	}
	a.Forget(1000)
	a.says(1000, "plain")
	mustSet(t, a, g.roster(0, 1, 3))
	a.SetMembers(g.roster(0, 1, 3))
	if s := a.Stats(); s.KeptMessages != stickyMessages+1 {
		t.Errorf("%d messages kept", s.KeptMessages)
	}
	var first string
	late := g.start(3, func(c *Config) {
		check := c.Check
		c.Check = func(data []byte) (Meta, error) {
			if first == "" { // one connection: one goroutine
				first = text(data)
			}
			return check(data)
		}
	})
	b.Forget(1000)
	late.dials(a)
	late.hears("plain")
	if !strings.HasPrefix(first, "sticky") {
		t.Errorf("%q came first", first)
	}
	for slot := 3; slot < stickyMessages+3; slot++ {
		late.hears(fmt.Sprint("sticky ", slot))
	}
	late.look(func() {
		if _, ok := late.texts["sticky 2"]; ok || len(late.texts) != stickyMessages+1 {
			t.Errorf("%d messages came", len(late.texts))
		}
	})
	_, meta := seal(g.keys[2], 2, 5, "sticky 5")
	if data, ok := late.Message(meta.ID); !ok || text(data) != "sticky 5" {
		t.Errorf("sticky 5 is not kept: %v", ok)
	}
	if _, ok := late.Message([32]byte{1}); ok {
		t.Error("a message of no name is kept")
	}
}

// TestStickyOfTheGoneAreBounded by the number of their signers.
func TestStickyOfTheGoneAreBounded(t *testing.T) {
	var k kept
	k.init(4, 1000, 1000)
	none := func(*keptMessage) {}
	for from := range 3 * keptGone {
		m := &keptMessage{data: make([]byte, 10), raw: uint64(from), meta: Meta{ID: [32]byte{byte(from), 1}, From: from, Slot: 1, Sticky: true}}
		if !k.add(m, none) {
			t.Fatal("not kept")
		}
		k.leave(from, none)
		k.leave(from, none)
	}
	if n, b := k.size(); n != keptGone || b != 10*keptGone || len(k.of) != keptGone || len(k.gone) != keptGone {
		t.Errorf("%d messages, %d bytes of %d signers", n, b, len(k.of))
	}
	k.join(3*keptGone - 1)
	if len(k.gone) != keptGone-1 || k.of[keptKey{3*keptGone - 1, true}] == nil {
		t.Error("one that joins is not kept")
	}
}

// TestNotYet: messages under a roster that is not known blame nobody, are not
// lost if there are few, and are asked for again if there were many.
func TestNotYet(t *testing.T) {
	g := newGroup(t, 3)
	g.beat = testHeartbeat
	book := newKeyBook(g, 0, 1)
	a := g.start(0, func(c *Config) { c.Check = book.check })
	b := g.start(1)
	a.dials(b)
	a.wait("connected", func() bool { return a.connected[1] })
	const n = 3 * heldMessages
	for slot := range uint64(n) {
		data, meta := seal(g.keys[2], 2, slot, fmt.Sprint("early ", slot))
		if err := b.Broadcast(data, meta); err != nil {
			t.Fatal(err)
		}
	}
	poll(t, "all came", func() bool { return a.Stats().NotYet == n })
	a.Host.mu.Lock()
	for _, s := range a.sessions {
		if len(s.held) > heldMessages {
			t.Errorf("%d messages are held", len(s.held))
		}
	}
	a.Host.mu.Unlock()
	if s := a.Stats(); s.Delivered != 0 || s.Bad != 0 || s.NotYetLost < n-2*heldMessages {
		t.Errorf("stats %+v", s)
	}
	book.learn(2, g.members[2])
	mustSet(t, a, g.roster())
	a.hears(fmt.Sprint("early ", n-1))
	for slot := range n { // the rest after the heartbeats that offering again takes
		a.hears(fmt.Sprint("early ", slot))
	}
}

// TestPlainMessagesOfStrangersEnd: what a signer off the roster says is held
// for some heartbeats, and then dropped.
func TestPlainMessagesOfStrangersEnd(t *testing.T) {
	g := newGroup(t, 3)
	g.beat = testHeartbeat
	a := g.start(0, func(c *Config) { c.Members = g.roster(0, 1) })
	b := g.start(1)
	a.dials(b)
	a.wait("connected", func() bool { return a.connected[1] })
	data, meta := seal(g.keys[2], 2, 1, "of no member")
	if err := b.Broadcast(data, meta); err != nil {
		t.Fatal(err)
	}
	data, meta = seal(g.keys[2], 2, 1, "sticky of no member")
	if err := b.Broadcast(data, meta); err != nil {
		t.Fatal(err)
	}
	a.hears("sticky of no member")
	poll(t, "dropped", func() bool { return a.Stats().Stale == 1 })
	if s := a.Stats(); s.Bad != 0 || s.Banned != 0 || s.Delivered != 1 || s.KeptMessages != 1 {
		t.Errorf("stats %+v", s)
	}
}

// TestExpelledDuringItsHandshake: a connection that was let through just before
// does not come up.
func TestExpelledDuringItsHandshake(t *testing.T) {
	g := newGroup(t, 2)
	p := g.start(0)
	r := g.dialRaw(1, p)
	r.greet(p)
	p.wait("connected", func() bool { return p.connected[1] })
	p.Host.mu.Lock()
	s := p.roster.at[1].session()
	p.Host.mu.Unlock()
	if err := p.Expel(1, "it lied"); err != nil {
		t.Fatal(err)
	}
	sessions := func() int {
		p.Host.mu.Lock()
		defer p.Host.mu.Unlock()
		return len(p.sessions)
	}
	poll(t, "dropped", func() bool { return sessions() == 0 })
	p.Host.connected(t.Context(), s.conn) // as the swarm says after a handshake
	if n := sessions(); n != 0 {
		t.Errorf("%d sessions of an expelled member", n)
	}
}
