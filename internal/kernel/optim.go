package kernel

import "math"

// This file holds the optimizers that vec.go does not: like those, they round
// every product and every sum by itself and give the same bits on both paths.
// The vectors may start at any address.

// RMSPropCoefficients are the scalars of one RMSProp step; OneMinusAlpha is
// rounded from the exact difference.
type RMSPropCoefficients struct {
	Alpha, OneMinusAlpha, LR, Eps, Momentum, WeightDecay float32
}

// Nesterov is one step of SGD with Nesterov's momentum: with d = g + wd*p,
// dstB = mu*b + d and dstP = p - lr*(d + mu*dstB). dstP may be p, dstB may be
// b.
func Nesterov(dstP, dstB, p, b, g []float32, lr, mu, wd float32) {
	n := len(dstP)
	if len(dstB) != n || len(p) != n || len(b) != n || len(g) != n {
		panic(badLength)
	}
	i := nesterovAsm(dstP, dstB, p, b, g, lr, mu, wd)
	nesterovGo(dstP[i:], dstB[i:], p[i:], b[i:], g[i:], lr, mu, wd)
}

// AdamW is one step of AdamW on the parameters p, first moments m and second
// moments v: Adam on g alone, from p - c.WeightDecay*p, so that WeightDecay is
// the learning rate times the decay. Each destination may be its source.
func AdamW(dstP, dstM, dstV, p, m, v, g []float32, c AdamCoefficients) {
	n := len(dstP)
	if len(dstM) != n || len(dstV) != n || len(p) != n || len(m) != n || len(v) != n || len(g) != n {
		panic(badLength)
	}
	i := adamWAsm(dstP, dstM, dstV, p, m, v, g, &c)
	adamWGo(dstP[i:], dstM[i:], dstV[i:], p[i:], m[i:], v[i:], g[i:], &c)
}

// RMSProp is one step of RMSProp without momentum on the parameters p and mean
// squares v. Each destination may be its source.
func RMSProp(dstP, dstV, p, v, g []float32, c RMSPropCoefficients) {
	n := len(dstP)
	if len(dstV) != n || len(p) != n || len(v) != n || len(g) != n {
		panic(badLength)
	}
	i := rmsPropAsm(dstP, dstV, p, v, g, &c)
	rmsPropGo(dstP[i:], dstV[i:], p[i:], v[i:], g[i:], &c)
}

// RMSPropMomentum is one step of RMSProp with momentum on the parameters p,
// mean squares v and momentum b. Each destination may be its source.
func RMSPropMomentum(dstP, dstV, dstB, p, v, b, g []float32, c RMSPropCoefficients) {
	n := len(dstP)
	if len(dstV) != n || len(dstB) != n || len(p) != n || len(v) != n || len(b) != n || len(g) != n {
		panic(badLength)
	}
	i := rmsPropMomentumAsm(dstP, dstV, dstB, p, v, b, g, &c)
	rmsPropMomentumGo(dstP[i:], dstV[i:], dstB[i:], p[i:], v[i:], b[i:], g[i:], &c)
}

// Adagrad is one step of Adagrad on the parameters p and sums of squares s:
// with d = g + wd*p, dstS = s + d*d and dstP = p - lr*(d/(sqrt(dstS) + eps)).
// Each destination may be its source.
func Adagrad(dstP, dstS, p, s, g []float32, lr, eps, wd float32) {
	n := len(dstP)
	if len(dstS) != n || len(p) != n || len(s) != n || len(g) != n {
		panic(badLength)
	}
	i := adagradAsm(dstP, dstS, p, s, g, lr, eps, wd)
	adagradGo(dstP[i:], dstS[i:], p[i:], s[i:], g[i:], lr, eps, wd)
}

func nesterovGo(dstP, dstB, p, b, g []float32, lr, mu, wd float32) {
	dstB, p, b, g = dstB[:len(dstP)], p[:len(dstP)], b[:len(dstP)], g[:len(dstP)]
	for i := range dstP {
		d := g[i] + float32(wd*p[i])
		buf := float32(mu*b[i]) + d
		dstB[i] = buf
		d += float32(mu * buf)
		dstP[i] = p[i] - float32(lr*d)
	}
}

func adamWGo(dstP, dstM, dstV, p, m, v, g []float32, c *AdamCoefficients) {
	n := len(dstP)
	dstM, dstV, p, m, v, g = dstM[:n], dstV[:n], p[:n], m[:n], v[:n], g[:n]
	for i := range dstP {
		d := g[i]
		m1 := float32(c.Beta1*m[i]) + float32(c.OneMinusBeta1*d)
		v1 := float32(c.Beta2*v[i]) + float32(c.OneMinusBeta2*float32(d*d))
		denominator := float32(float32(math.Sqrt(float64(v1)))/c.SqrtBias2) + c.Eps
		dstM[i] = m1
		dstV[i] = v1
		kept := p[i] - float32(c.WeightDecay*p[i])
		dstP[i] = kept - float32(c.StepSize*float32(m1/denominator))
	}
}

func rmsPropGo(dstP, dstV, p, v, g []float32, c *RMSPropCoefficients) {
	n := len(dstP)
	dstV, p, v, g = dstV[:n], p[:n], v[:n], g[:n]
	for i := range dstP {
		d := g[i] + float32(c.WeightDecay*p[i])
		v1 := float32(c.Alpha*v[i]) + float32(c.OneMinusAlpha*float32(d*d))
		dstV[i] = v1
		d /= float32(math.Sqrt(float64(v1))) + c.Eps
		dstP[i] = p[i] - float32(c.LR*d)
	}
}

func rmsPropMomentumGo(dstP, dstV, dstB, p, v, b, g []float32, c *RMSPropCoefficients) {
	n := len(dstP)
	dstV, dstB, p, v, b, g = dstV[:n], dstB[:n], p[:n], v[:n], b[:n], g[:n]
	for i := range dstP {
		d := g[i] + float32(c.WeightDecay*p[i])
		v1 := float32(c.Alpha*v[i]) + float32(c.OneMinusAlpha*float32(d*d))
		dstV[i] = v1
		d /= float32(math.Sqrt(float64(v1))) + c.Eps
		buf := float32(c.Momentum*b[i]) + d
		dstB[i] = buf
		dstP[i] = p[i] - float32(c.LR*buf)
	}
}

func adagradGo(dstP, dstS, p, s, g []float32, lr, eps, wd float32) {
	n := len(dstP)
	dstS, p, s, g = dstS[:n], p[:n], s[:n], g[:n]
	for i := range dstP {
		d := g[i] + float32(wd*p[i])
		sum := s[i] + float32(d*d)
		dstS[i] = sum
		d /= float32(math.Sqrt(float64(sum))) + eps
		dstP[i] = p[i] - float32(lr*d)
	}
}
