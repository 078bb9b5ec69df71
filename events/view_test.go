package events

import (
	"encoding/json"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
	"unsafe"

	"github.com/spirt-ml/spirt/bill"
)

func TestSeries(t *testing.T) {
	var s Series
	for _, round := range []uint64{3, 1, 2, 3, 0} {
		s.Add(round, float64(round))
	}
	s.Add(2, math.NaN())
	s.Add(2, math.Inf(1))
	rounds, values := s.Points()
	if !slices.Equal(rounds, []uint64{1, 2, 3}) || !slices.Equal(values, []float64{1, 2, 3}) {
		t.Error(rounds, values)
	}
	if _, values = s.After(3); !slices.Equal(values, []float64{3}) {
		t.Error(values)
	}
	// However many rounds: the points are bounded, and their mean is that of
	// all values.
	var long Series
	n := uint64(10*MaxPoints + 7)
	for round := uint64(1); round <= n; round++ {
		long.Add(round, float64(round))
	}
	rounds, values = long.Points()
	if len(rounds) > MaxPoints || len(rounds) < MaxPoints/2 || !slices.IsSorted(values) {
		t.Fatalf("%d points", len(rounds))
	}
	sum := 0.0
	for i, c := range long.counts {
		sum += float64(c) * long.sums[i] / float64(c)
	}
	if want := float64(n) * float64(n+1) / 2; math.Abs(sum-want) > 1 {
		t.Errorf("the sum is %v, want %v", sum, want)
	}
	long.Add(math.MaxUint64, 1)
	if last, _, ok := long.Last(); !ok || last != rounds[len(rounds)-1] || len(long.sums) > MaxPoints {
		t.Error(last, ok, len(long.sums))
	}
}

func TestView(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	loss, accuracy := 0.5, 0.75
	price := bill.USD / 4
	var v View
	for _, e := range []Event{
		{Event: "run", State: "started"},
		{Event: "peer", Peer: 1, State: "started", PID: 10},
		{Event: "peer", Peer: 2, State: "started", PID: 11},
		{Event: "invocation", Peer: 1, Invocation: &Invocation{Cold: true, BilledMS: 100, MemoryMB: 256, MS: 90}},
		{Event: "invocation", Peer: 1, Invocation: &Invocation{BilledMS: 50, MemoryMB: 256, Error: "Runtime.ExitError"}},
		{Event: "round", Peer: 1, Round: 1, Loss: &loss, Seconds: 2, Samples: 64, Members: []int{1, 2},
			Steps:   []Step{{"compute", 0, 5}, {"apply", 5, 2}, {"unknown", 0, 1}},
			Traffic: []Traffic{{2, 10, 20}, {-1, 5, 5}},
			Spent:   &Spent{bill.Usage{Invocations: 2, MBMillis: 150 * 256, PeerMillis: 2000, BytesOut: 20}, price}},
		{Event: "validation", Round: 1, Accuracy: &accuracy},
		{Event: "peer", Peer: 2, By: 1, State: "lost", Message: "gone"},
		{Event: "peer", Peer: 2, State: "crashed", Message: "killed"},
		{Event: "warning", Peer: 1, About: 2, Cause: CauseRefused, Message: "not finite"},
		{Event: "waiting", Peer: 1, Step: "gather", Members: []int{2}},
		{Event: "done", StopReason: "interrupted"},
	} {
		at = at.Add(time.Second)
		e.Time = at
		v.Add(&e)
	}
	if v.Round != 1 || v.Samples != 64 || v.Spent != price || v.Done == nil || len(v.Peers) != 2 {
		t.Errorf("%+v", v)
	}
	if want := (bill.Usage{Invocations: 2, MBMillis: 150 * 256, PeerMillis: 2000, BytesOut: 20}); v.Usage != want {
		t.Errorf("used %+v, want %+v", v.Usage, want)
	}
	if f := v.Functions; f.Cold != 1 || f.Failed != 1 || f.BilledMS != 150 {
		t.Errorf("%+v", f)
	}
	one, two := v.Peer(1), v.Peer(2)
	if one.In[2] != 10 || one.Out[2] != 20 || len(one.In) != 1 || one.Waiting == nil || one.PID != 10 {
		t.Errorf("%+v", one)
	}
	if two.State != "crashed" || v.Causes["lost"] != 1 || v.Causes["crashed"] != 1 || v.Causes[CauseRefused] != 1 || len(v.Faults) != 3 {
		t.Errorf("%+v %v", two, v.Causes)
	}
	if v.Steps[0] != 5 || v.Steps[4] != 2 {
		t.Error(v.Steps)
	}
	before := v.Elapsed()
	v.Add(&Event{Time: at.Add(time.Hour), Event: "run", State: "resumed"})
	if v.Elapsed() != before || v.Done != nil {
		t.Errorf("%v after a pause, %v before", v.Elapsed(), before)
	}
}

