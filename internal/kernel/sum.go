package kernel

// sum sets d to the sum of the sources from lo to hi, added in their order.
// There must be one source at least, and d must not overlap a source other
// than the first.
func sum(d []float32, sources [][]float32, lo, hi int) {
	var group [8][]float32
	for done := 0; done < len(sources); {
		count := min(len(sources)-done, len(group))
		for i, s := range sources[done : done+count] {
			group[i] = s[lo:hi]
		}
		n := sumVectorsAsm(d, group[:count], done == 0)
		for i, x := range group[:count] {
			if done == 0 && i == 0 {
				copy(d[n:], x[n:])
			} else {
				addGo(d[n:], x[n:])
			}
		}
		done += count
	}
}

// SumVectors sets dst to sources[0] + sources[1] + ..., added in this order.
// dst must not overlap a source other than the first; there must be one source
// at least.
func SumVectors(dst []float32, sources [][]float32) {
	if len(sources) == 0 {
		panic("kernel: the sum of no vectors")
	}
	for _, s := range sources {
		if len(s) != len(dst) {
			panic(badLength)
		}
	}
	for lo := 0; lo < len(dst); lo += tile {
		hi := min(lo+tile, len(dst))
		sum(dst[lo:hi], sources, lo, hi)
	}
}
