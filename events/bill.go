package events

import (
	"cmp"
	"encoding/csv"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"

	"github.com/spirt-ml/spirt/bill"
)

// Limits of a Bill.
const (
	maxBillRounds  = 1 << 18 // further ones are one, Statement.Further
	maxDifferences = 100
	maxKinds       = 32 // tasks, and types of failures; further ones are "other"

	// What an event may say of one invocation or one round.
	maxBilledMS = 7 * 24 * 3600 * 1000
	maxMemoryMB = 1 << 20
	maxSpent    = 1 << 50
)

// Bill adds up what a run used, from its events: invocations one by one, hours
// and transfer as each peer's rounds tell them. Give it every event by Add; the
// zero value has seen none. Usage is counted in whole numbers, so the parts of a
// Statement add up to the whole exactly; amounts are priced once for each part,
// and may differ from their sum by a picodollar a kind.
//
// It checks the peers: what a round says was spent since the peer's round before
// has to be what the invocations between add up to.
type Bill struct {
	// Own is the table that the peers had, for checking the amounts that they
	// reckoned; nil: they are not checked.
	Own *bill.Table

	usage  bill.Usage
	tasks  map[string]Count
	errors map[string]Count
	failed Count
	cold   Cold
	peers  map[int]*peerBill

	rounds    map[uint64]bill.Usage
	further   bill.Usage // of rounds beyond maxBillRounds
	abandoned bill.Usage // told by no round, before a peer was started again

	differences []Difference
	differ      int
	implausible int
	paid        *bill.Money // as the last done says
}

type peerBill struct {
	usage   bill.Usage
	rounds  int
	pending bill.Usage // since its last round
	used    int        // invocations of its process, as its last round says
}

// Count is how many invocations there were of a sort and what they used.
type Count struct {
	Invocations int64      `json:"invocations"`
	Usage       bill.Usage `json:"usage"`
}

func (c Count) add(u bill.Usage) Count {
	return Count{c.Invocations + 1, c.Usage.Add(u)}
}

// Cold is how many invocations had to wait for an instance to start, and what
// was billed for starting it.
type Cold struct {
	Invocations int64   `json:"invocations"`
	InitMS      float64 `json:"init_ms"`
	MBMillis    int64   `json:"mb_ms"` // billed beyond what the same invocations would have been billed warm
}

// Difference is a round of which a peer told another thing than follows from
// the other events.
type Difference struct {
	Peer    int        `json:"peer"`
	Round   uint64     `json:"round"`
	Told    bill.Usage `json:"told"`
	Counted bill.Usage `json:"counted"`
	// ToldUSD and CountedUSD are set where the usage agrees and the amount
	// does not.
	ToldUSD    bill.Money `json:"told_usd,omitempty"`
	CountedUSD bill.Money `json:"counted_usd,omitempty"`
}

// Add takes the next event.
func (b *Bill) Add(e *Event) {
	switch e.Event {
	case "invocation":
		if e.Invocation != nil {
			b.invocation(e.Peer, e.Invocation)
		}
	case "round":
		if p := b.peer(e.Peer); p != nil {
			b.round(p, e)
		}
	case "peer":
		// A peer that starts counts from nothing; one with a cause was running already.
		if e.By == 0 && e.State == "started" && e.Message == "" {
			b.abandon(e.Peer)
		}
	case "resume": // also of one that somebody started by hand
		b.abandon(e.Peer)
	case "done":
		if e.CostUSD != nil {
			c := *e.CostUSD
			b.paid = &c
		}
	}
}

// abandon takes what a peer used since its last round for told by none.
func (b *Bill) abandon(n int) {
	if p := b.peers[n]; p != nil {
		b.abandoned = b.abandoned.Add(p.pending)
		p.pending = bill.Usage{}
	}
}

func (b *Bill) peer(n int) *peerBill {
	if p := b.peers[n]; p != nil || n < 1 || len(b.peers) >= maxViewPeers {
		return p
	}
	if b.peers == nil {
		b.peers, b.rounds = map[int]*peerBill{}, map[uint64]bill.Usage{}
		b.tasks, b.errors = map[string]Count{}, map[string]Count{}
	}
	p := &peerBill{}
	b.peers[n] = p
	return p
}

