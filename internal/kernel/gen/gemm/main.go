// Command gemm writes the tile kernels of package kernel for AVX2 and FMA.
package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

const rows = 6

// tile holds the sums of 6 rows: in two registers of 8 columns each if it has
// 16 columns, in two registers that take turns if it has 8. Either way there
// are 12 sums, enough to hide the latency of the additions.
type tile struct {
	columns int
	sums    [rows][2]VecVirtual
}

func newTile(columns int) (t tile) {
	t.columns = columns
	for i := range t.sums {
		t.sums[i] = [2]VecVirtual{YMM(), YMM()}
	}
	return t
}

// step adds one outer product: a row of b and the six floats at left. turn
// counts the products.
func (t tile) step(turn int, b Mem, left func(i int) Mem) {
	b0, b1 := YMM(), YMM()
	VMOVUPS(b, b0)
	if t.columns == 16 {
		VMOVUPS(b.Offset(32), b1)
	}
	for i, sum := range t.sums {
		x := YMM()
		VBROADCASTSS(left(i), x)
		if t.columns == 16 {
			VFMADD231PS(x, b0, sum[0])
			VFMADD231PS(x, b1, sum[1])
		} else {
			VFMADD231PS(x, b0, sum[turn%2])
		}
	}
}

// finish stores the tile to the rows that at returns, or adds it to them one
// row after the other, and then goes on at the label done.
func (t tile) finish(add Register, at func(i int) Mem) {
	if t.columns == 8 {
		for _, sum := range t.sums {
			VADDPS(sum[1], sum[0], sum[0])
		}
	}
	TESTB(add, add)
	JNE(LabelRef("sum"))
	for i, sum := range t.sums {
		m := at(i)
		for j := range t.columns / 8 {
			VMOVUPS(sum[j], m.Offset(32*j))
		}
	}
	JMP(LabelRef("done"))
	Label("sum")
	for i, sum := range t.sums {
		m := at(i)
		for j := range t.columns / 8 {
			VADDPS(m.Offset(32*j), sum[j], sum[j])
		}
		for j := range t.columns / 8 {
			VMOVUPS(sum[j], m.Offset(32*j))
		}
	}
	Label("done")
}

func rowTiles(columns int) {
	name := fmt.Sprintf("rowTiles%dAVX2", columns)
	TEXT(name, NOSPLIT, "func(c *float32, coff *[6]int, a *float32, aoff *[6]int, tiles, runs, length, step int, b, bias *float32, add bool)")
	Doc(name + fmt.Sprintf(" is rowTiles with %d columns.", columns))
	Pragma("noescape")
	t := newTile(columns)
	length := Load(Param("length"), GP64())
	step := Load(Param("step"), GP64())
	SHLQ(Imm(2), step)
	// Where the offsets of the tile at hand lie in coff and aoff.
	at := GP64()
	XORQ(at, at)

	Label("tile")
	bias := Load(Param("bias"), GP64())
	VMOVUPS(Mem{Base: bias}, t.sums[0][0])
	if columns == 16 {
		VMOVUPS(Mem{Base: bias, Disp: 32}, t.sums[0][1])
	} else {
		VXORPS(t.sums[0][1], t.sums[0][1], t.sums[0][1])
	}
	for i := 1; i < rows; i++ {
		VMOVAPS(t.sums[0][0], t.sums[i][0])
		VMOVAPS(t.sums[0][1], t.sums[i][1])
	}
	a := Load(Param("a"), GP64())
	aoff := Load(Param("aoff"), GP64())
	var row [rows]GPVirtual
	for i := range row {
		row[i] = GP64()
		MOVQ(Mem{Base: aoff, Index: at, Scale: 1, Disp: 8 * i}, row[i])
		LEAQ(Mem{Base: a, Index: row[i], Scale: 4}, row[i])
	}
	runs := Load(Param("runs"), GP64())
	b := Load(Param("b"), GP64())
	k, left := GP64(), GP64()

	one := func(d int) {
		t.step(d, Mem{Base: b, Disp: 4 * columns * d}, func(i int) Mem { return Mem{Base: row[i], Index: k, Scale: 4, Disp: 4 * d} })
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
	ADDQ(U32(4*4*columns), b)
	ADDQ(Imm(4), k)
	SUBQ(Imm(4), left)
	JGE(LabelRef("four"))
	Label("rest")
	ADDQ(Imm(4), left)
	JEQ(LabelRef("next"))
	Label("one")
	one(0)
	ADDQ(Imm(uint64(4*columns)), b)
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
		MOVQ(Mem{Base: coff, Index: at, Scale: 1, Disp: 8 * i}, o)
		return Mem{Base: c, Index: o, Scale: 4}
	})
	ADDQ(Imm(8*rows), at)
	tiles := Load(Param("tiles"), GP64())
	IMUL3Q(Imm(8*rows), tiles, tiles)
	CMPQ(at, tiles)
	JLT(LabelRef("tile"))
	VZEROUPPER()
	RET()
}

func colTile(columns int) {
	name := fmt.Sprintf("colTile%dAVX2", columns)
	TEXT(name, NOSPLIT, "func(c *float32, ldc int, a *float32, outer, inner, jump, step int, b *float32, ldb int, add bool)")
	Doc(name + fmt.Sprintf(" is colTile with %d columns.", columns))
	Pragma("noescape")
	t := newTile(columns)
	for _, sum := range t.sums {
		VXORPS(sum[0], sum[0], sum[0])
		VXORPS(sum[1], sum[1], sum[1])
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
	one := func(turn int) {
		t.step(turn, Mem{Base: b}, func(i int) Mem { return Mem{Base: a, Disp: 4 * i} })
		ADDQ(step, a)
		ADDQ(ldb, b)
	}
	Label("outer")
	MOVQ(line, a)
	MOVQ(inner, left)
	SUBQ(Imm(2), left)
	JLT(LabelRef("rest"))
	Label("two")
	one(0)
	one(1)
	SUBQ(Imm(2), left)
	JGE(LabelRef("two"))
	Label("rest")
	ADDQ(Imm(2), left)
	JEQ(LabelRef("next"))
	one(0)
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
	VZEROUPPER()
	RET()
}

func main() {
	ConstraintExpr("amd64,!noasm")
	for _, columns := range []int{16, 8} {
		rowTiles(columns)
		colTile(columns)
	}
	Generate()
}
