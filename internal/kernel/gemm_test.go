package kernel

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

func random(r *rand.Rand, n int) []float32 {
	v := make([]float32, n)
	for i := range v {
		v[i] = float32(r.Float64()*2 - 1)
	}
	return v
}

// near compares with a float64 result whose terms sum to at most size in
// absolute value.
func near(got float32, want, size float64) bool {
	return math.Abs(float64(got)-want) <= 1e-6*size+1e-6
}

func seeded(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// bothTiles runs a test with the assembly and with plain Go.
func bothTiles(t *testing.T, test func(t *testing.T)) {
	had := avx2
	defer func() { avx2 = had }()
	if had {
		t.Run("AVX2", test)
	}
	avx2 = false
	t.Run("Go", test)
}

// shapes are rows, depth and columns; there is one for each number of columns
// up to 40.
var shapes = func() [][3]int {
	s := [][3]int{{1, 1, 1}, {6, 4, 16}, {7, 5, 17}, {12, 256, 32}, {5, 257, 15}, {40, 70, 120}, {13, 600, 33}, {3, 1, 40}, {18, 513, 8}}
	for cols := 1; cols <= 40; cols++ {
		s = append(s, [3]int{1 + cols*7%13, 1 + cols*5%23, cols})
	}
	return s
}()

func TestMulPacked(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		r := seeded(t)
		for _, s := range shapes {
			rows, depth, cols := s[0], s[1], s[2]
			for mode := range 12 {
				trans, padded, kind := mode&1 != 0, mode&2 != 0, mode/4 // kind: plain, bias, add
				outRows, outCols := rows, cols
				if padded {
					outRows, outCols = RoundUpRows(rows), RoundUp(cols)
				}
				lda, ldc := depth+r.IntN(3), outCols+r.IntN(3)
				a := random(r, (outRows-1)*lda+depth)
				b := random(r, depth*cols)
				ldb, at := cols, func(k, j int) float32 { return b[k*cols+j] }
				if trans {
					ldb, at = depth, func(k, j int) float32 { return b[j*depth+k] }
				}
				packed := make([]float32, PackedLen(depth, cols))
				Pack(packed, b, ldb, depth, cols, trans)
				c := random(r, (outRows-1)*ldc+outCols)
				before := append([]float32(nil), c...)
				var bias []float32
				if kind == 1 {
					bias = random(r, RoundUp(cols))
				}
				MulPacked(c, ldc, a, lda, packed, rows, depth, cols, bias, kind == 2, padded)
				for i := range c {
					m, n := i/ldc, i%ldc
					if m < rows && n < cols {
						want, size := 0.0, 1.0
						for k := range depth {
							p := float64(a[m*lda+k]) * float64(at(k, n))
							want, size = want+p, size+math.Abs(p)
						}
						if kind == 1 {
							want += float64(bias[n])
						}
						if kind == 2 {
							want += float64(before[i])
						}
						if !near(c[i], want, size) {
							t.Fatalf("%v mode %d: c[%d,%d] is %v, want %v", s, mode, m, n, c[i], want)
						}
					} else if !padded && c[i] != before[i] {
						t.Fatalf("%v mode %d: wrote outside at %d,%d", s, mode, m, n)
					}
				}
			}
		}
	})
}

func TestMulTransA(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		r := seeded(t)
		for _, s := range shapes {
			rows, depth, cols := s[0], s[1], s[2]
			for _, add := range []bool{false, true} {
				lda, ldb, ldc := RoundUpRows(rows)+r.IntN(3), RoundUp(cols)+r.IntN(3), cols+r.IntN(3)
				a, b := random(r, depth*lda), random(r, depth*ldb)
				c := random(r, rows*ldc)
				before := append([]float32(nil), c...)
				MulTransA(c, ldc, a, lda, b, ldb, rows, depth, cols, add)
				for i := range c {
					m, n := i/ldc, i%ldc
					if n >= cols {
						if c[i] != before[i] {
							t.Fatalf("%v: wrote outside at %d,%d", s, m, n)
						}
						continue
					}
					want, size := 0.0, 1.0
					for k := range depth {
						p := float64(a[k*lda+m]) * float64(b[k*ldb+n])
						want, size = want+p, size+math.Abs(p)
					}
					if add {
						want += float64(before[i])
					}
					if !near(c[i], want, size) {
						t.Fatalf("%v add %v: c[%d,%d] is %v, want %v", s, add, m, n, c[i], want)
					}
				}
			}
		}
	})
}

