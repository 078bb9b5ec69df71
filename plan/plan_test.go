package plan

import (
	"encoding/json"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

// rounds returns the events of rounds with gradients that take ms each, one
// after the other, the first of them cold.
func rounds(n, minibatches int, ms func(i int) float64) []events.Event {
	var out []events.Event
	i := 0
	for r := range n {
		took := 0.0
		for m := range minibatches {
			inv := &events.Invocation{Task: "gradient", Round: uint64(r + 1), Minibatch: m, Attempt: 1, MS: ms(i), MemoryMB: 256, PeakMB: 100}
			if i == 0 {
				inv.Cold, inv.InitMS = true, 20
				took += 20
			}
			took += inv.MS
			i++
			out = append(out, events.Event{Event: "invocation", Peer: 1, Invocation: inv})
		}
		out = append(out, events.Event{Event: "round", Peer: 1, Round: uint64(r + 1), Steps: []events.Step{
			{Step: "compute", MS: took}, {Step: "ballot", MS: 1}, {Step: "apply", MS: 2}, {Step: "record", MS: 1}, {Step: "gather", MS: 1000},
		}})
	}
	return out
}

func measured(minibatches int, list []events.Event) *Measured {
	var m Measurement
	for i := range list {
		m.Add(&list[i])
	}
	return m.Measured(minibatches, 1)
}

func constant(ms float64) func(int) float64 { return func(int) float64 { return ms } }

// ideal has no time but that of computing.
func ideal() Assumptions {
	return Assumptions{CPUFactor: 1, Bandwidth: 1e12, PeerBandwidth: 1e12, Margin: 1, AtOnce: MaxAtOnce}
}

func grid(m *Measured) *Grid {
	return &Grid{
		Work:     Work{Peers: 2, Rounds: 100, Minibatches: 8, Validations: 3, Params: 1000, SampleBytes: 785, BatchSize: 64, ValidationSamples: 1000, AverageBytes: 4000},
		Measured: m, Assumed: DefaultAssumptions(), Prices: bill.Default(),
	}
}

func estimates(t *testing.T, g *Grid) []Estimate {
	t.Helper()
	out, _, err := g.Estimates()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// With a whole vCPU as fast as the core that measured, one function at once and
// a network that takes no time, a round computes as long as was measured, and
// what is billed is what would have been billed here.
func TestSameAsMeasured(t *testing.T) {
	const ms = 12.5
	list := rounds(10, 8, constant(ms))
	g := grid(measured(8, list))
	g.Work.Validations = 0
	g.Assumed = ideal()
	g.Memory, g.Parallel = []int{MBPerCPU}, []int{1}
	e := estimates(t, g)[0]
	if g.Measured.OverheadMS > 1e-9 || math.Abs(e.ComputeMS-8*ms) > 0.1 {
		t.Errorf("a round computes for %v ms with an overhead of %v, measured were %v", e.ComputeMS, g.Measured.OverheadMS, 8*ms)
	}
	if g.Measured.ProtocolMS != 2 || g.Measured.ApplyMS != 2 {
		t.Errorf("protocol %v, apply %v", g.Measured.ProtocolMS, g.Measured.ApplyMS)
	}
	// 8 minibatches of 12.5 ms for 2 peers and 100 rounds, each billed 13 ms;
	// and two starts of 20 ms.
	if want := int64(2*100*8*13+2*20) * MBPerCPU; e.Usage.MBMillis != want || e.Usage.Invocations != 1600 {
		t.Errorf("%+v, want %d MB-ms and 1600 invocations", e.Usage, want)
	}
	if want := 100*(8*ms+4) + 20; math.Abs(1e3*e.Seconds-want) > 1 {
		t.Errorf("%v s, want %v ms", e.Seconds, want)
	}
	if e.Usage.PeerMillis != int64(math.Round(2*1e3*e.Seconds)) || e.Usage.DBMillis != 0 {
		t.Errorf("%+v", e.Usage)
	}
	// A core that is half as fast, and a quarter of one, take that much longer.
	for _, c := range []struct {
		factor float64
		memory int
	}{{0.5, MBPerCPU}, {2, 442}, {0.5, MaxMemory}} {
		g.Assumed.CPUFactor, g.Memory = c.factor, []int{c.memory}
		want := 8 * ms / (c.factor * min(1, float64(c.memory)/MBPerCPU))
		if e := estimates(t, g)[0]; math.Abs(e.ComputeMS-want) > 0.1 {
			t.Errorf("%+v: %v ms, want %v", c, e.ComputeMS, want)
		}
	}
}

// More memory is never slower, and functions never cost less for it; more at
// once saves time where nothing else holds it up; as much is asked for either way.
func TestMonotone(t *testing.T) {
	g := grid(measured(8, rounds(10, 8, func(i int) float64 { return 5 + float64(i*7%13) })))
	all := estimates(t, g)
	if len(all) != len(memories())*4 { // 1, 2, 4 and 8 at once
		t.Fatalf("%d estimates", len(all))
	}
	at := map[[2]int]Estimate{}
	for _, e := range all {
		at[[2]int{e.MemoryMB, e.Parallel}] = e
	}
	sizes := memories()
	for i, m := range sizes {
		for _, k := range []int{1, 2, 4, 8} {
			e := at[[2]int{m, k}]
			if e.Usage.Invocations != all[0].Usage.Invocations || e.Usage.BytesOut != all[0].Usage.BytesOut {
				t.Errorf("%d MB, %d at once: %+v", m, k, e.Usage)
			}
			if i > 0 {
				if b := at[[2]int{sizes[i-1], k}]; e.Seconds > b.Seconds || e.Cost.Functions < b.Cost.Functions && m > MBPerCPU {
					t.Errorf("%d at once: %d MB take %v s and %v, %d MB %v s and %v", k, sizes[i-1], b.Seconds, b.Cost.Functions, m, e.Seconds, e.Cost.Functions)
				}
			}
			if k > 1 {
				if b := at[[2]int{m, k / 2}]; e.Seconds >= b.Seconds {
					t.Errorf("%d MB: %d at once take %v s, %d %v s", m, k, e.Seconds, k/2, b.Seconds)
				}
			}
		}
	}
	// More of anything costs more.
	base := at[[2]int{512, 2}]
	for name, change := range map[string]func(*Grid){
		"rounds":      func(g *Grid) { g.Work.Rounds *= 2 },
		"peers":       func(g *Grid) { g.Work.Peers *= 2 },
		"minibatches": func(g *Grid) { g.Work.Minibatches *= 2 },
		"parameters":  func(g *Grid) { g.Work.Params *= 100 },
		"validations": func(g *Grid) { g.Work.Validations *= 10 },
		"a slow CPU":  func(g *Grid) { g.Assumed.CPUFactor = 0.5 },
		"a slow net":  func(g *Grid) { g.Assumed.Bandwidth = 1e6 },
		"databases":   func(g *Grid) { g.Assumed.Databases = true },
	} {
		c := *g
		c.Memory, c.Parallel = []int{512}, []int{2}
		if name == "validations" {
			m := *g.Measured
			m.Evaluate = m.Gradient
			c.Measured = &m
		}
		change(&c)
		if e := estimates(t, &c)[0]; e.TotalUSD <= base.TotalUSD {
			t.Errorf("%s: %v, and %v before", name, e.TotalUSD, base.TotalUSD)
		}
	}
}

// The front is what no other beats, found here by trying all pairs.
func TestFront(t *testing.T) {
	all := estimates(t, grid(measured(8, rounds(10, 8, func(i int) float64 { return 5 + float64(i*7%13) }))))
	cheapest, fastest := 0, 0
	for i, e := range all {
		beaten := slices.ContainsFunc(all, func(o Estimate) bool {
			return o.Seconds <= e.Seconds && o.TotalUSD <= e.TotalUSD && (o.Seconds < e.Seconds || o.TotalUSD < e.TotalUSD)
		})
		if e.Front && beaten {
			t.Errorf("%d MB, %d at once is beaten", e.MemoryMB, e.Parallel)
		}
		twin := slices.ContainsFunc(all, func(o Estimate) bool {
			return o.Front && o.Seconds == e.Seconds && o.TotalUSD == e.TotalUSD
		})
		if !beaten && !e.Front && !twin {
			t.Errorf("%d MB, %d at once belongs to the front", e.MemoryMB, e.Parallel)
		}
		for _, o := range all {
			if e.Cheapest && o.TotalUSD < e.TotalUSD || e.Fastest && o.Seconds < e.Seconds {
				t.Errorf("%d: %+v is beaten by %+v", i, e, o)
			}
		}
		if e.Cheapest {
			cheapest++
		}
		if e.Fastest {
			fastest++
		}
	}
	if cheapest != 1 || fastest != 1 {
		t.Errorf("%d cheapest, %d fastest", cheapest, fastest)
	}
}

// Failed attempts are paid for and take time.
func TestRetries(t *testing.T) {
	list := rounds(10, 8, constant(10))
	g := grid(measured(8, list))
	g.Memory, g.Parallel = []int{MBPerCPU}, []int{1}
	before := estimates(t, g)[0]
	for range 20 { // of 100 now
		list = append(list, events.Event{Event: "invocation", Invocation: &events.Invocation{Task: "gradient", MS: 10, Error: "Sandbox.Timedout"}})
	}
	g.Measured = measured(8, list)
	after := estimates(t, g)[0]
	if want := int64(math.Round(float64(before.Usage.Invocations) / 0.8)); after.Usage.Invocations != want {
		t.Errorf("%d invocations, want %d", after.Usage.Invocations, want)
	}
	if after.Seconds <= before.Seconds {
		t.Errorf("%v s, and %v without failures", after.Seconds, before.Seconds)
	}
	for range 200 {
		list = append(list, events.Event{Event: "invocation", Invocation: &events.Invocation{Task: "gradient", Error: "Runtime.ExitError"}})
	}
	g.Measured = measured(8, list)
	if _, _, err := g.Estimates(); err == nil || !strings.Contains(err.Error(), "220 of 300 attempts failed") {
		t.Errorf("most fail: %v", err)
	}
}

// What cannot be run is left out, with the reason.
func TestLimits(t *testing.T) {
	fresh := func() *Grid { return grid(measured(8, rounds(4, 8, constant(10)))) }
	g := fresh()
	g.Measured.PeakMB = 500
	all, left, err := g.Estimates()
	if err != nil || all[0].MemoryMB != 768 || len(left) != 3 || !strings.Contains(left[0], "128 MB: functions take 500 MB, so 625 to 10240 MB") {
		t.Errorf("%v, %q, %v", all, left, err)
	}
	g.Memory = []int{512}
	if _, _, err := g.Estimates(); err == nil || !strings.Contains(err.Error(), "625") {
		t.Errorf("too little memory alone: %v", err)
	}
	g = fresh()
	g.Parallel, g.Memory = []int{8, 9}, []int{512}
	if all, left, err := g.Estimates(); err != nil || len(all) != 1 || len(left) != 1 || !strings.Contains(left[0], "9 at once: 1 to 8 are of use") {
		t.Errorf("more at once than minibatches: %v, %q, %v", all, left, err)
	}
	g = fresh()
	g.Work.Peers, g.Work.Minibatches = 64, 1000
	all, _, err = g.Estimates() // 64 x (14 + 1) are 960
	if err != nil || all[len(all)-1].Parallel != 14 {
		t.Errorf("the account's limit: %v, %v", all[len(all)-1], err)
	}
	g.Assumed.AtOnce = 100
	if _, _, err := g.Estimates(); err == nil || !strings.Contains(err.Error(), "64 peers need 128 functions at once") {
		t.Errorf("too many peers: %v", err)
	}
	g = grid(measured(8, rounds(4, 8, constant(100e3))))
	all, left, err = g.Estimates() // 100 s of a core take 900 of 197 MB
	if err != nil || all[0].MemoryMB != 256 || len(left) != 1 || !strings.Contains(left[0], "128 MB: an invocation takes 1382 s, and may take 900") {
		t.Errorf("too slow: %v, %q, %v", all, left, err)
	}
	g = fresh()
	g.Assumed.CPUFactor = 0
	if _, _, err := g.Estimates(); err == nil || !strings.Contains(err.Error(), "the CPU factor is 0: take 0.01 to 100") {
		t.Errorf("no CPU: %v", err)
	}
	g = fresh()
	g.Measured = measured(8, nil)
	if _, _, err := g.Estimates(); err == nil || !strings.Contains(err.Error(), "no invocation") {
		t.Errorf("nothing measured: %v", err)
	}
	g = fresh()
	g.Work.Rounds = 0
	if _, _, err := g.Estimates(); err == nil {
		t.Error("no rounds have a plan")
	}
}

// What many events say is kept in a bounded amount of memory and stays near.
func TestTimes(t *testing.T) {
	var d Times
	for i := range 100_001 {
		d.add(float64(i % 1001))
	}
	d.add(math.NaN())
	d.add(-1)
	d.add(math.Inf(1))
	d.done()
	if d.Count != 100_001 || len(d.ms) > maxTimes || math.Abs(d.Mean-500) > 10 || math.Abs(d.P95-950) > 10 || d.Max > 1000 || d.at(0) != 0 {
		t.Errorf("%d of %d, mean %v, 95 %% %v, most %v", len(d.ms), d.Count, d.Mean, d.P95, d.Max)
	}
	if b := d.billed(1, 0.25); math.Abs(b-d.Mean-1) > 1e-6 {
		t.Errorf("whole milliseconds and a quarter are billed %v, mean %v", b, d.Mean)
	}
	if b := (&Times{}).billed(3, 3); b != 0 {
		t.Errorf("nothing is billed %v", b)
	}
}

// FuzzMeasurement: whatever a log says, a plan is an error or finite.
func FuzzMeasurement(f *testing.F) {
	f.Add([]byte(`[{"event":"invocation","invocation":{"task":"gradient","ms":5,"memory_mb":256,"peak_mb":20}},{"event":"round","steps":[{"step":"compute","ms":9}],"traffic":[{"peer":2,"out":100}]}]`))
	f.Add([]byte(`[{"event":"invocation","invocation":{"task":"gradient","ms":1e308,"cold":true,"init_ms":-5}}]`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var list []events.Event
		if json.Unmarshal(text, &list) != nil {
			return
		}
		g := grid(measured(8, list))
		all, _, err := g.Estimates()
		if err != nil {
			return
		}
		for _, e := range all {
			if math.IsNaN(e.Seconds) || math.IsInf(e.Seconds, 0) || e.Seconds < 0 || e.TotalUSD < 0 {
				t.Errorf("%+v", e)
			}
		}
		if _, err := json.Marshal(all); err != nil {
			t.Error(err)
		}
		again, _, _ := g.Estimates()
		if !reflect.DeepEqual(all, again) {
			t.Error("the same measurement has two plans")
		}
	})
}
