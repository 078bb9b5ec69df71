package sim

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/internal/round"
)

// Every plan can be written down and read back, and is the same run then.
func TestFormatAndParse(t *testing.T) {
	for seed := range uint64(60) {
		for _, n := range []int{1, 4, 7, 30} {
			want := Plan(seed, n, round.MaxFaulty(n)).Explicit()
			text := Format(want, "a comment", "two\nlines")
			got, err := Parse(text)
			if err != nil {
				t.Fatalf("%v in\n%s", err, text)
			}
			if len(want.Faults) == 0 {
				want.Faults = got.Faults
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("\n%+v, not\n%+v in\n%s", got, want, text)
			}
		}
	}
	plan := Plan(2, 4, 1)
	a, _ := Run(plan)
	read, err := Parse(Format(plan))
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := Run(read); a.Digest != b.Digest {
		t.Error("a scenario runs otherwise than the plan that it was written from")
	}
}

func TestParseErrors(t *testing.T) {
	for text, want := range map[string]string{
		"":                                                "does not say how many peers",
		"peers 4\npeers 4":                                "line 2: peers is given twice",
		"peers 0":                                         "line 1: peers:",
		"peers 2000":                                      "from 1 to 1024",
		"peers 4\nfaulty 2":                               "at most 1",
		"peers 4\nloss 1":                                 "line 2: loss:",
		"peers 4\nloss NaN":                               "line 2: loss:",
		"peers 4\ndelay 1us":                              "less than 1ms",
		"peers 4\nliars 4":                                "no peer 4",
		"peers 4\nlies silence":                           "no liars",
		"peers 4\nliars 1\nlies white":                    `no lie "white"`,
		"peers 4\nfly yes":                                `line 2: there is no setting "fly"`,
		"peers 4\nsigned maybe":                           "neither yes nor no",
		"peers 4\nat 1s crash 3":                          "after the end of chaos",
		"peers 4\nchaos 4s\nat 1s fly 3":                  `no fault "fly"`,
		"peers 4\nchaos 4s\nat 1s crash 4":                "no peer 4",
		"peers 4\nchaos 4s\nat 1s crash 1,2":              "of one peer",
		"peers 4\nchaos 4s\nat 1s pause 1":                "needs a time",
		"peers 4\nchaos 4s\nat 2h pause 1":                "no time",
		"peers 4\nchaos 4s\nat -1s pause 1":               "no time",
		"peers 4\nchaos 4s\nat 1s join 1 for 1s":          "does not last",
		"peers 4\nchaos 4s\nat 1s leave 1\nat 2s leave 1": "before",
		"peers 1\nchaos 4s\nat 1s join 0":                 "no member at the start",
		"peers 1\nchaos 4s\nat 1s leave 0":                "nobody is left",
		"peers 4\nchaos 4s\nat 2s pause 1 for 1s\nat 1s crash 1": "ascending",
		"peers 4\nchaos 4s\nat 1s partition 0,1 | 2 for 1s":      "3 peers on all sides",
		"peers 4\nchaos 4s\nat 1s partition 0,1 | 1,2,3 for 1s":  "on two sides",
		"peers 4\nchaos 4s\nat 1s partition 0,1,2,3 for 1s":      "has sides",
		"peers 4\n" + strings.Repeat("#", MaxScenario):           "longer",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, not %q", text, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for seed := range uint64(12) {
		f.Add(Format(Plan(seed, 7, 2)))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse(text)
		if err != nil {
			return
		}
		again, err := Parse(Format(c))
		if err != nil || !reflect.DeepEqual(again, c) {
			t.Errorf("%v: read back as\n%+v, not\n%+v", err, again, c)
		}
	})
}

// The scenarios that are kept have found something once, or show much.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("testdata", "scenarios", "*.scenario"))
	if err != nil || len(files) == 0 {
		t.Fatal(err, "no scenarios")
	}
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			c, err := Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Run(c); err != nil {
				t.Error(err)
			}
		})
	}
}

// The first seed that fails is reported, whichever worker was first.
func TestExploreFails(t *testing.T) {
	s := Explore(context.Background(), Exploration{Peers: 4, Byzantine: 1, First: 5, Seeds: 20, Workers: 3,
		New: func(round.Config) (*round.Machine, error) { return nil, errors.New("no machine today") }})
	if s.Err == nil || s.Failed.Seed != 5 || !strings.Contains(s.Err.Error(), "no machine today") {
		t.Errorf("%v, %+v", s.Err, s.Failed)
	}
}

// The sum over seeds does not depend on how many run at once.
func TestExplore(t *testing.T) {
	e := Exploration{Peers: 4, Byzantine: 1, First: 1, Seeds: 12, Workers: 1}
	a := Explore(t.Context(), e)
	e.Workers = 3
	b := Explore(t.Context(), e)
	a.Round, b.Round = 0, 0 // of the last run
	if a.Err != nil || a.Seeds != 12 || !reflect.DeepEqual(a, b) {
		t.Errorf("%+v\n%+v", a, b)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s := Explore(ctx, e); s.Seeds != 0 {
		t.Errorf("%d runs after the end", s.Seeds)
	}
}
