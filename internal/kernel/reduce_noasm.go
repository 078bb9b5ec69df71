//go:build !amd64 || noasm

package kernel

func sumAsm(l *[lanes]float64, x []float32) int        { return 0 }
func dotAsm(l *[lanes]float64, x, y []float32) int     { return 0 }
func sumSquaresAsm(l *[lanes]float64, x []float32) int { return 0 }
