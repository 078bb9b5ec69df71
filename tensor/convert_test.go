package tensor

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"testing"
	"time"
)

func newRand(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// A number is an element as its definition has it; exact is nil for what is
// not finite.
type number struct {
	float bool
	exact *big.Float
	f     float64 // if exact is nil, and for the sign of zero
}

// formats are the mantissa bits and the largest exponent of the floats.
var formats = map[DType]struct{ mantissa, bias int }{
	Float64: {52, 1023}, Float32: {23, 127}, Float16: {10, 15}, BFloat16: {7, 127},
}

var ranges = map[DType][2]int64{
	Int64: {math.MinInt64, math.MaxInt64}, Int32: {math.MinInt32, math.MaxInt32}, Int16: {math.MinInt16, math.MaxInt16},
	Int8: {math.MinInt8, math.MaxInt8}, Uint16: {0, math.MaxUint16}, Uint8: {0, math.MaxUint8},
}

// element returns the bits of an element.
func element(d DType, b []byte) uint64 {
	var word [8]byte
	copy(word[:], b[:d.Size()])
	return binary.LittleEndian.Uint64(word[:])
}

func decode(d DType, bits uint64) number {
	if f, ok := formats[d]; ok {
		size := 8 * d.Size()
		sign := 1.0
		if bits>>(size-1) == 1 {
			sign = -1
		}
		mantissa := int64(bits & (1<<f.mantissa - 1))
		exponent := int(bits >> f.mantissa & (1<<(size-1-f.mantissa) - 1))
		switch {
		case exponent == 2*f.bias+1 && mantissa != 0:
			return number{float: true, f: math.NaN()}
		case exponent == 2*f.bias+1:
			return number{float: true, f: math.Inf(int(sign))}
		case exponent == 0:
			exponent++
		default:
			mantissa += 1 << f.mantissa
		}
		x := new(big.Float).SetPrec(200).SetInt64(mantissa)
		x.SetMantExp(x, exponent-f.bias-f.mantissa)
		return number{float: true, exact: x.Mul(x, big.NewFloat(sign)), f: sign}
	}
	var v int64
	switch d {
	case Int64:
		v = int64(bits)
	case Int32:
		v = int64(int32(bits))
	case Int16:
		v = int64(int16(bits))
	case Int8:
		v = int64(int8(bits))
	case Bool:
		if bits != 0 {
			v = 1
		}
	default:
		v = int64(bits)
	}
	return number{exact: new(big.Float).SetPrec(200).SetInt64(v), f: 1}
}

// encode is the definition of a cast, by exact arithmetic.
func encode(d DType, x number) uint64 {
	if f, ok := formats[d]; ok {
		infinity := uint64(2*f.bias+1) << f.mantissa
		sign := uint64(0)
		if x.f < 0 || x.exact != nil && x.exact.Signbit() {
			sign = 1 << (8*d.Size() - 1)
		}
		switch {
		case x.f != x.f:
			return infinity | 1<<(f.mantissa-1)
		case x.exact == nil:
			return sign | infinity
		case x.exact.Sign() == 0:
			return sign
		}
		// In units of the last place of its exponent, rounded to an integer.
		v := new(big.Float).Abs(x.exact)
		exponent := max(v.MantExp(nil)-1, 1-f.bias)
		v.SetMantExp(v, f.mantissa-exponent)
		whole, _ := v.Int(nil)
		twice := new(big.Float).Sub(v, new(big.Float).SetInt(whole))
		twice.Mul(twice, big.NewFloat(2))
		n := whole.Uint64()
		if c := twice.Cmp(big.NewFloat(1)); c > 0 || c == 0 && n%2 == 1 {
			n++
		}
		// n may be 1 << mantissa+1, or below 1 << mantissa without an exponent.
		n += uint64(exponent+f.bias-1) << f.mantissa
		return sign | min(n, infinity)
	}
	if d == Bool {
		if x.exact == nil || x.exact.Sign() != 0 {
			return 1
		}
		return 0
	}
	r := ranges[d]
	var v int64
	switch {
	case x.f != x.f:
	case x.exact == nil && x.f < 0:
		v = r[0]
	case x.exact == nil:
		v = r[1]
	default:
		whole, _ := x.exact.Int(nil)
		switch {
		case whole.Cmp(big.NewInt(r[0])) < 0:
			v = r[0]
		case whole.Cmp(big.NewInt(r[1])) > 0:
			v = r[1]
		default:
			v = whole.Int64()
		}
	}
	return uint64(v) & (math.MaxUint64 >> (64 - 8*d.Size()))
}

// testBits returns elements of every kind: any bits, what is near the limits
// and the middles of other types, small numbers.
func testBits(rng *rand.Rand, d DType, n int) []uint64 {
	out := make([]uint64, n)
	for i := range out {
		other := DType(1 + rng.IntN(int(Bool)))
		switch bits := rng.Uint64() >> (64 - 8*other.Size()); rng.IntN(4) {
		case 0:
			out[i] = rng.Uint64()
		case 1: // a number of another type, or the middle to the next
			out[i] = encode(d, decode(other, bits))
			if f, ok := formats[other]; ok && formats[d].mantissa > f.mantissa && rng.IntN(2) == 0 {
				out[i] |= 1 << (formats[d].mantissa - f.mantissa - 1)
			}
			out[i] += uint64(rng.IntN(3) - 1)
		case 2: // a limit, or nearly
			if r, ok := ranges[other]; ok {
				x := new(big.Float).SetPrec(200).SetInt64(r[rng.IntN(2)])
				x.Add(x, big.NewFloat(float64(rng.IntN(9)-4)/4))
				out[i] = encode(d, number{exact: x, f: 1}) + uint64(rng.IntN(3)-1)
			} else if f, ok := formats[other]; ok {
				out[i] = encode(d, decode(other, uint64(2*f.bias+1)<<f.mantissa-uint64(rng.IntN(3)))) - uint64(rng.IntN(2))
			}
		default:
			x := number{exact: new(big.Float).SetPrec(200).SetFloat64(rng.NormFloat64() * 100), f: 1}
			out[i] = encode(d, x)
		}
		out[i] &= math.MaxUint64 >> (64 - 8*d.Size())
	}
	return out
}

// odd returns data of d at an odd address.
func odd(d DType, bits []uint64) Tensor {
	b := make([]byte, 1+d.Size()*len(bits))[1:]
	for i, v := range bits {
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], v)
		copy(b[i*d.Size():], word[:d.Size()])
	}
	return Tensor{DType: d, Shape: []int{len(bits)}, Data: b}
}

