package bill

import (
	"encoding/json"
	"math"
	"testing"
)

func TestMoney(t *testing.T) {
	for text, want := range map[string]Money{
		"0.25": USD / 4, "$5": 5 * USD, "0.0000133334": 13_333_400, "1.33334e-5": 13_333_400, "0": 0, "-1.5": -3 * USD / 2, "0.000000000001": 1, "999999": 999999 * USD,
	} {
		m, err := ParseMoney(text)
		if err != nil || m != want {
			t.Errorf("%s is %d, %v, want %d", text, m, err, want)
		}
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var back Money
		if err := json.Unmarshal(b, &back); err != nil || back != m {
			t.Errorf("%s reads back as %d, %v", b, back, err)
		}
	}
	for _, text := range []string{"", "x", "NaN", "Inf", "1e300", "1,5", "--1", "1.2.3"} {
		if m, err := ParseMoney(text); err == nil {
			t.Errorf("%q is %v", text, m)
		}
	}
	for m, want := range map[Money]string{0: "$0", USD * 123 / 100: "$1.23", 4_200_000: "$0.0000042", USD / 4: "$0.25", 300_000_000_000: "$0.30"} {
		if m.String() != want {
			t.Errorf("%d is %s, want %s", m, m, want)
		}
	}
}

// One GB-second and so on cost exactly what the table says.
func TestCost(t *testing.T) {
	p := Default()
	c := p.Cost(Usage{Invocations: 3, MBMillis: 1024 * 1000, PeerMillis: 3600 * 1000, DBMillis: 1800 * 1000, BytesOut: 1e9})
	if want := (Cost{p.GBSecond, 3 * p.Request, p.PeerHour, p.DBHour / 2, p.GBOut}); c != want {
		t.Errorf("%+v, want %+v", c, want)
	}
	if most := p.Cost(Usage{math.MaxInt64, math.MaxInt64, math.MaxInt64, math.MaxInt64, math.MaxInt64}).Total(); most < 0 {
		t.Errorf("the highest cost is %v", most)
	}
	if least := p.Cost(Usage{-1, -1, -1, -1, -1}).Total(); least != 0 {
		t.Errorf("negative usage costs %v", least)
	}
}

func FuzzParseMoney(f *testing.F) {
	f.Add("0.25")
	f.Add("$1e-5")
	f.Fuzz(func(t *testing.T, s string) {
		m, err := ParseMoney(s)
		if err != nil {
			return
		}
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var back Money
		if err := json.Unmarshal(b, &back); err != nil || back != m {
			t.Errorf("%q is %d, which is written as %s and read as %d, %v", s, m, b, back, err)
		}
	})
}
