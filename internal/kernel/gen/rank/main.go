// Command rank writes the AVX2 assembly of package kernel's order statistics.
//
// For each count of vectors from 2 to 16 there is a sorting network, Batcher's
// merge exchange, on 8 coordinates at a time: a comparator is one VMINPS and
// one VMAXPS. Of the median's network only what reaches the middle is kept. A
// wire is loaded where it is first compared; where the registers do not reach,
// the one that is used again last goes to the stack.
//
// VMINPS and VMAXPS of two zeros both give the second operand, so that the
// signs of zeros get lost on the way; the end of each network makes all of
// them positive.
package main

import (
	"fmt"
	"math"
	"math/bits"
	"slices"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

const (
	// most is the largest count of vectors that has a network.
	most = 16
	// held is the largest count whose pointers stay in registers.
	held = 8
	// bytes of one vector register.
	width = 32
)

var (
	half Mem
	// slots are the places on the stack of the function that is written.
	slots []Mem
)

func main() {
	ConstraintExpr("amd64,!noasm")
	half = GLOBL("rankHalf", RODATA|NOPTR)
	DATA(0, F32(0.5))

	TEXT("medianAVX2", NOSPLIT, "func(dst *float32, sources *[16]*float32, count, n int)")
	Pragma("noescape")
	Doc("medianAVX2 sets dst to the median of the first count sources, 2 to 16. n is a multiple of 8, not 0.")
	counts(func(count int) {
		middle := []int{(count - 1) / 2, count / 2}
		w := sorted(count, slices.Compact(middle), func(w *wires, i reg.Register) {
			low := w.reg(middle[0])
			if count%2 == 0 {
				high, factor := w.reg(middle[1]), w.free()
				VBROADCASTSS(half, factor)
				VMULPS(factor, low, low)
				VMULPS(factor, high, high)
				VADDPS(high, low, low)
			}
			zero := w.free()
			VXORPS(zero, zero, zero)
			VADDPS(zero, low, low)
			VMOVUPS(low, Mem{Base: w.dst, Index: i, Scale: 4})
		})
		w.loop()
	})

	TEXT("trimmedAVX2", NOSPLIT, "func(dst *float32, sources *[16]*float32, table *[17][8]uint32, count, n int)")
	Pragma("noescape")
	Doc("trimmedAVX2 sets dst to the sum of the first count sources, 2 to 16, sorted and masked by rows of the table, divided by its row 16. n is a multiple of 8, not 0.")
	table := Load(Param("table"), GP64())
	counts(func(count int) {
		all := make([]int, count)
		for i := range all {
			all[i] = i
		}
		w := sorted(count, all, func(w *wires, i reg.Register) {
			sum := w.free()
			VXORPS(sum, sum, sum)
			for wire := range count {
				y := w.reg(wire)
				VANDPS(Mem{Base: table, Disp: width * wire}, y, y)
				VADDPS(y, sum, sum)
				w.drop(wire)
			}
			VDIVPS(Mem{Base: table, Disp: width * most}, sum, sum)
			VMOVUPS(sum, Mem{Base: w.dst, Index: i, Scale: 4})
		})
		w.loop()
	})

	TEXT("orderAVX2", NOSPLIT, "func(a, b *float32, n int)")
	Pragma("noescape")
	Doc("orderAVX2 moves the lesser of a and b to a and the greater to b. n is a multiple of 8, not 0.")
	a, b, n, i := Load(Param("a"), GP64()), Load(Param("b"), GP64()), Load(Param("n"), GP64()), GP64()
	XORQ(i, i)
	Label("next")
	x, y, low := YMM(), YMM(), YMM()
	VMOVUPS(Mem{Base: a, Index: i, Scale: 4}, x)
	VMOVUPS(Mem{Base: b, Index: i, Scale: 4}, y)
	VMINPS(y, x, low)
	VMAXPS(y, x, y)
	VMOVUPS(low, Mem{Base: a, Index: i, Scale: 4})
	VMOVUPS(y, Mem{Base: b, Index: i, Scale: 4})
	ADDQ(Imm(8), i)
	CMPQ(i, n)
	JL(LabelRef("next"))
	VZEROUPPER()
	RET()

	Generate()
}

// counts writes a branch for each count of sources and what it leads to.
func counts(body func(count int)) {
	slots = nil
	count := Load(Param("count"), GP64())
	for c := 2; c < most; c++ {
		CMPQ(count, Imm(uint64(c)))
		JE(LabelRef(fmt.Sprintf("count%d", c)))
	}
	JMP(LabelRef(fmt.Sprintf("count%d", most)))
	for c := 2; c <= most; c++ {
		Label(fmt.Sprintf("count%d", c))
		body(c)
		JMP(LabelRef("stop"))
	}
	Label("stop")
	VZEROUPPER()
	RET()
}

// A comparator puts the lesser of wires i < j on i and the greater on j, each
// only if it is wanted.
type comparator struct {
	i, j     int
	min, max bool
}

// network returns the comparators of Batcher's merge exchange (Knuth, The Art
// of Computer Programming 5.2.2, algorithm M) that the wanted wires depend on.
func network(count int, wanted []int) []comparator {
	var all []comparator
	top := 1 << (bits.Len(uint(count-1)) - 1)
	for p := top; p > 0; p /= 2 {
		q, r, d := top, 0, p
		for {
			for i := range count - d {
				if i&p == r {
					all = append(all, comparator{i: i, j: i + d})
				}
			}
			if q == p {
				break
			}
			q, r, d = q/2, p, q-p
		}
	}
	needed := make([]bool, count)
	for _, w := range wanted {
		needed[w] = true
	}
	var kept []comparator
	for _, c := range slices.Backward(all) {
		c.min, c.max = needed[c.i], needed[c.j]
		if c.min || c.max {
			needed[c.i], needed[c.j] = true, true
			kept = append(kept, c)
		}
	}
	slices.Reverse(kept)
	return kept
}

// wires says where the value of each wire is.
type wires struct {
	count    int
	plan     []comparator
	wanted   []int
	end      func(w *wires, i reg.Register)
	dst      reg.Register
	list     reg.Register
	pointers []reg.Register

	step  int          // the comparator that is written
	owner [16]int      // by register: its wire, or -1
	at    []int        // by wire: its register, or -1
	slot  []int        // by wire: its place on the stack, or -1
	fresh []bool       // by wire: still in the source's memory
	index reg.Register // of the coordinates
	busy  map[int]bool // registers that must stay
	pins  map[int]bool // registers that free has given away
}

var registers = [16]reg.VecPhysical{
	reg.Y0, reg.Y1, reg.Y2, reg.Y3, reg.Y4, reg.Y5, reg.Y6, reg.Y7,
	reg.Y8, reg.Y9, reg.Y10, reg.Y11, reg.Y12, reg.Y13, reg.Y14, reg.Y15,
}

func sorted(count int, wanted []int, end func(w *wires, i reg.Register)) *wires {
	w := &wires{count: count, plan: network(count, wanted), wanted: wanted, end: end}
	w.at, w.slot, w.fresh = make([]int, count), make([]int, count), make([]bool, count)
	for i := range count {
		w.at[i], w.slot[i], w.fresh[i] = -1, -1, true
	}
	for r := range w.owner {
		w.owner[r] = -1
	}
	w.busy, w.pins = map[int]bool{}, map[int]bool{}
	return w
}

// loop writes the network for all coordinates.
func (w *wires) loop() {
	w.dst, w.list = Load(Param("dst"), GP64()), Load(Param("sources"), GP64())
	if w.count <= held {
		for i := range w.count {
			p := GP64()
			MOVQ(Mem{Base: w.list, Disp: 8 * i}, p)
			w.pointers = append(w.pointers, p)
		}
	}
	n, i := Load(Param("n"), GP64()), GP64()
	w.index = i
	XORQ(i, i)
	label := fmt.Sprintf("next%d", w.count)
	Label(label)
	for w.step = range w.plan {
		w.compare(w.plan[w.step])
	}
	w.step = len(w.plan)
	w.end(w, i)
	ADDQ(Imm(8), i)
	CMPQ(i, n)
	JL(LabelRef(label))
}

func (w *wires) compare(c comparator) {
	a := w.load(c.i)
	w.busy[a] = true
	b := w.load(c.j)
	w.busy[b] = true
	x, y := registers[a], registers[b]
	switch {
	case c.min && c.max:
		t := w.room()
		VMINPS(y, x, registers[t])
		VMAXPS(y, x, y)
		w.owner[a], w.owner[t], w.at[c.i] = -1, c.i, t
	case c.min:
		VMINPS(y, x, x)
		w.drop(c.j)
	default:
		VMAXPS(y, x, y)
		w.drop(c.i)
	}
	clear(w.busy)
}

// reg returns the register of a wire, which it must fetch first where it is on
// the stack.
func (w *wires) reg(wire int) reg.VecPhysical {
	r := w.load(wire)
	w.pins[r] = true
	return registers[r]
}

// free returns a register for other use, until the turn is over.
func (w *wires) free() reg.VecPhysical {
	r := w.room()
	w.pins[r] = true
	return registers[r]
}

func (w *wires) drop(wire int) {
	r := w.at[wire]
	w.owner[r], w.at[wire] = -1, -1
	delete(w.pins, r)
}

func (w *wires) load(wire int) int {
	if w.at[wire] >= 0 {
		return w.at[wire]
	}
	r := w.room()
	switch {
	case w.fresh[wire]:
		var p reg.Register
		if w.pointers != nil {
			p = w.pointers[wire]
		} else {
			p = GP64()
			MOVQ(Mem{Base: w.list, Disp: 8 * wire}, p)
		}
		VMOVUPS(Mem{Base: p, Index: w.index, Scale: 4}, registers[r])
		w.fresh[wire] = false
	case w.slot[wire] >= 0:
		VMOVUPS(slots[w.slot[wire]], registers[r])
		w.slot[wire] = -1
	default:
		panic(fmt.Sprintf("wire %d of %d has no value", wire, w.count))
	}
	w.owner[r], w.at[wire] = wire, r
	return r
}

// room returns a register without an owner, and makes one if there is none.
func (w *wires) room() int {
	best, last := -1, -1
	for r, wire := range w.owner {
		if w.busy[r] || w.pins[r] {
			continue
		}
		if wire < 0 {
			return r
		}
		if next := w.next(wire); next > last {
			best, last = r, next
		}
	}
	wire := w.owner[best]
	place := 0
	for slices.Contains(w.slot, place) {
		place++
	}
	if place == len(slots) {
		slots = append(slots, AllocLocal(width))
	}
	VMOVUPS(registers[best], slots[place])
	w.slot[wire], w.at[wire], w.owner[best] = place, -1, -1
	return best
}

// next returns the step that uses the wire next.
func (w *wires) next(wire int) int {
	for step := w.step; step < len(w.plan); step++ {
		if c := w.plan[step]; c.i == wire || c.j == wire {
			return step
		}
	}
	if slices.Contains(w.wanted, wire) {
		return len(w.plan) + wire
	}
	return math.MaxInt
}
