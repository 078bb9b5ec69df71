// Command gemm writes the tile kernels of package kernel for AVX2 and FMA.
package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

const rows = 6

// tile holds the sums of 6 rows by 16 columns.
type tile [rows][2]VecVirtual

func newTile() (t tile) {
	for i := range t {
		t[i] = [2]VecVirtual{YMM(), YMM()}
	}
	return t
}

// step adds one outer product: 16 floats of b and the six floats at left.
func (t tile) step(b Mem, left func(i int) Mem) {
	b0, b1 := YMM(), YMM()
	VMOVUPS(b, b0)
	VMOVUPS(b.Offset(32), b1)
	for i := range t {
		x := YMM()
		VBROADCASTSS(left(i), x)
		VFMADD231PS(x, b0, t[i][0])
		VFMADD231PS(x, b1, t[i][1])
	}
}

// finish stores the tile to the rows that at returns, or adds it to them one
// row after the other.
func (t tile) finish(add Register, at func(i int) Mem) {
	TESTB(add, add)
	JNE(LabelRef("sum"))
	for i := range t {
		m := at(i)
		VMOVUPS(t[i][0], m)
		VMOVUPS(t[i][1], m.Offset(32))
	}
	VZEROUPPER()
	RET()
	Label("sum")
	for i := range t {
		m := at(i)
		VADDPS(m, t[i][0], t[i][0])
		VADDPS(m.Offset(32), t[i][1], t[i][1])
		VMOVUPS(t[i][0], m)
		VMOVUPS(t[i][1], m.Offset(32))
	}
	VZEROUPPER()
	RET()
}

func rowTile() {
	TEXT("rowTileAVX2", NOSPLIT, "func(c *float32, coff *[6]int, a *float32, aoff *[6]int, runs, length, step int, b *float32, bias *[16]float32, add bool)")
	Doc("rowTileAVX2 is rowTile.")
	Pragma("noescape")
	t := newTile()
	bias := Load(Param("bias"), GP64())
	VMOVUPS(Mem{Base: bias}, t[0][0])
	VMOVUPS(Mem{Base: bias, Disp: 32}, t[0][1])
	for i := 1; i < rows; i++ {
		VMOVAPS(t[0][0], t[i][0])
		VMOVAPS(t[0][1], t[i][1])
	}
	a := Load(Param("a"), GP64())
	aoff := Load(Param("aoff"), GP64())
	var row [rows]GPVirtual
	for i := range row {
		row[i] = GP64()
		MOVQ(Mem{Base: aoff, Disp: 8 * i}, row[i])
		LEAQ(Mem{Base: a, Index: row[i], Scale: 4}, row[i])
	}
	runs := Load(Param("runs"), GP64())
	length := Load(Param("length"), GP64())
	step := Load(Param("step"), GP64())
	SHLQ(Imm(2), step)
	b := Load(Param("b"), GP64())
	k, left := GP64(), GP64()

	one := func(d int) {
		t.step(Mem{Base: b, Disp: 64 * d}, func(i int) Mem { return Mem{Base: row[i], Index: k, Scale: 4, Disp: 4 * d} })
	}
	Label("run")
	XORQ(k, k)
	MOVQ(length, left)
	SUBQ(Imm(4), left)
	JLT(LabelRef("rest"))
	Label("four")
	for d := range 4 {
		one(d)
	}
	ADDQ(U32(256), b)
	ADDQ(Imm(4), k)
	SUBQ(Imm(4), left)
	JGE(LabelRef("four"))
	Label("rest")
	ADDQ(Imm(4), left)
	JEQ(LabelRef("next"))
	Label("one")
	one(0)
	ADDQ(Imm(64), b)
	INCQ(k)
	DECQ(left)
	JNE(LabelRef("one"))
	Label("next")
	for i := range row {
		ADDQ(step, row[i])
	}
	DECQ(runs)
	JNE(LabelRef("run"))

	c := Load(Param("c"), GP64())
	coff := Load(Param("coff"), GP64())
	t.finish(Load(Param("add"), GP8()), func(i int) Mem {
		o := GP64()
		MOVQ(Mem{Base: coff, Disp: 8 * i}, o)
		return Mem{Base: c, Index: o, Scale: 4}
	})
}

func colTile() {
	TEXT("colTileAVX2", NOSPLIT, "func(c *float32, ldc int, a *float32, outer, inner, jump, step int, b *float32, ldb int, add bool)")
	Doc("colTileAVX2 is colTile.")
	Pragma("noescape")
	t := newTile()
	for i := range t {
		VXORPS(t[i][0], t[i][0], t[i][0])
		VXORPS(t[i][1], t[i][1], t[i][1])
	}
	line := Load(Param("a"), GP64())
	outer := Load(Param("outer"), GP64())
	inner := Load(Param("inner"), GP64())
	jump := Load(Param("jump"), GP64())
	step := Load(Param("step"), GP64())
	b := Load(Param("b"), GP64())
	ldb := Load(Param("ldb"), GP64())
	SHLQ(Imm(2), jump)
	SHLQ(Imm(2), step)
	SHLQ(Imm(2), ldb)
	a, left := GP64(), GP64()
	one := func() {
		t.step(Mem{Base: b}, func(i int) Mem { return Mem{Base: a, Disp: 4 * i} })
		ADDQ(step, a)
		ADDQ(ldb, b)
	}
	Label("outer")
	MOVQ(line, a)
	MOVQ(inner, left)
	SUBQ(Imm(2), left)
	JLT(LabelRef("rest"))
	Label("two")
	one()
	one()
	SUBQ(Imm(2), left)
	JGE(LabelRef("two"))
	Label("rest")
	ADDQ(Imm(2), left)
	JEQ(LabelRef("next"))
	one()
	Label("next")
	ADDQ(jump, line)
	DECQ(outer)
	JNE(LabelRef("outer"))

	c := Load(Param("c"), GP64())
	ldc := Load(Param("ldc"), GP64())
	SHLQ(Imm(2), ldc)
	t.finish(Load(Param("add"), GP8()), func(i int) Mem {
		if i > 0 {
			ADDQ(ldc, c)
		}
		return Mem{Base: c}
	})
}

func main() {
	ConstraintExpr("amd64,!noasm")
	rowTile()
	colTile()
	Generate()
}
