package kernel

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// special are values that are easily treated otherwise by another path.
var special = []float32{
	0, float32(math.Copysign(0, -1)), 1, -1, math.SmallestNonzeroFloat32, -math.SmallestNonzeroFloat32,
	1e-40, -3e-39, math.MaxFloat32, -math.MaxFloat32, float32(math.Inf(1)), float32(math.Inf(-1)), float32(math.NaN()),
	1.1754944e-38, 3.4e-20, 1.8e19,
}

func newRand(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// vector returns n random floats at a random alignment, some of them special.
func vector(rng *rand.Rand, n int) []float32 {
	off := rng.IntN(9)
	v := make([]float32, n+off)[off:]
	for i := range v {
		if rng.IntN(4) == 0 {
			v[i] = special[rng.IntN(len(special))]
		} else {
			v[i] = float32(rng.NormFloat64()) * float32(math.Ldexp(1, rng.IntN(20)-10))
		}
	}
	return v
}

func clone(x []float32) []float32 { return append(make([]float32, 0, len(x)), x...) }

// same compares bits; one NaN is as good as another.
func same(t *testing.T, what string, got, want []float32) {
	t.Helper()
	for i := range want {
		g, w := got[i], want[i]
		if math.Float32bits(g) != math.Float32bits(w) && !(g != g && w != w) {
			t.Fatalf("%s, length %d: [%d] = %v (%#08x), want %v (%#08x)", what, len(want), i, g, math.Float32bits(g), w, math.Float32bits(w))
		}
	}
}

// TestVecSameBits holds every operation, as this machine runs it, against the
// plain Go path.
func TestVecSameBits(t *testing.T) {
	t.Logf("AVX2 %v", HasAVX2())
	rng := newRand(t)
	for range 600 {
		n := rng.IntN(300)
		v := func() []float32 { return vector(rng, n) }
		x, y := v(), v()
		a, b, c := special[rng.IntN(len(special))], rng.Float32(), rng.Float32()
		if rng.IntN(2) == 0 {
			a = rng.Float32() - 0.5
		}

		got, want := clone(y), clone(y)
		Add(got, x)
		addGo(want, x)
		same(t, "Add", got, want)

		got, want = clone(y), clone(y)
		AddScaled(got, a, x)
		addScaledGo(want, a, x)
		same(t, "AddScaled", got, want)

		got, want = clone(y), clone(y)
		Scale(got, a)
		scaleGo(want, a)
		same(t, "Scale", got, want)

		Div(got, x, a)
		divGo(want, x, a)
		same(t, "Div", got, want)

		SGD(got, x, y, b, a)
		sgdGo(want, x, y, b, a)
		same(t, "SGD", got, want)
		got = clone(x)
		SGD(got, got, y, b, a)
		same(t, "SGD in place", got, want)

		buf, g := v(), v()
		gotB, wantB := v(), v()
		Momentum(got, gotB, x, buf, g, a, b, c)
		momentumGo(want, wantB, x, buf, g, a, b, c)
		same(t, "Momentum", got, want)
		same(t, "Momentum buffer", gotB, wantB)
		got, gotB = clone(x), clone(buf)
		Momentum(got, gotB, got, gotB, g, a, b, c)
		same(t, "Momentum in place", got, want)
		same(t, "Momentum buffer in place", gotB, wantB)

		k := AdamCoefficients{0.9, 0.1, 0.99, 0.01, b, c, 1e-8, a}
		m, vv := v(), v()
		gotM, gotV, wantM, wantV := v(), v(), v(), v()
		Adam(got, gotM, gotV, x, m, vv, g, k)
		adamGo(want, wantM, wantV, x, m, vv, g, &k)
		same(t, "Adam", got, want)
		same(t, "Adam m", gotM, wantM)
		same(t, "Adam v", gotV, wantV)
		got, gotM, gotV = clone(x), clone(m), clone(vv)
		Adam(got, gotM, gotV, got, gotM, gotV, g, k)
		same(t, "Adam in place", got, want)
		same(t, "Adam m in place", gotM, wantM)
		same(t, "Adam v in place", gotV, wantV)
	}
}

// TestVecSameBitsMean holds Mean against a sum in the same order, over the
// edges of tiles and of groups of eight.
func TestVecSameBitsMean(t *testing.T) {
	rng := newRand(t)
	for range 60 {
		n := rng.IntN(100)
		if rng.IntN(4) == 0 {
			n += tile - 50
		}
		k := 1 + rng.IntN(26)
		sources := make([][]float32, k)
		for i := range sources {
			sources[i] = vector(rng, n)
		}
		want := clone(sources[0])
		for _, s := range sources[1:] {
			addGo(want, s)
		}
		divGo(want, want, float32(k))
		got := vector(rng, n)
		Mean(got, sources)
		same(t, "Mean", got, want)

		weights := make([]float32, k)
		for i := range weights {
			weights[i] = 7
		}
		WeightedMean(got, sources, weights)
		same(t, "WeightedMean of equal weights", got, want)

		var total float32
		for i := range weights {
			weights[i] = float32(1 + rng.IntN(1000))
			total += weights[i]
		}
		if alike(weights) {
			continue
		}
		clear(want)
		copy(want, sources[0])
		scaleGo(want, weights[0])
		for i, s := range sources[1:] {
			addScaledGo(want, weights[1+i], s)
		}
		divGo(want, want, total)
		WeightedMean(got, sources, weights)
		same(t, "WeightedMean", got, want)
	}
}

func TestFirstNonFinite(t *testing.T) {
	rng := newRand(t)
	bad := []float32{float32(math.NaN()), float32(math.Inf(1)), float32(math.Inf(-1)), math.Float32frombits(0xffc00001), math.Float32frombits(0x7f800001)}
	for range 500 {
		x := make([]float32, rng.IntN(200))
		for i := range x {
			x[i] = [...]float32{math.MaxFloat32, -math.MaxFloat32, 0, 1e-45, rng.Float32()}[rng.IntN(5)]
		}
		if i := FirstNonFinite(x); i != -1 {
			t.Fatalf("finite vector of %d: found %d", len(x), i)
		}
		want := -1
		for range rng.IntN(3) {
			if len(x) > 0 {
				i := rng.IntN(len(x))
				x[i] = bad[rng.IntN(len(bad))]
				if want < 0 || i < want {
					want = i
				}
			}
		}
		if i := FirstNonFinite(x); i != want {
			t.Fatalf("length %d: %d, want %d", len(x), i, want)
		}
	}
}

func TestFirstBeyond(t *testing.T) {
	rng := newRand(t)
	for range 500 {
		x := make([]float32, rng.IntN(200))
		limit := rng.Float32() * 10
		want := -1
		for i := range x {
			x[i] = (rng.Float32()*2 - 1) * limit
			switch rng.IntN(80) {
			case 0:
				x[i] = limit
			case 1:
				x[i] = -math.Nextafter32(limit, 20)
			case 2:
				x[i] = float32(math.NaN())
			}
			if beyond := !(x[i] >= -limit && x[i] <= limit); beyond && want < 0 {
				want = i
			}
		}
		if i := FirstBeyond(x, limit); i != want {
			t.Fatalf("length %d, limit %v: %d, want %d", len(x), limit, i, want)
		}
	}
}

// TestVecMetamorphic checks relations that hold whatever the numbers are.
func TestVecMetamorphic(t *testing.T) {
	rng := newRand(t)
	x := make([]float32, 1000)
	for i := range x {
		x[i] = rng.Float32() - 0.5
	}
	mean := make([]float32, len(x))
	Mean(mean, [][]float32{x, x, x, x})
	same(t, "the mean of copies", mean, x)
	double := clone(x)
	Add(double, x)
	twice := clone(x)
	Scale(twice, 2)
	same(t, "x+x and 2x", double, twice)
	AddScaled(double, -2, x)
	same(t, "2x-2x", double, make([]float32, len(x)))
}

func TestVecPanicsOnMismatch(t *testing.T) {
	for name, f := range map[string]func(){
		"Add":          func() { Add(make([]float32, 3), make([]float32, 4)) },
		"Mean":         func() { Mean(make([]float32, 3), nil) },
		"WeightedMean": func() { WeightedMean(make([]float32, 3), [][]float32{make([]float32, 3)}, nil) },
		"HalfMean":     func() { HalfMean(make([]float32, 3), [][]uint16{make([]uint16, 4)}, nil) },
		"EncodeHalf":   func() { EncodeHalf(make([]uint16, 3), make([]float32, 4)) },
		"Adam":         func() { Adam(nil, nil, nil, nil, nil, nil, make([]float32, 1), AdamCoefficients{}) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s accepts vectors that do not match", name)
				}
			}()
			f()
		}()
	}
}

