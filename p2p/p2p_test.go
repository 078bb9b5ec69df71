package p2p

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/zeebo/blake3"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// patience is how long a test waits for an event that must come.
const patience = time.Minute

// Tests run on busy machines, under the race detector: most use slowBeat, so
// that no member counts as silent, and those about silence testHeartbeat.
const (
	slowBeat      = 2 * time.Second
	testHeartbeat = 100 * time.Millisecond
)

// seal makes a signed message as the round protocol would: the signer, the
// slot, a signature, and the text.
func seal(key ed25519.PrivateKey, from int, slot uint64, text string) ([]byte, Meta) {
	body := binary.LittleEndian.AppendUint64([]byte{byte(from)}, slot)
	body = append(body, text...)
	data := append(ed25519.Sign(key, body), body...)
	return data, Meta{ID: blake3.Sum256(data), From: from, Slot: slot, Sticky: strings.HasPrefix(text, "sticky")}
}

// unseal is the Check that goes with seal.
func unseal(members []ed25519.PublicKey) func([]byte) (Meta, error) {
	return func(data []byte) (Meta, error) {
		if len(data) < ed25519.SignatureSize+9 {
			return Meta{}, errors.New("too short")
		}
		body := data[ed25519.SignatureSize:]
		from := int(body[0])
		if from >= len(members) || !ed25519.Verify(members[from], body, data[:ed25519.SignatureSize]) {
			return Meta{}, errors.New("the signature does not hold")
		}
		return Meta{
			ID: blake3.Sum256(data), From: from, Slot: binary.LittleEndian.Uint64(body[1:]),
			Sticky: bytes.HasPrefix(body[9:], []byte("sticky")),
		}, nil
	}
}

func text(data []byte) string { return string(data[ed25519.SignatureSize+9:]) }

// shelf is a Bodies in memory that counts what is held.
type shelf struct {
	mu     sync.Mutex
	bodies map[treehash.Hash][]byte
	held   int
	asked  int
}

func (s *shelf) put(b []byte) treehash.Hash {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bodies == nil {
		s.bodies = make(map[treehash.Hash][]byte)
	}
	h := treehash.Sum(b)
	s.bodies[h] = b
	return h
}

func (s *shelf) Body(h treehash.Hash) ([]byte, func(), bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	b, ok := s.bodies[h]
	if !ok {
		return nil, nil, false
	}
	s.held++
	return b, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.held--
	}, true
}

// group is a roster and those of its members that run.
type group struct {
	t       testing.TB
	keys    []ed25519.PrivateKey
	members []ed25519.PublicKey
	peers   []*testPeer
	limits  Limits
	beat    time.Duration // zero: slowBeat
}

// testPeer is a host whose events are collected as they come.
type testPeer struct {
	*Host
	t     testing.TB
	index int
	key   ed25519.PrivateKey
	shelf *shelf

	mu        sync.Mutex
	changed   chan struct{}
	connected map[int]bool
	reasons   map[int][]string
	texts     map[string]int
	refused   []Refused
	over      bool
}

func newGroup(t testing.TB, n int) *group {
	g := &group{t: t, peers: make([]*testPeer, n)}
	for range n {
		key, err := NewKey()
		if err != nil {
			t.Fatal(err)
		}
		g.keys = append(g.keys, key)
		g.members = append(g.members, key.Public().(ed25519.PublicKey))
	}
	return g
}

// roster returns the members at the given places of the group, or all.
func (g *group) roster(places ...int) []Member {
	var out []Member
	for i, key := range g.members {
		if len(places) == 0 || slices.Contains(places, i) {
			out = append(out, Member{Index: i, Key: key})
		}
	}
	return out
}

func (g *group) config(i int) Config {
	return Config{
		Key: g.keys[i], Listen: []string{"127.0.0.1:0"}, Members: g.roster(),
		Job: [32]byte{1}, Check: unseal(g.members), Heartbeat: cmp.Or(g.beat, slowBeat), Limits: g.limits,
	}
}

// start runs member i, with changes to its config.
func (g *group) start(i int, change ...func(*Config)) *testPeer {
	g.t.Helper()
	c := g.config(i)
	s := &shelf{}
	c.Bodies = s
	for _, f := range change {
		f(&c)
	}
	h, err := New(c)
	if err != nil {
		g.t.Fatal(err)
	}
	p := &testPeer{
		Host: h, t: g.t, index: i, key: g.keys[i], shelf: s, changed: make(chan struct{}),
		connected: map[int]bool{}, reasons: map[int][]string{}, texts: map[string]int{},
	}
	g.t.Cleanup(func() { h.Close() })
	go p.collect()
	g.peers[i] = p
	return p
}

// startAll runs all members, each knowing the addresses of all.
func (g *group) startAll() {
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
		p.wait("all connected", func() bool { return len(p.connected) == len(g.peers)-1 })
	}
}

// heartbeatsCame waits until every peer knows that all are connected to all.
// Before that, members forward messages to be sure.
func (g *group) heartbeatsCame() {
	g.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for _, p := range g.peers {
		all := func() bool {
			p.Host.mu.Lock()
			defer p.Host.mu.Unlock()
			for _, m := range p.roster.members {
				s := m.session()
				for i := range g.peers {
					if s != nil && (s.peers == nil || !s.peers.has(i)) {
						return false
					}
				}
			}
			return true
		}
		for !all() {
			select {
			case <-tick.C:
			case <-late:
				g.t.Fatal("heartbeats do not come")
			}
		}
	}
}