// TestConvert holds every cast against exact arithmetic.
func TestConvert(t *testing.T) {
	rng := newRand(t)
	for from := Float32; from.Valid(); from++ {
		for to := Float32; to.Valid(); to++ {
			for range 6 {
				n := rng.IntN(3 * chunk)
				lo := rng.IntN(n + 1)
				hi := lo + rng.IntN(n-lo+1)
				src, dst := odd(from, testBits(rng, from, n)), odd(to, make([]uint64, n))
				for i := range dst.Data {
					dst.Data[i] = byte(rng.Uint32())
				}
				before := bytes.Clone(dst.Data)
				Convert(dst, src, lo, hi)
				for i := range n {
					got := element(to, dst.Data[i*to.Size():])
					in := element(from, src.Data[i*from.Size():])
					want := encode(to, decode(from, in))
					if from == to && to != Bool {
						want = in
					}
					if i < lo || i >= hi {
						want = element(to, before[i*to.Size():])
					}
					if got != want {
						t.Fatalf("%v %#x to %v, element %d of %d to %d: %#x, want %#x", from, in, to, i, lo, hi, got, want)
					}
				}
			}
		}
	}
}

// TestConvertHalves casts all floats of 16 bits, and from the middles between
// them: the neighbours of a middle in float64 would show a rounding too many.
func TestConvertHalves(t *testing.T) {
	for _, d := range []DType{Float16, BFloat16} {
		all := make([]uint64, 1<<16)
		for i := range all {
			all[i] = uint64(i)
		}
		src := odd(d, all)
		for _, wide := range []DType{Float32, Float64} {
			out, back := odd(wide, all), odd(d, all)
			Convert(out, src, 0, len(all))
			Convert(back, out, 0, len(all))
			for i := range all {
				x := decode(d, uint64(i))
				if got := element(wide, out.Data[i*wide.Size():]); got != encode(wide, x) {
					t.Fatalf("%v %#04x to %v: %#x", d, i, wide, got)
				}
				if got := element(d, back.Data[2*i:]); got != uint64(i) && x.f == x.f {
					t.Fatalf("%v %#04x to %v and back: %#04x", d, i, wide, got)
				}
			}
			var near []uint64
			for i := range all {
				b := element(wide, out.Data[i*wide.Size():]) + 1<<(formats[wide].mantissa-formats[d].mantissa-1)
				near = append(near, b-1, b, b+1)
			}
			middles, rounded := odd(wide, near), odd(d, near)
			Convert(rounded, middles, 0, len(near))
			for i, b := range near {
				if got, want := element(d, rounded.Data[2*i:]), encode(d, decode(wide, b)); got != want {
					t.Fatalf("%v %#x to %v: %#04x, want %#04x", wide, b, d, got, want)
				}
			}
		}
	}
}

