// Command optim writes the AVX2 assembly of package kernel's optimizers beyond
// those of vec: Nesterov's momentum, AdamW, RMSProp and Adagrad.
//
// Each function works on n floats, a multiple of 8, at any address, and rounds
// every product and sum by itself, as the plain Go path does.
package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// bytes of one vector register.
const width = 32

func main() {
	ConstraintExpr("amd64,!noasm")

	TEXT("nesterovAVX2", NOSPLIT, "func(dstP, dstB, p, b, grad *float32, lr, mu, wd float32, n int)")
	Pragma("noescape")
	Doc("nesterovAVX2 sets d to grad + wd*p, dstB to mu*b + d and dstP to p - lr*(d + mu*dstB).")
	dstP, dstB, p, b, g := pointer("dstP"), pointer("dstB"), pointer("p"), pointer("b"), pointer("grad")
	lr, mu, wd := scalar("lr"), scalar("mu"), scalar("wd")
	over(2, func(at func(reg.Register) Mem) {
		d, old, buf := YMM(), YMM(), YMM()
		VMOVUPS(at(p), old)
		decayed(d, old, wd, at(g))
		VMULPS(at(b), mu, buf)
		VADDPS(d, buf, buf)
		VMOVUPS(buf, at(dstB))
		VMULPS(buf, mu, buf)
		VADDPS(buf, d, d)
		VMULPS(d, lr, d)
		VSUBPS(d, old, d)
		VMOVUPS(d, at(dstP))
	})
	done()

	TEXT("adamWAVX2", NOSPLIT, "func(dstP, dstM, dstV, p, m, v, grad *float32, c *[8]float32, n int)")
	Pragma("noescape")
	Doc("adamWAVX2 is one step of AdamW; c holds the fields of AdamCoefficients in order.")
	dstP, dstM, dstV := pointer("dstP"), pointer("dstM"), pointer("dstV")
	p, m, v, g := pointer("p"), pointer("m"), pointer("v"), pointer("grad")
	k := scalars("c", 8)
	beta1, rest1, beta2, rest2, stepSize, sqrtBias2, eps, decay := k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]
	over(1, func(at func(reg.Register) Mem) {
		d, old, m1, v1 := YMM(), YMM(), YMM(), YMM()
		VMOVUPS(at(g), d)
		VMULPS(d, d, v1)
		VMULPS(rest2, v1, v1)
		VMULPS(rest1, d, d)
		VMULPS(at(m), beta1, m1)
		VADDPS(d, m1, m1)
		VMULPS(at(v), beta2, d)
		VADDPS(v1, d, v1)
		VMOVUPS(at(p), old)
		VMOVUPS(m1, at(dstM))
		VMOVUPS(v1, at(dstV))
		VSQRTPS(v1, v1)
		VDIVPS(sqrtBias2, v1, v1)
		VADDPS(eps, v1, v1)
		VDIVPS(v1, m1, m1)
		VMULPS(stepSize, m1, m1)
		VMULPS(old, decay, d)
		VSUBPS(d, old, old)
		VSUBPS(m1, old, old)
		VMOVUPS(old, at(dstP))
	})
	done()

	TEXT("rmsPropAVX2", NOSPLIT, "func(dstP, dstV, p, v, grad *float32, c *[6]float32, n int)")
	Pragma("noescape")
	Doc("rmsPropAVX2 is one step of RMSProp without momentum; c holds the fields of RMSPropCoefficients in order.")
	dstP, dstV, p, v, g = pointer("dstP"), pointer("dstV"), pointer("p"), pointer("v"), pointer("grad")
	k = scalars("c", 6)
	over(1, func(at func(reg.Register) Mem) {
		d, old := YMM(), YMM()
		VMOVUPS(at(p), old)
		normalized(d, old, k, at(g), at(v), at(dstV))
		VMULPS(d, k[2], d)
		VSUBPS(d, old, d)
		VMOVUPS(d, at(dstP))
	})
	done()

	TEXT("rmsPropMomentumAVX2", NOSPLIT, "func(dstP, dstV, dstB, p, v, b, grad *float32, c *[6]float32, n int)")
	Pragma("noescape")
	Doc("rmsPropMomentumAVX2 is one step of RMSProp with momentum; c holds the fields of RMSPropCoefficients in order.")
	dstP, dstV, dstB = pointer("dstP"), pointer("dstV"), pointer("dstB")
	p, v, b, g = pointer("p"), pointer("v"), pointer("b"), pointer("grad")
	k = scalars("c", 6)
	over(1, func(at func(reg.Register) Mem) {
		d, old, buf := YMM(), YMM(), YMM()
		VMOVUPS(at(p), old)
		VMULPS(at(b), k[4], buf)
		normalized(d, old, k, at(g), at(v), at(dstV))
		VADDPS(d, buf, buf)
		VMOVUPS(buf, at(dstB))
		VMULPS(buf, k[2], buf)
		VSUBPS(buf, old, old)
		VMOVUPS(old, at(dstP))
	})
	done()

	TEXT("adagradAVX2", NOSPLIT, "func(dstP, dstS, p, s, grad *float32, lr, eps, wd float32, n int)")
	Pragma("noescape")
	Doc("adagradAVX2 sets d to grad + wd*p, dstS to s + d*d and dstP to p - lr*(d/(sqrt(dstS) + eps)).")
	dstP, dstS, p, s, g := pointer("dstP"), pointer("dstS"), pointer("p"), pointer("s"), pointer("grad")
	lr, eps, wd = scalar("lr"), scalar("eps"), scalar("wd")
	over(1, func(at func(reg.Register) Mem) {
		d, old, sum := YMM(), YMM(), YMM()
		VMOVUPS(at(p), old)
		decayed(d, old, wd, at(g))
		VMULPS(d, d, sum)
		VADDPS(at(s), sum, sum)
		VMOVUPS(sum, at(dstS))
		VSQRTPS(sum, sum)
		VADDPS(eps, sum, sum)
		VDIVPS(sum, d, d)
		VMULPS(d, lr, d)
		VSUBPS(d, old, d)
		VMOVUPS(d, at(dstP))
	})
	done()

	Generate()
}

