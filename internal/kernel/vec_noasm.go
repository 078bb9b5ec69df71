//go:build !amd64 || noasm

package kernel

// Without assembly each of these does nothing, and says so: it returns how
// many floats it has worked on.

func addAsm(dst, x []float32) int                            { return 0 }
func addScaledAsm(dst []float32, a float32, x []float32) int { return 0 }
func scaleAsm(dst []float32, a float32) int                  { return 0 }
func divAsm(dst, x []float32, c float32) int                 { return 0 }
func encodeHalfAsm(dst []uint16, x []float32) int            { return 0 }
func decodeHalfAsm(dst []float32, x []uint16) int            { return 0 }
func sgdAsm(dst, p, g []float32, lr, wd float32) int         { return 0 }
func boundedPrefixAsm(x []float32, limit uint32) int         { return 0 }

func addScaled8Asm(dst []float32, s *[8][]float32, weights *[8]float32) int { return 0 }

func momentumAsm(dstP, dstB, p, b, g []float32, lr, mu, wd float32) int { return 0 }

func adamAsm(dstP, dstM, dstV, p, m, v, g []float32, c *AdamCoefficients) int { return 0 }
