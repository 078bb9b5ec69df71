package kernel

import (
	"math"
	"slices"
	"testing"
)

// TestQuantiseInt8 holds both paths against the definition, over blocks of
// every size of number.
func TestQuantiseInt8(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		rng := newRand(t)
		for range 400 {
			x := finite(rng, rng.IntN(4*QuantBlock))
			for lo := 0; lo < len(x); lo += QuantBlock {
				// Also blocks of zeros and of subnormals.
				factor := math.Ldexp(1, rng.IntN(300)-150)
				for i := range x[lo:min(lo+QuantBlock, len(x))] {
					v := float32(float64(x[lo+i]) * factor)
					if math.IsInf(float64(v), 0) {
						v = math.MaxFloat32
					}
					x[lo+i] = v
				}
			}
			q, scales := make([]int8, len(x)), make([]float32, QuantScales(len(x)))
			for i := range q {
				q[i] = int8(rng.IntN(256))
			}
			QuantiseInt8(q, scales, x)
			back := vector(rng, len(x))
			DequantiseInt8(back, q, scales)
			for lo := 0; lo < len(x); lo += QuantBlock {
				block := x[lo:min(lo+QuantBlock, len(x))]
				var most float32
				for _, f := range block {
					most = max(most, f, -f)
				}
				scale := scales[lo/QuantBlock]
				want := most / 127
				if math.IsInf(float64(want*127), 0) {
					want = math.Nextafter32(want, 0)
				}
				if math.Float32bits(scale) != math.Float32bits(want) {
					t.Fatalf("scale %v, want %v", scale, want)
				}
				for i, f := range block {
					want := 0.0
					if scale != 0 {
						want = math.RoundToEven(float64(f / scale))
						want = min(max(want, -127), 127)
					}
					if float64(q[lo+i]) != want {
						t.Fatalf("%v by %v becomes %d, want %v", f, scale, q[lo+i], want)
					}
					if w := float32(q[lo+i]) * scale; math.Float32bits(back[lo+i]) != math.Float32bits(w) {
						t.Fatalf("%d by %v comes back as %v, want %v", q[lo+i], scale, back[lo+i], w)
					}
					if scale > 1e-37 && math.Abs(float64(back[lo+i])-float64(f)) > 0.5001*float64(scale) {
						t.Fatalf("%v comes back as %v by scale %v", f, back[lo+i], scale)
					}
				}
			}
		}
	})
}

// What has been quantised once is quantised without loss.
func TestQuantiseInt8Again(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		rng := newRand(t)
		x := make([]float32, 5*QuantBlock+100)
		for i := range x {
			x[i] = float32(rng.IntN(255)-127) * 0.25
		}
		for lo := 0; lo < len(x); lo += QuantBlock {
			x[lo] = -127 * 0.25
		}
		q, scales, back := make([]int8, len(x)), make([]float32, QuantScales(len(x))), make([]float32, len(x))
		QuantiseInt8(q, scales, x)
		DequantiseInt8(back, q, scales)
		for i := range x {
			if back[i] != x[i] {
				t.Fatalf("%v comes back as %v", x[i], back[i])
			}
		}
	})
}

// The scale of subnormals is rough: what exceeds 127 steps is 127.
func TestQuantiseInt8Subnormal(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		x := make([]float32, 2*QuantBlock-1)
		for i := range x {
			x[i] = float32(i%381-190) * math.SmallestNonzeroFloat32
		}
		q, scales := make([]int8, len(x)), make([]float32, 2)
		QuantiseInt8(q, scales, x)
		for i, v := range q {
			if want := min(max(i%381-190, -127), 127); int(v) != want || scales[i/QuantBlock] != math.SmallestNonzeroFloat32 {
				t.Fatalf("%v by %v becomes %d, want %d", x[i], scales[i/QuantBlock], v, want)
			}
		}
	})
}

