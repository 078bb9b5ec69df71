package events

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/bill"
)

// called is an invocation event of a peer.
func called(peer int, ms float64, memory int, change func(*Invocation)) *Event {
	i := &Invocation{Task: "gradient", Attempt: 1, MS: ms, BilledMS: int64(ms), MemoryMB: memory}
	if change != nil {
		change(i)
	}
	return &Event{Event: "invocation", Peer: peer, Invocation: i}
}

// ended is a round event that tells what was spent, at the default prices.
func ended(peer int, round uint64, u bill.Usage) *Event {
	return &Event{Event: "round", Peer: peer, Round: round, Spent: &Spent{u, bill.Default().Cost(u).Total()}}
}

func add(b *Bill, events ...*Event) {
	for _, e := range events {
		b.Add(e)
	}
}

// Two peers, three rounds, a failed attempt, a cold start, work after the last
// round: each amount in its place, and the parts are the whole.
func TestBill(t *testing.T) {
	b := Bill{Own: bill.Default()}
	paid := bill.USD
	add(&b,
		called(1, 10, 256, func(i *Invocation) { i.Cold, i.InitMS, i.BilledMS = true, 7.5, 18 }), // 8 ms for the start
		ended(1, 1, bill.Usage{Invocations: 1, MBMillis: 18 * 256, PeerMillis: 1000, BytesOut: 500}),
		called(2, 10, 256, nil),
		called(2, 30, 256, func(i *Invocation) { i.Error = "Sandbox.Timedout" }),
		ended(2, 1, bill.Usage{Invocations: 2, MBMillis: 40 * 256, PeerMillis: 1000, BytesOut: 500}),
		called(1, 5, 256, nil),
		ended(1, 2, bill.Usage{Invocations: 1, MBMillis: 5 * 256, PeerMillis: 500, DBMillis: 250}),
		called(1, 3, 256, func(i *Invocation) { i.Task = "evaluate" }),
		&Event{Event: "done", CostUSD: &paid},
	)
	s := b.Statement(bill.Default())
	if s.Differ != 0 || s.Implausible != 0 {
		t.Fatalf("%d differ: %+v; %d implausible", s.Differ, s.Differences, s.Implausible)
	}
	if want := (bill.Usage{Invocations: 5, MBMillis: 66 * 256, PeerMillis: 2500, DBMillis: 250, BytesOut: 1000}); s.Usage != want {
		t.Errorf("usage %+v, want %+v", s.Usage, want)
	}
	p := bill.Default()
	if want := p.Cost(s.Usage); s.Cost != want || s.TotalUSD != want.Total() {
		t.Errorf("cost %+v, want %+v", s.Cost, want)
	}
	if s.Rest.Usage != (bill.Usage{Invocations: 1, MBMillis: 3 * 256}) {
		t.Errorf("rest %+v", s.Rest)
	}
	if s.Failed.Usage != (bill.Usage{Invocations: 1, MBMillis: 30 * 256}) || len(s.Failures) != 1 || s.Failures[0].Name != "Sandbox.Timedout" {
		t.Errorf("failed %+v %+v", s.Failed, s.Failures)
	}
	if s.Cold != (Cold{1, 7.5, 8 * 256}) || s.ColdUSD != p.Cost(bill.Usage{MBMillis: 8 * 256}).Total() {
		t.Errorf("cold %+v, %v", s.Cold, s.ColdUSD)
	}
	if len(s.Peers) != 2 || s.Peers[0].Rounds != 2 || s.Peers[1].Usage.MBMillis != 40*256 {
		t.Errorf("peers %+v", s.Peers)
	}
	if len(s.Tasks) != 2 || s.Tasks[0].Name != "gradient" || s.Tasks[0].Usage.Invocations != 4 {
		t.Errorf("tasks %+v", s.Tasks)
	}
	if len(s.Rounds) != 2 || s.Rounds[0].Usage.Invocations != 3 || s.Rounds[0].Usage.PeerMillis != 2000 {
		t.Errorf("rounds %+v", s.Rounds)
	}
	if d := s.Dearest(1); len(d) != 1 || d[0].Round != 1 {
		t.Errorf("dearest %+v", d)
	}
	if s.Mean.Usage.Invocations != 2 || s.PaidUSD == nil || *s.PaidUSD != bill.USD {
		t.Errorf("mean %+v, paid %v", s.Mean, s.PaidUSD)
	}

	var out bytes.Buffer
	if err := s.WriteCSV(&out); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(&out).ReadAll()
	if err != nil || len(rows) != 4 || rows[1][0] != "1" || rows[3][0] != "rest" {
		t.Fatalf("%v, %v", rows, err)
	}
	var sum [5]int64
	for _, row := range rows[1:] {
		for i := range sum {
			n, err := strconv.ParseInt(row[i+1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			sum[i] += n
		}
	}
	if want := [5]int64{5, 66 * 256, 2500, 250, 1000}; sum != want {
		t.Errorf("the lines add up to %v, want %v", sum, want)
	}
}

// A round of which the peer tells another thing than happened is named.
func TestBillDiffers(t *testing.T) {
	wrong := ended(3, 9, bill.Usage{Invocations: 1, MBMillis: 10})
	wrong.Spent.CostUSD++
	for name, c := range map[string]struct {
		events []*Event
		want   Difference
	}{
		"one too few": {
			[]*Event{called(1, 10, 128, nil), called(1, 10, 128, nil), ended(1, 4, bill.Usage{Invocations: 1, MBMillis: 1280})},
			Difference{Peer: 1, Round: 4, Told: bill.Usage{Invocations: 1, MBMillis: 1280}, Counted: bill.Usage{Invocations: 2, MBMillis: 2560}},
		},
		"less memory": {
			[]*Event{called(1, 10, 128, nil), ended(1, 4, bill.Usage{Invocations: 1, MBMillis: 640})},
			Difference{Peer: 1, Round: 4, Told: bill.Usage{Invocations: 1, MBMillis: 640}, Counted: bill.Usage{Invocations: 1, MBMillis: 1280}},
		},
		"nothing told": {
			[]*Event{called(2, 10, 128, nil), {Event: "round", Peer: 2, Round: 1}},
			Difference{Peer: 2, Round: 1, Counted: bill.Usage{Invocations: 1, MBMillis: 1280}},
		},
		"another amount": {
			[]*Event{called(3, 10, 1, nil), wrong},
			Difference{Peer: 3, Round: 9, Told: bill.Usage{Invocations: 1, MBMillis: 10}, Counted: bill.Usage{Invocations: 1, MBMillis: 10},
				ToldUSD: wrong.Spent.CostUSD, CountedUSD: wrong.Spent.CostUSD - 1},
		},
	} {
		b := Bill{Own: bill.Default()}
		add(&b, c.events...)
		if s := b.Statement(bill.Default()); s.Differ != 1 || !reflect.DeepEqual(s.Differences, []Difference{c.want}) {
			t.Errorf("%s: %d, %+v, want %+v", name, s.Differ, s.Differences, c.want)
		}
	}
	// At other prices the amounts are not looked at.
	b := Bill{}
	add(&b, called(3, 10, 1, nil), wrong)
	if s := b.Statement(bill.Default()); s.Differ != 0 {
		t.Errorf("%+v", s.Differences)
	}
}

// A peer that is started again counts from nothing; what it had used before is
// in the bill, but in no round.
func TestBillRestart(t *testing.T) {
	b := Bill{Own: bill.Default()}
	add(&b,
		&Event{Event: "peer", Peer: 1, State: "started"},
		called(1, 10, 128, nil),
		ended(1, 1, bill.Usage{Invocations: 1, MBMillis: 1280}),
		called(1, 20, 128, nil),
		&Event{Event: "peer", Peer: 1, State: "lost", By: 2}, // others saw it
		&Event{Event: "peer", Peer: 1, State: "started", By: 2},
		called(1, 1, 128, nil),
		&Event{Event: "peer", Peer: 1, State: "crashed"},
		&Event{Event: "peer", Peer: 1, State: "started"},
		called(1, 30, 128, nil),
		ended(1, 2, bill.Usage{Invocations: 1, MBMillis: 3840}),
	)
	s := b.Statement(bill.Default())
	if s.Differ != 0 {
		t.Errorf("%+v", s.Differences)
	}
	if s.Abandoned.Usage != (bill.Usage{Invocations: 2, MBMillis: 21 * 128}) || s.Rest.Usage != (bill.Usage{}) {
		t.Errorf("abandoned %+v, rest %+v", s.Abandoned, s.Rest)
	}
	if s.Usage.MBMillis != 61*128 {
		t.Errorf("usage %+v", s.Usage)
	}
}

// A peer that is started again by hand says nothing of it but by counting from
// nothing.
func TestBillRestartByHand(t *testing.T) {
	used := func(e *Event, n int) *Event {
		e.Used = &Usage{Invocations: n}
		return e
	}
	b := Bill{Own: bill.Default()}
	add(&b,
		called(1, 10, 128, nil),
		used(ended(1, 1, bill.Usage{Invocations: 1, MBMillis: 1280}), 1),
		called(1, 10, 128, nil),
		used(ended(1, 2, bill.Usage{Invocations: 1, MBMillis: 1280}), 2),
		called(1, 20, 128, nil), // and it is killed
		called(1, 30, 128, nil),
		used(ended(1, 3, bill.Usage{Invocations: 1, MBMillis: 3840}), 1),
		called(1, 10, 128, nil), // here it is not, and it tells too little
		called(1, 10, 128, nil),
		used(ended(1, 4, bill.Usage{Invocations: 1, MBMillis: 1280}), 2),
	)
	s := b.Statement(bill.Default())
	if s.Differ != 1 || s.Differences[0].Round != 4 {
		t.Errorf("%+v", s.Differences)
	}
	if s.Abandoned.Usage != (bill.Usage{Invocations: 1, MBMillis: 20 * 128}) {
		t.Errorf("abandoned %+v", s.Abandoned)
	}
}

// The event by which a peer says that it goes on comes before what it then uses;
// that it was found running says nothing.
func TestBillResume(t *testing.T) {
	b := Bill{Own: bill.Default()}
	add(&b,
		called(1, 20, 128, nil), // killed in its first round
		&Event{Event: "resume", Peer: 1},
		called(1, 30, 128, nil),
		&Event{Event: "peer", Peer: 1, State: "started", Message: "it was running already"},
		called(1, 10, 128, nil),
		ended(1, 1, bill.Usage{Invocations: 2, MBMillis: 40 * 128}),
	)
	s := b.Statement(bill.Default())
	if s.Differ != 0 || s.Abandoned.Usage != (bill.Usage{Invocations: 1, MBMillis: 20 * 128}) {
		t.Errorf("%+v, abandoned %+v", s.Differences, s.Abandoned)
	}
}

// What no process can mean is left out and counted.
func TestBillImplausible(t *testing.T) {
	b := Bill{}
	add(&b,
		called(0, 1, 1, nil), called(-3, 1, 1, nil),
		called(1, 1, 1, func(i *Invocation) { i.BilledMS = -1 }),
		called(1, 1, 1, func(i *Invocation) { i.BilledMS = 1 << 62 }),
		called(1, 1, 1, func(i *Invocation) { i.MemoryMB = 1 << 30 }),
		&Event{Event: "invocation", Peer: 1},
		&Event{Event: "round", Peer: 1, Round: 1, Spent: &Spent{Usage: bill.Usage{PeerMillis: -5}}},
		&Event{Event: "round", Peer: 1, Round: 1 << 60, Spent: &Spent{Usage: bill.Usage{BytesOut: 1 << 62}}},
	)
	for range 200 { // as many peers as no run has
		for n := range 3 {
			add(&b, called(1000*n+b.implausible+1, 1, 1, func(i *Invocation) { i.Task = strings.Repeat(strconv.Itoa(n+b.implausible), 200) }))
		}
	}
	s := b.Statement(bill.Default())
	if s.Implausible < 7 || s.Usage.PeerMillis != 0 || s.Usage.BytesOut != 0 || s.Differ != 2 || len(s.Tasks) > maxKinds+1 || len(s.Peers) > maxViewPeers {
		t.Errorf("%d implausible, %+v, %d differ, %d tasks, %d peers", s.Implausible, s.Usage, s.Differ, len(s.Tasks), len(s.Peers))
	}
	if _, err := json.Marshal(s); err != nil {
		t.Error(err)
	}
}

// A log with a torn line and one that is still being written has the bill of
// the others, and says so.
func TestBillTorn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.jsonl")
	var text []byte
	for _, e := range []*Event{called(1, 10, 128, nil), ended(1, 1, bill.Usage{Invocations: 1, MBMillis: 1280}), called(1, 5, 128, nil)} {
		line, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		text = append(append(text, line...), '\n')
		if len(text) < 300 {
			text = append(append(text, line[:len(line)/2]...), '\n')
		}
	}
	text = append(text, `{"event":"invocation","peer":1,"invoc`...)
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	tail, err := OpenTail(path)
	if err != nil {
		t.Fatal(err)
	}
	defer tail.Close()
	_, events, err := tail.Next()
	if err != nil {
		t.Fatal(err)
	}
	b := Bill{Own: bill.Default()}
	for _, e := range events {
		b.Add(&e)
	}
	s := b.Statement(bill.Default())
	if s.Usage.Invocations != 2 || s.Differ != 0 || s.Rest.Usage.Invocations != 1 || tail.Skipped() != 2 {
		t.Errorf("%+v, %d differ, %d skipped", s.Usage, s.Differ, tail.Skipped())
	}
}
