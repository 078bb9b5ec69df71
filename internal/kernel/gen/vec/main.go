// Command vec writes the AVX2 assembly of package kernel's vector operations.
//
// Each function works on n floats, a multiple of 8, and rounds every product
// and sum by itself, as the plain Go path does. No fused multiply-add here:
// its single rounding would give other bits.
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

	TEXT("addAVX2", NOSPLIT, "func(dst, x *float32, n int)")
	Pragma("noescape")
	Doc("addAVX2 sets dst to dst + x.")
	dst, x := pointer("dst"), pointer("x")
	over(4, func(at func(reg.Register) Mem) {
		y := YMM()
		VMOVUPS(at(dst), y)
		VADDPS(at(x), y, y)
		VMOVUPS(y, at(dst))
	})
	done()

	TEXT("addScaledAVX2", NOSPLIT, "func(dst *float32, alpha float32, x *float32, n int)")
	Pragma("noescape")
	Doc("addScaledAVX2 sets dst to dst + alpha*x.")
	dst, x = pointer("dst"), pointer("x")
	alpha := scalar("alpha")
	over(4, func(at func(reg.Register) Mem) {
		y := YMM()
		VMULPS(at(x), alpha, y)
		VADDPS(at(dst), y, y)
		VMOVUPS(y, at(dst))
	})
	done()

	TEXT("addScaled8AVX2", NOSPLIT, "func(dst *float32, sources *[8]*float32, weights *[8]float32, n int)")
	Pragma("noescape")
	Doc("addScaled8AVX2 adds eight sources, each times its weight, to dst in order.")
	dst, list := pointer("dst"), pointer("sources")
	var sources [8]reg.GPVirtual
	for i := range sources {
		sources[i] = GP64()
		MOVQ(Mem{Base: list, Disp: 8 * i}, sources[i])
	}
	values := pointer("weights")
	var weights [8]reg.VecVirtual
	for i := range weights {
		weights[i] = YMM()
		VBROADCASTSS(Mem{Base: values, Disp: 4 * i}, weights[i])
	}
	over(2, func(at func(reg.Register) Mem) {
		y := YMM()
		VMOVUPS(at(dst), y)
		for i, s := range sources {
			product := YMM()
			VMULPS(at(s), weights[i], product)
			VADDPS(product, y, y)
		}
		VMOVUPS(y, at(dst))
	})
	done()

	TEXT("scaleAVX2", NOSPLIT, "func(dst *float32, alpha float32, n int)")
	Pragma("noescape")
	Doc("scaleAVX2 sets dst to dst*alpha.")
	dst = pointer("dst")
	alpha = scalar("alpha")
	over(4, func(at func(reg.Register) Mem) {
		y := YMM()
		VMULPS(at(dst), alpha, y)
		VMOVUPS(y, at(dst))
	})
	done()

	TEXT("divAVX2", NOSPLIT, "func(dst, x *float32, c float32, n int)")
	Pragma("noescape")
	Doc("divAVX2 sets dst to x/c.")
	dst, x = pointer("dst"), pointer("x")
	c := scalar("c")
	over(4, func(at func(reg.Register) Mem) {
		y := YMM()
		VMOVUPS(at(x), y)
		VDIVPS(c, y, y)
		VMOVUPS(y, at(dst))
	})
	done()

	TEXT("sgdAVX2", NOSPLIT, "func(dst, p, grad *float32, lr, wd float32, n int)")
	Pragma("noescape")
	Doc("sgdAVX2 sets dst to p - lr*(grad + wd*p).")
	dst, p, g := pointer("dst"), pointer("p"), pointer("grad")
	lr, wd := scalar("lr"), scalar("wd")
	over(4, func(at func(reg.Register) Mem) {
		d, old := YMM(), YMM()
		VMOVUPS(at(p), old)
		VMULPS(old, wd, d)
		VADDPS(at(g), d, d)
		VMULPS(d, lr, d)
		VSUBPS(d, old, d)
		VMOVUPS(d, at(dst))
	})
	done()

	TEXT("momentumAVX2", NOSPLIT, "func(dstP, dstB, p, b, grad *float32, lr, mu, wd float32, n int)")
	Pragma("noescape")
	Doc("momentumAVX2 sets dstB to mu*b + (grad + wd*p) and dstP to p - lr*dstB.")
	dstP, dstB, p, b, g := pointer("dstP"), pointer("dstB"), pointer("p"), pointer("b"), pointer("grad")
	lr, mu, wd := scalar("lr"), scalar("mu"), scalar("wd")
	over(2, func(at func(reg.Register) Mem) {
		d, old, buf := YMM(), YMM(), YMM()
		VMOVUPS(at(p), old)
		VMULPS(old, wd, d)
		VADDPS(at(g), d, d)
		VMULPS(at(b), mu, buf)
		VADDPS(d, buf, d)
		VMOVUPS(d, at(dstB))
		VMULPS(d, lr, d)
		VSUBPS(d, old, d)
		VMOVUPS(d, at(dstP))
	})
	done()

	TEXT("adamAVX2", NOSPLIT, "func(dstP, dstM, dstV, p, m, v, grad *float32, c *[8]float32, n int)")
	Pragma("noescape")
	Doc("adamAVX2 is one step of Adam; c holds the fields of AdamCoefficients in order.")
	dstP, dstM, dstV := pointer("dstP"), pointer("dstM"), pointer("dstV")
	p, m, v, g := pointer("p"), pointer("m"), pointer("v"), pointer("grad")
	coefficients := pointer("c")
	var k [8]reg.VecVirtual
	for i := range k {
		k[i] = YMM()
		VBROADCASTSS(Mem{Base: coefficients, Disp: 4 * i}, k[i])
	}
	beta1, rest1, beta2, rest2, stepSize, sqrtBias2, eps, decay := k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]
	over(1, func(at func(reg.Register) Mem) {
		d, old, m1, v1 := YMM(), YMM(), YMM(), YMM()
		VMOVUPS(at(p), old)
		VMULPS(old, decay, d)
		VADDPS(at(g), d, d)
		VMULPS(d, d, v1)
		VMULPS(rest2, v1, v1)
		VMULPS(rest1, d, d)
		VMULPS(at(m), beta1, m1)
		VADDPS(d, m1, m1)
		VMULPS(at(v), beta2, d)
		VADDPS(v1, d, v1)
		VMOVUPS(m1, at(dstM))
		VMOVUPS(v1, at(dstV))
		VSQRTPS(v1, v1)
		VDIVPS(sqrtBias2, v1, v1)
		VADDPS(eps, v1, v1)
		VDIVPS(v1, m1, m1)
		VMULPS(stepSize, m1, m1)
		VSUBPS(m1, old, old)
		VMOVUPS(old, at(dstP))
	})
	done()

	TEXT("encodeHalfF16C", NOSPLIT, "func(dst *uint16, x *float32, n int)")
	Pragma("noescape")
	Doc("encodeHalfF16C sets dst to x in half precision, rounded to nearest even.")
	halves, x := pointer("dst"), pointer("x")
	over(4, func(at func(reg.Register) Mem) {
		y := YMM()
		VMOVUPS(at(x), y)
		VCVTPS2PH(U8(0), y, narrow(at(halves)))
	})
	done()

	TEXT("decodeHalfF16C", NOSPLIT, "func(dst *float32, x *uint16, n int)")
	Pragma("noescape")
	Doc("decodeHalfF16C sets dst to the halves x.")
	dst, halves = pointer("dst"), pointer("x")
	over(4, func(at func(reg.Register) Mem) {
		y := YMM()
		VCVTPH2PS(narrow(at(halves)), y)
		VMOVUPS(y, at(dst))
	})
	done()

	boundedPrefix()
	features()

	Generate()
}

