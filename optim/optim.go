// Package optim applies a gradient to parameters: stochastic gradient descent
// with plain or Nesterov's momentum, Adam, AdamW, RMSProp and Adagrad, each
// with a schedule of the learning rate.
//
// Fill a Config, or read one from words with ParseArgs, call Validate once,
// make a state of StateLen zeros, and call Step with step 1, 2, 3, ... The
// result is the same bits on every machine: nothing is fused, and the
// arithmetic is float32 in a fixed order, so peers that apply one gradient to
// one state hold one model. StepRange does a step in parts, with the same bits
// whatever the parts are.
//
// The conventions are PyTorch's: weight decay is added to the gradient (L2)
// but for adamw, and the momentum buffer is not damped. PyTorch may fuse
// products into sums, so that its last bits differ.
//
// The floats may start at any address, also one that is no multiple of 4,
// where the CPU can load them from there; 32-bit ARM may not.
package optim

import (
	"fmt"
	"math"

	"github.com/spirt-ml/spirt/internal/kernel"
)

// The names of the optimizers.
const (
	SGD     = "sgd"
	Adam    = "adam"
	AdamW   = "adamw"
	RMSProp = "rmsprop"
	Adagrad = "adagrad"
)

// Config names an optimizer and its hyperparameters. It is plain data, and two
// may be compared with ==.
type Config struct {
	Name string  `json:"name" yaml:"name"` // of the constants above; there is no default
	LR   float32 `json:"lr" yaml:"lr"`     // learning rate, above 0; there is no default
	// WeightDecay is L2 regularization, but for adamw the decay of the
	// parameters themselves; zero: none.
	WeightDecay float32 `json:"weight_decay,omitempty" yaml:"weight_decay,omitempty"`
	// Momentum is for sgd and rmsprop only, in [0, 1); zero is none, and no
	// state for it.
	Momentum float32 `json:"momentum,omitempty" yaml:"momentum,omitempty"`
	// Nesterov is for sgd with momentum only: the step looks ahead.
	Nesterov bool `json:"nesterov,omitempty" yaml:"nesterov,omitempty"`
	// Beta1 and Beta2 are for adam and adamw only; zero means 0.9 and 0.999.
	Beta1 float32 `json:"beta1,omitempty" yaml:"beta1,omitempty"`
	Beta2 float32 `json:"beta2,omitempty" yaml:"beta2,omitempty"`
	// Alpha is for rmsprop only, how much of the mean square stays; zero means
	// 0.99.
	Alpha float32 `json:"alpha,omitempty" yaml:"alpha,omitempty"`
	// Eps is for all but sgd; zero means 1e-8, and 1e-10 for adagrad.
	Eps float32 `json:"eps,omitempty" yaml:"eps,omitempty"`
	// Schedule changes the learning rate from step to step; zero: it is
	// constant.
	Schedule Schedule `json:"schedule,omitzero" yaml:"schedule,omitempty"`
}

