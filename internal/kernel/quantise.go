package kernel

import "math"

// This file holds what makes floats smaller, beside half.go: int8 in blocks
// with a scale each (Dettmers et al., "8-bit Optimizers via Block-wise
// Quantization", 2022; here linear), and bfloat16, the upper half of a float32.
// It too gives the same bits everywhere.

// QuantBlock is the number of elements that share a scale.
const QuantBlock = 256

// QuantScales returns how many scales n elements have.
func QuantScales(n int) int { return (n + QuantBlock - 1) / QuantBlock }

// QuantiseInt8 writes x as integers from -127 to 127, and for each block of
// QuantBlock elements a scale: the largest magnitude / 127, and at most the
// largest float that times 127 is finite. An integer is x/scale rounded to the
// nearest, ties to even, at most 127. A block of zeros, or of
// magnitudes too small for a scale (up to 9e-44), has scale 0 and integers 0.
// The values must be finite.
func QuantiseInt8(q []int8, scales []float32, x []float32) {
	if len(q) != len(x) || len(scales) != QuantScales(len(x)) {
		panic(badLength)
	}
	n := quantiseInt8Asm(q, scales, x)
	quantiseInt8Go(q[n:], scales[n/QuantBlock:], x[n:])
}

// DequantiseInt8 sets x to the integers times their block's scale.
func DequantiseInt8(x []float32, q []int8, scales []float32) {
	if len(q) != len(x) || len(scales) != QuantScales(len(x)) {
		panic(badLength)
	}
	n := dequantiseInt8Asm(x, q, scales)
	dequantiseInt8Go(x[n:], q[n:], scales[n/QuantBlock:])
}

// EncodeBFloat16 sets dst to x rounded to the nearest bfloat16, ties to even.
// What is beyond the largest by half a step or more becomes an infinity.
func EncodeBFloat16(dst []uint16, x []float32) {
	if len(dst) != len(x) {
		panic(badLength)
	}
	n := encodeBFloat16Asm(dst, x)
	encodeBFloat16Go(dst[n:], x[n:])
}

// DecodeBFloat16 sets dst to the bfloat16 x, which is exact.
func DecodeBFloat16(dst []float32, x []uint16) {
	if len(dst) != len(x) {
		panic(badLength)
	}
	n := decodeBFloat16Asm(dst, x)
	decodeBFloat16Go(dst[n:], x[n:])
}

func quantiseInt8Go(q []int8, scales []float32, x []float32) {
	// With this added, the last place of a small float is 1, and the lowest
	// byte of its bits is the integer.
	const integer = 3 << 22
	const maxScale = 0x1.020406p+121
	for b := range scales {
		n := min(QuantBlock, len(x))
		block, out := x[:n], q[:n]
		x, q = x[n:], q[n:]
		var most uint32 // the bits of magnitudes are in their order
		for _, f := range block {
			most = max(most, math.Float32bits(f)&^(1<<31))
		}
		scale := min(math.Float32frombits(most)/127, maxScale)
		scales[b] = scale
		if scale == 0 {
			clear(out)
			continue
		}
		for i, f := range block {
			// A subnormal scale is so rough that a quotient may exceed 127.
			v := min(max(f/scale, -127), 127)
			out[i] = int8(math.Float32bits(v + integer))
		}
	}
}

func dequantiseInt8Go(x []float32, q []int8, scales []float32) {
	for _, scale := range scales {
		n := min(QuantBlock, len(x))
		block, in := x[:n], q[:n]
		x, q = x[n:], q[n:]
		for i, v := range in {
			block[i] = float32(v) * scale
		}
	}
}

func encodeBFloat16Go(dst []uint16, x []float32) {
	x = x[:len(dst)]
	for i, f := range x {
		b := math.Float32bits(f)
		if f != f {
			dst[i] = uint16(b>>16) | 0x40 // it does not trap
			continue
		}
		dst[i] = uint16((b + 0x7fff + b>>16&1) >> 16)
	}
}

func decodeBFloat16Go(dst []float32, x []uint16) {
	x = x[:len(dst)]
	for i, h := range x {
		dst[i] = math.Float32frombits(uint32(h) << 16)
	}
}
