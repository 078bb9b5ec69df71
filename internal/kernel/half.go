package kernel

import "math"

// This file holds what is done with halves, IEEE 754 binary16 numbers as their
// bits. It too gives the same bits everywhere.

// EncodeHalf sets dst to x rounded to the nearest half, ties to even. What is
// beyond the largest half, 65504, by half a step or more becomes an infinity;
// what is below the smallest, 6e-8, by more than half becomes zero.
func EncodeHalf(dst []uint16, x []float32) {
	if len(dst) != len(x) {
		panic(badLength)
	}
	n := encodeHalfAsm(dst, x)
	encodeHalfGo(dst[n:], x[n:])
}

// DecodeHalf sets dst to the halves x, which is exact.
func DecodeHalf(dst []float32, x []uint16) {
	if len(dst) != len(x) {
		panic(badLength)
	}
	n := decodeHalfAsm(dst, x)
	decodeHalfGo(dst[n:], x[n:])
}

// halfTile is the number of halves that are decoded at a time, into the
// first-level cache.
const halfTile = 4096

// HalfMean is WeightedMean of the decoded sources; without weights it is Mean.
// dst must not overlap a source.
func HalfMean(dst []float32, sources [][]uint16, weights []float32) {
	if len(sources) == 0 {
		panic("kernel: the mean of no vectors")
	}
	if weights != nil && len(weights) != len(sources) {
		panic(badLength)
	}
	for _, s := range sources {
		if len(s) != len(dst) {
			panic(badLength)
		}
	}
	total := float32(len(sources))
	if alike(weights) {
		weights = nil
	} else {
		total = addUp(weights)
	}
	var decoded [halfTile]float32
	for lo := 0; lo < len(dst); lo += halfTile {
		hi := min(lo+halfTile, len(dst))
		d, x := dst[lo:hi], decoded[:hi-lo]
		DecodeHalf(d, sources[0][lo:hi])
		if weights != nil {
			Scale(d, weights[0])
		}
		for i, s := range sources[1:] {
			DecodeHalf(x, s[lo:hi])
			if weights != nil {
				AddScaled(d, weights[1+i], x)
			} else {
				Add(d, x)
			}
		}
		Div(d, d, total)
	}
}

// The layout of a half and, shifted to its place, of a float32: sign, 5 and 8
// bits of exponent, 10 and 23 bits of mantissa.
const (
	halfSign     = 0x8000
	halfExponent = 0x7c00
	halfQuiet    = 0x0200 // the NaN does not trap
	narrowing    = 13     // bits of mantissa that a half lacks
	rebias       = (127 - 15) << 23
)

func encodeHalfGo(dst []uint16, x []float32) {
	x = x[:len(dst)]
	for i, f := range x {
		b := math.Float32bits(f)
		sign := uint16(b>>16) & halfSign
		switch b &^= 1 << 31; {
		case b > 0x7f800000: // NaN: the upper part of its mantissa stays
			dst[i] = sign | halfExponent | halfQuiet | uint16(b>>narrowing)&0x3ff
		case b >= 0x477ff000: // from 65520
			dst[i] = sign | halfExponent
		case b < 0x38800000: // below 2^-14, the smallest with an exponent: half's last place is that of 0.5
			dst[i] = sign | uint16(math.Float32bits(math.Float32frombits(b)+0.5)-0x3f000000)
		default: // a mantissa that is rounded up carries into the exponent
			dst[i] = sign | uint16((b-rebias+(1<<(narrowing-1)-1)+b>>narrowing&1)>>narrowing)
		}
	}
}

func decodeHalfGo(dst []float32, x []uint16) {
	x = x[:len(dst)]
	for i, h := range x {
		sign, b := uint32(h&halfSign)<<16, uint32(h&^halfSign)
		switch {
		case b > halfExponent: // NaN
			b = (b|halfQuiet)<<narrowing | 0x7f800000
		case b == halfExponent:
			b = 0x7f800000
		case b < 1<<10: // no exponent
			b = math.Float32bits(float32(b) * (1.0 / (1 << 24)))
		default:
			b = b<<narrowing + rebias
		}
		dst[i] = math.Float32frombits(sign | b)
	}
}