func (b *Bill) invocation(peer int, i *Invocation) {
	p := b.peer(peer)
	if p == nil || i.BilledMS < 0 || i.BilledMS > maxBilledMS || i.MemoryMB < 0 || i.MemoryMB > maxMemoryMB {
		b.implausible++
		return
	}
	u := i.Usage()
	b.usage, p.usage, p.pending = b.usage.Add(u), p.usage.Add(u), p.pending.Add(u)
	count(b.tasks, i.Task, u)
	if i.Error != "" {
		b.failed = b.failed.add(u)
		count(b.errors, i.Error, u)
	}
	if i.Cold {
		b.cold.Invocations++
		if i.InitMS > 0 && i.InitMS <= maxBilledMS {
			b.cold.InitMS += i.InitMS
		}
		// A warm one is billed its duration rounded up.
		warm := int64(math.Ceil(min(max(i.MS, 0), maxBilledMS)))
		b.cold.MBMillis += max(0, i.BilledMS-warm) * int64(i.MemoryMB)
	}
}

// count adds to the entry of a kind, of which there are only so many.
func count(of map[string]Count, kind string, u bill.Usage) {
	const most = 80
	if kind = kind[:min(len(kind), most)]; kind == "" {
		kind = "unnamed"
	}
	if _, ok := of[kind]; !ok && len(of) >= maxKinds {
		kind = "other"
	}
	of[kind] = of[kind].add(u)
}

func (b *Bill) round(p *peerBill, e *Event) {
	p.rounds++
	counted := p.pending
	p.pending = bill.Usage{}
	before := p.used
	if e.Used != nil {
		p.used = e.Used.Invocations
	}
	if s := e.Spent; s != nil {
		// A peer that somebody started again by hand says so only here: its first
		// round tells all that its process has used.
		if e.Used != nil && before > 0 && int64(p.used) <= s.Invocations {
			if lost := counted.Sub(bill.Usage{Invocations: s.Invocations, MBMillis: s.MBMillis}); lost.Invocations > 0 && lost.MBMillis >= 0 {
				b.abandoned, counted = b.abandoned.Add(lost), counted.Sub(lost)
			}
		}
		if s.Invocations < 0 || s.MBMillis < 0 || outside(s.PeerMillis) || outside(s.DBMillis) || outside(s.BytesOut) {
			b.implausible++
		} else {
			rest := s.Usage
			rest.Invocations, rest.MBMillis = 0, 0 // those were counted one by one
			b.usage, p.usage = b.usage.Add(rest), p.usage.Add(rest)
			counted = counted.Add(rest)
		}
		if counted != s.Usage {
			b.differs(Difference{Peer: e.Peer, Round: e.Round, Told: s.Usage, Counted: counted})
		} else if b.Own != nil {
			if c := b.Own.Cost(s.Usage).Total(); c != s.CostUSD {
				b.differs(Difference{Peer: e.Peer, Round: e.Round, Told: s.Usage, Counted: counted, ToldUSD: s.CostUSD, CountedUSD: c})
			}
		}
	} else if counted != (bill.Usage{}) {
		b.differs(Difference{Peer: e.Peer, Round: e.Round, Counted: counted})
	}
	if _, ok := b.rounds[e.Round]; !ok && len(b.rounds) >= maxBillRounds {
		b.further = b.further.Add(counted)
		return
	}
	b.rounds[e.Round] = b.rounds[e.Round].Add(counted)
}

func outside(n int64) bool { return n < 0 || n > maxSpent }

func (b *Bill) differs(d Difference) {
	b.differ++
	if len(b.differences) < maxDifferences {
		b.differences = append(b.differences, d)
	}
}

// Item is a part of a bill.
type Item struct {
	Usage    bill.Usage `json:"usage"`
	Cost     bill.Cost  `json:"cost"`
	TotalUSD bill.Money `json:"total_usd"`
}

// Statement is a bill at the prices of a table.
type Statement struct {
	Prices *bill.Table `json:"prices"`
	Item               // all
	Tasks  []NamedItem `json:"tasks"`
	Peers  []PeerItem  `json:"peers"`
	Rounds []RoundItem `json:"rounds,omitempty"` // ascending, all peers together
	Mean   Item        `json:"mean_round"`       // usage rounded down

	Further   Item `json:"further_rounds"` // of a run of more rounds than are kept apart
	Rest      Item `json:"rest"`           // invocations since each peer's last round
	Abandoned Item `json:"abandoned"`      // invocations that no round tells, as their peer was started again

	Failed   Item        `json:"failed"` // attempts
	Failures []NamedItem `json:"failures"`
	Cold     Cold        `json:"cold"`
	ColdUSD  bill.Money  `json:"cold_usd"`

	// Differences are rounds of which a peer told another thing; Differ is how
	// many there are, of which the first are listed.
	Differences []Difference `json:"differences"`
	Differ      int          `json:"differ"`
	Implausible int          `json:"implausible"`        // events that say what cannot be, left out
	PaidUSD     *bill.Money  `json:"paid_usd,omitempty"` // as the run's last event reckons it
}