// TestBFloat16All decodes every bfloat16 and encodes it, and what lies around
// the middle between it and the next.
func TestBFloat16All(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		all := make([]uint16, 1<<16)
		for i := range all {
			all[i] = uint16(i)
		}
		x := make([]float32, len(all))
		DecodeBFloat16(x, all)
		var around []float32
		var want []uint16
		for i, f := range x {
			if b := math.Float32bits(f); b != uint32(i)<<16 {
				t.Fatalf("%#04x becomes %#08x", i, b)
			}
			h, b := uint16(i), uint32(i)<<16
			if f != f {
				around = append(around, f, math.Float32frombits(b|1))
				want = append(want, h|0x40, h|0x40)
				continue
			}
			around = append(around, f)
			want = append(want, h)
			if !math.IsInf(float64(f), 0) {
				around = append(around, math.Float32frombits(b+0x7fff), math.Float32frombits(b+0x8000), math.Float32frombits(b+0x8001))
				want = append(want, h, h+h&1, h+1)
			}
		}
		// A signalling infinity plus one bit is a NaN that must not become an infinity.
		around = append(around, math.Float32frombits(0x7f800001), math.Float32frombits(0xff800001))
		want = append(want, 0x7fc0, 0xffc0)
		got := make([]uint16, len(around))
		EncodeBFloat16(got, around)
		for i := range want {
			if got[i] != want[i] {
				t.Fatalf("%#08x becomes %#04x, want %#04x", math.Float32bits(around[i]), got[i], want[i])
			}
		}
		for n := range 20 { // what fills no register
			short := make([]uint16, n)
			EncodeBFloat16(short, around[:n])
			floats := make([]float32, n)
			DecodeBFloat16(floats, all[:n])
			if !slices.Equal(short, want[:n]) || n > 1 && math.Float32bits(floats[n-1]) != uint32(n-1)<<16 {
				t.Fatalf("length %d: %#04x, %v", n, short, floats)
			}
		}
	})
}

func TestQuantisePanics(t *testing.T) {
	for name, f := range map[string]func(){
		"QuantiseInt8, integers":   func() { QuantiseInt8(make([]int8, 3), make([]float32, 1), make([]float32, 4)) },
		"QuantiseInt8, scales":     func() { QuantiseInt8(make([]int8, 300), make([]float32, 1), make([]float32, 300)) },
		"DequantiseInt8, integers": func() { DequantiseInt8(make([]float32, 4), make([]int8, 3), make([]float32, 1)) },
		"DequantiseInt8, scales":   func() { DequantiseInt8(make([]float32, 4), make([]int8, 4), nil) },
		"EncodeBFloat16":           func() { EncodeBFloat16(make([]uint16, 3), make([]float32, 4)) },
		"DecodeBFloat16":           func() { DecodeBFloat16(make([]float32, 3), make([]uint16, 4)) },
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

func benchQuantised(b *testing.B) ([]int8, []float32, []float32) {
	x := rankVectors(b, 1)[0]
	b.SetBytes(int64(4 * len(x)))
	return make([]int8, len(x)), make([]float32, QuantScales(len(x))), x
}

func BenchmarkQuantiseInt8(b *testing.B) {
	q, scales, x := benchQuantised(b)
	for b.Loop() {
		QuantiseInt8(q, scales, x)
	}
}

func BenchmarkDequantiseInt8(b *testing.B) {
	q, scales, x := benchQuantised(b)
	QuantiseInt8(q, scales, x)
	for b.Loop() {
		DequantiseInt8(x, q, scales)
	}
}

func BenchmarkEncodeBFloat16(b *testing.B) {
	_, _, x := benchQuantised(b)
	h := make([]uint16, len(x))
	for b.Loop() {
		EncodeBFloat16(h, x)
	}
}

func BenchmarkDecodeBFloat16(b *testing.B) {
	_, _, x := benchQuantised(b)
	h := make([]uint16, len(x))
	for b.Loop() {
		DecodeBFloat16(x, h)
	}
}
