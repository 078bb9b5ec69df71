// Package optim applies a gradient to parameters: stochastic gradient descent
// with momentum, and Adam.
//
// Fill a Config, call Validate once, make a state of StateLen zeros, and call
// Step with step 1, 2, 3, ... The result is the same bits on every machine:
// nothing is fused, and the arithmetic is float32 in a fixed order, so peers
// that apply one gradient to one state hold one model.
//
// The conventions are PyTorch's: weight decay is added to the gradient (L2),
// and the momentum buffer is not damped.
package optim

import (
	"fmt"
	"math"

	"github.com/spirt-ml/spirt/internal/kernel"
)

// The names of the optimizers.
const (
	SGD  = "sgd"
	Adam = "adam"
)

// Config names an optimizer and its hyperparameters. It is plain data.
type Config struct {
	Name        string  `json:"name" yaml:"name"`                                     // "sgd" or "adam"; there is no default
	LR          float32 `json:"lr" yaml:"lr"`                                         // learning rate, above 0; there is no default
	WeightDecay float32 `json:"weight_decay,omitempty" yaml:"weight_decay,omitempty"` // zero: none
	// Momentum is for sgd only, in [0, 1); zero is plain SGD without a state.
	Momentum float32 `json:"momentum,omitempty" yaml:"momentum,omitempty"`
	// Beta1, Beta2 and Eps are for adam only; zero means 0.9, 0.999 and 1e-8.
	Beta1 float32 `json:"beta1,omitempty" yaml:"beta1,omitempty"`
	Beta2 float32 `json:"beta2,omitempty" yaml:"beta2,omitempty"`
	Eps   float32 `json:"eps,omitempty" yaml:"eps,omitempty"`
}

// Validate reports the first hyperparameter that is missing or out of range.
func (c Config) Validate() error {
	c = c.withDefaults()
	switch c.Name {
	case SGD:
		if !(c.Momentum >= 0 && c.Momentum < 1) {
			return fmt.Errorf("momentum %v is not in [0, 1)", c.Momentum)
		}
		if c.Beta1 != 0 || c.Beta2 != 0 || c.Eps != 0 {
			return fmt.Errorf("beta1, beta2 and eps belong to adam, not to sgd")
		}
	case Adam:
		if !(c.Beta1 > 0 && c.Beta1 < 1) || !(c.Beta2 > 0 && c.Beta2 < 1) {
			return fmt.Errorf("beta1 %v or beta2 %v is not in (0, 1)", c.Beta1, c.Beta2)
		}
		if !(c.Eps > 0 && finite(c.Eps)) {
			return fmt.Errorf("eps %v is not a positive number", c.Eps)
		}
		if c.Momentum != 0 {
			return fmt.Errorf("momentum belongs to sgd; adam has beta1")
		}
	default:
		return fmt.Errorf("unknown optimizer %.32q: use sgd or adam", c.Name)
	}
	if !(c.LR > 0 && finite(c.LR)) {
		return fmt.Errorf("learning rate %v is not a positive number", c.LR)
	}
	if !(c.WeightDecay >= 0 && finite(c.WeightDecay)) {
		return fmt.Errorf("weight decay %v is not zero or a positive number", c.WeightDecay)
	}
	return nil
}

// StateLen returns how many floats of state the optimizer keeps for n
// parameters: 0 for plain SGD, n with momentum, 2n for Adam (first moments,
// then second moments). A new state is all zeros.
func (c Config) StateLen(n int) int {
	switch {
	case c.Name == Adam:
		return 2 * n
	case c.Momentum != 0:
		return n
	}
	return 0
}

// Step applies grad as step number step (the first is 1) and writes what
// follows into dstParams and dstState, which may be params and state
// themselves. It panics if lengths do not match, the Config is not valid or
// step is 0.
//
// SGD, as PyTorch's torch.optim.SGD without dampening (Sutskever et al. 2013,
// with the learning rate outside the buffer):
//
//	g' = g + wd*p;  b' = momentum*b + g';  p' = p - lr*b'
//
// Adam, Kingma & Ba 2015, algorithm 1, as torch.optim.Adam:
//
//	g' = g + wd*p;  m' = beta1*m + (1-beta1)*g';  v' = beta2*v + (1-beta2)*g'*g'
//	p' = p - lr/(1-beta1^t) * m' / (sqrt(v')/sqrt(1-beta2^t) + eps)
func (c Config) Step(dstParams, dstState, params, state, grad []float32, step uint64) {
	n := len(params)
	if len(dstParams) != n || len(grad) != n || len(state) != c.StateLen(n) || len(dstState) != len(state) {
		panic("optim: lengths do not match")
	}
	if step == 0 {
		panic("optim: steps start at 1")
	}
	switch c = c.withDefaults(); c.Name {
	case SGD:
		if c.Momentum == 0 {
			kernel.SGD(dstParams, params, grad, c.LR, c.WeightDecay)
		} else {
			kernel.Momentum(dstParams, dstState, params, state, grad, c.LR, c.Momentum, c.WeightDecay)
		}
	case Adam:
		beta1, beta2 := float64(c.Beta1), float64(c.Beta2)
		kernel.Adam(dstParams, dstState[:n], dstState[n:], params, state[:n], state[n:], grad, kernel.AdamCoefficients{
			Beta1: c.Beta1, OneMinusBeta1: float32(1 - beta1),
			Beta2: c.Beta2, OneMinusBeta2: float32(1 - beta2),
			StepSize:    float32(float64(c.LR) / (1 - power(beta1, step))),
			SqrtBias2:   float32(math.Sqrt(1 - power(beta2, step))),
			Eps:         c.Eps,
			WeightDecay: c.WeightDecay,
		})
	default:
		panic("optim: the Config is not valid")
	}
}

func (c Config) withDefaults() Config {
	if c.Name == Adam {
		if c.Beta1 == 0 {
			c.Beta1 = 0.9
		}
		if c.Beta2 == 0 {
			c.Beta2 = 0.999
		}
		if c.Eps == 0 {
			c.Eps = 1e-8
		}
	}
	return c
}

// power returns x^n by squaring. Each product is rounded by itself, so that
// the result is the same on every machine, which math.Pow does not promise.
func power(x float64, n uint64) float64 {
	result := 1.0
	for ; n > 0; n >>= 1 {
		if n&1 != 0 {
			result = float64(result * x)
		}
		x = float64(x * x)
	}
	return result
}

func finite(x float32) bool { return !math.IsNaN(float64(x)) && !math.IsInf(float64(x), 0) }
