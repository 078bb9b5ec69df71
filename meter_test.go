package spirt

import (
	"testing"
	"time"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
	"github.com/spirt-ml/spirt/function"
	"github.com/spirt-ml/spirt/p2p"
)

// What the rounds tell is what was used, each thing once, also over a restart.
func TestMeter(t *testing.T) {
	var told []Event
	m := &meter{emit: func(e Event) { told = append(told, e) }, prices: bill.Default(), database: true}
	start := time.Now()
	m.restore(bill.Usage{Invocations: 5, PeerMillis: 1000}, time.Second)
	m.begin(start)
	attempt := function.Invocation{Label: invoked{"gradient", 3, 1}, Billed: 10 * time.Millisecond, MemoryMB: 256, Attempt: 2, Cold: true, Error: "Runtime.ExitError"}
	m.invocation(attempt)
	m.settle(start.Add(700*time.Microsecond), 10)
	m.round(Event{Event: "round", Round: 1}, start.Add(1500*time.Microsecond), 100, []p2p.Traffic{{Member: 1, In: 5, Out: 7}, {Member: 2}})
	m.invocation(attempt)
	m.round(Event{Event: "round", Round: 2}, start.Add(3*time.Millisecond), 150, []p2p.Traffic{{Member: 1, In: 6, Out: 7}, {Member: 2}})
	if len(told) != 4 {
		t.Fatalf("%d events", len(told))
	}
	if i := told[0].Invocation; i.Task != "gradient" || i.Round != 3 || i.Minibatch != 1 || i.Attempt != 2 || !i.Cold || i.BilledMS != 10 || i.Error == "" {
		t.Errorf("%+v", i)
	}
	for i, want := range []bill.Usage{
		{Invocations: 1, MBMillis: 2560, PeerMillis: 1, DBMillis: 1, BytesOut: 100},
		{Invocations: 1, MBMillis: 2560, PeerMillis: 2, DBMillis: 2, BytesOut: 50},
	} {
		if s := told[2*i+1].Spent; s.Usage != want || s.CostUSD != bill.Default().Cost(want).Total() {
			t.Errorf("round %d: %+v, want %+v", i+1, *s, want)
		}
	}
	if one := told[1].Traffic; len(one) != 1 || one[0] != (events.Traffic{Peer: 2, In: 5, Out: 7}) {
		t.Errorf("%+v", one)
	}
	if two := told[3].Traffic; len(two) != 1 || two[0] != (events.Traffic{Peer: 2, In: 1}) {
		t.Errorf("%+v", two)
	}
	used, elapsed, cost := m.totals()
	if want := (bill.Usage{Invocations: 7, MBMillis: 5120, PeerMillis: 1003, DBMillis: 3, BytesOut: 150}); used != want || elapsed != 1003*time.Millisecond || cost != bill.Default().Cost(want).Total() {
		t.Errorf("%+v, %v, %v", used, elapsed, cost)
	}
}

func TestStopwatch(t *testing.T) {
	at := time.Now()
	var s stopwatch
	s.lap(at)
	for i, step := range []string{"compute", "compute", "gather", "apply"} {
		s.turn(step, at.Add(time.Duration(i)*time.Millisecond))
	}
	steps := s.lap(at.Add(5 * time.Millisecond))
	if len(steps) != 2 || steps[0] != (events.Step{Step: "compute", At: 0, MS: 2}) || steps[1] != (events.Step{Step: "gather", At: 2, MS: 1}) {
		t.Errorf("%+v", steps)
	}
	for i := range 100 { // of slots that fail without end
		s.turn([]string{"gather", "pause"}[i%2], at.Add(time.Duration(10+i)*time.Millisecond))
	}
	if steps = s.lap(at.Add(time.Second)); len(steps) != maxSteps {
		t.Errorf("%d steps", len(steps))
	}
}

// What liars say of their spending moves the total by a bounded amount, and
// honest claims add up to the nano-dollar.
func TestClaims(t *testing.T) {
	members := shares{{member: 0, minibatches: 1}, {member: 1, minibatches: 1}, {member: 2, minibatches: 4}, {member: 3, minibatches: 1}}
	for name, c := range map[string]struct {
		claims claims
		want   bill.Money // nano-dollars
	}{
		"none":            {claims{}, 0},
		"all":             {claims{0: 100, 1: 100, 2: 400, 3: 100}, 700},
		"one is silent":   {claims{0: 100, 1: 100, 3: 100}, 700},
		"only itself":     {claims{1: 50}, 350},
		"a liar":          {claims{0: 100, 1: 100, 2: 400, 3: 1 << 62}, 100 + 100 + 400 + 400},
		"it says nothing": {claims{0: 100, 1: 100, 2: 400, 3: 0}, 600},
		"a stranger":      {claims{0: 100, 1: 100, 2: 400, 3: 100, 9: 1e9}, 700},
	} {
		if got := c.claims.total(members); got != c.want*1000 {
			t.Errorf("%s: %d, want %d", name, got/1000, c.want)
		}
	}
}

func TestPatrol(t *testing.T) {
	var w patrol
	at := time.Now()
	w.reset(at)
	for range 200 {
		w.round(time.Second)
	}
	if len(w.laps) != lapsKept {
		t.Errorf("%d laps", len(w.laps))
	}
	// A step of eight rounds' time hangs, then of sixteen, and so on.
	var told []int
	for s := range 70 {
		if w.hangs(at.Add(time.Duration(s) * time.Second)) {
			told = append(told, s)
		}
	}
	if len(told) != 4 || told[0] != 8 || told[1] != 16 || told[2] != 32 || told[3] != 64 {
		t.Errorf("told after %v s", told)
	}
	w.reset(at)
	if w.hangs(at.Add(4*time.Second)) || !w.hangs(at.Add(9*time.Second)) {
		t.Error("after another step it does not start anew")
	}
	if _, ok := w.clocks(at); ok {
		t.Error("a jump at the first look")
	}
	if _, ok := w.clocks(at.Add(time.Second)); ok {
		t.Error("a jump of clocks that agree")
	}
	if w.lost(at, 1) || !w.lost(at.Add(time.Second), 0) || w.lost(at.Add(2*time.Second), 0) || w.lost(at.Add(time.Minute), 0) {
		t.Error("whom it has lost at once")
	}
	e := Event{Step: "gather", Round: 7, Members: []int{1, 2, 4}, Seconds: 12.4}
	text := "round 7: waits for the averages of peers 2, 4, since 12 s"
	if got := waitingText(e, 1, 0); got != text {
		t.Errorf("%q, want %q", got, text)
	}
	text += "; no other peer is connected, and who has missed rounds believes no fewer than 2"
	if got := waitingText(e, 1, 2); got != text {
		t.Errorf("%q, want %q", got, text)
	}
}
