package round

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestConfigIsChecked(t *testing.T) {
	good := Config{Rosters: roster(4), Genesis: genesis(), Rounds: 3}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for want, f := range map[string]func(*Config){
		"but 0 peers":               func(c *Config) { c.Rosters = []Roster{{Hash: h("roster")}} },
		"peer 1025 is out of":       func(c *Config) { c.Rosters = roster(1025) },
		"the highest index is 1023": func(c *Config) { c.Self = 1024 },
		"f is 2, but 4 peers":       func(c *Config) { c.Rosters = roster(4); c.Rosters[0].F = 2 },
		"roster of genesis is not":  func(c *Config) { c.Genesis.Roster = h("another") },
		"roster of the restored": func(c *Config) {
			c.Head = Record{Height: 1, Slot: 1, Parent: c.Genesis.ID(), Position: 4, Set: []Entry{{0, h("g")}}, Roster: h("x")}
		},
		"a checkpoint every 1048577": func(c *Config) { c.CheckpointEvery = 1<<20 + 1 },
		"genesis must have":          func(c *Config) { c.Genesis.Height = 1 },
		"would not end":              func(c *Config) { c.Rounds = 0 },
		"is more than 10000":         func(c *Config) { c.TargetAccuracy = 10001 },
		"is negative":                func(c *Config) { c.Timeouts.Fetch = -1 },
		"are at most":                func(c *Config) { c.Watermark = MaxSlot + 1 },
		"is not a record":            func(c *Config) { c.Head = Record{Height: 3, Slot: 4} },
		"its run folder belongs": func(c *Config) {
			c.Head = Record{Height: 2, Slot: 2, Parent: c.Genesis.ID(), Set: []Entry{{0, h("g")}}}
		},
	} {
		c := good
		f(&c)
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

func roster(n int) []Roster { return []Roster{NewRoster(h("roster"), Hash{}, n)} }

func genesis() Record { return Genesis(h("job"), h("roster"), h("model"), h("state")) }

// said is a message as Open gives it.
func said(m Message) Received {
	if m.Roster == (Hash{}) {
		m.Roster = h("roster")
	}
	return Received{Message: m, ID: ID(h("job"), m)}
}

// other is what the other peers of a round say, for driving one machine.
type others struct {
	m       *Machine
	now     time.Duration
	counter uint64
}

// round takes the machine through one round without a fault, and returns how
// many messages it got.
func (o *others) round() int {
	m, n := o.m, len(o.m.peers)
	o.now += 40 * time.Millisecond
	slot, head := m.slot, m.head
	entries := make([]Entry, n)
	gradient := func(p int) Hash {
		g := head.id
		g[0], g[1] = g[0]^byte(p+1), g[1]^0xaa
		return g
	}
	for p := range entries {
		entries[p] = Entry{Peer(p), gradient(p)}
	}
	say := func(p int, b Body) {
		m.Step(o.now, said(Message{From: Peer(p), Slot: slot, Parent: head.id, Body: b}))
	}
	m.Step(o.now, GradientReady{Slot: slot, Parent: head.id, Gradient: gradient(0), Bytes: 1000})
	for p := 1; p < n; p++ {
		say(p, Announce{Gradient: gradient(p), Bytes: 1000, BaseModel: head.rec.Model})
		m.Step(o.now, BodyReady{Peer(p), gradient(p)})
	}
	for p := 1; p < n; p++ {
		say(p, Ballot{Entries: entries})
	}
	model := head.rec.Model
	model[3]++
	m.Step(o.now, Applied{Slot: slot, Parent: head.id, Set: m.set, Model: model, State: head.rec.State})
	own := m.own.rec
	o.counter++
	for p := 1; p < n; p++ {
		say(p, SignedRecord{Record: own, Counter: o.counter})
	}
	return 3 * (n - 1)
}

func newOthers(t testing.TB, n int) *others {
	m, err := New(Config{Rosters: roster(n), Genesis: genesis(), Rounds: MaxSlot})
	if err != nil {
		t.Fatal(err)
	}
	m.Step(0, Start{})
	for p := 1; p < n; p++ {
		m.Step(0, Connected{Peer(p)})
	}
	return &others{m: m}
}

// A long run neither waits for a timer nor grows.
func TestLongRunStaysSmall(t *testing.T) {
	o := newOthers(t, 7)
	for i := range uint64(2000) {
		o.round()
		if o.m.head.rec.Height != i+1 || o.m.slot != i+2 {
			t.Fatalf("round %d: at height %d in slot %d", i+1, o.m.head.rec.Height, o.m.slot)
		}
	}
	if s := o.m.Stats(); s.Records > 3*window || s.Bodies > 3*7 || s.States > 3 || s.Messages > 7*inboxSlots {
		t.Errorf("%+v", s)
	}
}

// A peer that is to pause makes no records far from what is final while less
// than a quorum is connected, and goes on when enough are.
func TestPause(t *testing.T) {
	m, err := New(Config{Rosters: roster(4), Genesis: genesis(), Rounds: 100, CheckpointEvery: 2, PauseAfter: 6})
	if err != nil {
		t.Fatal(err)
	}
	m.Step(0, Start{})
	now, reported := time.Minute, 0
	look := func(actions []Action) {
		for _, a := range actions {
			if r, ok := a.(Report); ok && r.Kind == Paused {
				reported++
			}
		}
	}
	look(m.Step(now, Timer{})) // nobody came
	for i := 0; i < 20 && m.phase != phaseObserve; i++ {
		now += time.Minute
		slot, head := m.slot, m.head
		look(m.Step(now, GradientReady{Slot: slot, Parent: head.id, Gradient: h(head.id.String()), Bytes: 4}))
		model := head.rec.Model
		model[0]++
		look(m.Step(now, Applied{Slot: slot, Parent: head.id, Set: m.set, Model: model, State: head.rec.State}))
		look(m.Step(now, Timer{}))
	}
	if m.phase != phaseObserve || m.head.rec.Height != 6 || reported != 1 {
		t.Fatalf("phase %d at height %d, reported %d times", m.phase, m.head.rec.Height, reported)
	}
	m.Step(now, Connected{1})
	if m.phase != phaseObserve {
		t.Error("it goes on with two of four")
	}
	m.Step(now, Connected{2})
	if m.phase != phaseGather {
		t.Errorf("with a quorum connected the phase is %d", m.phase)
	}
}

func BenchmarkRound(b *testing.B) {
	o := newOthers(b, 4)
	messages := 0
	for b.Loop() {
		messages += o.round()
	}
	b.ReportMetric(float64(messages)/b.Elapsed().Seconds(), "messages/s")
}

// Who has a head already waits less at the start: those that are away may be
// so for long.
func TestStartAgainWithoutOthers(t *testing.T) {
	g := genesis()
	head := Record{Height: 1, Slot: 1, Parent: g.ID(), Position: 4, Roster: g.Roster,
		Set: []Entry{{0, h("g")}}, Model: h("m"), State: h("s")}
	for name, test := range map[string]struct {
		head Record
		wait time.Duration
	}{"from genesis": {Record{}, 15 * time.Second}, "from a head": {head, 3 * time.Second}} {
		t.Run(name, func(t *testing.T) {
			m, err := New(Config{Rosters: roster(4), Genesis: g, Rounds: 3, Head: test.head})
			if err != nil {
				t.Fatal(err)
			}
			m.Step(0, Start{})
			_, id := m.Head()
			m.Step(0, GradientReady{Slot: m.slot, Parent: id, Gradient: h("own"), Bytes: 4})
			balloted := func(actions []Action) bool {
				return slices.ContainsFunc(actions, func(a Action) bool {
					s, ok := a.(Send)
					_, is := s.Message.Body.(Ballot)
					return ok && is
				})
			}
			if balloted(m.Step(test.wait-1, Timer{})) {
				t.Error("it went on before the others had time to come")
			}
			if !balloted(m.Step(test.wait, Timer{})) {
				t.Error("it still waits")
			}
		})
	}
}
