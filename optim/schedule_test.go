package optim

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestCosPi(t *testing.T) {
	for i := range 100_001 {
		x := float64(i) / 100_000
		if got, want := cosPi(x), math.Cos(math.Pi*x); math.Abs(got-want) > 1e-14 {
			t.Fatalf("cosPi(%v) = %v, want %v", x, got, want)
		}
	}
	if cosPi(0) != 1 || cosPi(1) != -1 {
		t.Errorf("the ends are %v and %v", cosPi(0), cosPi(1))
	}
}

// TestScheduleAt holds the factors against those of the comment of Schedule,
// with package math.
func TestScheduleAt(t *testing.T) {
	cosine := func(part float64) float64 { return (1 + math.Cos(math.Pi*part)) / 2 }
	for _, c := range []struct {
		s    Schedule
		want map[uint64]float64
	}{
		{Schedule{}, map[uint64]float64{1: 1, math.MaxUint64: 1}},
		{Schedule{Name: Constant, Warmup: 4}, map[uint64]float64{1: .25, 2: .5, 3: .75, 4: 1, 5: 1, 99: 1}},
		{Schedule{Warmup: 1}, map[uint64]float64{1: 1, 2: 1}},
		{Schedule{Name: Linear, Total: 10, Cooldown: 4}, map[uint64]float64{1: 1, 6: 1, 7: .8, 8: .6, 9: .4, 10: .2, 11: 0, math.MaxUint64: 0}},
		{Schedule{Name: Linear, Total: 10, Cooldown: 4, Min: .5}, map[uint64]float64{6: 1, 7: .9, 8: .8, 9: .7, 10: .6, 11: .5}},
		{Schedule{Name: Linear, Warmup: 2, Total: 4, Cooldown: 2}, map[uint64]float64{1: .5, 2: 1, 3: 2. / 3, 4: 1. / 3, 5: 0}},
		{Schedule{Name: Cosine, Total: 8}, map[uint64]float64{1: cosine(1. / 8), 4: .5, 7: cosine(7. / 8), 8: 0, 9: 0}},
		{Schedule{Name: Cosine, Warmup: 2, Total: 10, Min: .1}, map[uint64]float64{
			1: .5, 2: 1, 3: .1 + .9*cosine(1./8), 6: .55, 9: .1 + .9*cosine(7./8), 10: .1, 11: .1, math.MaxUint64: .1,
		}},
		{Schedule{Name: StepDecay, Every: 3, Gamma: .5}, map[uint64]float64{1: 1, 3: 1, 4: .5, 6: .5, 7: .25, math.MaxUint64: 0}},
		{Schedule{Name: StepDecay, Warmup: 2, Every: 3, Gamma: .5}, map[uint64]float64{1: .5, 2: 1, 3: 1, 5: 1, 6: .5}},
		{Schedule{Name: Exponential, Gamma: .9}, map[uint64]float64{1: .9, 2: .81, 50: math.Pow(float64(float32(.9)), 50), math.MaxUint64: 0}},
		{Schedule{Name: Exponential, Warmup: 10, Gamma: .9}, map[uint64]float64{1: .1, 10: 1, 11: .9, 12: .81}},
		{Schedule{Name: Exponential, Gamma: 1}, map[uint64]float64{1: 1, math.MaxUint64: 1}},
	} {
		if err := c.s.Validate(); err != nil {
			t.Errorf("%+v: %v", c.s, err)
		}
		for step, want := range c.want {
			if got := float64(c.s.At(step)); math.Abs(got-want) > 1e-6*want {
				t.Errorf("%+v: step %d has the factor %v, want %v", c.s, step, got, want)
			}
		}
	}
}

// TestScheduleStays: whatever the numbers are, the factor is from 0 to 1, rises
// in the warmup and does not rise after.
func TestScheduleStays(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 300 {
		warmup := rng.Uint64N(20)
		total := warmup + 1 + rng.Uint64N(100)
		for _, s := range []Schedule{
			{Warmup: warmup},
			{Name: Linear, Warmup: warmup, Total: total, Cooldown: 1 + rng.Uint64N(total-warmup), Min: rng.Float32()},
			{Name: Cosine, Warmup: warmup, Total: total, Min: rng.Float32()},
			{Name: StepDecay, Warmup: warmup, Every: 1 + rng.Uint64N(9), Gamma: 1 - rng.Float32()},
			{Name: Exponential, Warmup: warmup, Gamma: 1 - rng.Float32()},
		} {
			if err := s.Validate(); err != nil {
				t.Fatalf("%+v: %v", s, err)
			}
			last := float32(0)
			for step := uint64(1); step < total+5; step++ {
				f := s.At(step)
				if !(f >= s.Min*min(1, float32(step)/float32(max(1, warmup))) && f <= 1) {
					t.Errorf("%+v: step %d has the factor %v", s, step, f)
				}
				if step > 1 && (step <= warmup && f <= last || step > warmup+1 && f > last) {
					t.Errorf("%+v: step %d has the factor %v after %v", s, step, f, last)
				}
				last = f
			}
		}
	}
}

