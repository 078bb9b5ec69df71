package tensor

import (
	"encoding/binary"
	"math"
	"math/bits"
)

// This file casts numbers. It reads and writes bytes one element at a time, so
// that tensors may lie anywhere in memory, and gives the same bits everywhere.

// le makes one load or store of each element, where the CPU can.
var le = binary.LittleEndian

// chunk is the number of elements that Convert casts at a time.
const chunk = 256

const badRange = "tensor: elements out of range"

// Convert sets elements lo to hi of dst to those of src, cast to dst's type:
//
//   - From float to float each number is rounded once, to the nearest, ties to
//     even; what is too large becomes an infinity. A NaN of any other type
//     becomes the positive quiet NaN without a payload.
//   - From float to integer the fraction is cut off, what is out of range
//     becomes the nearest integer in range, and NaN becomes 0.
//   - From integer to integer what is out of range becomes the nearest in range.
//   - From integer to float is rounded once, as above.
//   - To bool is whether it is not 0, so NaN is true. A bool is 0 or 1, and any
//     byte but 0 is read as true.
//
// Within one type, bool apart, bytes are copied. Data need not be aligned. It
// must not overlap, unless both types are one. Convert panics if a type is
// unknown or the data are too short; it does not look at shapes.
func Convert(dst, src Tensor, lo, hi int) {
	d, s := dst.part(lo, hi), src.part(lo, hi)
	to, from := dst.DType, src.DType
	switch {
	case to == from && to != Bool:
		copy(d, s)
	case from == Float32 && to == Float16:
		for ; len(s) >= 4; d, s = d[2:], s[4:] {
			le.PutUint16(d, halfOf(float64(math.Float32frombits(le.Uint32(s)))))
		}
	case from == Float32 && to == BFloat16:
		for ; len(s) >= 4; d, s = d[2:], s[4:] {
			le.PutUint16(d, upperOf(le.Uint32(s)))
		}
	case from == Float32 && to == Float64:
		for ; len(s) >= 4; d, s = d[8:], s[4:] {
			le.PutUint64(d, bits64(float64(math.Float32frombits(le.Uint32(s)))))
		}
	case from == Float64 && to == Float32:
		for ; len(s) >= 8; d, s = d[4:], s[8:] {
			le.PutUint32(d, bits32(math.Float64frombits(le.Uint64(s))))
		}
	case from == Float16 && to == Float32:
		for ; len(s) >= 2; d, s = d[4:], s[2:] {
			le.PutUint32(d, halfBits(le.Uint16(s)))
		}
	case from == BFloat16 && to == Float32:
		for ; len(s) >= 2; d, s = d[4:], s[2:] {
			b := uint32(le.Uint16(s)) << 16
			if b&^sign32 > inf32 {
				b = nan32
			}
			le.PutUint32(d, b)
		}
	default:
		convert(d, s, to, from, hi-lo)
	}
}

// FirstNonFinite returns the index of the first NaN or infinity among elements
// lo to hi of t, or -1; integers and bools are finite. Data need not be
// aligned. It panics if the type is unknown or the data are too short.
func FirstNonFinite(t Tensor, lo, hi int) int {
	b := t.part(lo, hi)
	// As in NonFinite, an exponent of all ones carries into the sign bit.
	var exponent, one uint64
	switch t.DType {
	case Float64:
		exponent, one = 0x7ff0<<48, 0x0010<<48
	case Float32:
		exponent, one = 0x7f800000_7f800000, 0x00800000_00800000
	case Float16:
		exponent, one = 0x7c00_7c00_7c00_7c00, 0x0400_0400_0400_0400
	case BFloat16:
		exponent, one = 0x7f80_7f80_7f80_7f80, 0x0080_0080_0080_0080
	default:
		return -1
	}
	signs := exponent + one
	size := t.DType.Size()
	at := 0
	for ; at+32 <= len(b); at += 32 {
		w := b[at : at+32]
		c := (le.Uint64(w)&exponent + one) | (le.Uint64(w[8:])&exponent + one)
		d := (le.Uint64(w[16:])&exponent + one) | (le.Uint64(w[24:])&exponent + one)
		if (c|d)&signs != 0 {
			break
		}
	}
	for ; at < len(b); at += 8 {
		var word [8]byte
		copy(word[:], b[at:])
		if found := (le.Uint64(word[:])&exponent + one) & signs; found != 0 {
			return lo + (at+bits.TrailingZeros64(found)/8)/size
		}
	}
	return -1
}