// helpers are what this binary does instead of testing when a test runs it
// again.
var helpers = map[string]func(){}

// TestMain keeps libp2p's own log lines out of the tests' output.
func TestMain(m *testing.M) {
	if f := helpers[os.Getenv("SPIRT_P2P_HELPER")]; f != nil {
		f()
		return
	}
	LogLibrary(slog.DiscardHandler)
	os.Exit(m.Run())
}

func (p *testPeer) dials(o *testPeer) {
	p.t.Helper()
	if err := p.SetAddresses(o.index, o.Addrs()); err != nil {
		p.t.Fatal(err)
	}
}

func (p *testPeer) collect() {
	for e := range p.Events() {
		p.mu.Lock()
		switch e := e.(type) {
		case Connected:
			p.connected[e.Member] = true
		case Disconnected:
			delete(p.connected, e.Member)
			p.reasons[e.Member] = append(p.reasons[e.Member], e.Reason)
		case Message:
			p.texts[text(e.Data)]++
		case Refused:
			p.refused = append(p.refused, e)
		}
		close(p.changed)
		p.changed = make(chan struct{})
		p.mu.Unlock()
	}
	p.mu.Lock()
	p.over = true
	close(p.changed)
	p.mu.Unlock()
}

// wait waits until ok holds; it is called with p.mu held after each event.
func (p *testPeer) wait(what string, ok func() bool) {
	p.t.Helper()
	late := time.After(patience)
	for {
		p.mu.Lock()
		if ok() {
			p.mu.Unlock()
			return
		}
		changed, over := p.changed, p.over
		p.mu.Unlock()
		if over {
			p.t.Fatalf("peer %d: %s: the host closed", p.index, what)
		}
		select {
		case <-changed:
		case <-late:
			p.mu.Lock()
			defer p.mu.Unlock()
			p.t.Fatalf("peer %d: %s: not within %v: connected %v, reasons %v, refused %v, texts %d, stats %+v",
				p.index, what, patience, p.connected, p.reasons, p.refused, len(p.texts), p.Stats())
		}
	}
}

// look reads what was collected.
func (p *testPeer) look(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

func (p *testPeer) hears(texts ...string) {
	p.t.Helper()
	for _, s := range texts {
		p.wait("hears "+s, func() bool { return p.texts[s] == 1 })
	}
}

func (p *testPeer) says(slot uint64, s string) {
	p.t.Helper()
	data, meta := seal(p.key, p.index, slot, s)
	if err := p.Broadcast(data, meta); err != nil {
		p.t.Fatal(err)
	}
}

func randomBody(n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{7})
	rng.Read(b)
	return b
}

func mustFetch(t testing.TB, p *testPeer, hash treehash.Hash, want []byte, from ...int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	got, err := p.Fetch(ctx, hash, int64(len(want)), from)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the body is another one")
	}
}

func TestFourPeersHearEachOtherOnce(t *testing.T) {
	g := newGroup(t, 4)
	g.startAll()
	g.heartbeatsCame()
	before := g.peers[0].Stats().MessagesOut
	for slot := range uint64(20) {
		for i, p := range g.peers {
			p.says(slot, fmt.Sprintf("%d of %d", slot, i))
		}
	}
	for i, p := range g.peers {
		for slot := range 20 {
			for j := range g.peers {
				if i != j {
					p.hears(fmt.Sprintf("%d of %d", slot, j))
				}
			}
		}
	}
	for _, p := range g.peers {
		p.Close()
	}
	for i, p := range g.peers {
		if n := len(p.texts); n != 60 {
			t.Errorf("peer %d heard %d messages, want 60", i, n)
		}
		for s, n := range p.texts {
			if n != 1 {
				t.Errorf("peer %d heard %q %d times", i, s, n)
			}
		}
	}
	if n := g.peers[0].Stats().MessagesOut - before; n != 60 {
		t.Errorf("%d messages sent where 60 are enough: connected members need no forwarding", n)
	}
}

func TestFetch(t *testing.T) {
	g := newGroup(t, 3)
	g.startAll()
	for _, n := range []int{1, 1000, treehash.ChunkSize - 1, treehash.ChunkSize, treehash.ChunkSize + 1, 5*treehash.ChunkSize + 17, 45 << 20} {
		body := randomBody(n)
		hash := g.peers[0].shelf.put(body)
		mustFetch(t, g.peers[1], hash, body, 0)
		g.peers[2].shelf.put(body)
		mustFetch(t, g.peers[1], hash, body, 2, 0)
		g.peers[2].shelf.bodies = nil
		mustFetch(t, g.peers[1], hash, body, 2, 0)
	}
}

// checkGoroutines fails the test if goroutines that it started outlive it.
func checkGoroutines(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		late := time.Now().Add(patience)
		for runtime.NumGoroutine() > before {
			if time.Now().After(late) {
				buf := make([]byte, 1<<20)
				t.Fatalf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
			}
			runtime.Gosched()
		}
	})
}