// Validate reports the first hyperparameter that is missing or out of range.
func (c Config) Validate() error {
	c = c.withDefaults()
	adam := c.Name == Adam || c.Name == AdamW
	switch c.Name {
	case SGD, Adam, AdamW, RMSProp, Adagrad:
	default:
		return fmt.Errorf("unknown optimizer %.32q: use sgd, adam, adamw, rmsprop or adagrad", c.Name)
	}
	if !(c.Momentum >= 0 && c.Momentum < 1) {
		return fmt.Errorf("momentum %v is not in [0, 1)", c.Momentum)
	}
	if c.Momentum != 0 && c.Name != SGD && c.Name != RMSProp {
		return fmt.Errorf("momentum belongs to sgd and rmsprop, not to %s", c.Name)
	}
	if c.Nesterov && (c.Name != SGD || c.Momentum == 0) {
		return fmt.Errorf("nesterov needs sgd with a momentum above 0")
	}
	if !adam && (c.Beta1 != 0 || c.Beta2 != 0) {
		return fmt.Errorf("beta1 and beta2 belong to adam and adamw, not to %s", c.Name)
	}
	if adam && (!within(c.Beta1) || !within(c.Beta2)) {
		return fmt.Errorf("beta1 %v or beta2 %v is not in (0, 1)", c.Beta1, c.Beta2)
	}
	if c.Name != RMSProp && c.Alpha != 0 {
		return fmt.Errorf("alpha belongs to rmsprop, not to %s", c.Name)
	}
	if c.Name == RMSProp && !within(c.Alpha) {
		return fmt.Errorf("alpha %v is not in (0, 1)", c.Alpha)
	}
	if c.Name == SGD && c.Eps != 0 {
		return fmt.Errorf("eps does not belong to sgd")
	}
	if c.Name != SGD && !(c.Eps > 0 && finite(c.Eps)) {
		return fmt.Errorf("eps %v is not a positive number", c.Eps)
	}
	if !(c.LR > 0 && finite(c.LR)) {
		return fmt.Errorf("learning rate %v is not a positive number", c.LR)
	}
	if !(c.WeightDecay >= 0 && finite(c.WeightDecay)) {
		return fmt.Errorf("weight decay %v is not zero or a positive number", c.WeightDecay)
	}
	if err := c.Schedule.Validate(); err != nil {
		return fmt.Errorf("schedule: %w", err)
	}
	return nil
}

// StateLen returns how many floats of state the optimizer keeps for n
// parameters, a vector of length n after the other. A new state is all zeros.
//
//	sgd                      0
//	sgd with momentum        n   momentum
//	adam, adamw             2n   first moments, second moments
//	rmsprop                  n   mean squares
//	rmsprop with momentum   2n   mean squares, momentum
//	adagrad                  n   sums of squares
func (c Config) StateLen(n int) int {
	vectors := 0
	switch c.Name {
	case Adam, AdamW:
		vectors = 2
	case RMSProp, Adagrad:
		vectors = 1
	}
	if c.Momentum != 0 && (c.Name == SGD || c.Name == RMSProp) {
		vectors++
	}
	return vectors * n
}

// Step applies grad as step number step (the first is 1) and writes what
// follows into dstParams and dstState, which may be params and state
// themselves. It panics if lengths do not match, the Config is not valid or
// step is 0. In what follows, lr is LR times Schedule.At(step).
//
// SGD, as PyTorch's torch.optim.SGD without dampening (Sutskever et al. 2013,
// with the learning rate outside the buffer); with Nesterov's momentum it is
// g'+momentum*b' that the parameters follow:
//
//	g' = g + wd*p;  b' = momentum*b + g';  p' = p - lr*b'
//
// Adam, Kingma & Ba 2015, algorithm 1, as torch.optim.Adam:
//
//	g' = g + wd*p;  m' = beta1*m + (1-beta1)*g';  v' = beta2*v + (1-beta2)*g'*g'
//	p' = p - lr/(1-beta1^t) * m' / (sqrt(v')/sqrt(1-beta2^t) + eps)
//
// AdamW, Loshchilov & Hutter 2019, as torch.optim.AdamW: Adam without decay of
// the gradient, from p - lr*wd*p instead of p.
//
// RMSProp, as torch.optim.RMSprop, not centered; without momentum b' is g'/d:
//
//	g' = g + wd*p;  v' = alpha*v + (1-alpha)*g'*g';  d = sqrt(v') + eps
//	b' = momentum*b + g'/d;  p' = p - lr*b'
//
// Adagrad, Duchi et al. 2011, as torch.optim.Adagrad without a decay of lr:
//
//	g' = g + wd*p;  s' = s + g'*g';  p' = p - lr * g' / (sqrt(s') + eps)
func (c Config) Step(dstParams, dstState, params, state, grad []float32, step uint64) {
	c.StepRange(dstParams, dstState, params, state, grad, 0, len(params), step)
}

