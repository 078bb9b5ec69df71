package kernel

import "math/bits"

// This file holds order statistics of several vectors, coordinate by
// coordinate. They give the same bits everywhere and for every order of the
// sources: -0 counts as +0, and what is added is sorted before. The values must
// be finite.

const (
	// networks is the largest count of sources that has an assembly.
	networks = 16
	// rankRoom is the number of floats that are sorted at a time elsewhere, so
	// that they stay in the first-level cache.
	rankRoom = 8192
)

// Median sets dst to the median of the sources in each coordinate. For an even
// count it is a*0.5 + b*0.5 of the middle two, each operation rounded by
// itself: (a+b)/2 to the last bit, but where a+b would overflow or half of one
// is subnormal. A zero is +0. dst may be one of the sources, of which there
// must be one at least. Beyond 1024 sources it allocates.
func Median(dst []float32, sources [][]float32) {
	if len(sources) == 0 {
		panic("kernel: the median of no vectors")
	}
	for _, s := range sources {
		if len(s) != len(dst) {
			panic(badLength)
		}
	}
	n := medianAsm(dst, sources)
	sortedRows(dst, sources, n, func(d, rows []float32, stride int) {
		low, high := (len(sources)-1)/2, len(sources)/2
		a, b := rows[low*stride:][:len(d)], rows[high*stride:][:len(d)]
		if low == high {
			for i := range d {
				d[i] = a[i] + 0 // -0 becomes +0
			}
			return
		}
		for i := range d {
			d[i] = float32(a[i]*0.5) + float32(b[i]*0.5) + 0
		}
	})
}

// TrimmedMean sets dst to the mean, in each coordinate, of the sources without
// the f smallest and the f largest: added in ascending order, beginning with
// +0, and divided by their number. The sum may overflow. dst may be one of the
// sources, of which there must be more than 2f. Beyond 1024 sources it
// allocates.
func TrimmedMean(dst []float32, sources [][]float32, f int) {
	if f < 0 || f >= (len(sources)+1)/2 {
		panic("kernel: the trimmed mean of too few vectors")
	}
	for _, s := range sources {
		if len(s) != len(dst) {
			panic(badLength)
		}
	}
	n := trimmedAsm(dst, sources, f)
	count := float32(len(sources) - 2*f)
	sortedRows(dst, sources, n, func(d, rows []float32, stride int) {
		clear(d)
		for k := f; k < len(sources)-f; k++ {
			Add(d, rows[k*stride:][:len(d)])
		}
		Div(d, d, count)
	})
}

// sortedRows calls use with consecutive parts of dst, from element from on, and
// the parts of the sources that belong to them, as rows of stride floats,
// sorted in each column.
func sortedRows(dst []float32, sources [][]float32, from int, use func(d, rows []float32, stride int)) {
	if from == len(dst) {
		return
	}
	var room [rankRoom]float32
	rows, stride := room[:], rankRoom/len(sources)&^7
	if stride == 0 {
		stride = 8
		rows = make([]float32, stride*len(sources))
	}
	for lo := from; lo < len(dst); lo += stride {
		hi := min(lo+stride, len(dst))
		for k, s := range sources {
			copy(rows[k*stride:], s[lo:hi])
		}
		// The columns beyond hi are compared too: whole registers are faster.
		sortRows(rows, len(sources), stride, (hi-lo+7)&^7)
		use(dst[lo:hi], rows, stride)
	}
}

// sortRows sorts the first width columns by Batcher's merge exchange (Knuth,
// The Art of Computer Programming 5.2.2, algorithm M).
func sortRows(rows []float32, count, stride, width int) {
	if count < 2 {
		return
	}
	top := 1 << (bits.Len(uint(count-1)) - 1)
	for p := top; p > 0; p /= 2 {
		q, r, d := top, 0, p
		for {
			for i := range count - d {
				if i&p == r {
					order(rows[i*stride:][:width], rows[(i+d)*stride:][:width])
				}
			}
			if q == p {
				break
			}
			q, r, d = q/2, p, q-p
		}
	}
}

// order moves the lesser of a and b to a and the greater to b.
func order(a, b []float32) {
	n := orderAsm(a, b)
	orderGo(a[n:], b[n:])
}

func orderGo(a, b []float32) {
	b = b[:len(a)]
	for i, x := range a {
		y := b[i]
		a[i], b[i] = min(x, y), max(x, y)
	}
}