// Whatever a clock is set to, the run goes on as long as it does.
func TestViewClockSet(t *testing.T) {
	const years = 56 * 365 * 24 * time.Hour
	round := func(peer int, n uint64) Event { return Event{Event: "round", Peer: peer, Round: n} }
	warns := func(peer int, by time.Duration) Event {
		return Event{Event: "warning", Peer: peer, Cause: CauseClock, Seconds: by.Seconds()}
	}
	type told struct {
		Event
		at, set time.Duration // since the first event, and by how much the clock is off
	}
	start := []told{{Event{Event: "run", State: "started"}, 0, 0}, {round(1, 1), 10 * time.Second, 0}, {round(2, 1), 10 * time.Second, 0}}
	for name, c := range map[string]struct {
		events []told
		want   time.Duration
	}{
		"not": {[]told{{round(1, 2), time.Hour, 0}, {round(2, 2), time.Hour, -time.Second}, {round(1, 3), time.Hour + 10*time.Second, 0}}, time.Hour + 10*time.Second},
		"back": {[]told{{round(1, 2), 10 * time.Second, -time.Hour}, {round(2, 2), 11 * time.Second, -time.Hour}, {warns(1, -time.Hour), 12 * time.Second, -time.Hour},
			{warns(2, -time.Hour), 12 * time.Second, -time.Hour}, {round(1, 3), 20 * time.Second, -time.Hour}}, 20 * time.Second},
		"back a little": {[]told{{round(1, 2), 11 * time.Second, -3 * time.Second}, {warns(1, -3*time.Second), 11 * time.Second, -3 * time.Second}, {round(1, 3), 21 * time.Second, -3 * time.Second}}, 20 * time.Second},
		"forward": {[]told{{round(1, 2), 11 * time.Second, years}, {round(2, 2), 11 * time.Second, years}, {warns(2, years), 11*time.Second - time.Millisecond, years},
			{warns(1, years), 12 * time.Second, years}, {round(1, 3), 20 * time.Second, years}}, 20 * time.Second},
		"forward in a long round": {[]told{{warns(1, 4*time.Second), 10*time.Minute + time.Second, 4 * time.Second}, {warns(2, 4*time.Second), 10*time.Minute + time.Second, 4 * time.Second},
			{round(1, 2), 10*time.Minute + 2*time.Second, 4 * time.Second}, {round(1, 3), 11 * time.Minute, 4 * time.Second}}, 11 * time.Minute},
		"to and fro": {[]told{{round(1, 2), 11 * time.Second, years}, {warns(1, years), 12 * time.Second, years}, {round(1, 3), 13 * time.Second, 0}, {warns(1, -years), 13 * time.Second, 0},
			{round(1, 4), 20 * time.Second, 0}}, 19 * time.Second}, // what is between two events with a step back is not known
		"told by nobody":            {[]told{{round(1, 2), 20 * time.Second, time.Hour}, {warns(1, 24*time.Hour), 20 * time.Second, time.Hour}}, time.Hour + 20*time.Second},
		"late line":                 {[]told{{round(1, 2), 50 * time.Second, 0}, {round(2, 2), 20 * time.Second, 0}, {round(1, 3), 51 * time.Second, 0}}, 51 * time.Second},
		"back while it did not run": {[]told{{Event{Event: "run", State: "resumed"}, 15 * time.Second, -time.Hour}, {round(1, 2), 25 * time.Second, -time.Hour}}, 20 * time.Second},
	} {
		var v View
		at := time.Date(1970, 1, 2, 3, 4, 5, 0, time.UTC)
		for _, e := range append(slices.Clone(start), c.events...) {
			e.Time = at.Add(e.at + e.set)
			v.Add(&e.Event)
		}
		if v.Elapsed() != c.want || v.Latest.Sub(v.Started)-v.Paused != c.want {
			t.Errorf("%s: %v, and %v without %v, want %v", name, v.Elapsed(), v.Latest.Sub(v.Started), v.Paused, c.want)
		}
		rounds, seconds := v.Clock.Points()
		if !slices.IsSorted(seconds) || seconds[0] != 10 || seconds[len(rounds)-1] > c.want.Seconds()+1e-6 {
			t.Errorf("%s: the clock says %v", name, seconds)
		}
	}
}