// NamedItem is what one sort of invocation cost.
type NamedItem struct {
	Name string `json:"name"`
	Item
}

// PeerItem is what one peer cost.
type PeerItem struct {
	Peer   int `json:"peer"`
	Rounds int `json:"rounds"`
	Item
}

// RoundItem is what a round cost at all peers together.
type RoundItem struct {
	Round uint64 `json:"round"`
	Item
}

// Statement prices what was used.
func (b *Bill) Statement(t *bill.Table) *Statement {
	item := func(u bill.Usage) Item {
		c := t.Cost(u)
		return Item{u, c, c.Total()}
	}
	named := func(of map[string]Count) []NamedItem {
		out := []NamedItem{}
		for _, name := range slices.Sorted(maps.Keys(of)) {
			out = append(out, NamedItem{name, item(of[name].Usage)})
		}
		slices.SortStableFunc(out, func(x, y NamedItem) int { return cmp.Compare(y.TotalUSD, x.TotalUSD) })
		return out
	}
	s := &Statement{
		Prices: t, Item: item(b.usage), Tasks: named(b.tasks), Peers: []PeerItem{}, Further: item(b.further), Abandoned: item(b.abandoned),
		Failed: item(b.failed.Usage), Failures: named(b.errors), Cold: b.cold, ColdUSD: t.Cost(bill.Usage{MBMillis: b.cold.MBMillis}).Total(),
		Differences: slices.Clone(b.differences), Differ: b.differ, Implausible: b.implausible, PaidUSD: b.paid,
	}
	var rest, all bill.Usage
	for _, n := range slices.Sorted(maps.Keys(b.peers)) {
		p := b.peers[n]
		s.Peers = append(s.Peers, PeerItem{n, p.rounds, item(p.usage)})
		rest = rest.Add(p.pending)
	}
	s.Rest = item(rest)
	for _, n := range slices.Sorted(maps.Keys(b.rounds)) {
		s.Rounds = append(s.Rounds, RoundItem{n, item(b.rounds[n])})
		all = all.Add(b.rounds[n])
	}
	if n := int64(len(b.rounds)); n > 0 {
		s.Mean = item(bill.Usage{Invocations: all.Invocations / n, MBMillis: all.MBMillis / n, PeerMillis: all.PeerMillis / n, DBMillis: all.DBMillis / n, BytesOut: all.BytesOut / n})
		s.Mean.TotalUSD = t.Cost(all).Total() / bill.Money(n)
	}
	if s.Differences == nil {
		s.Differences = []Difference{}
	}
	return s
}

// Dearest returns the n rounds that cost most, the dearest first.
func (s *Statement) Dearest(n int) []RoundItem {
	out := slices.Clone(s.Rounds)
	slices.SortStableFunc(out, func(x, y RoundItem) int { return cmp.Compare(y.TotalUSD, x.TotalUSD) })
	return out[:min(n, len(out))]
}

// WriteCSV writes a line for each round, and one for each of what belongs to
// none. The usage of all lines is that of the run.
func (s *Statement) WriteCSV(w io.Writer) error {
	out := csv.NewWriter(w)
	if err := out.Write([]string{"round", "invocations", "mb_ms", "peer_ms", "database_ms", "bytes_out",
		"functions_usd", "requests_usd", "peers_usd", "databases_usd", "transfer_usd", "total_usd"}); err != nil {
		return err
	}
	line := func(name string, i Item) error {
		row := []string{name}
		for _, n := range []int64{i.Usage.Invocations, i.Usage.MBMillis, i.Usage.PeerMillis, i.Usage.DBMillis, i.Usage.BytesOut} {
			row = append(row, strconv.FormatInt(n, 10))
		}
		for _, m := range []bill.Money{i.Cost.Functions, i.Cost.Requests, i.Cost.Peers, i.Cost.Databases, i.Cost.Transfer, i.TotalUSD} {
			row = append(row, m.Decimal())
		}
		return out.Write(row)
	}
	for _, r := range s.Rounds {
		if err := line(strconv.FormatUint(r.Round, 10), r.Item); err != nil {
			return err
		}
	}
	for _, r := range []struct {
		name string
		item Item
	}{{"further", s.Further}, {"abandoned", s.Abandoned}, {"rest", s.Rest}} {
		if r.item.Usage != (bill.Usage{}) {
			if err := line(r.name, r.item); err != nil {
				return err
			}
		}
	}
	out.Flush()
	return out.Error()
}
