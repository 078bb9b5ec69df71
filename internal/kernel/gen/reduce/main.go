// Command reduce writes the AVX2 assembly of package kernel's reductions.
//
// Each function adds to 16 lanes of float64, element i to lane i modulo 16,
// as the plain Go path does. n is a multiple of 16.
package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

func main() {
	ConstraintExpr("amd64,!noasm")

	TEXT("sumAVX2", NOSPLIT, "func(lanes *[16]float64, x *float32, n int)")
	Pragma("noescape")
	Doc("sumAVX2 adds x to the lanes.")
	x := Load(Param("x"), GP64())
	reduce(func(at func(reg.Register) Mem, lane reg.VecVirtual) {
		v := YMM()
		VCVTPS2PD(at(x), v)
		VADDPD(v, lane, lane)
	})

	TEXT("dotAVX2", NOSPLIT, "func(lanes *[16]float64, x, y *float32, n int)")
	Pragma("noescape")
	Doc("dotAVX2 adds the products of x and y to the lanes.")
	x, y := Load(Param("x"), GP64()), Load(Param("y"), GP64())
	reduce(func(at func(reg.Register) Mem, lane reg.VecVirtual) {
		v, w := YMM(), YMM()
		VCVTPS2PD(at(x), v)
		VCVTPS2PD(at(y), w)
		VMULPD(w, v, v)
		VADDPD(v, lane, lane)
	})

	TEXT("sumSquaresAVX2", NOSPLIT, "func(lanes *[16]float64, x *float32, n int)")
	Pragma("noescape")
	Doc("sumSquaresAVX2 adds the squares of x to the lanes.")
	x = Load(Param("x"), GP64())
	reduce(func(at func(reg.Register) Mem, lane reg.VecVirtual) {
		v := YMM()
		VCVTPS2PD(at(x), v)
		VMULPD(v, v, v)
		VADDPD(v, lane, lane)
	})

	Generate()
}

// reduce runs body for every 4 floats. at(p) is the current four of pointer p.
func reduce(body func(at func(reg.Register) Mem, lane reg.VecVirtual)) {
	list, n, i := Load(Param("lanes"), GP64()), Load(Param("n"), GP64()), GP64()
	var lanes [4]reg.VecVirtual
	for j := range lanes {
		lanes[j] = YMM()
		VMOVUPD(Mem{Base: list, Disp: 32 * j}, lanes[j])
	}
	XORQ(i, i)
	Label("next")
	CMPQ(i, n)
	JGE(LabelRef("stop"))
	for j, lane := range lanes {
		body(func(p reg.Register) Mem {
			return Mem{Base: p, Index: i, Scale: 4, Disp: 16 * j}
		}, lane)
	}
	ADDQ(Imm(16), i)
	JMP(LabelRef("next"))
	Label("stop")
	for j, lane := range lanes {
		VMOVUPD(lane, Mem{Base: list, Disp: 32 * j})
	}
	VZEROUPPER()
	RET()
}
