//go:build !amd64 || noasm

package kernel

func sumVectorsAsm(dst []float32, sources [][]float32, fresh bool) int { return 0 }