// part returns the bytes of elements lo to hi.
func (t Tensor) part(lo, hi int) []byte {
	size := t.DType.Size()
	if size == 0 {
		panic("tensor: unknown element type")
	}
	if lo < 0 || hi < lo || hi > len(t.Data)/size {
		panic(badRange)
	}
	return t.Data[lo*size : hi*size : hi*size]
}

// isFloat reports whether elements are floats, of which float64 holds any
// exactly. All others are integers, of which int64 does.
func (d DType) isFloat() bool {
	return d == Float32 || d == Float64 || d == Float16 || d == BFloat16
}

func convert(dst, src []byte, to, from DType, n int) {
	var floats [chunk]float64
	var ints [chunk]int64
	for n > 0 {
		k := min(n, chunk)
		f, v := floats[:k], ints[:k]
		d, s := dst[:k*to.Size()], src[:k*from.Size()]
		n, dst, src = n-k, dst[len(d):], src[len(s):]
		if from.isFloat() {
			readFloats(f, from, s)
		} else {
			readInts(v, from, s)
		}
		switch {
		case to.isFloat() && from.isFloat():
			writeFloats(d, to, f)
		case to == Float64:
			for i, x := range v {
				f[i] = float64(x)
			}
			writeFloats(d, to, f)
		case to.isFloat():
			for i, x := range v {
				f[i] = roundToOdd(x)
			}
			writeFloats(d, to, f)
		case from.isFloat() && to == Bool:
			for i, x := range f {
				d[i] = 0
				if x != 0 {
					d[i] = 1
				}
			}
		case from.isFloat():
			for i, x := range f {
				v[i] = truncate(x)
			}
			writeInts(d, to, v)
		default:
			writeInts(d, to, v)
		}
	}
}

func readFloats(dst []float64, d DType, b []byte) {
	switch d {
	case Float64:
		for i := range dst {
			dst[i] = math.Float64frombits(le.Uint64(b[8*i:]))
		}
	case Float32:
		for i := range dst {
			dst[i] = float64(math.Float32frombits(le.Uint32(b[4*i:])))
		}
	case Float16:
		for i := range dst {
			dst[i] = float64(math.Float32frombits(halfBits(le.Uint16(b[2*i:]))))
		}
	case BFloat16:
		for i := range dst {
			dst[i] = float64(math.Float32frombits(uint32(le.Uint16(b[2*i:])) << 16))
		}
	}
}

func writeFloats(b []byte, d DType, src []float64) {
	switch d {
	case Float64:
		for i, x := range src {
			le.PutUint64(b[8*i:], bits64(x))
		}
	case Float32:
		for i, x := range src {
			le.PutUint32(b[4*i:], bits32(x))
		}
	case Float16:
		for i, x := range src {
			le.PutUint16(b[2*i:], halfOf(x))
		}
	case BFloat16:
		for i, x := range src {
			le.PutUint16(b[2*i:], bfloat16Of(x))
		}
	}
}

func readInts(dst []int64, d DType, b []byte) {
	switch d {
	case Int64:
		for i := range dst {
			dst[i] = int64(le.Uint64(b[8*i:]))
		}
	case Int32:
		for i := range dst {
			dst[i] = int64(int32(le.Uint32(b[4*i:])))
		}
	case Int16:
		for i := range dst {
			dst[i] = int64(int16(le.Uint16(b[2*i:])))
		}
	case Int8:
		for i := range dst {
			dst[i] = int64(int8(b[i]))
		}
	case Uint16:
		for i := range dst {
			dst[i] = int64(le.Uint16(b[2*i:]))
		}
	case Uint8:
		for i := range dst {
			dst[i] = int64(b[i])
		}
	case Bool:
		for i := range dst {
			dst[i] = 0
			if b[i] != 0 {
				dst[i] = 1
			}
		}
	}
}

