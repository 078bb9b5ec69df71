package optim

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/goccy/go-yaml"
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
	if len(golden.Cases) < 18 {
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
				if c.Config.Name == RMSProp && j >= len(params) {
					return 1 // normalized gradients
				}
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
	{Name: SGD, LR: 0.1, Momentum: 0.9, Nesterov: true},
	{Name: SGD, LR: 0.1, Momentum: 0.9, Nesterov: true, WeightDecay: 0.01},
	{Name: AdamW, LR: 0.01},
	{Name: AdamW, LR: 0.01, WeightDecay: 0.1},
	{Name: RMSProp, LR: 0.01},
	{Name: RMSProp, LR: 0.01, Alpha: 0.9, WeightDecay: 0.1},
	{Name: RMSProp, LR: 0.01, Momentum: 0.9},
	{Name: RMSProp, LR: 0.01, Momentum: 0.9, Eps: 1e-3, WeightDecay: 0.1},
	{Name: Adagrad, LR: 0.1},
	{Name: Adagrad, LR: 0.1, WeightDecay: 0.1, Schedule: Schedule{Name: Exponential, Warmup: 2, Gamma: 0.9}},
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
		"unknown optimizer":                  {Name: "sdg", LR: 1},
		"learning rate 0":                    {Name: SGD},
		"learning rate NaN":                  {Name: Adam, LR: nan},
		"momentum 1":                         {Name: SGD, LR: 1, Momentum: 1},
		"momentum NaN":                       {Name: RMSProp, LR: 1, Momentum: nan},
		"momentum belongs":                   {Name: Adam, LR: 1, Momentum: 0.9},
		"and rmsprop, not to adagrad":        {Name: Adagrad, LR: 1, Momentum: 0.9},
		"belong to adam":                     {Name: SGD, LR: 1, Beta1: 0.9},
		"adamw, not to rmsprop":              {Name: RMSProp, LR: 1, Beta2: 0.9},
		"beta2 1.5":                          {Name: Adam, LR: 1, Beta2: 1.5},
		"beta1 NaN":                          {Name: AdamW, LR: 1, Beta1: nan},
		"eps -1":                             {Name: Adam, LR: 1, Eps: -1},
		"eps +Inf":                           {Name: Adagrad, LR: 1, Eps: float32(math.Inf(1))},
		"eps does not belong":                {Name: SGD, LR: 1, Eps: 1},
		"alpha 1":                            {Name: RMSProp, LR: 1, Alpha: 1},
		"alpha belongs":                      {Name: AdamW, LR: 1, Alpha: 0.9},
		"weight decay -1":                    {Name: Adam, LR: 1, WeightDecay: -1},
		"nesterov needs":                     {Name: SGD, LR: 1, Nesterov: true},
		"nesterov needs sgd":                 {Name: RMSProp, LR: 1, Momentum: 0.5, Nesterov: true},
		"schedule: unknown schedule \"cos\"": {Name: SGD, LR: 1, Schedule: Schedule{Name: "cos"}},
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

// TestDefaults: what is zero is what stands in the comments.
func TestDefaults(t *testing.T) {
	for _, c := range []struct{ short, long Config }{
		{Config{Name: Adam, LR: 1}, Config{Name: Adam, LR: 1, Beta1: 0.9, Beta2: 0.999, Eps: 1e-8}},
		{Config{Name: AdamW, LR: 1}, Config{Name: AdamW, LR: 1, Beta1: 0.9, Beta2: 0.999, Eps: 1e-8}},
		{Config{Name: RMSProp, LR: 1}, Config{Name: RMSProp, LR: 1, Alpha: 0.99, Eps: 1e-8}},
		{Config{Name: Adagrad, LR: 1}, Config{Name: Adagrad, LR: 1, Eps: 1e-10}},
	} {
		if got := c.short.withDefaults(); got != c.long {
			t.Errorf("%+v becomes %+v, want %+v", c.short, got, c.long)
		}
	}
}

// exact fills lists with numbers of many magnitudes that are the same on every
// CPU.
func exact(rng *rand.Rand, lists ...[]float32) {
	for _, l := range lists {
		for i := range l {
			l[i] = float32(int32(rng.Uint32())) / float32(uint64(1)<<(30+rng.UintN(12)))
		}
	}
}

// The results of fixed steps have these hashes on every CPU, with assembly and
// without: what peers agree on is what each computes for itself.
func TestSameBits(t *testing.T) {
	const n, steps = 1003, 20
	want := []string{
		"bd184ecc6d93c4937f58844b4885353a",
		"f743a4ea942126bc93c6b0aa202ef9de",
		"78339de17d2b06fe5a5d00ff7fa99b24",
		"a35c099fa6c425c829c8251e73d474f9",
		"eaa4423527152e57190145fce611d466",
		"01798f2396f16464c4e4d6a0fdd220fe",
		"78339de17d2b06fe5a5d00ff7fa99b24",
		"5224bf3efa259c8e3cedc988cd76f557",
		"1e42c00e7c5380b116ef9f35e5deb768",
		"a3877369112c2c220d32657b12d43477",
		"db9e7e61f39cf514665273aee31b1f4e",
		"b9a301abf6345a2837e1e2f247eeec61",
		"64c482a84d655807d89981150322cb79",
		"30b506c3f9dba4eb9e2fde1ea4271a99",
	}
	for i, c := range configs {
		rng := rand.New(rand.NewPCG(1, 2))
		params, grad, state := make([]float32, n), make([]float32, n), make([]float32, c.StateLen(n))
		exact(rng, params)
		for step := uint64(1); step <= steps; step++ {
			exact(rng, grad)
			c.Step(params, state, params, state, grad, step)
		}
		hash := sha256.New()
		if err := binary.Write(hash, binary.LittleEndian, slices.Concat(params, state)); err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(hash.Sum(nil)[:16]); got != want[i] {
			t.Errorf("%+v has the hash %s, want %s", c, got, want[i])
		}
	}
}

// unaligned returns a copy of x at an address that is no multiple of 4, as a
// string's bytes may have.
func unaligned(x []float32, off int) []float32 {
	if len(x) == 0 {
		return x
	}
	raw := make([]float32, len(x)+1)
	y := unsafe.Slice((*float32)(unsafe.Add(unsafe.Pointer(&raw[0]), off)), len(x))
	copy(y, x)
	return y
}

// TestStepRange: a step in parts, in any order, in place or not, at any
// address, is the step.
func TestStepRange(t *testing.T) {
	if runtime.GOARCH == "arm" {
		t.Skip("this CPU may not load floats from every address")
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 50 {
		for _, c := range configs {
			n := rng.IntN(400)
			params, grad, state := make([]float32, n), make([]float32, n), make([]float32, c.StateLen(n))
			exact(rng, params, grad, state)
			for i := range state {
				state[i] = max(state[i], -state[i])
			}
			step := 1 + rng.Uint64N(20)
			wantP, wantS := make([]float32, n), make([]float32, len(state))
			c.Step(wantP, wantS, params, state, grad, step)

			bounds := []int{0, n}
			for range rng.IntN(6) {
				bounds = append(bounds, rng.IntN(n+1))
			}
			slices.Sort(bounds)
			parts := rng.Perm(len(bounds) - 1)
			run := func(what string, dstP, dstS, p, s, g []float32) {
				t.Helper()
				for _, i := range parts {
					c.StepRange(dstP, dstS, p, s, g, bounds[i], bounds[i+1], step)
				}
				if !slices.Equal(dstP, wantP) || !slices.Equal(dstS, wantS) {
					t.Errorf("%+v, parts at %d: %s differs", c, bounds, what)
				}
			}
			off := func() int { return 1 + rng.IntN(3) }
			run("another destination", make([]float32, n), make([]float32, len(state)), params, state, grad)
			run("an unaligned destination", unaligned(make([]float32, n), off()), unaligned(make([]float32, len(state)), off()),
				unaligned(params, off()), unaligned(state, off()), unaligned(grad, off()))
			p, s := unaligned(params, off()), unaligned(state, off())
			run("unaligned in place", p, s, p, s, unaligned(grad, off()))
			p, s = slices.Clone(params), slices.Clone(state)
			run("in place", p, s, p, s, grad)
		}
	}
}

// TestStepRangeTouchesNothingElse: outside of the range all stays.
func TestStepRangeTouchesNothingElse(t *testing.T) {
	const n, lo, hi = 100, 13, 77
	for _, c := range configs {
		params, grad, state := make([]float32, n), make([]float32, n), make([]float32, c.StateLen(n))
		random(t, params, grad)
		p, s := slices.Clone(params), slices.Clone(state)
		c.StepRange(p, s, p, s, grad, lo, hi, 1)
		for i := range n {
			moved := p[i] != params[i]
			for j := i; j < len(s); j += n {
				moved = moved || s[j] != 0
			}
			if inside := i >= lo && i < hi; moved != inside {
				t.Errorf("%+v: parameter %d, in range %v, moved %v", c, i, inside, moved)
			}
		}
	}
}

func TestStepAllocatesNothing(t *testing.T) {
	for _, c := range configs {
		params, state := make([]float32, 99), make([]float32, c.StateLen(99))
		if n := testing.AllocsPerRun(10, func() { c.Step(params, state, params, state, params, 3) }); n != 0 {
			t.Errorf("%+v: a step allocates %v times", c, n)
		}
	}
}

func TestStepPanics(t *testing.T) {
	c := Config{Name: RMSProp, LR: 1, Momentum: 0.5}
	v := make([]float32, 4)
	for want, f := range map[string]func(){
		"lengths":       func() { c.Step(v, v, v, v, v, 1) },
		"steps start":   func() { Config{Name: SGD, LR: 1}.Step(v, nil, v, nil, v, 0) },
		"not valid":     func() { Config{Name: "x"}.Step(v, nil, v, nil, v, 1) },
		"Schedule":      func() { Config{Name: SGD, Schedule: Schedule{Name: "x"}}.Step(v, nil, v, nil, v, 1) },
		"no range":      func() { Config{Name: SGD}.StepRange(v, nil, v, nil, v, 3, 2, 1) },
		"lo and hi":     func() { Config{Name: SGD}.StepRange(v, nil, v, nil, v, -1, 2, 1) },
		"lo and hi are": func() { Config{Name: SGD}.StepRange(v, nil, v, nil, v, 0, 5, 1) },
	} {
		func() {
			defer func() {
				if got, _ := recover().(string); !strings.Contains(got, want) {
					t.Errorf("panics with %q, want %q", got, want)
				}
			}()
			f()
		}()
	}
}

// TestConfigIsPlainData: JSON and "github.com/goccy/go-yaml" give back what they got, and leave out
// what is zero.
func TestConfigIsPlainData(t *testing.T) {
	c := Config{Name: SGD, LR: 0.1, Momentum: 0.9, Nesterov: true, Schedule: Schedule{Name: Linear, Warmup: 1, Total: 9, Cooldown: 3, Min: 0.1}}
	for _, f := range []struct {
		name      string
		marshal   func(any) ([]byte, error)
		unmarshal func([]byte, any) error
	}{
		{"json", json.Marshal, json.Unmarshal},
		{"yaml", yaml.Marshal, func(b []byte, v any) error { return yaml.Unmarshal(b, v) }},
	} {
		for _, c := range append(configs, c) {
			text, err := f.marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(text), "schedule") != (c.Schedule != Schedule{}) {
				t.Errorf("%s", text)
			}
			var again Config
			if err := f.unmarshal(text, &again); err != nil || again != c {
				t.Errorf("%s becomes %+v: %v", text, again, err)
			}
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

// BenchmarkStep counts the bytes that are read and written.
func BenchmarkStep(b *testing.B) {
	n := 11_200_000
	if testing.Short() {
		n = 1 << 20
	}
	for _, c := range []Config{
		{Name: SGD, LR: 0.001},
		{Name: SGD, LR: 0.001, Momentum: 0.9},
		{Name: SGD, LR: 0.001, Momentum: 0.9, Nesterov: true},
		{Name: Adam, LR: 0.001},
		{Name: AdamW, LR: 0.001, WeightDecay: 0.01},
		{Name: RMSProp, LR: 0.001},
		{Name: RMSProp, LR: 0.001, Momentum: 0.9},
		{Name: Adagrad, LR: 0.001},
	} {
		name := c.Name
		if c.Momentum != 0 {
			name += "-momentum"
		}
		if c.Nesterov {
			name += "-nesterov"
		}
		b.Run(name, func(b *testing.B) {
			params, grad, state := make([]float32, n), make([]float32, n), make([]float32, c.StateLen(n))
			for i := range grad {
				grad[i] = float32(i%13) - 6
			}
			b.SetBytes(int64(4 * (3*n + 2*len(state))))
			for step := uint64(1); b.Loop(); step++ {
				c.Step(params, state, params, state, grad, step)
			}
		})
	}
}
