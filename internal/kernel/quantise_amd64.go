//go:build amd64 && !noasm

package kernel

import "unsafe"

//go:generate sh -c "cd gen && go run ./quantise -out ../quantise_amd64.s -stubs ../quantise_stubs_amd64.go -pkg kernel"

func quantiseInt8Asm(q []int8, scales []float32, x []float32) int {
	blocks := whole(len(x)) / QuantBlock
	if blocks > 0 {
		quantiseInt8AVX2(unsafe.SliceData(q), first(scales), first(x), blocks)
	}
	return blocks * QuantBlock
}

func dequantiseInt8Asm(x []float32, q []int8, scales []float32) int {
	blocks := whole(len(x)) / QuantBlock
	if blocks > 0 {
		dequantiseInt8AVX2(first(x), unsafe.SliceData(q), first(scales), blocks)
	}
	return blocks * QuantBlock
}

func encodeBFloat16Asm(dst []uint16, x []float32) int {
	n := whole(len(dst))
	if n > 0 {
		encodeBFloat16AVX2(unsafe.SliceData(dst), first(x), n)
	}
	return n
}

func decodeBFloat16Asm(dst []float32, x []uint16) int {
	n := whole(len(dst))
	if n > 0 {
		decodeBFloat16AVX2(first(dst), unsafe.SliceData(x), n)
	}
	return n
}
