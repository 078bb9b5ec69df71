package kernel

// This file holds sums over a vector, in float64. They give the same bits
// everywhere: a vector is cut into blocks of ReduceBlock elements; in a block,
// element i is added to lane i modulo 16, and the lanes are added as a tree;
// the blocks are added in order. (A NaN stays a NaN, but which one is up to
// the machine.)
//
// A caller with a vector in chunks carries the total along. It is that of the
// whole vector, bit for bit, if all chunks but the last are multiples of
// ReduceBlock long:
//
//	total := 0.0
//	for _, chunk := range chunks {
//		total = kernel.SumBlocks(total, chunk)
//	}

// ReduceBlock is the number of elements of one block.
const ReduceBlock = 4096

// lanes is the number of running sums of a block.
const lanes = 16

// Sum returns the sum of x.
func Sum(x []float32) float64 { return SumBlocks(0, x) }

// Dot returns the sum of the products of x and y, which are exact.
func Dot(x, y []float32) float64 { return DotBlocks(0, x, y) }

// SumSquares returns the sum of the squares of x, which are exact.
func SumSquares(x []float32) float64 { return SumSquaresBlocks(0, x) }

// SumBlocks returns total + x[0] + x[1] + ..., block by block.
func SumBlocks(total float64, x []float32) float64 {
	for len(x) > 0 {
		b := x[:min(ReduceBlock, len(x))]
		x = x[len(b):]
		var l [lanes]float64
		n := sumAsm(&l, b)
		sumGo(&l, b[n:])
		total += tree(&l)
	}
	return total
}

// DotBlocks returns total + x[0]*y[0] + x[1]*y[1] + ..., block by block.
func DotBlocks(total float64, x, y []float32) float64 {
	if len(x) != len(y) {
		panic(badLength)
	}
	for len(x) > 0 {
		n := min(ReduceBlock, len(x))
		b, c := x[:n], y[:n]
		x, y = x[n:], y[n:]
		var l [lanes]float64
		n = dotAsm(&l, b, c)
		dotGo(&l, b[n:], c[n:])
		total += tree(&l)
	}
	return total
}

// SumSquaresBlocks returns total + x[0]*x[0] + x[1]*x[1] + ..., block by block.
func SumSquaresBlocks(total float64, x []float32) float64 {
	for len(x) > 0 {
		b := x[:min(ReduceBlock, len(x))]
		x = x[len(b):]
		var l [lanes]float64
		n := sumSquaresAsm(&l, b)
		dotGo(&l, b[n:], b[n:])
		total += tree(&l)
	}
	return total
}

// tree adds the lanes: the upper half to the lower, until there is one.
func tree(l *[lanes]float64) float64 {
	for half := lanes / 2; half > 0; half /= 2 {
		for i := range half {
			l[i] += l[i+half]
		}
	}
	return l[0]
}

// x begins at lane 0.
func sumGo(l *[lanes]float64, x []float32) {
	for ; len(x) >= lanes; x = x[lanes:] {
		for i, v := range (*[lanes]float32)(x) {
			l[i] += float64(v)
		}
	}
	for i, v := range x {
		l[i] += float64(v)
	}
}

func dotGo(l *[lanes]float64, x, y []float32) {
	y = y[:len(x)]
	for ; len(x) >= lanes; x, y = x[lanes:], y[lanes:] {
		w := (*[lanes]float32)(y)
		for i, v := range (*[lanes]float32)(x) {
			l[i] += float64(float64(v) * float64(w[i]))
		}
	}
	for i, v := range x {
		l[i] += float64(float64(v) * float64(y[i]))
	}
}
