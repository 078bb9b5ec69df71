package kernel

import (
	"math"
	"testing"
)

// TestMaxPool2 compares the two implementations, bit by bit.
func TestMaxPool2(t *testing.T) {
	if !avx2 {
		return // there is one only; package nn tests it
	}
	defer func() { avx2 = true }()
	r := seeded(t)
	for range 200 {
		pixels, channels := r.IntN(9), 1+r.IntN(40)
		lanes, relu := RoundUp(channels), r.IntN(2) == 0
		top, bottom := make([]float32, 2*pixels*lanes), make([]float32, 2*pixels*lanes)
		for i := range top {
			// Few values, so that many are equal.
			values := []float32{-1, 0, 1, 2, 3, float32(math.NaN()), float32(math.Inf(-1))}
			top[i], bottom[i] = values[r.IntN(len(values))], values[r.IntN(len(values))]
		}
		room := pixels*channels + 8
		var dst, dtop, dbottom, sum [2][]float32
		var codes [2][]int32
		src := random(r, room)
		for k := range 2 {
			avx2 = k == 0
			dst[k], codes[k] = make([]float32, room), make([]int32, room)
			MaxPool2(dst[k], codes[k], top, bottom, pixels, channels, lanes, relu)
			dtop[k], dbottom[k] = random(r, len(top)), random(r, len(top))
			sum[k] = make([]float32, lanes)
			MaxUnpool2(dtop[k], dbottom[k], sum[k], codes[0], src, pixels, channels, lanes)
		}
		same := func(what string, a, b float32) {
			if math.Float32bits(a) != math.Float32bits(b) {
				t.Fatalf("%d pixels, %d channels, relu %v: %s is %v and %v", pixels, channels, relu, what, a, b)
			}
		}
		for i := range pixels * channels {
			same("maximum", dst[0][i], dst[1][i])
			if codes[0][i] != codes[1][i] {
				t.Fatalf("code %d is %d and %d", i, codes[0][i], codes[1][i])
			}
		}
		for p := range 2 * pixels {
			for i := range channels {
				same("gradient above", dtop[0][p*lanes+i], dtop[1][p*lanes+i])
				same("gradient below", dbottom[0][p*lanes+i], dbottom[1][p*lanes+i])
			}
		}
		for i := range channels {
			same("sum", sum[0][i], sum[1][i])
		}
	}
}
