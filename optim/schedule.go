package optim

import "fmt"

// The names of the schedules.
const (
	Constant    = "constant"
	Linear      = "linear"
	Cosine      = "cosine"
	StepDecay   = "step"
	Exponential = "exponential"
)

// Schedule says by what factor the learning rate of a Config is multiplied in
// each step. It is plain data; zero is the factor 1.
//
// In the first Warmup steps the factor rises in equal parts to 1, whatever the
// name is: it is step/Warmup. With s = step - Warmup, it then is
//
//	constant      1
//	linear        1, and in the last Cooldown steps up to Total it falls in
//	              equal parts: min + (1-min) * (Total-step+1)/(Cooldown+1)
//	cosine        min + (1-min) * (1+cos(pi*s/(Total-Warmup)))/2
//	step          Gamma^((s-1)/Every), rounded down: Every steps have one factor
//	exponential   Gamma^s
//
// and Min after Total steps. It has the same bits on every CPU.
type Schedule struct {
	// Name is of the constants above; empty means constant.
	Name string `json:"name,omitempty" yaml:"name,omitempty"`
	// Warmup is a number of steps; zero: none.
	Warmup uint64 `json:"warmup,omitempty" yaml:"warmup,omitempty"`
	// Total is for linear and cosine only, the number of steps with Warmup and
	// Cooldown.
	Total uint64 `json:"total,omitempty" yaml:"total,omitempty"`
	// Cooldown is for linear only.
	Cooldown uint64 `json:"cooldown,omitempty" yaml:"cooldown,omitempty"`
	// Min is for linear and cosine only, the last factor, in [0, 1).
	Min float32 `json:"min,omitempty" yaml:"min,omitempty"`
	// Every is for step only, a number of steps.
	Every uint64 `json:"every,omitempty" yaml:"every,omitempty"`
	// Gamma is for step and exponential only, in (0, 1].
	Gamma float32 `json:"gamma,omitempty" yaml:"gamma,omitempty"`
}

// maxSteps bounds the numbers of a schedule: up to it a float64 is exact.
const maxSteps = 1 << 53

// Validate reports the first field that is missing or out of range.
func (s Schedule) Validate() error {
	var total, cooldown, every, gamma bool // what the name takes
	switch s.Name {
	case "", Constant:
	case Linear:
		total, cooldown = true, true
	case Cosine:
		total = true
	case StepDecay:
		every, gamma = true, true
	case Exponential:
		gamma = true
	default:
		return fmt.Errorf("unknown schedule %.32q: use constant, linear, cosine, step or exponential", s.Name)
	}
	for _, f := range []struct {
		name  string
		value uint64
		taken bool
	}{{"total", s.Total, total}, {"cooldown", s.Cooldown, cooldown}, {"every", s.Every, every}} {
		switch {
		case !f.taken && f.value != 0:
			return fmt.Errorf("%s does not belong to the schedule %s", f.name, s.name())
		case f.taken && (f.value < 1 || f.value > maxSteps):
			return fmt.Errorf("%s %d is not a number of steps, 1 to %d", f.name, f.value, uint64(maxSteps))
		}
	}
	if s.Warmup > maxSteps {
		return fmt.Errorf("warmup %d is above %d steps", s.Warmup, uint64(maxSteps))
	}
	if !gamma && s.Gamma != 0 {
		return fmt.Errorf("gamma does not belong to the schedule %s", s.name())
	}
	if gamma && !(s.Gamma > 0 && s.Gamma <= 1) {
		return fmt.Errorf("gamma %v is not in (0, 1]", s.Gamma)
	}
	if !total && s.Min != 0 {
		return fmt.Errorf("min does not belong to the schedule %s", s.name())
	}
	if !(s.Min >= 0 && s.Min < 1) {
		return fmt.Errorf("min %v is not in [0, 1)", s.Min)
	}
	if s.Name == Linear && s.Warmup+s.Cooldown > s.Total {
		return fmt.Errorf("warmup %d and cooldown %d are more than total, %d steps", s.Warmup, s.Cooldown, s.Total)
	}
	if s.Name == Cosine && s.Warmup >= s.Total {
		return fmt.Errorf("warmup %d leaves nothing of total, %d steps", s.Warmup, s.Total)
	}
	return nil
}

func (s Schedule) name() string {
	if s.Name == "" {
		return Constant
	}
	return s.Name
}

// At returns the factor for a step, 1, 2, 3, ... It panics if the step is 0 or
// the name unknown.
func (s Schedule) At(step uint64) float32 {
	if step == 0 {
		panic("optim: steps start at 1")
	}
	if step <= s.Warmup {
		return float32(float64(step) / float64(s.Warmup))
	}
	after := step - s.Warmup
	switch s.Name {
	case "", Constant:
		return 1
	case Linear:
		if step > s.Total {
			return s.Min
		}
		left := s.Total - step + 1
		if left > s.Cooldown {
			return 1
		}
		return s.above(float64(left) / float64(s.Cooldown+1))
	case Cosine:
		if step >= s.Total {
			return s.Min
		}
		return s.above((1 + cosPi(float64(after)/float64(s.Total-s.Warmup))) / 2)
	case StepDecay:
		return float32(power(float64(s.Gamma), (after-1)/s.Every))
	case Exponential:
		return float32(power(float64(s.Gamma), after))
	}
	panic("optim: the Schedule is not valid")
}

// above returns what is a part of the way from Min to 1.
func (s Schedule) above(part float64) float32 {
	low := float64(s.Min)
	return float32(low + float64((1-low)*part))
}

// cosPi returns the cosine of pi*x for x in [0, 1], with an error below 1e-14.
// Each product is rounded by itself, which math.Cos does not promise.
func cosPi(x float64) float64 {
	if x > 0.5 {
		return -cosPi(1 - x)
	}
	const pi2 = 9.86960440108935861883449099987615113531369940724079062641334937622
	y, sum := float64(float64(x*x)*pi2), 0.0
	for _, c := range [...]float64{ // of Taylor's series, 1/20! to 1
		1. / 2432902008176640000, -1. / 6402373705728000, 1. / 20922789888000, -1. / 87178291200, 1. / 479001600,
		-1. / 3628800, 1. / 40320, -1. / 720, 1. / 24, -1. / 2, 1,
	} {
		sum = float64(sum*y) + c
	}
	return sum
}
