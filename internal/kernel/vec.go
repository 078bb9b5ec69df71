package kernel

import "math"

// This file holds the operations on whole vectors. They are deterministic: the
// AVX2 and the plain Go path round every product and every sum by itself and
// in the same order, so they give the same bits (a NaN stays a NaN, but which
// one is up to the machine).

// tile is the number of floats that a sum over many vectors works on at a
// time: the running sum stays in the second-level cache, and each source is
// read in long enough parts for the CPU to foresee what comes.
const tile = 16384

// AdamCoefficients are the scalars of one Adam step: OneMinusBeta is rounded
// from the exact difference, StepSize is lr/(1-beta1^t), SqrtBias2 is
// sqrt(1-beta2^t).
type AdamCoefficients struct {
	Beta1, OneMinusBeta1, Beta2, OneMinusBeta2, StepSize, SqrtBias2, Eps, WeightDecay float32
}

// Add sets dst to dst + x.
func Add(dst, x []float32) {
	if len(dst) != len(x) {
		panic(badLength)
	}
	n := addAsm(dst, x)
	addGo(dst[n:], x[n:])
}

// AddScaled sets dst to dst + alpha*x, product and sum rounded apart.
func AddScaled(dst []float32, alpha float32, x []float32) {
	if len(dst) != len(x) {
		panic(badLength)
	}
	n := addScaledAsm(dst, alpha, x)
	addScaledGo(dst[n:], alpha, x[n:])
}

// Scale sets dst to dst*alpha.
func Scale(dst []float32, alpha float32) {
	n := scaleAsm(dst, alpha)
	scaleGo(dst[n:], alpha)
}

// Div sets dst to x/c; dst may be x.
func Div(dst, x []float32, c float32) {
	if len(dst) != len(x) {
		panic(badLength)
	}
	n := divAsm(dst, x, c)
	divGo(dst[n:], x[n:], c)
}

// Mean sets dst to (sources[0] + sources[1] + ...) / len(sources), added in
// this order. dst must not overlap a source other than the first; there must
// be one source at least.
func Mean(dst []float32, sources [][]float32) {
	if len(sources) == 0 {
		panic("kernel: the mean of no vectors")
	}
	for _, s := range sources {
		if len(s) != len(dst) {
			panic(badLength)
		}
	}
	count := float32(len(sources))
	for lo := 0; lo < len(dst); lo += tile {
		hi := min(lo+tile, len(dst))
		d := dst[lo:hi]
		sum(d, sources, lo, hi)
		Div(d, d, count)
	}
}

// WeightedMean sets dst to (weights[0]*sources[0] + weights[1]*sources[1] + ...)
// / (weights[0] + weights[1] + ...), added in this order, every product rounded
// by itself. Where all weights are equal it is Mean, bit for bit. dst must not
// overlap a source other than the first; there must be one source at least.
func WeightedMean(dst []float32, sources [][]float32, weights []float32) {
	if len(weights) != len(sources) {
		panic(badLength)
	}
	if alike(weights) {
		Mean(dst, sources)
		return
	}
	for _, s := range sources {
		if len(s) != len(dst) {
			panic(badLength)
		}
	}
	total := addUp(weights)
	for lo := 0; lo < len(dst); lo += tile {
		hi := min(lo+tile, len(dst))
		d := dst[lo:hi]
		copy(d, sources[0][lo:hi])
		Scale(d, weights[0])
		rest, w := sources[1:], weights[1:]
		for ; len(rest) >= 8; rest, w = rest[8:], w[8:] {
			s := [8][]float32{
				rest[0][lo:hi], rest[1][lo:hi], rest[2][lo:hi], rest[3][lo:hi],
				rest[4][lo:hi], rest[5][lo:hi], rest[6][lo:hi], rest[7][lo:hi],
			}
			n := addScaled8Asm(d, &s, (*[8]float32)(w))
			for i, x := range s {
				addScaledGo(d[n:], w[i], x[n:])
			}
		}
		for i, x := range rest {
			AddScaled(d, w[i], x[lo:hi])
		}
		Div(d, d, total)
	}
}

// alike reports whether all weights are equal.
func alike(weights []float32) bool {
	for _, w := range weights {
		if w != weights[0] {
			return false
		}
	}
	return true
}

func addUp(x []float32) float32 {
	var t float32
	for _, v := range x {
		t += v
	}
	return t
}

