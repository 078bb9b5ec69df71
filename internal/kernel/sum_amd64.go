//go:build amd64 && !noasm

package kernel

//go:generate sh -c "cd gen && go run ./sum -out ../sum_amd64.s -stubs ../sum_stubs_amd64.go -pkg kernel"

// sumVectorsAsm adds the sources, at most 8, to dst in order; fresh: instead of what
// dst has. It returns how many floats it worked on.
func sumVectorsAsm(dst []float32, sources [][]float32, fresh bool) int {
	n := whole(len(dst))
	if n == 0 {
		return 0
	}
	if fresh && len(sources) == 1 {
		copy(dst[:n], sources[0])
		return n
	}
	var p [8]*float32
	for i, s := range sources {
		p[i] = first(s)
	}
	d, count := first(dst), len(sources)
	if fresh {
		count += 8
	}
	switch count {
	case 1:
		add1AVX2(d, &p, n)
	case 2:
		add2AVX2(d, &p, n)
	case 3:
		add3AVX2(d, &p, n)
	case 4:
		add4AVX2(d, &p, n)
	case 5:
		add5AVX2(d, &p, n)
	case 6:
		add6AVX2(d, &p, n)
	case 7:
		add7AVX2(d, &p, n)
	case 8:
		add8AVX2(d, &p, n)
	case 8 + 2:
		sum2AVX2(d, &p, n)
	case 8 + 3:
		sum3AVX2(d, &p, n)
	case 8 + 4:
		sum4AVX2(d, &p, n)
	case 8 + 5:
		sum5AVX2(d, &p, n)
	case 8 + 6:
		sum6AVX2(d, &p, n)
	case 8 + 7:
		sum7AVX2(d, &p, n)
	case 8 + 8:
		sum8AVX2(d, &p, n)
	}
	return n
}
