package optim

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestGolden holds every step against PyTorch's optimizers. PyTorch fuses some
// products into sums, so the last bits may differ.
func TestGolden(t *testing.T) {
	text, err := os.ReadFile("testdata/golden.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden struct {
		Params []float32
		Grads  [][]float32
		Cases  []struct {
			Config Config
			Steps  []struct{ Params, State []float32 }
		}
	}
	if err := json.Unmarshal(text, &golden); err != nil {
		t.Fatal(err)
	}
	if len(golden.Cases) < 7 {
		t.Fatalf("%d cases", len(golden.Cases))
	}
	for _, c := range golden.Cases {
		if err := c.Config.Validate(); err != nil {
			t.Fatalf("%+v: %v", c.Config, err)
		}
		params := slices.Clone(golden.Params)
		state := make([]float32, c.Config.StateLen(len(params)))
		for i, want := range c.Steps {
			c.Config.Step(params, state, params, state, golden.Grads[i], uint64(i+1))
			near(t, c.Config, i+1, "parameter", params, want.Params, func(int) float64 { return 1 })
			near(t, c.Config, i+1, "state", state, want.State, func(j int) float64 {
				g := 0.0 // as large as the gradients were, or as their squares
				for _, grad := range golden.Grads {
					g = max(g, math.Abs(float64(grad[j%len(params)])))
				}
				return min(g, g*g)
			})
		}
	}
}

// near compares with a millionth of the value or of its scale as tolerance.
func near(t *testing.T, c Config, step int, what string, got, want []float32, scale func(i int) float64) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%+v step %d: %d %ss, want %d", c, step, len(got), what, len(want))
	}
	for i := range want {
		g, w := float64(got[i]), float64(want[i])
		if math.Abs(g-w) > 1e-6*max(math.Abs(w), scale(i)) {
			t.Errorf("%+v step %d: %s %d is %v, PyTorch has %v", c, step, what, i, g, w)
		}
	}
}

func random(t *testing.T, lists ...[]float32) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, l := range lists {
		for i := range l {
			l[i] = float32(rng.NormFloat64())
		}
	}
}

var configs = []Config{
	{Name: SGD, LR: 0.1},
	{Name: SGD, LR: 0.1, Momentum: 0.9, WeightDecay: 0.01},
	{Name: Adam, LR: 0.01},
	{Name: Adam, LR: 0.01, WeightDecay: 0.1},
}

// TestMetamorphic checks what must hold whatever the numbers are: a step in
// place is a step, elements do not see each other, and no gradient without
// decay changes nothing.
func TestMetamorphic(t *testing.T) {
	const n = 77
	for _, c := range configs {
		params, grad, state := make([]float32, n), make([]float32, n), make([]float32, c.StateLen(n))
		random(t, params, grad, state)
		for i := range state {
			state[i] = max(state[i], -state[i]) // second moments are not negative
		}
		p1, s1 := make([]float32, n), make([]float32, len(state))
		c.Step(p1, s1, params, state, grad, 3)

		p2, s2 := slices.Clone(params), slices.Clone(state)
		c.Step(p2, s2, p2, s2, grad, 3)
		if !slices.Equal(p1, p2) || !slices.Equal(s1, s2) {
			t.Errorf("%+v: in place differs", c)
		}

		backward := func(x []float32) []float32 {
			y := slices.Clone(x)
			for lo := 0; lo < len(y); lo += n {
				slices.Reverse(y[lo : lo+n])
			}
			return y
		}
		p3, s3 := backward(params), backward(state)
		c.Step(p3, s3, p3, s3, backward(grad), 3)
		if !slices.Equal(backward(p3), p1) || !slices.Equal(backward(s3), s1) {
			t.Errorf("%+v: the order of the elements counts", c)
		}

		if c.WeightDecay == 0 {
			p4, s4 := slices.Clone(params), make([]float32, len(state))
			c.Step(p4, s4, p4, s4, make([]float32, n), 1)
			if !slices.Equal(p4, params) {
				t.Errorf("%+v: a zero gradient moves the parameters", c)
			}
		}
	}
}

// TestAdamStartsWithTheLearningRate: the first step of Adam is the learning
// rate against the gradient's sign (Kingma & Ba 2015, section 2.1).
func TestAdamStartsWithTheLearningRate(t *testing.T) {
	grad := []float32{1e-3, -5, 400}
	p, s := make([]float32, 3), make([]float32, 6)
	Config{Name: Adam, LR: 0.01}.Step(p, s, p, s, grad, 1)
	for i, g := range grad {
		want := -math.Copysign(0.01, float64(g))
		if math.Abs(float64(p[i])-want) > 1e-6 {
			t.Errorf("gradient %v moves by %v, want %v", g, p[i], want)
		}
	}
}

func TestPower(t *testing.T) {
	for _, n := range []uint64{0, 1, 2, 3, 10, 1000, 123456} {
		if got, want := power(0.999, n), math.Pow(0.999, float64(n)); math.Abs(got-want) > 1e-12*want {
			t.Errorf("0.999^%d = %v, want %v", n, got, want)
		}
	}
	if got := power(0.9, math.MaxUint64); got != 0 {
		t.Errorf("0.9 to the largest step is %v", got)
	}
}

func TestValidate(t *testing.T) {
	nan := float32(math.NaN())
	for want, c := range map[string]Config{
		"unknown optimizer": {Name: "sdg", LR: 1},
		"learning rate 0":   {Name: SGD},
		"learning rate NaN": {Name: Adam, LR: nan},
		"momentum 1":        {Name: SGD, LR: 1, Momentum: 1},
		"momentum belongs":  {Name: Adam, LR: 1, Momentum: 0.9},
		"belong to adam":    {Name: SGD, LR: 1, Beta1: 0.9},
		"beta2 1.5":         {Name: Adam, LR: 1, Beta2: 1.5},
		"eps -1":            {Name: Adam, LR: 1, Eps: -1},
		"weight decay -1":   {Name: Adam, LR: 1, WeightDecay: -1},
	} {
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", c, err, want)
		}
	}
	for _, c := range configs {
		if err := c.Validate(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func BenchmarkAdamUpdate(b *testing.B) {
	n := 11_200_000
	if testing.Short() {
		n = 1 << 20
	}
	c := Config{Name: Adam, LR: 0.001}
	params, grad, state := make([]float32, n), make([]float32, n), make([]float32, 2*n)
	for i := range grad {
		grad[i] = float32(i%13) - 6
	}
	b.SetBytes(int64(4 * n))
	for step := uint64(1); b.Loop(); step++ {
		c.Step(params, state, params, state, grad, step)
	}
}