// decayed sets d to g + wd*p.
func decayed(d, p, wd reg.VecVirtual, g Mem) {
	VMULPS(p, wd, d)
	VADDPS(g, d, d)
}

// normalized sets d to the gradient over the root of its mean square, which it
// writes to dstV. k holds the fields of RMSPropCoefficients in order.
func normalized(d, p reg.VecVirtual, k []reg.VecVirtual, g, v, dstV Mem) {
	alpha, rest, eps, wd := k[0], k[1], k[3], k[5]
	square, mean := YMM(), YMM()
	decayed(d, p, wd, g)
	VMULPS(d, d, square)
	VMULPS(rest, square, square)
	VMULPS(v, alpha, mean)
	VADDPS(square, mean, mean)
	VMOVUPS(mean, dstV)
	VSQRTPS(mean, mean)
	VADDPS(eps, mean, mean)
	VDIVPS(mean, d, d)
}

// pointer loads a pointer argument.
func pointer(name string) reg.GPVirtual { return Load(Param(name), GP64()).(reg.GPVirtual) }

// scalar loads a float32 argument into all lanes of a register.
func scalar(name string) reg.VecVirtual {
	param, err := Param(name).Resolve()
	if err != nil {
		panic(err)
	}
	y := YMM()
	VBROADCASTSS(param.Addr, y)
	return y
}

// scalars loads each of the n floats behind a pointer into all lanes of a
// register.
func scalars(name string, n int) []reg.VecVirtual {
	p, y := pointer(name), make([]reg.VecVirtual, n)
	for i := range y {
		y[i] = YMM()
		VBROADCASTSS(Mem{Base: p, Disp: 4 * i}, y[i])
	}
	return y
}

// over runs body for every 8 floats of argument n, unroll times in a turn
// while there are enough. at(p) is the current vector of pointer p.
func over(unroll int, body func(at func(reg.Register) Mem)) {
	n, i := Load(Param("n"), GP64()), GP64()
	XORQ(i, i)
	turn := func(times int, label, next string) {
		Label(label)
		end := GP64()
		LEAQ(Mem{Base: i, Disp: 8 * times}, end)
		CMPQ(end, n)
		JG(LabelRef(next))
		for j := range times {
			body(func(p reg.Register) Mem {
				return Mem{Base: p, Index: i, Scale: 4, Disp: j * width}
			})
		}
		MOVQ(end, i)
		JMP(LabelRef(label))
	}
	if unroll > 1 {
		turn(unroll, "many", "one")
	}
	turn(1, "one", "stop")
	Label("stop")
}

func done() {
	VZEROUPPER()
	RET()
}
