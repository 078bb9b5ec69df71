package kernel

import (
	"math"
	"testing"
)

// halfValue is what a half stands for, by its definition.
func halfValue(h uint16) float64 {
	sign := 1 - 2*float64(h>>15)
	mantissa, exponent := float64(h&0x3ff), int(h>>10&0x1f)
	switch exponent {
	case 0:
		return sign * math.Ldexp(mantissa, -24)
	case 31:
		if mantissa != 0 {
			return math.NaN()
		}
		return sign * math.Inf(1)
	}
	return sign * math.Ldexp(1024+mantissa, exponent-25)
}

// TestHalfAll decodes every half and encodes it again.
func TestHalfAll(t *testing.T) {
	all := make([]uint16, 1<<16)
	for i := range all {
		all[i] = uint16(i)
	}
	got, want := make([]float32, len(all)), make([]float32, len(all))
	DecodeHalf(got, all)
	decodeHalfGo(want, all)
	for i := range all {
		if math.Float32bits(got[i]) != math.Float32bits(want[i]) {
			t.Fatalf("half %#04x: %#08x, in Go %#08x", i, math.Float32bits(got[i]), math.Float32bits(want[i]))
		}
		if v := halfValue(all[i]); float64(got[i]) != v && !(v != v && got[i] != got[i]) || math.Signbit(float64(got[i])) != (i>>15 == 1) {
			t.Fatalf("half %#04x is %v, decoded %v", i, v, got[i])
		}
	}
	again := make([]uint16, len(all))
	EncodeHalf(again, got)
	for i, h := range again {
		if want := all[i]; h != want && !(got[i] != got[i] && h == want|halfQuiet) {
			t.Fatalf("half %#04x becomes %#04x", want, h)
		}
	}
}

// TestHalfRounding looks at the floats around the middle between any two
// neighbours.
func TestHalfRounding(t *testing.T) {
	var x []float32
	var want []uint16
	add := func(f float32, h uint16) {
		x, want = append(x, f, -f), append(want, h, h|halfSign)
	}
	inf := float32(math.Inf(1))
	for h := uint16(0); h < halfExponent; h++ {
		next := halfValue(h + 1)
		if h+1 == halfExponent {
			next = 65536
		}
		middle, even := float32((halfValue(h)+next)/2), h+h&1
		add(float32(halfValue(h)), h)
		add(middle, even)
		add(math.Nextafter32(middle, 0), h)
		add(math.Nextafter32(middle, inf), h+1)
	}
	add(math.MaxFloat32, halfExponent)
	add(inf, halfExponent)
	add(math.SmallestNonzeroFloat32, 0)
	got, plain := make([]uint16, len(x)), make([]uint16, len(x))
	EncodeHalf(got, x)
	encodeHalfGo(plain, x)
	for i := range x {
		if got[i] != want[i] || plain[i] != want[i] {
			t.Fatalf("%v becomes %#04x, in Go %#04x, want %#04x", x[i], got[i], plain[i], want[i])
		}
	}
}

// TestHalfSameBits holds the conversions, as this machine runs them, against
// the plain Go path, over floats of every kind and lengths that fill no
// register.
func TestHalfSameBits(t *testing.T) {
	rng := newRand(t)
	for range 300 {
		n := rng.IntN(300)
		x := vector(rng, n)
		for i := range x {
			if rng.IntN(2) == 0 {
				x[i] = math.Float32frombits(rng.Uint32())
			}
		}
		got, want := make([]uint16, n), make([]uint16, n)
		EncodeHalf(got, x)
		encodeHalfGo(want, x)
		for i := range want {
			if got[i] != want[i] {
				t.Fatalf("%#08x becomes %#04x, in Go %#04x", math.Float32bits(x[i]), got[i], want[i])
			}
		}
		back, plain := make([]float32, n), make([]float32, n)
		DecodeHalf(back, got)
		decodeHalfGo(plain, got)
		same(t, "DecodeHalf", back, plain)
	}
}

// TestHalfMean holds the mean of halves against that of what they decode to.
func TestHalfMean(t *testing.T) {
	rng := newRand(t)
	for range 60 {
		n := rng.IntN(100)
		if rng.IntN(4) == 0 {
			n += tile - 50
		}
		k := 1 + rng.IntN(20)
		sources, decoded, weights := make([][]uint16, k), make([][]float32, k), make([]float32, k)
		for i := range sources {
			sources[i], decoded[i], weights[i] = make([]uint16, n), make([]float32, n), float32(1+rng.IntN(4))
			EncodeHalf(sources[i], vector(rng, n))
			DecodeHalf(decoded[i], sources[i])
		}
		got, want := make([]float32, n), make([]float32, n)
		HalfMean(got, sources, nil)
		Mean(want, decoded)
		same(t, "HalfMean", got, want)
		HalfMean(got, sources, weights)
		WeightedMean(want, decoded, weights)
		same(t, "HalfMean with weights", got, want)
	}
}

func benchHalves(k, n int) [][]uint16 {
	v := make([][]uint16, k)
	for i := range v {
		v[i] = make([]uint16, n)
		EncodeHalf(v[i], benchVectors(1, n)[0])
	}
	return v
}

func BenchmarkEncodeHalf(b *testing.B) {
	x := benchVectors(1, benchLen(b))[0]
	h := make([]uint16, len(x))
	b.SetBytes(int64(4 * len(x)))
	for b.Loop() {
		EncodeHalf(h, x)
	}
}

func BenchmarkDecodeHalf(b *testing.B) {
	h := benchHalves(1, benchLen(b))[0]
	x := make([]float32, len(h))
	b.SetBytes(int64(4 * len(x)))
	for b.Loop() {
		DecodeHalf(x, h)
	}
}

// BenchmarkHalfMean4 counts the bytes of the floats that the halves stand for.
func BenchmarkHalfMean4(b *testing.B) {
	h := benchHalves(4, benchLen(b))
	dst := make([]float32, len(h[0]))
	b.SetBytes(int64(4 * 4 * len(dst)))
	for b.Loop() {
		HalfMean(dst, h, nil)
	}
}
