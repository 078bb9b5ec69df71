// Command pool writes the pooling kernels of package kernel for AVX2.
package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Predicates of VCMPPS.
const (
	lessOrEqual = 0x12 // false for NaN
	unordered   = 0x03
	greater     = 0x1e // false for NaN
)

// codes returns registers with the codes 1, 2 and 3 in every lane.
func codes() (r [4]VecVirtual) {
	ones := YMM()
	VPCMPEQD(ones, ones, ones)
	for i := 1; i < 4; i++ {
		r[i] = YMM()
	}
	VPSRLD(Imm(31), ones, r[1])
	VPADDD(r[1], r[1], r[2])
	VPADDD(r[1], r[2], r[3])
	return r
}

func pool() {
	TEXT("maxPool2AVX2", NOSPLIT, "func(dst *float32, codes *int32, top, bottom *float32, pixels, channels, lanes int, relu bool)")
	Doc("maxPool2AVX2 is the loop of MaxPool2 for channels rounded up to 8.")
	Pragma("noescape")
	dst := Load(Param("dst"), GP64())
	code := Load(Param("codes"), GP64())
	top := Load(Param("top"), GP64())
	bottom := Load(Param("bottom"), GP64())
	pixels := Load(Param("pixels"), GP64())
	channels := Load(Param("channels"), GP64())
	lanes := Load(Param("lanes"), GP64())
	SHLQ(Imm(2), channels)
	SHLQ(Imm(2), lanes)
	c := codes()
	// All ones where ReLU cuts off.
	relu := GP32()
	Load(Param("relu"), relu.As8().(GPVirtual))
	MOVBLZX(relu.As8(), relu)
	NEGL(relu)
	cut := YMM()
	x := XMM()
	VMOVD(relu, x)
	VPBROADCASTD(x, cut)

	at := GP64()
	Label("pixel")
	XORQ(at, at)
	Label("vector")
	best, index := YMM(), YMM()
	VMOVUPS(Mem{Base: top, Index: at, Scale: 1}, best)
	VPXOR(index, index, index)
	next := func(m Mem, i int) {
		v, more, nan := YMM(), YMM(), YMM()
		VMOVUPS(m, v)
		VCMPPS(Imm(greater), best, v, more)
		VCMPPS(Imm(unordered), v, v, nan)
		VORPS(nan, more, more)
		VBLENDVPS(more, v, best, best)
		VBLENDVPS(more, c[i], index, index)
	}
	second := GP64()
	LEAQ(Mem{Base: at, Index: lanes, Scale: 1}, second)
	next(Mem{Base: top, Index: second, Scale: 1}, 1)
	next(Mem{Base: bottom, Index: at, Scale: 1}, 2)
	next(Mem{Base: bottom, Index: second, Scale: 1}, 3)
	zero, off := YMM(), YMM()
	VXORPS(zero, zero, zero)
	VCMPPS(Imm(lessOrEqual), zero, best, off)
	VPAND(cut, off, off)
	VANDNPS(best, off, best)
	VPOR(off, index, index)
	VMOVUPS(best, Mem{Base: dst, Index: at, Scale: 1})
	VMOVDQU(index, Mem{Base: code, Index: at, Scale: 1})
	ADDQ(Imm(32), at)
	CMPQ(at, channels)
	JLT(LabelRef("vector"))
	ADDQ(channels, dst)
	ADDQ(channels, code)
	LEAQ(Mem{Base: top, Index: lanes, Scale: 2}, top)
	LEAQ(Mem{Base: bottom, Index: lanes, Scale: 2}, bottom)
	DECQ(pixels)
	JNE(LabelRef("pixel"))
	VZEROUPPER()
	RET()
}

func unpool() {
	TEXT("maxUnpool2AVX2", NOSPLIT, "func(top, bottom, sum *float32, codes *int32, src *float32, pixels, channels, lanes int)")
	Doc("maxUnpool2AVX2 is the loop of MaxUnpool2 for channels rounded up to 8.")
	Pragma("noescape")
	top := Load(Param("top"), GP64())
	bottom := Load(Param("bottom"), GP64())
	sums := Load(Param("sum"), GP64())
	code := Load(Param("codes"), GP64())
	src := Load(Param("src"), GP64())
	pixels := Load(Param("pixels"), GP64())
	channels := Load(Param("channels"), GP64())
	lanes := Load(Param("lanes"), GP64())
	SHLQ(Imm(2), channels)
	SHLQ(Imm(2), lanes)
	c := codes()
	c[0] = YMM()
	VPXOR(c[0], c[0], c[0])
	v, left, from, to := GP64(), GP64(), GP64(), GP64()
	XORQ(v, v)
	Label("vector")
	sum := YMM()
	VMOVUPS(Mem{Base: sums, Index: v, Scale: 1}, sum)
	MOVQ(v, from)
	MOVQ(v, to)
	MOVQ(pixels, left)
	Label("pixel")
	g, index := YMM(), YMM()
	VMOVUPS(Mem{Base: src, Index: from, Scale: 1}, g)
	VMOVDQU(Mem{Base: code, Index: from, Scale: 1}, index)
	ADDQ(channels, from)
	var part [4]VecVirtual
	for i := range part {
		part[i] = YMM()
		VPCMPEQD(c[i], index, part[i])
		VPAND(g, part[i], part[i])
	}
	kept := YMM()
	VPSRAD(Imm(31), index, kept)
	VPANDN(g, kept, kept)
	VADDPS(kept, sum, sum)
	VMOVUPS(part[0], Mem{Base: top, Index: to, Scale: 1})
	VMOVUPS(part[2], Mem{Base: bottom, Index: to, Scale: 1})
	ADDQ(lanes, to)
	VMOVUPS(part[1], Mem{Base: top, Index: to, Scale: 1})
	VMOVUPS(part[3], Mem{Base: bottom, Index: to, Scale: 1})
	ADDQ(lanes, to)
	DECQ(left)
	JNE(LabelRef("pixel"))
	VMOVUPS(sum, Mem{Base: sums, Index: v, Scale: 1})
	ADDQ(Imm(32), v)
	CMPQ(v, channels)
	JLT(LabelRef("vector"))
	VZEROUPPER()
	RET()
}

func main() {
	ConstraintExpr("amd64,!noasm")
	pool()
	unpool()
	Generate()
}
