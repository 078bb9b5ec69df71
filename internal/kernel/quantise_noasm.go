//go:build !amd64 || noasm

package kernel

func quantiseInt8Asm(q []int8, scales []float32, x []float32) int   { return 0 }
func dequantiseInt8Asm(x []float32, q []int8, scales []float32) int { return 0 }
func encodeBFloat16Asm(dst []uint16, x []float32) int               { return 0 }
func decodeBFloat16Asm(dst []float32, x []uint16) int               { return 0 }
