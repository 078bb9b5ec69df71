// Package bill says what a run costs: what was used, as whole numbers, times a
// table of prices. Call Open for the Table that a user names, then Table.Cost.
//
// Amounts are whole picodollars and usage is counted in whole units, so the
// same usage has the same cost on every machine, in whatever order it was
// added up. The prices of the built-in tables are those of published lists with
// their date; no discount, tax or free tier is known here.
package bill

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// Money is an amount in picodollars, 1e-12 US dollars. In JSON it is a number
// of dollars with up to 12 decimals, which is exact.
type Money int64

// USD is one US dollar.
const USD Money = 1e12

// MaxMoney is what larger amounts are cut to: nine million dollars.
const MaxMoney Money = math.MaxInt64

// Dollars returns the amount as a floating-point number of dollars.
func (m Money) Dollars() float64 { return float64(m) / float64(USD) }

// String returns the amount for people, with enough decimals to tell small
// amounts apart: "$0.0000042", "$1.23".
func (m Money) String() string {
	d := math.Abs(m.Dollars())
	switch {
	case m == 0:
		return "$0"
	case d >= 1:
		return fmt.Sprintf("$%.2f", m.Dollars())
	}
	decimals := min(12, 2+int(math.Ceil(-math.Log10(d))))
	s := strings.TrimRight(strconv.FormatFloat(m.Dollars(), 'f', decimals, 64), "0")
	if point := strings.IndexByte(s, '.'); len(s)-point < 3 {
		s += strings.Repeat("0", 3-len(s)+point)
	}
	return "$" + s
}

// MarshalJSON writes dollars.
func (m Money) MarshalJSON() ([]byte, error) { return []byte(m.Decimal()), nil }

// Decimal returns the exact amount of dollars without a sign of them: "0.25".
func (m Money) Decimal() string {
	sign, u := "", uint64(m)
	if m < 0 {
		sign, u = "-", -u
	}
	s := strings.TrimRight(fmt.Sprintf("%d.%012d", u/uint64(USD), u%uint64(USD)), "0")
	return sign + strings.TrimSuffix(s, ".")
}

// UnmarshalJSON reads dollars.
func (m *Money) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	v, err := ParseMoney(string(b))
	if err != nil {
		return err
	}
	*m = v
	return nil
}

// ParseMoney reads an amount of dollars such as "0.25", "$5" or "1.66667e-5".
// What is below a picodollar is rounded.
func ParseMoney(s string) (Money, error) {
	text := strings.TrimPrefix(strings.TrimSpace(s), "$")
	if exact, ok := parseDecimal(text); ok {
		return exact, nil
	}
	d, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsNaN(d) || math.Abs(d) > MaxMoney.Dollars()/2 {
		return 0, fmt.Errorf("%.40q is no amount in US dollars: take a number such as 0.25", s)
	}
	return Money(math.Round(d * float64(USD))), nil
}

// parseDecimal reads plain decimals, exactly.
func parseDecimal(s string) (Money, bool) {
	digits, negative := strings.CutPrefix(s, "-")
	whole, part, _ := strings.Cut(digits, ".")
	if len(part) > 12 || len(whole) > 6 || whole == "" {
		return 0, false
	}
	v, err := strconv.ParseUint(whole+part+strings.Repeat("0", 12-len(part)), 10, 63)
	if err != nil {
		return 0, false
	}
	if negative {
		return -Money(v), true
	}
	return Money(v), true
}

// Usage is what was used of everything that has a price. The zero value is
// none.
type Usage struct {
	Invocations int64 `json:"invocations"`
	MBMillis    int64 `json:"mb_ms"`       // billed milliseconds times MiB of memory, summed over the invocations
	PeerMillis  int64 `json:"peer_ms"`     // peers were running, summed over the peers
	DBMillis    int64 `json:"database_ms"` // likewise their databases, where these are on their own
	BytesOut    int64 `json:"bytes_out"`   // sent by peers to other peers
}

// GBSeconds returns the memory of functions times their time, as Lambda
// reckons it.
func (u Usage) GBSeconds() float64 { return float64(u.MBMillis) / (1024 * 1000) }

// Add returns the sum of both, each number at most the largest there is.
func (u Usage) Add(v Usage) Usage {
	u.Invocations = sum(u.Invocations, v.Invocations)
	u.MBMillis = sum(u.MBMillis, v.MBMillis)
	u.PeerMillis = sum(u.PeerMillis, v.PeerMillis)
	u.DBMillis = sum(u.DBMillis, v.DBMillis)
	u.BytesOut = sum(u.BytesOut, v.BytesOut)
	return u
}

// sum returns a+b, or the largest number there is: usage comes from files too.
func sum(a, b int64) int64 {
	if b > 0 && a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// Sub returns what u has more than v.
func (u Usage) Sub(v Usage) Usage {
	u.Invocations -= v.Invocations
	u.MBMillis -= v.MBMillis
	u.PeerMillis -= v.PeerMillis
	u.DBMillis -= v.DBMillis
	u.BytesOut -= v.BytesOut
	return u
}

// Table is a table of prices.
type Table struct {
	Name     string `json:"name" yaml:"name"`             // what is priced, such as "AWS us-east-1, arm64"
	Date     string `json:"date" yaml:"date"`             // of the prices, as 2006-01-02
	Source   string `json:"source" yaml:"source"`         // where they stand
	Notes    string `json:"notes,omitempty" yaml:"notes"` // what to know of them
	GBSecond Money  `json:"gb_second" yaml:"-"`           // of a function
	Request  Money  `json:"request" yaml:"-"`             // one invocation
	PeerHour Money  `json:"peer_hour" yaml:"-"`           // the machine of a peer
	DBHour   Money  `json:"database_hour" yaml:"-"`       // the machine of a database that is not in the peer's process
	GBOut    Money  `json:"gigabyte_out" yaml:"-"`        // 1e9 bytes between peers
}

// Cost is what usage costs, by kind.
type Cost struct {
	Functions Money `json:"functions_usd"` // memory times time
	Requests  Money `json:"requests_usd"`
	Peers     Money `json:"peers_usd"`
	Databases Money `json:"databases_usd"`
	Transfer  Money `json:"transfer_usd"`
}

// Total is the sum.
func (c Cost) Total() Money {
	return c.Functions + c.Requests + c.Peers + c.Databases + c.Transfer
}

// Cost prices usage. Each kind is rounded down to the picodollar once, so the
// cost of a sum may differ from the sum of costs by one for each kind.
func (t *Table) Cost(u Usage) Cost {
	return Cost{
		Functions: times(u.MBMillis, t.GBSecond, 1024*1000),
		Requests:  times(u.Invocations, t.Request, 1),
		Peers:     times(u.PeerMillis, t.PeerHour, 3600*1000),
		Databases: times(u.DBMillis, t.DBHour, 3600*1000),
		Transfer:  times(u.BytesOut, t.GBOut, 1e9),
	}
}

// times returns n*price/per, rounded down, at most MaxMoney/8 so that sums fit.
func times(n int64, price Money, per uint64) Money {
	if n <= 0 || price <= 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(n), uint64(price))
	if hi >= per {
		return MaxMoney / 8
	}
	q, _ := bits.Div64(hi, lo, per)
	return Money(min(q, uint64(MaxMoney/8)))
}
