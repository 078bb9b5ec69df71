package nn

import (
	"math/rand/v2"
	"testing"
	"time"
)

// benchmarkStep times forward, backward and a plain SGD step of a batch of 64,
// as bench/pytorch_step.py does. The minimum is what to compare on a busy
// machine.
func benchmarkStep(b *testing.B, name string) {
	spec, err := Builtin(name)
	if err != nil {
		b.Fatal(err)
	}
	m, err := New(spec)
	if err != nil {
		b.Fatal(err)
	}
	const batch = 64
	r := rand.New(rand.NewPCG(1, 2))
	params, grad := make([]float32, m.NumParams()), make([]float32, m.NumParams())
	m.Init(params, 1)
	x, labels := make([]float32, batch*m.InputLen()), make([]int32, batch)
	for i := range x {
		x[i] = float32(r.NormFloat64())
	}
	for i := range labels {
		labels[i] = int32(r.IntN(10))
	}
	ws := m.NewWorkspace(batch)
	least := time.Hour
	for b.Loop() {
		start := time.Now()
		m.Gradient(grad, params, x, labels, ws)
		for i, g := range grad {
			params[i] -= 0.01 * g
		}
		least = min(least, time.Since(start))
	}
	b.ReportMetric(float64(least.Microseconds())/1000, "min-ms/step")
	b.ReportMetric(float64(b.Elapsed().Microseconds())/1000/float64(b.N), "ms/step")
}

func BenchmarkLeNet5Step(b *testing.B) { benchmarkStep(b, "lenet5") }
func BenchmarkCNNStep(b *testing.B)    { benchmarkStep(b, "cnn") }
