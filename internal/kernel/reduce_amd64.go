//go:build amd64 && !noasm

package kernel

//go:generate sh -c "cd gen && go run ./reduce -out ../reduce_amd64.s -stubs ../reduce_stubs_amd64.go -pkg kernel"

// wholeLanes is whole for what needs a float for each lane.
func wholeLanes(n int) int { return whole(n) &^ (lanes - 1) }

func sumAsm(l *[lanes]float64, x []float32) int {
	n := wholeLanes(len(x))
	if n > 0 {
		sumAVX2(l, first(x), n)
	}
	return n
}

func dotAsm(l *[lanes]float64, x, y []float32) int {
	n := wholeLanes(len(x))
	if n > 0 {
		dotAVX2(l, first(x), first(y), n)
	}
	return n
}

func sumSquaresAsm(l *[lanes]float64, x []float32) int {
	n := wholeLanes(len(x))
	if n > 0 {
		sumSquaresAVX2(l, first(x), n)
	}
	return n
}