// The factors have this hash on every CPU.
func TestScheduleSameBits(t *testing.T) {
	hash := sha256.New()
	for _, s := range []Schedule{
		{Warmup: 777},
		{Name: Linear, Warmup: 10, Total: 1000, Cooldown: 700, Min: 0.1},
		{Name: Cosine, Warmup: 10, Total: 1000, Min: 0.1},
		{Name: Cosine, Total: 997},
		{Name: StepDecay, Every: 7, Gamma: 0.97},
		{Name: Exponential, Gamma: 0.997},
	} {
		for step := uint64(1); step <= 1000; step++ {
			hash.Write(binary.LittleEndian.AppendUint32(nil, math.Float32bits(s.At(step))))
		}
	}
	const want = "477b5bb565fbd7bd5821587493c54bfd"
	if got := hex.EncodeToString(hash.Sum(nil)[:16]); got != want {
		t.Errorf("the factors have the hash %s, want %s", got, want)
	}
}

// TestScheduleOfSteps: a step with a schedule is a step with a learning rate
// times the factor.
func TestScheduleOfSteps(t *testing.T) {
	const n = 33
	schedule := Schedule{Name: Cosine, Warmup: 2, Total: 9, Min: 0.01}
	for _, c := range configs {
		params, grad, state := make([]float32, n), make([]float32, n), make([]float32, c.StateLen(n))
		random(t, params, grad)
		for step := uint64(1); step < 12; step++ {
			with, plain := c, c
			with.Schedule, plain.Schedule = schedule, Schedule{}
			plain.LR *= schedule.At(step)
			p1, s1, p2, s2 := make([]float32, n), slices.Clone(state), make([]float32, n), slices.Clone(state)
			with.Step(p1, s1, params, state, grad, step)
			plain.Step(p2, s2, params, state, grad, step)
			if !slices.Equal(p1, p2) || !slices.Equal(s1, s2) {
				t.Errorf("%+v: step %d differs", with, step)
			}
		}
	}
}

func TestScheduleValidate(t *testing.T) {
	nan := float32(math.NaN())
	for want, s := range map[string]Schedule{
		"unknown schedule \"Linear\"":      {Name: "Linear"},
		"total 0":                          {Name: Linear, Cooldown: 1},
		"cooldown 0":                       {Name: Linear, Total: 1},
		"warmup 5 and cooldown 6":          {Name: Linear, Warmup: 5, Cooldown: 6, Total: 10},
		"warmup 9 leaves":                  {Name: Cosine, Warmup: 9, Total: 9},
		"total 9007199254740993":           {Name: Cosine, Total: 1<<53 + 1},
		"warmup 18446744073709551615":      {Warmup: math.MaxUint64},
		"min 1 ":                           {Name: Cosine, Total: 9, Min: 1},
		"min NaN":                          {Name: Linear, Total: 9, Cooldown: 1, Min: nan},
		"min does not":                     {Name: Exponential, Gamma: 0.5, Min: 0.1},
		"gamma 0":                          {Name: StepDecay, Every: 1},
		"gamma 1.5":                        {Name: Exponential, Gamma: 1.5},
		"gamma NaN":                        {Name: Exponential, Gamma: nan},
		"gamma does not":                   {Name: Cosine, Total: 9, Gamma: 0.5},
		"every 0":                          {Name: StepDecay, Gamma: 0.5},
		"every does not":                   {Name: Exponential, Gamma: 0.5, Every: 1},
		"total does not belong to the sch": {Total: 9},
		"cooldown does not":                {Name: Cosine, Total: 9, Cooldown: 1},
		"to the schedule constant":         {Total: 5},
	} {
		if err := s.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", s, err, want)
		}
	}
}
