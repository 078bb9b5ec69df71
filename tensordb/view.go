package tensordb

import (
	"unsafe"

	"github.com/spirt-ml/spirt/internal/kernel"
)

// floats returns b as numbers, aliasing it. Unlike tensor.Floats it takes any
// address: in a Redis server that is where a string happens to lie. The
// machines that such a server runs on read floats from there.
func floats(b []byte) []float32 {
	return unsafe.Slice((*float32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}

// halves does the same for float16 and bfloat16.
func halves(b []byte) []uint16 {
	return unsafe.Slice((*uint16)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/2)
}

// tileLen is how many numbers of each tensor an operation takes at a time, so
// that what one step leaves is in the cache for the next.
const tileLen = 16384

// tiles calls f for parts of [lo, hi).
func tiles(lo, hi int, f func(lo, hi int)) {
	for ; lo < hi; lo += tileLen {
		f(lo, min(lo+tileLen, hi))
	}
}

// firstBad sets bad, unless it is set already, to the index of the first
// number of part that is not finite; part starts at index at.
func firstBad(bad *int, part []float32, at int) {
	if *bad >= 0 {
		return
	}
	if i := kernel.FirstNonFinite(part); i >= 0 {
		*bad = at + i
	}
}

// int8s does the same for int8.
func int8s(b []byte) []int8 {
	return unsafe.Slice((*int8)(unsafe.Pointer(unsafe.SliceData(b))), len(b))
}