func writeInts(b []byte, d DType, src []int64) {
	switch d {
	case Int64:
		for i, x := range src {
			le.PutUint64(b[8*i:], uint64(x))
		}
	case Int32:
		for i, x := range src {
			le.PutUint32(b[4*i:], uint32(min(max(x, math.MinInt32), math.MaxInt32)))
		}
	case Int16:
		for i, x := range src {
			le.PutUint16(b[2*i:], uint16(min(max(x, math.MinInt16), math.MaxInt16)))
		}
	case Int8:
		for i, x := range src {
			b[i] = byte(min(max(x, math.MinInt8), math.MaxInt8))
		}
	case Uint16:
		for i, x := range src {
			le.PutUint16(b[2*i:], uint16(min(max(x, 0), math.MaxUint16)))
		}
	case Uint8:
		for i, x := range src {
			b[i] = byte(min(max(x, 0), math.MaxUint8))
		}
	case Bool:
		for i, x := range src {
			b[i] = 0
			if x != 0 {
				b[i] = 1
			}
		}
	}
}

// truncate checks the range itself: Go leaves to the CPU what is out of it.
func truncate(x float64) int64 {
	switch {
	case x != x:
		return 0
	case x >= 1<<63:
		return math.MaxInt64
	case x < -1<<63:
		return math.MinInt64
	}
	return int64(x)
}

// roundToOdd returns x as a float64 that rounds to a shorter float as x itself
// does: what has no place sets the last bit that has one.
func roundToOdd(x int64) float64 {
	const lost = 1<<11 - 1
	if -1<<53 <= x && x <= 1<<53 {
		return float64(x)
	}
	if x&lost != 0 {
		x = x&^lost | (lost + 1)
	}
	return float64(x)
}

const (
	sign32 = 1 << 31
	inf32  = 0x7f800000
	nan32  = 0x7fc00000
)

func bits64(x float64) uint64 {
	if x != x {
		return 0x7ff8 << 48
	}
	return math.Float64bits(x)
}

func bits32(x float64) uint32 {
	if x != x {
		return nan32
	}
	return math.Float32bits(float32(x))
}

// upperOf returns the bfloat16 next to the float32 with these bits.
func upperOf(b uint32) uint16 {
	if b&^sign32 > inf32 {
		return nan32 >> 16
	}
	return uint16((b + 0x7fff + b>>16&1) >> 16)
}

// halfBits returns the bits of a half as a float32, which is exact.
func halfBits(h uint16) uint32 {
	sign, b := uint32(h&0x8000)<<16, uint32(h&0x7fff)
	switch {
	case b > 0x7c00:
		return nan32
	case b == 0x7c00:
		return sign | inf32
	case b < 1<<10: // no exponent
		return sign | math.Float32bits(float32(b)*(1.0/(1<<24)))
	}
	return sign | (b<<13 + (127-15)<<23)
}

func halfOf(x float64) uint16 { return narrow(x, 10, 15) }

func bfloat16Of(x float64) uint16 { return narrow(x, 7, 127) }

// narrow rounds x to a float of 16 bits with this many bits of mantissa and
// this bias of the exponent.
func narrow(x float64, mantissa, bias uint64) uint16 {
	b := math.Float64bits(x)
	sign := uint16(b>>48) & 0x8000
	b &^= 1 << 63
	infinity := (2*bias + 1) << mantissa
	shift := 52 - mantissa
	var r uint64
	switch {
	case x != x:
		return uint16(infinity | 1<<(mantissa-1))
	case b < (1023+1-bias)<<52:
		// Below the smallest with an exponent: the last place is that of a
		// power of two, which is added.
		power := (1023 + 52 + 1 - bias - mantissa) << 52
		r = math.Float64bits(math.Float64frombits(b)+math.Float64frombits(power)) - power
	default: // a mantissa that is rounded up carries into the exponent
		r = (b - (1023-bias)<<52 + (1<<(shift-1) - 1) + b>>shift&1) >> shift
	}
	return sign | uint16(min(r, infinity))
}
