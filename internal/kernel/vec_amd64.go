//go:build amd64 && !noasm

package kernel

import "unsafe"

//go:generate sh -c "cd gen && go run ./vec -out ../vec_amd64.s -stubs ../vec_stubs_amd64.go -pkg kernel"

// Each function below works on as many floats as fill whole registers and
// returns their number: 0 where the CPU has no AVX2.

func whole(n int) int {
	if !avx2 {
		return 0
	}
	return n &^ 7
}

func first(x []float32) *float32 { return unsafe.SliceData(x) }

func addAsm(dst, x []float32) int {
	n := whole(len(dst))
	if n > 0 {
		addAVX2(first(dst), first(x), n)
	}
	return n
}

func addScaled8Asm(dst []float32, s *[8][]float32, weights *[8]float32) int {
	n := whole(len(dst))
	if n > 0 {
		var p [8]*float32
		for i := range p {
			p[i] = first(s[i])
		}
		addScaled8AVX2(first(dst), &p, weights, n)
	}
	return n
}

func addScaledAsm(dst []float32, alpha float32, x []float32) int {
	n := whole(len(dst))
	if n > 0 {
		addScaledAVX2(first(dst), alpha, first(x), n)
	}
	return n
}

func scaleAsm(dst []float32, alpha float32) int {
	n := whole(len(dst))
	if n > 0 {
		scaleAVX2(first(dst), alpha, n)
	}
	return n
}

func divAsm(dst, x []float32, c float32) int {
	n := whole(len(dst))
	if n > 0 {
		divAVX2(first(dst), first(x), c, n)
	}
	return n
}

func sgdAsm(dst, p, g []float32, lr, wd float32) int {
	n := whole(len(dst))
	if n > 0 {
		sgdAVX2(first(dst), first(p), first(g), lr, wd, n)
	}
	return n
}

func momentumAsm(dstP, dstB, p, b, g []float32, lr, mu, wd float32) int {
	n := whole(len(dstP))
	if n > 0 {
		momentumAVX2(first(dstP), first(dstB), first(p), first(b), first(g), lr, mu, wd, n)
	}
	return n
}

func adamAsm(dstP, dstM, dstV, p, m, v, g []float32, c *AdamCoefficients) int {
	n := whole(len(dstP))
	if n > 0 {
		adamAVX2(first(dstP), first(dstM), first(dstV), first(p), first(m), first(v), first(g), (*[8]float32)(unsafe.Pointer(c)), n)
	}
	return n
}

func boundedPrefixAsm(x []float32, limit uint32) int {
	n := whole(len(x))
	if n == 0 {
		return 0
	}
	return boundedPrefixAVX2(first(x), n, limit)
}

func encodeHalfAsm(dst []uint16, x []float32) int {
	n := whole(len(dst))
	if !f16c || n == 0 {
		return 0
	}
	encodeHalfF16C(unsafe.SliceData(dst), first(x), n)
	return n
}

func decodeHalfAsm(dst []float32, x []uint16) int {
	n := whole(len(dst))
	if !f16c || n == 0 {
		return 0
	}
	decodeHalfF16C(first(dst), unsafe.SliceData(x), n)
	return n
}
