//go:build amd64 && !noasm

package kernel

import "unsafe"

//go:generate sh -c "cd gen && go run ./optim -out ../optim_amd64.s -stubs ../optim_stubs_amd64.go -pkg kernel"

func nesterovAsm(dstP, dstB, p, b, g []float32, lr, mu, wd float32) int {
	n := whole(len(dstP))
	if n > 0 {
		nesterovAVX2(first(dstP), first(dstB), first(p), first(b), first(g), lr, mu, wd, n)
	}
	return n
}

func adamWAsm(dstP, dstM, dstV, p, m, v, g []float32, c *AdamCoefficients) int {
	n := whole(len(dstP))
	if n > 0 {
		adamWAVX2(first(dstP), first(dstM), first(dstV), first(p), first(m), first(v), first(g), (*[8]float32)(unsafe.Pointer(c)), n)
	}
	return n
}

func rmsPropAsm(dstP, dstV, p, v, g []float32, c *RMSPropCoefficients) int {
	n := whole(len(dstP))
	if n > 0 {
		rmsPropAVX2(first(dstP), first(dstV), first(p), first(v), first(g), (*[6]float32)(unsafe.Pointer(c)), n)
	}
	return n
}

func rmsPropMomentumAsm(dstP, dstV, dstB, p, v, b, g []float32, c *RMSPropCoefficients) int {
	n := whole(len(dstP))
	if n > 0 {
		rmsPropMomentumAVX2(first(dstP), first(dstV), first(dstB), first(p), first(v), first(b), first(g), (*[6]float32)(unsafe.Pointer(c)), n)
	}
	return n
}

func adagradAsm(dstP, dstS, p, s, g []float32, lr, eps, wd float32) int {
	n := whole(len(dstP))
	if n > 0 {
		adagradAVX2(first(dstP), first(dstS), first(p), first(s), first(g), lr, eps, wd, n)
	}
	return n
}
