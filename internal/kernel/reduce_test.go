package kernel

import (
	"math"
	"math/big"
	"testing"
)

// reduceOf is the definition, of the elements' terms.
func reduceOf(terms []float64) float64 {
	total := 0.0
	for len(terms) > 0 {
		b := terms[:min(ReduceBlock, len(terms))]
		terms = terms[len(b):]
		var l [16]float64
		for i, v := range b {
			l[i%16] += v
		}
		for i := range 8 {
			l[i] += l[i+8]
		}
		l[0], l[1], l[2], l[3] = l[0]+l[4], l[1]+l[5], l[2]+l[6], l[3]+l[7]
		total += (l[0] + l[2]) + (l[1] + l[3])
	}
	return total
}

func sameSum(t *testing.T, what string, got, want float64) {
	t.Helper()
	if math.Float64bits(got) != math.Float64bits(want) && !(got != got && want != want) {
		t.Fatalf("%s: %v (%#016x), want %v (%#016x)", what, got, math.Float64bits(got), want, math.Float64bits(want))
	}
}

func TestReduce(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		rng := newRand(t)
		for range 300 {
			n := rng.IntN(100)
			if rng.IntN(4) == 0 {
				n += ReduceBlock*(1+rng.IntN(3)) - 50
			}
			x, y := vector(rng, n), vector(rng, n)
			if rng.IntN(2) == 0 {
				x, y = finite(rng, n), finite(rng, n)
			}
			sums, products, squares := make([]float64, n), make([]float64, n), make([]float64, n)
			for i := range x {
				sums[i] = float64(x[i])
				products[i] = float64(x[i]) * float64(y[i])
				squares[i] = float64(x[i]) * float64(x[i])
			}
			sameSum(t, "Sum", Sum(x), reduceOf(sums))
			sameSum(t, "Dot", Dot(x, y), reduceOf(products))
			sameSum(t, "SumSquares", SumSquares(x), reduceOf(squares))

			var sum, dot, square float64
			for lo := 0; lo < n; {
				hi := min(n, lo+ReduceBlock*(1+rng.IntN(2)))
				sum = SumBlocks(sum, x[lo:hi])
				dot = DotBlocks(dot, x[lo:hi], y[lo:hi])
				square = SumSquaresBlocks(square, x[lo:hi])
				lo = hi
			}
			sameSum(t, "SumBlocks", sum, Sum(x))
			sameSum(t, "DotBlocks", dot, Dot(x, y))
			sameSum(t, "SumSquaresBlocks", square, SumSquares(x))
		}
	})
}

// TestReduceExact holds a sum against one without rounding.
func TestReduceExact(t *testing.T) {
	rng := newRand(t)
	x, y := random(rng, 3*ReduceBlock+77), random(rng, 3*ReduceBlock+77)
	exact, size := new(big.Float).SetPrec(2000), 0.0
	for i := range x {
		p := new(big.Float).SetPrec(2000).Mul(big.NewFloat(float64(x[i])), big.NewFloat(float64(y[i])))
		exact.Add(exact, p)
		size += math.Abs(float64(x[i]) * float64(y[i]))
	}
	want, _ := exact.Float64()
	// A lane has 256 additions, and after it come 4 and 3 more.
	if got := Dot(x, y); math.Abs(got-want) > size*263*0x1p-53 {
		t.Fatalf("%v, exactly %v", got, want)
	}
}

func TestReducePanics(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("Dot accepts vectors that do not match")
		}
	}()
	Dot(make([]float32, 3), make([]float32, 4))
}

var total float64 // so that no sum is left out

func BenchmarkSum(b *testing.B) {
	x := benchVectors(1, benchLen(b))[0]
	b.SetBytes(int64(4 * len(x)))
	for b.Loop() {
		total = Sum(x)
	}
}

func BenchmarkDot(b *testing.B) {
	v := benchVectors(2, benchLen(b))
	b.SetBytes(int64(8 * len(v[0])))
	for b.Loop() {
		total = Dot(v[0], v[1])
	}
}

func BenchmarkSumSquares(b *testing.B) {
	x := benchVectors(1, benchLen(b))[0]
	b.SetBytes(int64(4 * len(x)))
	for b.Loop() {
		total = SumSquares(x)
	}
}