// Times that no clock has overflow nothing.
func TestViewTimes(t *testing.T) {
	var v View
	for i := range 12 {
		for _, kind := range []string{"run", "round"} {
			for _, year := range []int{0, 9999} {
				v.Add(&Event{Event: kind, Peer: 1, Round: uint64(i), Time: time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC)})
				if v.Elapsed() < 0 {
					t.Fatalf("%v", v.Elapsed())
				}
			}
		}
	}
}

// However much peers claim, no sum overflows or shrinks, and usage is what a
// Bill counts.
func TestViewBoundsSums(t *testing.T) {
	var v View
	var b Bill
	most := int64(math.MaxInt64)
	for range 3 {
		for _, e := range []Event{
			{Event: "round", Peer: 1, Round: 1, Samples: math.MaxInt, Spent: &Spent{CostUSD: 4_000_000 * bill.USD}, Traffic: []Traffic{{2, most, most}, {2, -5, -5}}, Used: &Usage{Timeouts: math.MinInt}},
			{Event: "round", Peer: 1, Round: 2, Spent: &Spent{CostUSD: -bill.USD}, Used: &Usage{Timeouts: math.MaxInt}},
			{Event: "round", Peer: 1, Round: 3, Spent: &Spent{Usage: bill.Usage{PeerMillis: -1, DBMillis: 10, BytesOut: 10}}},
			{Event: "round", Peer: 1, Round: 4, Spent: &Spent{Usage: bill.Usage{PeerMillis: 10, DBMillis: 20, BytesOut: most}}},
			{Event: "round", Peer: 1, Round: 5, Spent: &Spent{Usage: bill.Usage{PeerMillis: 10, DBMillis: 20, BytesOut: 30}}},
			{Event: "invocation", Peer: 1, Invocation: &Invocation{BilledMS: most, MemoryMB: 1024}},
			{Event: "invocation", Peer: 1, Invocation: &Invocation{BilledMS: 10, MemoryMB: math.MaxInt}},
			{Event: "invocation", Peer: 1, Invocation: &Invocation{BilledMS: -10, MemoryMB: 1024}},
			{Event: "invocation", Peer: 1, Invocation: &Invocation{BilledMS: 10, MemoryMB: -1024}},
			{Event: "invocation", Peer: 1, Invocation: &Invocation{BilledMS: 10, MemoryMB: 256, PeakMB: math.MaxInt}},
		} {
			v.Add(&e)
			b.Add(&e)
		}
	}
	p := v.Peer(1)
	if v.Spent != bill.MaxMoney || p.Spent != bill.MaxMoney {
		t.Errorf("spent %v, by the peer %v", v.Spent, p.Spent)
	}
	if rounds, costs := v.Cost.Points(); len(rounds) != 5 || slices.Min(costs) < 0 {
		t.Errorf("costs %v", costs)
	}
	want := bill.Usage{Invocations: 3, MBMillis: 3 * 10 * 256, PeerMillis: 30, DBMillis: 60, BytesOut: 90}
	if v.Usage != want || p.Usage != want || b.usage != want {
		t.Errorf("used %+v, by the peer %+v, billed %+v, want %+v", v.Usage, p.Usage, b.usage, want)
	}
	if f := v.Functions; f.Invocations != 3 || f.BilledMS != 30 || f.PeakMB != 0 {
		t.Errorf("%+v", f)
	}
	if v.Samples != 0 || p.Timeouts != 0 || p.In[2] != most || p.Out[2] != most {
		t.Errorf("%d samples, %d timeouts, traffic %v %v", v.Samples, p.Timeouts, p.In, p.Out)
	}
}

