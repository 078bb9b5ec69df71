package nn

import (
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"testing"

	"github.com/spirt-ml/spirt/internal/kernel"
)

// lossFloat64 is the mean loss of a batch, computed from the Spec layer by
// layer in float64: the reference for gradients. It shares no code with the
// engine but the Spec's resolved shapes.
func lossFloat64(t *testing.T, spec Spec, params []float64, x []float32, labels []int32) float64 {
	layers, err := spec.resolve()
	if err != nil {
		t.Fatal(err)
	}
	total := 0.0
	each := len(x) / len(labels)
	for s, label := range labels {
		a := make([]float64, each)
		for i := range a {
			a[i] = float64(x[s*each+i])
		}
		rest := params
		for _, l := range layers {
			nw, nb := l.params()
			w, b := rest[:nw], rest[nw:nw+nb]
			rest = rest[nw+nb:]
			a = layerFloat64(l, a, w, b)
		}
		top := slices.Max(a)
		sum := 0.0
		for _, v := range a {
			sum += math.Exp(v - top)
		}
		total += math.Log(sum) + top - a[label]
	}
	return total / float64(len(labels))
}

func layerFloat64(l resolved, a, w, b []float64) []float64 {
	y := make([]float64, l.out.size())
	switch l.Kind {
	case Flatten:
		copy(y, a)
	case ReLU:
		for i, v := range a {
			y[i] = max(v, 0)
		}
	case Linear:
		for o := range y {
			y[o] = b[o]
			for i, v := range a {
				y[o] += v * w[o*len(a)+i]
			}
		}
	case Conv2D, MaxPool:
		for o := range l.out.c {
			for oy := range l.out.h {
				for ox := range l.out.w {
					out := &y[(o*l.out.h+oy)*l.out.w+ox]
					best := math.Inf(-1)
					for ky := range l.Kernel {
						for kx := range l.Kernel {
							yy, xx := oy*l.Stride+ky-l.Padding, ox*l.Stride+kx-l.Padding
							if yy < 0 || xx < 0 || yy >= l.in.h || xx >= l.in.w {
								continue
							}
							at := func(c int) float64 { return a[(c*l.in.h+yy)*l.in.w+xx] }
							if l.Kind == MaxPool {
								best = max(best, at(o))
								continue
							}
							for c := range l.in.c {
								*out += at(c) * w[((o*l.in.c+c)*l.Kernel+ky)*l.Kernel+kx]
							}
						}
					}
					if l.Kind == MaxPool {
						*out = best
					} else {
						*out += b[o]
					}
				}
			}
		}
	}
	return y
}

// sample makes a model with parameters, and a batch.
func sample(t testing.TB, r *rand.Rand, spec Spec, batch int) (m *Model, params, x []float32, labels []int32) {
	m, err := New(spec)
	if err != nil {
		t.Fatal(err)
	}
	params = make([]float32, m.NumParams())
	m.Init(params, r.Uint64())
	x, labels = make([]float32, batch*m.InputLen()), make([]int32, batch)
	for i := range x {
		x[i] = float32(r.NormFloat64())
	}
	for i := range labels {
		labels[i] = int32(r.IntN(spec.Classes))
	}
	return m, params, x, labels
}

// checkGradient compares at most count entries of each parameter's gradient
// with central differences in float64. ReLU and pooling have kinks: where a
// difference straddles one, its two halves disagree and it is left out.
func checkGradient(t *testing.T, r *rand.Rand, spec Spec, batch, count int) {
	m, params, x, labels := sample(t, r, spec, batch)
	grad := make([]float32, len(params))
	loss, _ := m.Gradient(grad, params, x, labels, m.NewWorkspace(batch))
	wide := make([]float64, len(params))
	for i, p := range params {
		wide[i] = float64(p)
	}
	if want := lossFloat64(t, spec, wide, x, labels); math.Abs(loss-want) > 1e-5 {
		t.Errorf("%s: loss %v, want %v", spec.Name, loss, want)
	} else {
		loss = want
	}
	checked, kinks := 0, 0
	for _, v := range m.Views() {
		scale := 0.0
		for _, g := range v.Of(grad) {
			scale = max(scale, math.Abs(float64(g)))
		}
		at := r.Perm(v.Len())
		for _, i := range at[:min(count, len(at))] {
			const h = 1e-6
			i += v.Offset
			p := wide[i]
			wide[i] = p + h
			up := lossFloat64(t, spec, wide, x, labels)
			wide[i] = p - h
			down := lossFloat64(t, spec, wide, x, labels)
			wide[i] = p
			checked++
			if math.Abs((up-loss)-(loss-down))/h > 1e-4*scale+1e-7 {
				kinks++
				continue
			}
			want := (up - down) / (2 * h)
			if got := float64(grad[i]); math.Abs(got-want) > 1e-4*scale+1e-6 {
				t.Errorf("%s: %s[%d]: the gradient is %v, the difference quotient %v", spec.Name, v.Name, i-v.Offset, got, want)
			}
		}
	}
	if kinks > checked/10+2 {
		t.Errorf("%s: %d of %d differences straddle a kink", spec.Name, kinks, checked)
	}
}

