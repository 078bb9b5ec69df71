// Command quantise writes the AVX2 assembly of package kernel's int8 blocks
// and of bfloat16. Each rounds as the plain Go path does.
package main

import (
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

const (
	// block is the number of elements that share a scale.
	block = 256
	// maxScale is the largest scale, its bits: 127 times the next overflows.
	maxScale = 0x7c010203
)

func main() {
	ConstraintExpr("amd64,!noasm")
	// What is packed from four registers lies in this order.
	order := GLOBL("quantiseOrder", RODATA|NOPTR)
	for i, from := range []uint32{0, 4, 1, 5, 2, 6, 3, 7} {
		DATA(4*i, U32(from))
	}

	TEXT("quantiseInt8AVX2", NOSPLIT, "func(q *int8, scales, x *float32, blocks int)")
	Pragma("noescape")
	Doc("quantiseInt8AVX2 writes whole blocks of x as integers and scales. There is one block at least.")
	q, scales, x, blocks := pointer("q"), pointer("scales"), pointer("x"), pointer("blocks")
	abs, top, bottom := constant(0x7fffffff), float(127), float(-127)
	largest := constant(maxScale)
	perm, zero := YMM(), YMM()
	VMOVDQU(order, perm)
	VXORPS(zero, zero, zero)
	i := GP64()
	Label("quantiseBlock")
	most := [2]reg.VecVirtual{YMM(), YMM()}
	for _, m := range most {
		VXORPS(m, m, m)
	}
	XORQ(i, i)
	Label("largest")
	for j, m := range [4]reg.VecVirtual{most[0], most[1], most[0], most[1]} {
		y := YMM()
		VANDPS(Mem{Base: x, Index: i, Scale: 4, Disp: 32 * j}, abs, y)
		VMAXPS(y, m, m)
	}
	ADDQ(Imm(32), i)
	CMPQ(i, U32(block))
	JL(LabelRef("largest"))
	VMAXPS(most[1], most[0], most[0])
	high, low := XMM(), most[0].AsX()
	VEXTRACTF128(Imm(1), most[0], high)
	VMAXPS(high, low, low)
	VPERMILPS(Imm(0b1110), low, high)
	VMAXPS(high, low, low)
	VPERMILPS(Imm(1), low, high)
	VMAXPS(high, low, low)
	VDIVSS(top.AsX(), low, low)
	VMINSS(largest.AsX(), low, low)
	VMOVSS(low, Mem{Base: scales})
	scale, some := YMM(), YMM()
	VBROADCASTSS(low, scale)
	VCMPPS(Imm(4), zero, scale, some) // not equal
	XORQ(i, i)
	Label("round")
	var v [4]reg.VecVirtual
	for j := range v {
		v[j] = YMM()
		VMOVUPS(Mem{Base: x, Index: i, Scale: 4, Disp: 32 * j}, v[j])
		VDIVPS(scale, v[j], v[j])
		VMINPS(top, v[j], v[j])
		VMAXPS(bottom, v[j], v[j])
		VANDPS(some, v[j], v[j])
		VCVTPS2DQ(v[j], v[j])
	}
	VPACKSSDW(v[1], v[0], v[0])
	VPACKSSDW(v[3], v[2], v[2])
	VPACKSSWB(v[2], v[0], v[0])
	VPERMD(v[0], perm, v[0])
	VMOVDQU(v[0], Mem{Base: q, Index: i, Scale: 1})
	ADDQ(Imm(32), i)
	CMPQ(i, U32(block))
	JL(LabelRef("round"))
	ADDQ(U32(4*block), x)
	ADDQ(U32(block), q)
	ADDQ(Imm(4), scales)
	DECQ(blocks)
	JNZ(LabelRef("quantiseBlock"))
	done()

	TEXT("dequantiseInt8AVX2", NOSPLIT, "func(x *float32, q *int8, scales *float32, blocks int)")
	Pragma("noescape")
	Doc("dequantiseInt8AVX2 sets x to whole blocks of integers times their scales. There is one block at least.")
	x, q, scales, blocks = pointer("x"), pointer("q"), pointer("scales"), pointer("blocks")
	i = GP64()
	Label("dequantiseBlock")
	scale = YMM()
	VBROADCASTSS(Mem{Base: scales}, scale)
	XORQ(i, i)
	Label("multiply")
	for j := range 4 {
		y := YMM()
		VPMOVSXBD(Mem{Base: q, Index: i, Scale: 1, Disp: 8 * j}, y)
		VCVTDQ2PS(y, y)
		VMULPS(scale, y, y)
		VMOVUPS(y, Mem{Base: x, Index: i, Scale: 4, Disp: 32 * j})
	}
	ADDQ(Imm(32), i)
	CMPQ(i, U32(block))
	JL(LabelRef("multiply"))
	ADDQ(U32(4*block), x)
	ADDQ(U32(block), q)
	ADDQ(Imm(4), scales)
	DECQ(blocks)
	JNZ(LabelRef("dequantiseBlock"))
	done()

	TEXT("encodeBFloat16AVX2", NOSPLIT, "func(dst *uint16, x *float32, n int)")
	Pragma("noescape")
	Doc("encodeBFloat16AVX2 sets dst to x, rounded to nearest even. n is a multiple of 8, not 0.")
	dst, x, n := pointer("dst"), pointer("x"), pointer("n")
	one, below, quiet := constant(1), constant(0x7fff), constant(0x00400000)
	i = GP64()
	XORQ(i, i)
	Label("encode")
	y, odd, nan := YMM(), YMM(), YMM()
	VMOVUPS(Mem{Base: x, Index: i, Scale: 4}, y)
	VCMPPS(Imm(3), y, y, nan) // unordered
	VPSRLD(Imm(16), y, odd)
	VPAND(one, odd, odd)
	VPADDD(below, odd, odd)
	VPADDD(y, odd, odd)
	VPOR(quiet, y, y)
	VBLENDVPS(nan, y, odd, y)
	VPSRLD(Imm(16), y, y)
	VPACKUSDW(y, y, y)
	VPERMQ(Imm(0b1000), y, y)
	VMOVDQU(y.AsX(), Mem{Base: dst, Index: i, Scale: 2})
	ADDQ(Imm(8), i)
	CMPQ(i, n)
	JL(LabelRef("encode"))
	done()

	TEXT("decodeBFloat16AVX2", NOSPLIT, "func(dst *float32, x *uint16, n int)")
	Pragma("noescape")
	Doc("decodeBFloat16AVX2 sets dst to x. n is a multiple of 8, not 0.")
	dst, x, n = pointer("dst"), pointer("x"), pointer("n")
	i = GP64()
	XORQ(i, i)
	Label("decode")
	y = YMM()
	VPMOVZXWD(Mem{Base: x, Index: i, Scale: 2}, y)
	VPSLLD(Imm(16), y, y)
	VMOVUPS(y, Mem{Base: dst, Index: i, Scale: 4})
	ADDQ(Imm(8), i)
	CMPQ(i, n)
	JL(LabelRef("decode"))
	done()

	Generate()
}

func pointer(name string) reg.GPVirtual { return Load(Param(name), GP64()).(reg.GPVirtual) }

// constant returns a register with bits in all lanes.
func constant(bits uint32) reg.VecVirtual {
	word, low, y := GP32(), XMM(), YMM()
	MOVL(U32(bits), word)
	VMOVD(word, low)
	VPBROADCASTD(low, y)
	return y
}

func float(f float32) reg.VecVirtual { return constant(math.Float32bits(f)) }

func done() {
	VZEROUPPER()
	RET()
}