func benchVectors(k, n int) [][]float32 {
	v := make([][]float32, k)
	for i := range v {
		v[i] = make([]float32, n)
		for j := range v[i] {
			v[i][j] = float32(j%7) - 3
		}
	}
	return v
}

func benchLen(b *testing.B) int {
	if testing.Short() {
		return 1 << 20
	}
	return 11_200_000
}

func BenchmarkMean24(b *testing.B) {
	v := benchVectors(25, benchLen(b))
	b.SetBytes(int64(24 * 4 * len(v[0])))
	for b.Loop() {
		Mean(v[24], v[:24])
	}
}

func BenchmarkWeightedMean24(b *testing.B) {
	v := benchVectors(25, benchLen(b))
	weights := make([]float32, 24)
	for i := range weights {
		weights[i] = float32(1 + i)
	}
	b.SetBytes(int64(24 * 4 * len(v[0])))
	for b.Loop() {
		WeightedMean(v[24], v[:24], weights)
	}
}

func BenchmarkAdd(b *testing.B) {
	v := benchVectors(2, benchLen(b))
	b.SetBytes(int64(8 * len(v[0])))
	for b.Loop() {
		Add(v[0], v[1])
	}
}

func BenchmarkAdam(b *testing.B) {
	v := benchVectors(4, benchLen(b))
	b.SetBytes(int64(16 * len(v[0])))
	for b.Loop() {
		Adam(v[0], v[1], v[2], v[0], v[1], v[2], v[3], AdamCoefficients{.9, .1, .999, .001, 1e-3, 1, 1e-8, 0})
	}
}

func BenchmarkFirstNonFinite(b *testing.B) {
	v := benchVectors(1, benchLen(b))
	b.SetBytes(int64(4 * len(v[0])))
	for b.Loop() {
		if FirstNonFinite(v[0]) >= 0 {
			b.Fatal("found one")
		}
	}
}