func layerSpecs() []Spec {
	spec := func(name string, c, h, w, classes int, layers ...LayerSpec) Spec {
		return Spec{Name: name, Input: []int{c, h, w}, Classes: classes, Layers: append(layers, LayerSpec{Kind: Flatten}, LayerSpec{Kind: Linear, Out: classes})}
	}
	conv := func(out, kernel, stride, padding int) LayerSpec {
		return LayerSpec{Kind: Conv2D, Out: out, Kernel: kernel, Stride: stride, Padding: padding}
	}
	pool := func(kernel, stride, padding int) LayerSpec {
		return LayerSpec{Kind: MaxPool, Kernel: kernel, Stride: stride, Padding: padding}
	}
	relu := LayerSpec{Kind: ReLU}
	return []Spec{
		spec("linear", 2, 3, 5, 3),
		spec("linear wide", 1, 5, 5, 19, LayerSpec{Kind: Flatten}, LayerSpec{Kind: Linear, Out: 33}, relu, LayerSpec{Kind: Linear, Out: 7}),
		spec("relu on the input", 1, 4, 4, 3, relu),
		spec("relu on the flat input", 2, 2, 3, 3, LayerSpec{Kind: Flatten}, relu),
		spec("conv", 3, 7, 6, 4, conv(5, 3, 1, 0)),
		spec("conv 1x1", 17, 3, 3, 4, conv(18, 1, 1, 0), relu, conv(3, 1, 1, 0)),
		spec("conv padded", 2, 5, 6, 4, conv(7, 3, 1, 1), conv(20, 5, 1, 4)),
		spec("conv strided", 2, 9, 8, 4, conv(4, 3, 2, 1), relu, conv(5, 2, 3, 1)),
		spec("conv, relu, pool", 1, 8, 8, 4, conv(6, 3, 1, 1), relu, pool(2, 2, 0), conv(9, 3, 1, 1), relu, pool(2, 2, 0)),
		spec("conv, pool, relu", 1, 9, 7, 4, conv(6, 3, 1, 1), pool(2, 2, 0), relu, conv(5, 2, 1, 1), pool(2, 2, 0), relu),
		spec("pool alone", 3, 6, 6, 4, pool(2, 0, 0)),
		spec("pool overlapping", 1, 8, 9, 3, conv(4, 3, 1, 1), pool(3, 2, 1), conv(3, 2, 1, 0), pool(2, 1, 1)),
		spec("pool of one", 1, 8, 9, 3, conv(4, 3, 1, 1), pool(1, 2, 0), pool(2, 2, 1), conv(3, 2, 1, 0)),
		spec("pools between", 1, 9, 9, 3, pool(2, 1, 0), conv(5, 3, 1, 1), relu, pool(2, 2, 0), pool(3, 1, 1), relu, conv(3, 2, 1, 1), relu),
	}
}

func TestGradientLayers(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for _, spec := range layerSpecs() {
		checkGradient(t, r, spec, 1+r.IntN(6), 25)
	}
}

func TestGradientModels(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for name, count := range map[string]int{"logistic": 20, "mlp": 4, "lenet5": 3, "cnn": 2} {
		spec, err := Builtin(name)
		if err != nil {
			t.Fatal(err)
		}
		if name == "cnn" {
			spec.Input = []int{1, 8, 8} // the reference is slow
		}
		checkGradient(t, r, spec, 2, count)
	}
}

// TestPlainGo runs the tests of gradients again without assembly.
func TestPlainGo(t *testing.T) {
	if !kernel.HasAVX2() {
		return // they ran without it
	}
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-test.run=^(TestGradientLayers|TestGolden)$", "-test.v")
	cmd.Env = append(os.Environ(), "SPIRT_NOASM=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
