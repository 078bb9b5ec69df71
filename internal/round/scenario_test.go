package round

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// story drives one machine with the commands of testdata/*.story. Hashes are
// shown by the names under which the story introduced them.
type story struct {
	m       *Machine
	now     time.Duration
	names   map[string]string // short hash: name
	records map[string]Record // by name
	counter map[Peer]uint64
}

func TestScenarios(t *testing.T) {
	datadriven.Walk(t, "testdata/scenarios", func(t *testing.T, path string) {
		s := &story{}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			return s.run(t, d)
		})
	})
}

func (s *story) name(h Hash, name string) Hash {
	s.names[h.Short()] = name
	return h
}

// gradient is what p computes on the head: g3.1 is peer 3's for round 1.
func (s *story) gradient(p Peer) Hash {
	height := s.m.head.rec.Height + 1
	return s.name(h(fmt.Sprint("gradient", uint16(p), height)), fmt.Sprintf("g%d.%d", p, height))
}

// show prints actions by name, without housekeeping.
func (s *story) show(actions []Action) string {
	var b strings.Builder
	for _, a := range actions {
		switch a := a.(type) {
		case Retain, SetTimer:
			continue
		case Send:
			if r, ok := a.Message.Body.(SignedRecord); ok {
				s.learn(r.Record)
			}
		}
		fmt.Fprintln(&b, a)
	}
	out := b.String()
	for short, name := range s.names {
		out = strings.ReplaceAll(out, short, name)
	}
	if out == "" {
		return "(nothing)\n"
	}
	return out
}

// learn names a record after its height and set: r1:023.
func (s *story) learn(r Record) string {
	name := fmt.Sprintf("r%d:", r.Height)
	for _, e := range r.Set {
		name += strconv.Itoa(int(e.Peer))
	}
	if other, ok := s.records[name]; ok && other.ID() != r.ID() {
		name += fmt.Sprintf("@%d", r.Slot)
	}
	s.records[name] = r
	s.name(r.ID(), name)
	return name
}

func (s *story) step(ev Event) string { return s.show(slices.Clone(s.m.Step(s.now, ev))) }

func (s *story) peers(text string) []Peer {
	var out []Peer
	for _, f := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' }) {
		p, err := strconv.Atoi(f)
		if err != nil {
			panic(err)
		}
		out = append(out, Peer(p))
	}
	return out
}

func arg(d *datadriven.TestData, key, def string) string {
	for _, a := range d.CmdArgs {
		if a.Key == key {
			return strings.Join(a.Vals, ",")
		}
	}
	return def
}

func (s *story) set(text string) []Entry {
	out := []Entry{}
	for _, p := range s.peers(text) {
		out = append(out, Entry{p, s.gradient(p)})
	}
	return out
}

// record makes the record that follows from a set on the named parent.
func (s *story) record(d *datadriven.TestData) Record {
	parentName := arg(d, "on", s.names[s.m.head.id.Short()])
	parent := s.records[parentName]
	set := s.set(arg(d, "set", ""))
	slot, _ := strconv.ParseUint(arg(d, "slot", fmt.Sprint(parent.Slot+1)), 10, 64)
	salt := arg(d, "model", "")
	type entry struct {
		peer     uint16
		gradient string
	}
	content := make([]entry, len(set))
	for i, e := range set {
		content[i] = entry{uint16(e.Peer), e.Gradient.String()}
	}
	r := Record{
		Slot: slot, Height: parent.Height + 1, Parent: parent.ID(), Set: set,
		FUsed: uint16(min(s.m.ros.F, (len(set)-1)/2)),
		Model: h(fmt.Sprint(parent.Model, content, salt)), State: h(fmt.Sprint(parent.State, content)),
		Position: parent.Position + s.m.ros.Minibatches, Roster: parent.Roster, Justified: parent.Justified,
	}
	s.learn(r)
	return r
}

