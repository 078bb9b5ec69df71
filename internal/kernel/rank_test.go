package kernel

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// finite is vector without what Median does not take.
func finite(rng *rand.Rand, n int) []float32 {
	v := vector(rng, n)
	for i := range v {
		if f := float64(v[i]); math.IsNaN(f) || math.IsInf(f, 0) {
			v[i] = float32(rng.IntN(3) - 1)
		}
	}
	return v
}

// medianOf and trimmedOf are the definitions.
func medianOf(column []float32) float32 {
	slices.Sort(column)
	n := len(column)
	if n%2 == 1 {
		return column[n/2] + 0
	}
	return float32(column[n/2-1]*0.5) + float32(column[n/2]*0.5) + 0
}

func trimmedOf(column []float32, f int) float32 {
	slices.Sort(column)
	var total float32
	kept := column[f : len(column)-f]
	for _, v := range kept {
		total += v
	}
	return total / float32(len(kept))
}

func perColumn(sources [][]float32, of func(column []float32) float32) []float32 {
	out, column := make([]float32, len(sources[0])), make([]float32, len(sources))
	for i := range out {
		for k, s := range sources {
			column[k] = s[i]
		}
		out[i] = of(column)
	}
	return out
}

// TestRankReference holds both paths against the definitions, with every count
// that has a network and some that have none.
func TestRankReference(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		rng := newRand(t)
		counts := []int{17, 24, 31, 32, 33, 64, 100, 1024, 1025, 1500}
		for k := 1; k <= networks; k++ {
			counts = append(counts, k, k, k)
		}
		for _, k := range counts {
			n := rng.IntN(200)
			if k <= networks && rng.IntN(2) == 0 {
				n += rankRoom / k
			}
			sources := make([][]float32, k)
			for i := range sources {
				sources[i] = finite(rng, n)
			}
			if n == 0 {
				continue
			}
			got := vector(rng, n)
			Median(got, sources)
			same(t, "Median", got, perColumn(sources, medianOf))
			for f := range (k + 1) / 2 {
				if k > networks && rng.IntN(k) > 4 {
					continue
				}
				TrimmedMean(got, sources, f)
				same(t, "TrimmedMean", got, perColumn(sources, func(c []float32) float32 { return trimmedOf(c, f) }))
			}
			// The destination may be a source, and permuted sources are as good.
			want := clone(got)
			Median(want, sources)
			rng.Shuffle(k, func(i, j int) { sources[i], sources[j] = sources[j], sources[i] })
			Median(sources[0], sources)
			same(t, "Median in place and permuted", sources[0], want)
		}
	})
}

// TestRankNetworks proves the networks right by the 0-1 principle: what sorts
// all sequences of zeros and ones sorts everything.
func TestRankNetworks(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		for k := 1; k <= networks; k++ {
			sources := make([][]float32, k)
			for i := range sources {
				sources[i] = make([]float32, 1<<k)
				for c := range sources[i] {
					sources[i][c] = float32(c >> i & 1)
				}
			}
			got, want := make([]float32, 1<<k), make([]float32, 1<<k)
			Median(got, sources)
			same(t, "Median", got, perColumn(sources, medianOf))
			// The differences of the trimmed sums are the sorted pairs.
			for f := range (k + 1) / 2 {
				TrimmedMean(got, sources, f)
				for c := range want {
					ones := 0
					for i := range k {
						ones += c >> i & 1
					}
					want[c] = float32(min(max(ones-f, 0), k-2*f)) / float32(k-2*f)
				}
				same(t, "TrimmedMean", got, want)
			}
		}
	})
}

func TestRankScaling(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		rng := newRand(t)
		for k := 1; k < 20; k++ {
			sources, scaled := make([][]float32, k), make([][]float32, k)
			for i := range sources {
				sources[i] = random(rng, 77)
				scaled[i] = clone(sources[i])
				Scale(scaled[i], -4)
			}
			got, want := make([]float32, 77), make([]float32, 77)
			Median(want, sources)
			Scale(want, -4)
			Median(got, scaled)
			same(t, "Median of scaled sources", got, want)
			for _, s := range scaled {
				Scale(s, -1)
			}
			TrimmedMean(want, sources, (k-1)/2)
			Scale(want, 4)
			TrimmedMean(got, scaled, (k-1)/2)
			same(t, "TrimmedMean of scaled sources", got, want)
		}
	})
}

// The middle of the largest floats is finite.
func TestMedianNoOverflow(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		x := make([]float32, 9)
		for i := range x {
			x[i] = math.MaxFloat32
		}
		got := make([]float32, 9)
		Median(got, [][]float32{x, x})
		same(t, "Median", got, x)
	})
}

func TestRankPanics(t *testing.T) {
	x := make([]float32, 3)
	for name, f := range map[string]func(){
		"Median of none":             func() { Median(x, nil) },
		"Median of unequal":          func() { Median(x, [][]float32{x, x[1:]}) },
		"TrimmedMean of none":        func() { TrimmedMean(x, nil, 0) },
		"TrimmedMean of unequal":     func() { TrimmedMean(x, [][]float32{x[1:], x}, 0) },
		"TrimmedMean without a rest": func() { TrimmedMean(x, [][]float32{x, x}, 1) },
		"TrimmedMean, f negative":    func() { TrimmedMean(x, [][]float32{x, x}, -1) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s does not panic", name)
				}
			}()
			f()
		}()
	}
}

// rankVectors are random, so that nothing is in order by chance.
func rankVectors(b *testing.B, k int) [][]float32 {
	r := rand.New(rand.NewPCG(1, 1))
	v := make([][]float32, k)
	for i := range v {
		v[i] = make([]float32, benchLen(b))
		for j := range v[i] {
			v[i][j] = r.Float32()
		}
	}
	return v
}

func benchRank(b *testing.B, k int, f func(dst []float32, sources [][]float32)) {
	v := rankVectors(b, k+1)
	b.SetBytes(int64(4 * k * len(v[0])))
	for b.Loop() {
		f(v[k], v[:k])
	}
}

func BenchmarkMedian8(b *testing.B)  { benchRank(b, 8, Median) }
func BenchmarkMedian16(b *testing.B) { benchRank(b, 16, Median) }
func BenchmarkMedian24(b *testing.B) { benchRank(b, 24, Median) }

func BenchmarkTrimmedMean8(b *testing.B) {
	benchRank(b, 8, func(dst []float32, sources [][]float32) { TrimmedMean(dst, sources, 2) })
}

func BenchmarkTrimmedMean16(b *testing.B) {
	benchRank(b, 16, func(dst []float32, sources [][]float32) { TrimmedMean(dst, sources, 4) })
}

// BenchmarkRead8 is what BenchmarkMedian8 cannot do without: it reads the
// sources.
func BenchmarkRead8(b *testing.B) {
	benchRank(b, 8, func(dst []float32, sources [][]float32) {
		for _, s := range sources {
			if FirstNonFinite(s) >= 0 {
				b.Fatal("found one")
			}
		}
	})
}

func BenchmarkMean8(b *testing.B) { benchRank(b, 8, Mean) }