// narrow is the address of the halves at the place of the floats at m.
func narrow(m Mem) Mem {
	m.Scale, m.Disp = m.Scale/2, m.Disp/2
	return m
}

// features writes what tells whether the CPU converts halves, which package
// cpu does not.
func features() {
	TEXT("cpuid1", NOSPLIT, "func() uint32")
	Doc("cpuid1 returns ECX of CPUID leaf 1.")
	MOVL(U32(1), reg.EAX)
	XORL(reg.ECX, reg.ECX)
	CPUID()
	Store(reg.ECX, ReturnIndex(0))
	RET()
}

// boundedPrefix writes a search that stops before the first block of 32 floats
// with one whose bits, without the sign, are above a limit: those of positive
// floats are in their order, and those of what is not finite above all others.
func boundedPrefix() {
	TEXT("boundedPrefixAVX2", NOSPLIT, "func(x *float32, n int, limit uint32) int")
	Pragma("noescape")
	Doc("boundedPrefixAVX2 returns how many floats, in whole blocks of 32, precede the first block with one above the limit.")
	x, n := pointer("x"), Load(Param("n"), GP64())
	limit, abs := YMM(), YMM()
	broadcast := func(bits Op, dst reg.VecVirtual) {
		low := XMM()
		VMOVD(bits, low)
		VPBROADCASTD(low, dst)
	}
	broadcast(Load(Param("limit"), GP32()), limit)
	mask := GP32()
	MOVL(U32(0x7fffffff), mask)
	broadcast(mask, abs)
	i := GP64()
	XORQ(i, i)
	Label("block")
	end := GP64()
	LEAQ(Mem{Base: i, Disp: 32}, end)
	CMPQ(end, n)
	JG(LabelRef("stop"))
	found := YMM()
	for j := range 4 {
		y := YMM()
		VPAND(Mem{Base: x, Index: i, Scale: 4, Disp: j * width}, abs, y)
		VPCMPGTD(limit, y, y)
		if j == 0 {
			found = y
		} else {
			VPOR(y, found, found)
		}
	}
	VPTEST(found, found)
	JNZ(LabelRef("stop"))
	MOVQ(end, i)
	JMP(LabelRef("block"))
	Label("stop")
	Store(i, ReturnIndex(0))
	done()
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