// StepRange is Step for the parameters lo to hi, hi excluded, and what belongs
// to them in each vector of the state; the slices are those of the whole. A
// step in parts, in any order, has the bits of the whole step. It panics as
// Step does, and if lo and hi are no range of params.
func (c Config) StepRange(dstParams, dstState, params, state, grad []float32, lo, hi int, step uint64) {
	n := len(params)
	if len(dstParams) != n || len(grad) != n || len(state) != c.StateLen(n) || len(dstState) != len(state) {
		panic("optim: lengths do not match")
	}
	if lo < 0 || hi < lo || hi > n {
		panic("optim: lo and hi are no range of the parameters")
	}
	if step == 0 {
		panic("optim: steps start at 1")
	}
	c = c.withDefaults()
	lr := float32(c.LR * c.Schedule.At(step))
	dst, p, g := dstParams[lo:hi], params[lo:hi], grad[lo:hi]
	// part returns the range of vector i of a state.
	part := func(state []float32, i int) []float32 { return state[i*n:][lo:hi] }
	switch c.Name {
	case SGD:
		switch {
		case c.Momentum == 0:
			kernel.SGD(dst, p, g, lr, c.WeightDecay)
		case c.Nesterov:
			kernel.Nesterov(dst, part(dstState, 0), p, part(state, 0), g, lr, c.Momentum, c.WeightDecay)
		default:
			kernel.Momentum(dst, part(dstState, 0), p, part(state, 0), g, lr, c.Momentum, c.WeightDecay)
		}
	case Adam, AdamW:
		beta1, beta2 := float64(c.Beta1), float64(c.Beta2)
		k := kernel.AdamCoefficients{
			Beta1: c.Beta1, OneMinusBeta1: float32(1 - beta1),
			Beta2: c.Beta2, OneMinusBeta2: float32(1 - beta2),
			StepSize:    float32(float64(lr) / (1 - power(beta1, step))),
			SqrtBias2:   float32(math.Sqrt(1 - power(beta2, step))),
			Eps:         c.Eps,
			WeightDecay: c.WeightDecay,
		}
		do := kernel.Adam
		if c.Name == AdamW {
			do = kernel.AdamW
			k.WeightDecay = float32(lr * c.WeightDecay)
		}
		do(dst, part(dstState, 0), part(dstState, 1), p, part(state, 0), part(state, 1), g, k)
	case RMSProp:
		k := kernel.RMSPropCoefficients{
			Alpha: c.Alpha, OneMinusAlpha: float32(1 - float64(c.Alpha)),
			LR: lr, Eps: c.Eps, Momentum: c.Momentum, WeightDecay: c.WeightDecay,
		}
		if c.Momentum == 0 {
			kernel.RMSProp(dst, part(dstState, 0), p, part(state, 0), g, k)
		} else {
			kernel.RMSPropMomentum(dst, part(dstState, 0), part(dstState, 1), p, part(state, 0), part(state, 1), g, k)
		}
	case Adagrad:
		kernel.Adagrad(dst, part(dstState, 0), p, part(state, 0), g, lr, c.Eps, c.WeightDecay)
	default:
		panic("optim: the Config is not valid")
	}
}

func (c Config) withDefaults() Config {
	or := func(x *float32, value float32) {
		if *x == 0 {
			*x = value
		}
	}
	switch c.Name {
	case Adam, AdamW:
		or(&c.Beta1, 0.9)
		or(&c.Beta2, 0.999)
		or(&c.Eps, 1e-8)
	case RMSProp:
		or(&c.Alpha, 0.99)
		or(&c.Eps, 1e-8)
	case Adagrad:
		or(&c.Eps, 1e-10)
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

// within reports whether x is between 0 and 1.
func within(x float32) bool { return x > 0 && x < 1 }

func finite(x float32) bool { return !math.IsNaN(float64(x)) && !math.IsInf(float64(x), 0) }