func TestConv(t *testing.T) {
	bothTiles(t, func(t *testing.T) {
		r := seeded(t)
		for i := range 80 {
			c, k, stride, o := 1+r.IntN(20), 1+r.IntN(5), 1+r.IntN(3), 1+i%40
			h, w := k+r.IntN(12), k+r.IntN(12)
			s := NewConv(c, h, w, k, stride, o)
			name := fmt.Sprintf("%dx%dx%d kernel %d stride %d out %d", c, h, w, k, stride, o)
			in, weights := random(r, s.InLen()), random(r, o*c*k*k)
			bias := make([]float32, s.OutLanes)
			copy(bias, random(r, o))
			dout := make([]float32, s.OutLen())
			for p := range s.OutH * s.OutW {
				copy(dout[p*s.OutLanes:], random(r, o))
			}
			forward, backward := make([]float32, s.ForwardLen()), make([]float32, s.BackwardLen())
			s.PackForward(forward, weights)
			s.PackBackward(backward, weights)
			out := make([]float32, s.OutLen())
			s.Forward(out, in, forward, bias)
			packed := make([]float32, s.WeightsLen())
			s.WeightsGradient(packed, in, dout)
			s.WeightsGradient(packed, in, dout)
			dw := make([]float32, len(weights))
			s.UnpackWeights(dw, packed)
			din := make([]float32, s.InLen())
			s.InputGradient(din, dout, backward)

			wantIn, wantW := make([]float64, len(in)), make([]float64, len(dw))
			for y := range s.OutH {
				for x := range s.OutW {
					for n := range s.OutLanes {
						at := (y*s.OutW+x)*s.OutLanes + n
						sum := float64(bias[n])
						if n < o {
							for i := range c {
								for ky := range k {
									for kx := range k {
										from := ((y*stride+ky)*w+x*stride+kx)*c + i
										to := ((n*c+i)*k+ky)*k + kx
										sum += float64(in[from]) * float64(weights[to])
										wantIn[from] += float64(dout[at]) * float64(weights[to])
										wantW[to] += 2 * float64(dout[at]) * float64(in[from])
									}
								}
							}
						}
						if !near(out[at], sum, float64(c*k*k)) {
							t.Fatalf("%s: output %d,%d,%d is %v, want %v", name, y, x, n, out[at], sum)
						}
					}
				}
			}
			for i, v := range dw {
				if !near(v, wantW[i], float64(2*s.OutH*s.OutW)) {
					t.Fatalf("%s: weight gradient %d is %v, want %v", name, i, v, wantW[i])
				}
			}
			for i := range h * w * c {
				if !near(din[i], wantIn[i], float64(o*k*k)) {
					t.Fatalf("%s: input gradient %d is %v, want %v", name, i, din[i], wantIn[i])
				}
			}
		}
	})
}

func BenchmarkGEMM512(b *testing.B) {
	const n = 512
	r := rand.New(rand.NewPCG(1, 1))
	x, y, c := random(r, n*n), random(r, n*n), make([]float32, n*n)
	packed := make([]float32, PackedLen(n, n))
	least := time.Hour
	for b.Loop() {
		start := time.Now()
		Pack(packed, y, n, n, n, false)
		MulPacked(c, n, x, n, packed, n, n, n, nil, false, false)
		least = min(least, time.Since(start))
	}
	b.ReportMetric(2*n*n*n/float64(least.Nanoseconds()), "max-GFLOP/s")
	b.ReportMetric(2*n*n*n*float64(b.N)/float64(b.Elapsed().Nanoseconds()), "GFLOP/s")
}

// BenchmarkConv times the three products of a layer of the wider CNN.
func BenchmarkConv(b *testing.B) {
	s := NewConv(32, 18, 18, 5, 1, 64)
	r := rand.New(rand.NewPCG(1, 1))
	in, out, bias := random(r, s.InLen()), random(r, s.OutLen()), random(r, s.OutLanes)
	forward, backward, weights := random(r, s.ForwardLen()), random(r, s.BackwardLen()), random(r, s.WeightsLen())
	for name, f := range map[string]func(){
		"Forward":         func() { s.Forward(out, in, forward, bias) },
		"WeightsGradient": func() { s.WeightsGradient(weights, in, out) },
		"InputGradient":   func() { s.InputGradient(in, out, backward) },
	} {
		b.Run(name, func(b *testing.B) {
			least := time.Hour
			for b.Loop() {
				start := time.Now()
				f()
				least = min(least, time.Since(start))
			}
			operations := 2 * float64(s.OutH*s.OutW) * float64(s.Kernel*s.run*s.OutC)
			b.ReportMetric(operations/float64(least.Nanoseconds()), "max-GFLOP/s")
		})
	}
}
