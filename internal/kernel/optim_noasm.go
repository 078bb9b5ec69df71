//go:build !amd64 || noasm

package kernel

func nesterovAsm(dstP, dstB, p, b, g []float32, lr, mu, wd float32) int { return 0 }

func adamWAsm(dstP, dstM, dstV, p, m, v, g []float32, c *AdamCoefficients) int { return 0 }

func rmsPropAsm(dstP, dstV, p, v, g []float32, c *RMSPropCoefficients) int { return 0 }

func rmsPropMomentumAsm(dstP, dstV, dstB, p, v, b, g []float32, c *RMSPropCoefficients) int { return 0 }

func adagradAsm(dstP, dstS, p, s, g []float32, lr, eps, wd float32) int { return 0 }