func TestConvertExamples(t *testing.T) {
	f64 := func(x float64) uint64 { return math.Float64bits(x) }
	for _, c := range []struct {
		to, from  DType
		want, src uint64
	}{
		{Int8, Float64, 127, f64(1e300)},
		{Int8, Float64, 0x80, f64(math.Inf(-1))},
		{Uint8, Float64, 0, f64(-0.9)},
		{Int32, Float64, 0, f64(math.NaN())},
		{Int64, Float64, 1<<63 - 1, f64(1 << 63)},
		{Int16, Int32, 0x7fff, 40000},
		{Uint16, Int8, 0, 0xff},
		{Bool, Float64, 1, f64(0.25)},
		{Bool, Float64, 0, f64(math.Copysign(0, -1))},
		{Bool, Bool, 1, 7},
		{Float16, Float64, 0x3c01, f64(1 + 0x1p-11 + 0x1p-40)}, // through float32 it would be a tie
		{Float32, Int64, 0x5d800001, 1<<60 + 1<<36 + 1},        // through float64 too
		{Float16, Int64, 0x7c00, 65520},
	} {
		dst := odd(c.to, []uint64{0})
		Convert(dst, odd(c.from, []uint64{c.src}), 0, 1)
		if got := element(c.to, dst.Data); got != c.want {
			t.Errorf("%v %#x to %v: %#x, want %#x", c.from, c.src, c.to, got, c.want)
		}
	}
}

func TestFirstNonFinite(t *testing.T) {
	rng := newRand(t)
	for range 200 {
		for d := Float32; d.Valid(); d++ {
			all := testBits(rng, d, rng.IntN(100))
			if rng.IntN(2) == 0 { // all finite but one perhaps
				for i, b := range all {
					if decode(d, b).exact == nil && rng.IntN(len(all)) > 0 {
						all[i] = 0
					}
				}
			}
			x := odd(d, all)
			lo := rng.IntN(len(all) + 1)
			hi := lo + rng.IntN(len(all)-lo+1)
			want := -1
			for i := lo; i < hi && want < 0; i++ {
				if decode(d, all[i]).exact == nil {
					want = i
				}
			}
			if got := FirstNonFinite(x, lo, hi); got != want {
				t.Fatalf("%v, %d to %d: %d, want %d: %#x", d, lo, hi, got, want, all)
			}
		}
	}
}

// The first of two among large numbers is found wherever they are.
func TestFirstNonFiniteEverywhere(t *testing.T) {
	const n = 70
	for d, f := range formats {
		infinity := uint64(2*f.bias+1) << f.mantissa
		for _, bad := range []uint64{infinity, infinity | 1, infinity | 1<<(8*d.Size()-1)} {
			all := make([]uint64, n)
			for i := range all {
				all[i] = infinity - 1 | uint64(i%2)<<(8*d.Size()-1)
			}
			if got := FirstNonFinite(odd(d, all), 0, n); got != -1 {
				t.Fatalf("%v: found %d among the largest", d, got)
			}
			for i := range all {
				for j := i; j < n; j++ {
					x, y := all[i], all[j]
					all[i], all[j] = bad, bad
					if got := FirstNonFinite(odd(d, all), 0, n); got != i {
						t.Fatalf("%v at %d and %d: found %d", d, i, j, got)
					}
					all[j], all[i] = y, x
				}
			}
		}
	}
}

func TestConvertPanics(t *testing.T) {
	x, y := odd(Float32, make([]uint64, 4)), odd(Int8, make([]uint64, 3))
	for name, f := range map[string]func(){
		"beyond the destination": func() { Convert(y, x, 0, 4) },
		"beyond the source":      func() { Convert(x, y, 0, 4) },
		"negative":               func() { Convert(x, x, -1, 2) },
		"reversed":               func() { Convert(x, x, 2, 1) },
		"unknown type":           func() { Convert(x, Tensor{Data: x.Data}, 0, 1) },
		"FirstNonFinite beyond":  func() { FirstNonFinite(x, 0, 5) },
		"FirstNonFinite unknown": func() { FirstNonFinite(Tensor{DType: 99, Data: x.Data}, 0, 1) },
		"beyond all addresses":   func() { FirstNonFinite(x, 0, math.MaxInt) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			f()
		}()
	}
}

func BenchmarkConvert(b *testing.B) {
	const n = 1 << 20
	for _, c := range [][2]DType{
		{Float16, Float32}, {Float32, Float16}, {BFloat16, Float32}, {Float32, BFloat16}, {Float64, Float32}, {Float32, Float64},
		{Int8, Float32}, {Float32, Int64}, {Float16, Float64}, {Uint8, Int32},
	} {
		b.Run(fmt.Sprintf("%vTo%v", c[1], c[0]), func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, 1))
			floats := make([]float32, n)
			for i := range floats {
				floats[i] = float32(r.NormFloat64())
			}
			src, dst := odd(c[1], make([]uint64, n)), odd(c[0], make([]uint64, n))
			Convert(src, FromFloats([]int{n}, floats), 0, n)
			b.SetBytes(int64(n * (c[0].Size() + c[1].Size())))
			for b.Loop() {
				Convert(dst, src, 0, n)
			}
		})
	}
}

func BenchmarkFirstNonFinite(b *testing.B) {
	x := odd(Float32, make([]uint64, 1<<20))
	b.SetBytes(4 << 20)
	for b.Loop() {
		if FirstNonFinite(x, 0, 1<<20) >= 0 {
			b.Fatal("found one")
		}
	}
}
