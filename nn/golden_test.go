package nn

import (
	"encoding/json"
	"math"
	"os"
	"reflect"
	"slices"
	"testing"
)

// splitmix and uniform are the generators of testdata/golden.py.
func splitmix(seed uint64, i int) uint64 {
	z := seed + uint64(i+1)*0x9E3779B97F4A7C15
	z = (z ^ z>>30) * 0xBF58476D1CE4E5B9
	z = (z ^ z>>27) * 0x94D049BB133111EB
	return z ^ z>>31
}

func uniform(seed uint64, i, levels int) float32 {
	top := int64(splitmix(seed, i) >> 40)
	if levels > 0 {
		return float32(top%int64(levels)-int64(levels/2)) / float32(levels/2)
	}
	return float32(float64(top-1<<23) / (1 << 23))
}

// TestGolden compares with PyTorch, see testdata/golden.py.
func TestGolden(t *testing.T) {
	data, err := os.ReadFile("testdata/golden.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Spec          Spec
		Batch, Levels int
		Loss          float64
		Correct       int
		Gradients     []struct {
			Sum, Abs float64
			Step     int
			Samples  []float64
		}
	}
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	if len(cases) < 13 {
		t.Fatalf("golden.json has %d cases only", len(cases))
	}
	for _, c := range cases {
		t.Run(c.Spec.Name, func(t *testing.T) {
			if slices.Contains(Names(), c.Spec.Name) {
				if own, _ := Builtin(c.Spec.Name); !reflect.DeepEqual(own, c.Spec) {
					t.Fatalf("the built-in model is %v, golden.json has %v", own, c.Spec)
				}
			}
			m, err := New(c.Spec)
			if err != nil {
				t.Fatal(err)
			}
			params, grad := make([]float32, m.NumParams()), make([]float32, m.NumParams())
			for i, v := range m.Views() {
				fanIn := 1
				for _, d := range v.Shape[1:] {
					fanIn *= d
				}
				bound := float32(1 / math.Sqrt(float64(fanIn)))
				for j := range v.Of(params) {
					p := uniform(uint64(1000+i), j, c.Levels)
					if c.Levels == 0 {
						p *= bound
					}
					v.Of(params)[j] = p
				}
			}
			x, labels := make([]float32, c.Batch*m.InputLen()), make([]int32, c.Batch)
			for i := range x {
				x[i] = uniform(1, i, c.Levels)
			}
			for i := range labels {
				labels[i] = int32(splitmix(2, i) >> 40 % uint64(c.Spec.Classes))
			}
			// A workspace that is larger, and used before: nothing may be left over.
			ws := m.NewWorkspace(c.Batch + 5)
			dirty := slices.Repeat(x, 2)[:(c.Batch+1)*m.InputLen()]
			m.Gradient(grad, params, dirty, append(labels, 0), ws)
			loss, correct := m.Gradient(grad, params, x, labels, ws)
			if math.Abs(loss-c.Loss) > 2e-6*(1+c.Loss) || correct != c.Correct {
				t.Errorf("loss %v, %d correct; PyTorch has %v, %d", loss, correct, c.Loss, c.Correct)
			}
			sum, correct := m.Evaluate(params, x, labels, ws)
			if math.Abs(sum/float64(c.Batch)-loss) > 1e-12*(1+loss) || correct != c.Correct {
				t.Errorf("Evaluate has loss %v, %d correct; Gradient %v, %d", sum/float64(c.Batch), correct, loss, c.Correct)
			}
			for i, v := range m.Views() {
				g, want := v.Of(grad), c.Gradients[i]
				total, abs := 0.0, 0.0
				for _, x := range g {
					total += float64(x)
					abs += math.Abs(float64(x))
				}
				mean := want.Abs / float64(len(g))
				if math.Abs(total-want.Sum) > 1e-5*want.Abs+1e-7 || math.Abs(abs-want.Abs) > 1e-5*want.Abs+1e-7 {
					t.Errorf("%s: the gradient's sum is %v, of absolute values %v; PyTorch has %v, %v", v.Name, total, abs, want.Sum, want.Abs)
				}
				for j, w := range want.Samples {
					if got := float64(g[j*want.Step]); math.Abs(got-w) > 1e-5*math.Abs(w)+2e-5*mean+1e-8 {
						t.Errorf("%s[%d]: the gradient is %v, PyTorch has %v", v.Name, j*want.Step, got, w)
					}
				}
			}
		})
	}
}
