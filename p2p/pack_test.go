package p2p

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/nn"
)

// floats returns the bytes of numbers such as gradients are.
func floats(n int) []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	var out []byte
	for range n {
		out = binary.LittleEndian.AppendUint32(out, math.Float32bits(float32(rng.NormFloat64()*1e-3)))
	}
	return out
}

func TestPack(t *testing.T) {
	for _, c := range []struct {
		name    string
		chunk   []byte
		smaller bool
	}{
		{"floats", floats(treehash.ChunkSize / 4), true},
		{"a few floats", floats(2000), true},
		{"an odd number of bytes", floats(1000)[:3997], true},
		{"zeros", make([]byte, treehash.ChunkSize), true},
		{"noise", randomBody(treehash.ChunkSize), false},
		{"one byte", []byte{1}, false},
	} {
		packed, smaller := pack([]byte("before"), c.chunk)
		if smaller != c.smaller {
			t.Errorf("%s: %d bytes packed into %d", c.name, len(c.chunk), len(packed)-6)
		}
		if !bytes.HasPrefix(packed, []byte("before")) {
			t.Errorf("%s: what was there is lost", c.name)
		}
		got := make([]byte, len(c.chunk))
		if err := unpack(got, packed[6:]); err != nil || !bytes.Equal(got, c.chunk) {
			t.Errorf("%s: it does not come back: %v", c.name, err)
		}
		for _, other := range []int{len(c.chunk) - 1, len(c.chunk) + 1} {
			if err := unpack(make([]byte, other), packed[6:]); !errors.Is(err, errPacked) {
				t.Errorf("%s: unpacked to %d bytes: %v", c.name, other, err)
			}
		}
	}
	zeros, _ := pack(nil, make([]byte, treehash.ChunkSize))
	if n := testing.AllocsPerRun(10, func() {
		if unpack(make([]byte, 100), zeros) == nil {
			t.Error("zeros without end were taken for 100")
		}
	}); n > 50 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzUnpack(f *testing.F) {
	for _, n := range []int{1, 7, 400} {
		packed, _ := pack(nil, floats(n))
		f.Add(packed, 4*n)
		f.Add(packed[:len(packed)-1], 4*n)
	}
	zeros, _ := pack(nil, make([]byte, treehash.ChunkSize))
	f.Add(zeros, 1000)
	f.Add(zeros, treehash.ChunkSize)
	f.Fuzz(func(t *testing.T, packed []byte, n int) {
		if n < 1 || n > treehash.ChunkSize {
			return
		}
		chunk := make([]byte, n)
		if unpack(chunk, packed) != nil {
			return
		}
		again, _ := pack(nil, chunk)
		back := make([]byte, n)
		if err := unpack(back, again); err != nil || !bytes.Equal(back, chunk) {
			t.Fatalf("what was unpacked does not pack: %v", err)
		}
	})
}

// TestPackedFetch counts what is saved, and that nothing is where nobody asks.
func TestPackedFetch(t *testing.T) {
	for _, packing := range []Packing{PackAlways, PackAuto, PackNever} {
		t.Run(fmt.Sprint(packing), func(t *testing.T) {
			g := newGroup(t, 2)
			o, p := g.start(0), g.start(1, func(c *Config) { c.Packing = packing })
			p.dials(o)
			p.wait("connected", func() bool { return p.connected[0] })
			for _, body := range [][]byte{floats(50_000), floats(1_500_001), randomBody(20 * treehash.ChunkSize)} {
				mustFetch(t, p, o.shelf.put(body), body, 0)
			}
			got, gave := p.Stats(), o.Stats()
			if got.BodySavedIn != gave.BodySavedOut || got.BadBodies != 0 {
				t.Errorf("%+v\n%+v", got, gave)
			}
			// A loopback connection is never too slow.
			if saved := float64(got.BodySavedIn) / 6_200_004; packing == PackAlways && saved < 0.1 || packing != PackAlways && saved != 0 {
				t.Errorf("saved %.3f of the floats", saved)
			}
		})
	}
}

// gradient computes a LeNet-5 gradient after some steps, and returns it and
// the parameters as they travel.
func gradient(b *testing.B) (grad, params []byte) {
	spec, err := nn.Builtin("lenet5")
	if err != nil {
		b.Fatal(err)
	}
	model, err := nn.New(spec)
	if err != nil {
		b.Fatal(err)
	}
	data, err := dataset.Open("mnist-10k")
	if err != nil {
		b.Fatal(err)
	}
	const batch = 64
	w, d := make([]float32, model.NumParams()), make([]float32, model.NumParams())
	x, labels, ws := make([]float32, batch*model.InputLen()), make([]int32, batch), model.NewWorkspace(batch)
	model.Init(w, 1)
	for step := range 100 {
		lo := step % 90 * batch
		data.Floats(x, dataset.Range{Lo: lo, Hi: lo + batch})
		for i := range labels {
			labels[i] = int32(data.Labels[lo+i])
		}
		model.Gradient(d, w, x, labels, ws)
		for i := range w {
			w[i] -= 0.05 * d[i]
		}
	}
	for i := range w {
		params = binary.LittleEndian.AppendUint32(params, math.Float32bits(w[i]))
		grad = binary.LittleEndian.AppendUint32(grad, math.Float32bits(d[i]))
	}
	return grad, params
}

// BenchmarkPack is one core's work on what peers send each other.
func BenchmarkPack(b *testing.B) {
	grad, params := gradient(b)
	for _, c := range []struct {
		name string
		body []byte
	}{{"gradient", grad}, {"parameters", params}, {"noise", randomBody(len(grad))}} {
		packed, _ := pack(nil, c.body)
		b.Run("pack/"+c.name, func(b *testing.B) {
			b.SetBytes(int64(len(c.body)))
			for b.Loop() {
				packed, _ = pack(packed[:0], c.body)
			}
			b.ReportMetric(float64(len(packed))/float64(len(c.body)), "of-its-size")
		})
		b.Run("unpack/"+c.name, func(b *testing.B) {
			chunk := make([]byte, len(c.body))
			b.SetBytes(int64(len(c.body)))
			for b.Loop() {
				if err := unpack(chunk, packed); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
