//go:build amd64 && !noasm

package kernel

import "math"

//go:generate sh -c "cd gen && go run ./rank -out ../rank_amd64.s -stubs ../rank_stubs_amd64.go -pkg kernel"

// rankSources returns how many floats the assembly takes, and from where.
func rankSources(sources [][]float32) (n int, p [networks]*float32) {
	if len(sources) < 2 || len(sources) > networks {
		return 0, p
	}
	for i, s := range sources {
		p[i] = first(s)
	}
	return whole(len(sources[0])), p
}

func medianAsm(dst []float32, sources [][]float32) int {
	n, p := rankSources(sources)
	if n > 0 {
		medianAVX2(first(dst), &p, len(sources), n)
	}
	return n
}

func trimmedAsm(dst []float32, sources [][]float32, f int) int {
	n, p := rankSources(sources)
	if n > 0 {
		// What is dropped becomes +0, which changes no sum that began with +0.
		var table [networks + 1][8]uint32
		for k := f; k < len(sources)-f; k++ {
			for i := range table[k] {
				table[k][i] = math.MaxUint32
			}
		}
		for i := range table[networks] {
			table[networks][i] = math.Float32bits(float32(len(sources) - 2*f))
		}
		trimmedAVX2(first(dst), &p, &table, len(sources), n)
	}
	return n
}

func orderAsm(a, b []float32) int {
	n := whole(len(a))
	if n > 0 {
		orderAVX2(first(a), first(b), n)
	}
	return n
}