// SGD sets dst to p - lr*(g + wd*p); dst may be p.
func SGD(dst, p, g []float32, lr, wd float32) {
	if len(p) != len(dst) || len(g) != len(dst) {
		panic(badLength)
	}
	n := sgdAsm(dst, p, g, lr, wd)
	sgdGo(dst[n:], p[n:], g[n:], lr, wd)
}

// Momentum is one step of SGD with momentum: dstB = mu*b + (g + wd*p) and
// dstP = p - lr*dstB. dstP may be p, dstB may be b.
func Momentum(dstP, dstB, p, b, g []float32, lr, mu, wd float32) {
	n := len(dstP)
	if len(dstB) != n || len(p) != n || len(b) != n || len(g) != n {
		panic(badLength)
	}
	i := momentumAsm(dstP, dstB, p, b, g, lr, mu, wd)
	momentumGo(dstP[i:], dstB[i:], p[i:], b[i:], g[i:], lr, mu, wd)
}

// Adam is one step of Adam on the parameters p, first moments m and second
// moments v. Each destination may be its source.
func Adam(dstP, dstM, dstV, p, m, v, g []float32, c AdamCoefficients) {
	n := len(dstP)
	if len(dstM) != n || len(dstV) != n || len(p) != n || len(m) != n || len(v) != n || len(g) != n {
		panic(badLength)
	}
	i := adamAsm(dstP, dstM, dstV, p, m, v, g, &c)
	adamGo(dstP[i:], dstM[i:], dstV[i:], p[i:], m[i:], v[i:], g[i:], &c)
}

// FirstNonFinite returns the index of the first NaN or infinity of x, or -1.
func FirstNonFinite(x []float32) int { return FirstBeyond(x, math.MaxFloat32) }

// FirstBeyond returns the index of the first of x that is beyond -limit or
// limit, or NaN; -1 if there is none. The limit is not negative.
func FirstBeyond(x []float32, limit float32) int {
	bits := math.Float32bits(limit)
	n := boundedPrefixAsm(x, bits)
	if i := firstBeyondGo(x[n:], bits); i >= 0 {
		return n + i
	}
	return -1
}

const badLength = "kernel: vector lengths differ"

func addGo(dst, x []float32) {
	x = x[:len(dst)]
	for i := range dst {
		dst[i] += x[i]
	}
}

func addScaledGo(dst []float32, alpha float32, x []float32) {
	x = x[:len(dst)]
	for i := range dst {
		dst[i] += float32(alpha * x[i])
	}
}

func scaleGo(dst []float32, alpha float32) {
	for i := range dst {
		dst[i] *= alpha
	}
}

func divGo(dst, x []float32, c float32) {
	x = x[:len(dst)]
	for i := range dst {
		dst[i] = x[i] / c
	}
}

func sgdGo(dst, p, g []float32, lr, wd float32) {
	p, g = p[:len(dst)], g[:len(dst)]
	for i := range dst {
		d := g[i] + float32(wd*p[i])
		dst[i] = p[i] - float32(lr*d)
	}
}

func momentumGo(dstP, dstB, p, b, g []float32, lr, mu, wd float32) {
	dstB, p, b, g = dstB[:len(dstP)], p[:len(dstP)], b[:len(dstP)], g[:len(dstP)]
	for i := range dstP {
		d := g[i] + float32(wd*p[i])
		d = float32(mu*b[i]) + d
		dstB[i] = d
		dstP[i] = p[i] - float32(lr*d)
	}
}

func adamGo(dstP, dstM, dstV, p, m, v, g []float32, c *AdamCoefficients) {
	n := len(dstP)
	dstM, dstV, p, m, v, g = dstM[:n], dstV[:n], p[:n], m[:n], v[:n], g[:n]
	for i := range dstP {
		d := g[i] + float32(c.WeightDecay*p[i])
		m1 := float32(c.Beta1*m[i]) + float32(c.OneMinusBeta1*d)
		v1 := float32(c.Beta2*v[i]) + float32(c.OneMinusBeta2*float32(d*d))
		denominator := float32(float32(math.Sqrt(float64(v1)))/c.SqrtBias2) + c.Eps
		dstM[i] = m1
		dstV[i] = v1
		dstP[i] = p[i] - float32(c.StepSize*float32(m1/denominator))
	}
}

func firstBeyondGo(x []float32, limit uint32) int {
	const signBit = 1 << 31
	for i, f := range x {
		if math.Float32bits(f)&^signBit > limit {
			return i
		}
	}
	return -1
}