func (s *story) run(t *testing.T, d *datadriven.TestData) string {
	number := func(key string, def uint64) uint64 {
		n, err := strconv.ParseUint(arg(d, key, fmt.Sprint(def)), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	message := func(p Peer, b Body) string {
		m := Message{From: p, Slot: number("slot", s.m.slot), Parent: s.m.head.id, Body: b}
		if on := arg(d, "on", ""); on != "" {
			r := s.records[on]
			m.Parent = r.ID()
		}
		return s.step(said(m))
	}
	var out strings.Builder
	froms := s.peers(arg(d, "from", ""))
	switch d.Cmd {
	case "new":
		*s = story{names: map[string]string{}, records: map[string]Record{}, counter: map[Peer]uint64{}}
		g := genesis()
		s.records["genesis"] = g
		s.name(g.ID(), "genesis")
		n := int(number("n", 4))
		m, err := New(Config{
			Self: Peer(number("self", 0)), Rosters: roster(n), Genesis: g,
			Rounds: number("rounds", 100), Watermark: number("watermark", 0), Counter: number("counter", 0),
			TargetAccuracy: uint32(number("target", 0)), Patience: uint32(number("patience", 0)), MinDelta: int64(number("delta", 0)),
		})
		if err != nil {
			return err.Error() + "\n"
		}
		s.m = m
		out.WriteString(s.step(Start{}))
		for p := range Peer(n) {
			if p != m.cfg.Self && !slices.Contains(s.peers(arg(d, "away", "")), p) {
				m.Step(s.now, Connected{p})
			}
		}
	case "connect":
		for _, p := range froms {
			out.WriteString(s.step(Connected{p}))
		}
	case "disconnect":
		for _, p := range froms {
			out.WriteString(s.step(Disconnected{p}))
		}
	case "wait":
		for_, err := time.ParseDuration(d.CmdArgs[0].Key)
		if err != nil {
			t.Fatal(err)
		}
		s.now += for_
		out.WriteString(s.step(Timer{}))
	case "gradient":
		if arg(d, "failed", "no") != "no" {
			return s.step(GradientFailed{Slot: s.m.slot, Parent: s.m.head.id})
		}
		v := Validation{}
		if c := number("correct", 0); c > 0 {
			v = Validation{LossMicro: int64(number("loss", 1000)), Correct: uint32(c), Count: 100}
		}
		out.WriteString(s.step(GradientReady{Slot: s.m.slot, Parent: s.m.head.id, Gradient: s.gradient(s.m.cfg.Self), Bytes: 1000, Validation: v, Stop: Stop(number("stop", 0))}))
	case "announce":
		for _, p := range froms {
			base := s.m.head.rec.Model
			if on := arg(d, "on", ""); on != "" {
				base = s.records[on].Model
			}
			a := Announce{Gradient: s.gradient(p), Bytes: 1000, BaseModel: base}
			if x := arg(d, "gradient", ""); x != "" {
				a.Gradient = s.name(h(x), x)
			}
			if x := number("correct", 0); x > 0 {
				a.Validation = Validation{LossMicro: int64(number("loss", 1000+uint64(p))), Correct: uint32(x), Count: 100}
			}
			a.Stop = Stop(number("stop", 0))
			if x := arg(d, "none", "no"); x != "no" {
				a = Announce{BaseModel: a.BaseModel}
			}
			out.WriteString(message(p, a))
		}
	case "return":
		for _, p := range froms {
			r := Return{Counter: number("counter", 0), Head: s.m.head.rec}
			if on := arg(d, "on", ""); on != "" {
				r.Head = s.records[on]
			}
			out.WriteString(message(p, r))
		}
	case "body":
		for _, p := range froms {
			switch {
			case arg(d, "refused", "no") != "no":
				out.WriteString(s.step(BodyRefused{p, s.gradient(p), "not finite at index 3"}))
			case arg(d, "unavailable", "no") != "no":
				out.WriteString(s.step(BodyUnavailable{p, s.gradient(p)}))
			default:
				out.WriteString(s.step(BodyReady{p, s.gradient(p)}))
			}
		}
	case "ballot":
		for _, p := range froms {
			out.WriteString(message(p, Ballot{Entries: s.set(arg(d, "set", ""))}))
		}
	case "applied":
		r := s.record(d)
		slot := s.m.slot
		if s.m.pursued != nil {
			r.Slot = s.m.pursued.rec.Slot
			slot = r.Slot
		}
		out.WriteString(s.step(Applied{Slot: slot, Parent: r.Parent, Set: r.Set, Model: r.Model, State: r.State}))
	case "record":
		var r Record
		if arg(d, "own", "no") != "no" {
			r = s.m.own.rec
		} else {
			r = s.record(d)
		}
		for _, p := range froms {
			s.counter[p]++
			c := number("counter", s.counter[p])
			out.WriteString(s.step(said(Message{From: p, Slot: r.Slot, Parent: r.Parent, Body: SignedRecord{Record: r, Counter: c}})))
		}
	case "state":
		r := s.records[arg(d, "of", "")]
		if arg(d, "unavailable", "no") != "no" {
			return s.step(StateUnavailable{r.ID()})
		}
		out.WriteString(s.step(StateReady{r.ID()}))
	default:
		t.Fatalf("%s: unknown command %s", d.Pos, d.Cmd)
	}
	got := strings.ReplaceAll(out.String(), "(nothing)\n", "")
	if got == "" {
		return "(nothing)\n"
	}
	return got
}
