package robust

import (
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

func newRand(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// vectors returns count vectors, many values of which are equal.
func vectors(rng *rand.Rand, count, n int) [][]float32 {
	v := make([][]float32, count)
	for k := range v {
		v[k] = make([]float32, n)
		for i := range v[k] {
			v[k][i] = float32(rng.NormFloat64())
			if rng.IntN(3) == 0 {
				v[k][i] = [...]float32{0, float32(math.Copysign(0, -1)), 1, -1, 1e30, -1e-30}[rng.IntN(6)]
			}
		}
	}
	return v
}

func column(sources [][]float32, i int) []float64 {
	var c []float64
	for _, s := range sources {
		c = append(c, float64(s[i]))
	}
	slices.Sort(c)
	return c
}

func sameBits(t *testing.T, what string, got, want []float32) {
	t.Helper()
	for i := range want {
		if math.Float32bits(got[i]) != math.Float32bits(want[i]) {
			t.Fatalf("%s: [%d] is %v, want %v", what, i, got[i], want[i])
		}
	}
}

func median(t *testing.T, sources [][]float32) []float32 {
	t.Helper()
	dst := make([]float32, len(sources[0]))
	if err := Median(dst, sources); err != nil {
		t.Fatal(err)
	}
	return dst
}

func trimmed(t *testing.T, sources [][]float32, f int) []float32 {
	t.Helper()
	dst := make([]float32, len(sources[0]))
	if err := TrimmedMean(dst, sources, f); err != nil {
		t.Fatal(err)
	}
	return dst
}

func TestReference(t *testing.T) {
	rng := newRand(t)
	for range 200 {
		count, n := 1+rng.IntN(40), 1+rng.IntN(50)
		f := rng.IntN((count + 1) / 2)
		sources := vectors(rng, count, n)
		gotMedian, gotTrimmed := median(t, sources), trimmed(t, sources, f)
		for i := range n {
			c := column(sources, i)
			want := float32((c[(count-1)/2] + c[count/2]) / 2)
			if gotMedian[i] != want {
				t.Fatalf("%d vectors: median %v, want %v", count, gotMedian[i], want)
			}
			total, size := 0.0, 0.0
			for _, v := range c[f : count-f] {
				total += v
				size += math.Abs(v)
			}
			total /= float64(count - 2*f)
			if math.Abs(float64(gotTrimmed[i])-total) > size*1e-6 {
				t.Fatalf("%d vectors, f %d: trimmed mean %v, want %v", count, f, gotTrimmed[i], total)
			}
		}
	}
}

func TestMetamorphic(t *testing.T) {
	rng := newRand(t)
	for range 100 {
		count, n := 1+rng.IntN(40), 1+rng.IntN(100)
		f := rng.IntN((count + 1) / 2)
		sources := vectors(rng, count, n)
		wantMedian, wantTrimmed := median(t, sources), trimmed(t, sources, f)

		// Any chunks.
		lo, parts := rng.IntN(n), make([][]float32, count)
		hi := lo + 1 + rng.IntN(n-lo)
		for i, s := range sources {
			parts[i] = s[lo:hi]
		}
		sameBits(t, "median of a part", median(t, parts), wantMedian[lo:hi])
		sameBits(t, "trimmed mean of a part", trimmed(t, parts, f), wantTrimmed[lo:hi])

		// Any order.
		rng.Shuffle(count, func(i, j int) { sources[i], sources[j] = sources[j], sources[i] })
		sameBits(t, "median of permuted vectors", median(t, sources), wantMedian)
		sameBits(t, "trimmed mean of permuted vectors", trimmed(t, sources, f), wantTrimmed)

		// A power of two.
		scaled := make([][]float32, count)
		for k, s := range sources {
			for _, v := range s {
				scaled[k] = append(scaled[k], v*8)
			}
		}
		for i := range wantMedian {
			wantMedian[i] *= 8
			wantTrimmed[i] *= 8
		}
		sameBits(t, "median of scaled vectors", median(t, scaled), wantMedian)
		sameBits(t, "trimmed mean of scaled vectors", trimmed(t, scaled, f), wantTrimmed)
	}
}

// TestByzantine has f vectors of the worst there is: the result stays between
// the others.
func TestByzantine(t *testing.T) {
	rng := newRand(t)
	for range 100 {
		f := 1 + rng.IntN(8)
		honest := vectors(rng, f+1+rng.IntN(8), 20)
		sources := slices.Clone(honest)
		for range f {
			bad := make([]float32, 20)
			for i := range bad {
				bad[i] = [...]float32{math.MaxFloat32, -math.MaxFloat32}[rng.IntN(2)]
			}
			sources = append(sources, bad)
		}
		m, tm := median(t, sources), trimmed(t, sources, f)
		for i := range m {
			c := column(honest, i)
			low, high := c[0], c[len(c)-1]
			slack := 1e-6 * max(-low, high)
			if v := float64(m[i]); v < low || v > high {
				t.Fatalf("the median %v is not in [%v, %v]", v, low, high)
			}
			if v := float64(tm[i]); v < low-slack || v > high+slack {
				t.Fatalf("the trimmed mean %v is not in [%v, %v]", v, low, high)
			}
		}
	}
}

func TestErrors(t *testing.T) {
	x := make([]float32, 3)
	three := [][]float32{x, x, x}
	unequal := [][]float32{x, x, x[:2]}
	for _, c := range []struct {
		err  error
		want string
	}{
		{Median(x, nil), "no vectors"},
		{Median(x, unequal), "vector 2 has 2 elements"},
		{Median(x[:2], three), "vector 0 has 3 elements"},
		{TrimmedMean(x, nil, 0), "of 0 vectors without 0"},
		{TrimmedMean(x, three, -1), "without -1 vectors"},
		{TrimmedMean(x, three, 2), "of 3 vectors without 2"},
		{TrimmedMean(x, three[:2], 1), "of 2 vectors without 1"},
		{TrimmedMean(x, three, math.MaxInt), "more than 2f"},
		{TrimmedMean(x, unequal, 1), "vector 2 has 2 elements"},
		{TrimmedMean(x, three, 1), ""},
		{Median(nil, [][]float32{nil}), ""},
	} {
		if c.want == "" && c.err != nil || c.want != "" && (c.err == nil || !strings.Contains(c.err.Error(), c.want)) {
			t.Errorf("%v, want %q", c.err, c.want)
		}
	}
}