// A view keeps little of events that are as large as a line can be.
func TestViewBoundsText(t *testing.T) {
	long := strings.Repeat("é", MaxLine/8)
	usd := bill.Money(0)
	var v View
	for i := range 64 {
		many := make([]int, 1<<16)
		e := Event{
			Peer: 1, Round: uint64(i + 1), Model: long, How: long, State: long, Step: long, Message: long, Cause: long + string(rune('a'+i)), Run: long, StopReason: long, Members: many,
			Steps: []Step{{long, 0, 1}, {"compute", 1, 2}, {string([]byte("gather")), 3, 4}, {"none", 1, 1}}, CostUSD: &usd, Peers: make([]PeerDone, 1<<12), Traffic: make([]Traffic, 1<<12),
		}
		for j := range e.Peers {
			e.Peers[j].State = long
		}
		for _, kind := range []string{"peer", "round", "warning", "finished", "waiting", "done"} {
			e.Event = kind
			v.Add(&e)
		}
	}
	b, err := json.Marshal(v)
	check(t, err)
	if len(b) > 1<<20 {
		t.Errorf("%d bytes", len(b))
	}
	p := v.Peer(1)
	if n := cap(p.Members) + cap(p.Waiting.Members) + cap(v.Done.Peers) + cap(v.Done.Members) + cap(v.Done.Traffic); n > 4*maxViewPeers {
		t.Errorf("%d numbers are held", n)
	}
	if want := []Step{{"compute", 1, 2}, {"gather", 3, 4}}; !slices.Equal(p.Rounds[0].Steps, want) || cap(p.Rounds[0].Steps) > maxRoundSteps {
		t.Errorf("%.200v", p.Rounds[0].Steps)
	}
	if s := v.Faults[0].Cause; len(s) != maxName || !utf8.ValidString(s) {
		t.Errorf("a cause of %d bytes", len(s))
	}
	if s := clip(long, maxName); unsafe.StringData(s) == unsafe.StringData(long) {
		t.Error("what is cut off is held")
	}
}

// Whatever stands in an event log, a view takes it, in bounded memory.
func FuzzView(f *testing.F) {
	f.Add([]byte(`{"event":"round","peer":1,"round":1,"steps":[{"step":"compute","ms":-1}],"traffic":[{"peer":9}],"spent":{"cost_usd":0.1}}`))
	f.Add([]byte(`{"event":"peer","peer":3,"by":1,"state":"lost"}`))
	f.Add([]byte(`{"event":"round","peer":1,"round":18446744073709551615,"loss":1e308}`))
	f.Add([]byte(`{"event":"invocation","peer":1}`))
	f.Add([]byte(`{"event":"round","peer":1,"round":1,"loss":1.7e308,"seconds":9e9,"time":"0000-01-01T00:00:00Z","steps":[{"step":"compute","ms":1.7e308}]}`))
	f.Add([]byte(`{"event":"invocation","peer":1,"invocation":{"ms":1.7e308,"queue_ms":1.7e308}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		var e Event
		if json.Unmarshal(line, &e) != nil {
			return
		}
		var v View
		for range 3 {
			v.Add(&e)
		}
		if _, err := json.Marshal(v); err != nil {
			t.Error(err)
		}
		v.SamplesPerSecond()
		v.Left(10)
		if len(v.Peers) > 1 {
			t.Errorf("%d peers of one event", len(v.Peers))
		}
	})
}
