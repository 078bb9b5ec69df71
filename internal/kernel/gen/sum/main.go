// Command sum writes the AVX2 assembly of package kernel's sums over several
// vectors: one function for each number of sources, which adds them in order
// in a register.
package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

const (
	width = 32 // bytes of one vector register
	most  = 8  // sources
	// ahead is how far before their use sources are asked for: the sum goes
	// over many streams in short parts, which the CPU does not foresee.
	ahead = 512
)

func main() {
	ConstraintExpr("amd64,!noasm")
	for count := 2; count <= most; count++ {
		function(fmt.Sprintf("sum%dAVX2", count), fmt.Sprintf("sets dst to the sum of %d sources, added in order.", count), count, true)
	}
	for count := 1; count <= most; count++ {
		function(fmt.Sprintf("add%dAVX2", count), fmt.Sprintf("adds %d sources to dst in order.", count), count, false)
	}
	Generate()
}

// function writes one; fresh: dst is not read.
func function(name, does string, count int, fresh bool) {
	TEXT(name, NOSPLIT, "func(dst *float32, sources *[8]*float32, n int)")
	Pragma("noescape")
	Doc(name + " " + does)
	dst := Load(Param("dst"), GP64()).(reg.GPVirtual)
	list := Load(Param("sources"), GP64())
	sources := make([]reg.GPVirtual, count)
	for i := range sources {
		sources[i] = GP64()
		MOVQ(Mem{Base: list, Disp: 8 * i}, sources[i])
	}
	n, i := Load(Param("n"), GP64()), GP64()
	XORQ(i, i)
	step := func(j int) {
		at := func(p reg.Register) Mem { return Mem{Base: p, Index: i, Scale: 4, Disp: j * width} }
		y := YMM()
		rest := sources
		if fresh {
			VMOVUPS(at(sources[0]), y)
			rest = sources[1:]
		} else {
			VMOVUPS(at(dst), y)
		}
		for _, s := range rest {
			VADDPS(at(s), y, y)
		}
		VMOVUPS(y, at(dst))
	}
	turn := func(times int, label, next string) {
		Label(label)
		end := GP64()
		LEAQ(Mem{Base: i, Disp: 8 * times}, end)
		CMPQ(end, n)
		JG(LabelRef(next))
		if times > 1 {
			for _, s := range sources {
				PREFETCHT0(Mem{Base: s, Index: i, Scale: 4, Disp: ahead})
			}
		}
		for j := range times {
			step(j)
		}
		MOVQ(end, i)
		JMP(LabelRef(label))
	}
	turn(2, "many", "one") // 64 bytes, a line of the cache
	turn(1, "one", "stop")
	Label("stop")
	VZEROUPPER()
	RET()
}
