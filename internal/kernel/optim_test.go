package kernel

import (
	"slices"
	"testing"
	"unsafe"
)

// astray returns a copy of x at an address that is no multiple of 4.
func astray(x []float32, off int) []float32 {
	if len(x) == 0 {
		return x
	}
	raw := make([]float32, len(x)+1)
	y := unsafe.Slice((*float32)(unsafe.Add(unsafe.Pointer(&raw[0]), off)), len(x))
	copy(y, x)
	return y
}

// optimizers run each kernel of optim.go, and its plain Go path, on vectors of
// parameters and state, in place where dst is src.
var optimizers = []struct {
	name       string
	state      int
	run, plain func(dst, src [][]float32, g []float32, k [8]float32)
}{
	{"Nesterov", 1,
		func(d, s [][]float32, g []float32, k [8]float32) {
			Nesterov(d[0], d[1], s[0], s[1], g, k[0], k[1], k[2])
		},
		func(d, s [][]float32, g []float32, k [8]float32) {
			nesterovGo(d[0], d[1], s[0], s[1], g, k[0], k[1], k[2])
		}},
	{"AdamW", 2,
		func(d, s [][]float32, g []float32, k [8]float32) {
			AdamW(d[0], d[1], d[2], s[0], s[1], s[2], g, adamOf(k))
		},
		func(d, s [][]float32, g []float32, k [8]float32) {
			c := adamOf(k)
			adamWGo(d[0], d[1], d[2], s[0], s[1], s[2], g, &c)
		}},
	{"RMSProp", 1,
		func(d, s [][]float32, g []float32, k [8]float32) {
			RMSProp(d[0], d[1], s[0], s[1], g, rmsPropOf(k))
		},
		func(d, s [][]float32, g []float32, k [8]float32) {
			c := rmsPropOf(k)
			rmsPropGo(d[0], d[1], s[0], s[1], g, &c)
		}},
	{"RMSPropMomentum", 2,
		func(d, s [][]float32, g []float32, k [8]float32) {
			RMSPropMomentum(d[0], d[1], d[2], s[0], s[1], s[2], g, rmsPropOf(k))
		},
		func(d, s [][]float32, g []float32, k [8]float32) {
			c := rmsPropOf(k)
			rmsPropMomentumGo(d[0], d[1], d[2], s[0], s[1], s[2], g, &c)
		}},
	{"Adagrad", 1,
		func(d, s [][]float32, g []float32, k [8]float32) {
			Adagrad(d[0], d[1], s[0], s[1], g, k[0], k[1], k[2])
		},
		func(d, s [][]float32, g []float32, k [8]float32) {
			adagradGo(d[0], d[1], s[0], s[1], g, k[0], k[1], k[2])
		}},
}

func adamOf(k [8]float32) AdamCoefficients {
	return AdamCoefficients{k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]}
}

func rmsPropOf(k [8]float32) RMSPropCoefficients {
	return RMSPropCoefficients{k[0], k[1], k[2], k[3], k[4], k[5]}
}

// TestOptimSameBits holds every optimizer, as this machine runs it, against
// the plain Go path, in place and at odd addresses too.
func TestOptimSameBits(t *testing.T) {
	rng := newRand(t)
	for range 300 {
		n := rng.IntN(200)
		for _, o := range optimizers {
			vectors := func() (v [][]float32) {
				for range 1 + o.state {
					v = append(v, vector(rng, n))
				}
				return v
			}
			moved := func(v [][]float32) (w [][]float32) {
				for _, x := range v {
					w = append(w, astray(x, 1+rng.IntN(3)))
				}
				return w
			}
			var k [8]float32
			for i := range k {
				k[i] = rng.Float32()
				if rng.IntN(8) == 0 {
					k[i] = special[rng.IntN(len(special))]
				}
			}
			src, g, want := vectors(), vector(rng, n), vectors()
			o.plain(want, src, g, k)
			check := func(what string, got [][]float32) {
				t.Helper()
				for i := range got {
					same(t, o.name+what, got[i], want[i])
				}
			}
			got := vectors()
			o.run(got, src, g, k)
			check("", got)
			got = moved(vectors())
			o.run(got, moved(src), astray(g, 1), k)
			check(" at an odd address", got)
			got = moved(src)
			o.run(got, got, astray(g, 3), k)
			check(" in place at an odd address", got)
			got = moved(src)
			o.plain(got, got, astray(g, 2), k)
			check(" in Go in place at an odd address", got)
			for i := range src {
				src[i] = clone(src[i])
			}
			o.run(src, src, g, k)
			check(" in place", src)
		}
	}
}

func TestOptimPanicsOnMismatch(t *testing.T) {
	for _, o := range optimizers {
		for odd := range 2*(1+o.state) + 1 {
			var v [][]float32
			for i := range 2*(1+o.state) + 1 {
				n := 9
				if i == odd {
					n = 8
				}
				v = append(v, make([]float32, n))
			}
			func() {
				defer func() {
					if recover() != badLength {
						t.Errorf("%s accepts vectors that do not match", o.name)
					}
				}()
				o.run(v[:1+o.state], v[1+o.state:][:1+o.state], v[len(v)-1], [8]float32{})
			}()
		}
	}
}

func BenchmarkOptim(b *testing.B) {
	for _, o := range optimizers {
		b.Run(o.name, func(b *testing.B) {
			v := benchVectors(2+o.state, benchLen(b))
			for _, s := range v[1 : 1+o.state] {
				clear(s)
			}
			p := slices.Clone(v[:1+o.state])
			b.SetBytes(int64(4 * len(v[0]) * (2*len(p) + 1))) // read and written
			for b.Loop() {
				o.run(p, p, v[len(p)], [8]float32{.9, .1, .001, .001, 1e-3, .5, 1e-8, 0})
			}
		})
	}
}
