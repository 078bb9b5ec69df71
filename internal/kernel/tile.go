package kernel

//go:generate sh -c "cd gen && go run ./gemm -out ../tile_amd64.s -stubs ../tile_stubs_amd64.go -pkg kernel"

// A tile is 6 rows by 16 columns of a product, 12 AVX registers of sums, or 6
// rows by 8 columns in as many registers: two sums each, of every other term.
// All matrix products and convolutions are made of the tile kernels here, in
// which the left operand is read in place. Offsets and steps count floats.

const (
	tileRows = 6
	// Lanes is the width of a wide tile, narrowLanes that of a narrow one. See
	// tileWidth for which is used where.
	Lanes       = 16
	narrowLanes = 8
)

// tileWidth returns the width of the tile that begins where left columns are
// still to do: every matrix is cut from the left into wide tiles, but what is
// no wider than a narrow one becomes one. So a packed panel that begins at
// column n of a matrix begins at float n*depth.
func tileWidth(left int) int {
	if left > narrowLanes {
		return Lanes
	}
	return narrowLanes
}

// RoundUp returns n rounded up to whole tiles. Matrices whose rows are written
// by kernels have rows of that length.
func RoundUp(n int) int { return (n + narrowLanes - 1) / narrowLanes * narrowLanes }

// RoundUpRows returns n rounded up to whole tiles, for matrices whose last
// tile is written in full.
func RoundUpRows(n int) int { return (n + tileRows - 1) / tileRows * tileRows }

// zeros is the bias of products that have none.
var zeros [Lanes]float32

// offsets are where the six rows of a tile begin.
type offsets = [tileRows]int

// rowTiles computes six dot products with width columns for each of the tiles
// t, where the left operand has its sums' index contiguous in runs:
//
//	c[coff[t][i]+j] = bias[j] + sum over s < runs, k < length of
//	                  a[aoff[t][i]+s*step+k] * b[(s*length+k)*width+j]
//
// If add is set the sum is added to c instead, row after row, so that rows may
// overlap in c.
func rowTiles(width int, c []float32, coff []offsets, a []float32, aoff []offsets, runs, length, step int, b, bias []float32, add bool) {
	if len(coff) == 0 {
		return
	}
	aoff, bias = aoff[:len(coff)], bias[:width]
	switch {
	case !avx2:
		for t := range coff {
			rowTileGo(width, c, &coff[t], a, &aoff[t], runs, length, step, b, bias, add)
		}
	case width == Lanes:
		rowTiles16AVX2(&c[0], &coff[0], &a[0], &aoff[0], len(coff), runs, length, step, &b[0], &bias[0], add)
	default:
		rowTiles8AVX2(&c[0], &coff[0], &a[0], &aoff[0], len(coff), runs, length, step, &b[0], &bias[0], add)
	}
}

func rowTileGo(width int, c []float32, coff *offsets, a []float32, aoff *offsets, runs, length, step int, b, bias []float32, add bool) {
	for j := 0; j < width; j += 4 {
		for i := 0; i < tileRows; i += 2 {
			r00, r01, r02, r03 := bias[j], bias[j+1], bias[j+2], bias[j+3]
			r10, r11, r12, r13 := r00, r01, r02, r03
			for s := range runs {
				a0 := a[aoff[i]+s*step:][:length]
				a1 := a[aoff[i+1]+s*step:][:length]
				bs := b[s*length*width+j:][:(length-1)*width+4]
				for k, x := range a0 {
					y := a1[k]
					bk := bs[k*width:][:4]
					r00 += x * bk[0]
					r01 += x * bk[1]
					r02 += x * bk[2]
					r03 += x * bk[3]
					r10 += y * bk[0]
					r11 += y * bk[1]
					r12 += y * bk[2]
					r13 += y * bk[3]
				}
			}
			store4(c[coff[i]+j:], r00, r01, r02, r03, add)
			store4(c[coff[i+1]+j:], r10, r11, r12, r13, add)
		}
	}
}

// colTile computes a tile of width columns where the left operand has its rows
// contiguous and the sums' index in two nested steps, as pixels of an image
// are:
//
//	c[i*ldc+j] = sum over y < outer, x < inner of
//	             a[y*jump+x*step+i] * b[(y*inner+x)*ldb+j]
//
// It reads a in steps of six whether all rows are wanted or not. If add is set
// the sum is added to c instead.
func colTile(width int, c []float32, ldc int, a []float32, outer, inner, jump, step int, b []float32, ldb int, add bool) {
	switch {
	case !avx2:
		colTileGo(width, c, ldc, a, outer, inner, jump, step, b, ldb, add)
	case width == Lanes:
		colTile16AVX2(&c[0], ldc, &a[0], outer, inner, jump, step, &b[0], ldb, add)
	default:
		colTile8AVX2(&c[0], ldc, &a[0], outer, inner, jump, step, &b[0], ldb, add)
	}
}

func colTileGo(width int, c []float32, ldc int, a []float32, outer, inner, jump, step int, b []float32, ldb int, add bool) {
	for j := 0; j < width; j += 4 {
		for i := 0; i < tileRows; i += 2 {
			var r00, r01, r02, r03, r10, r11, r12, r13 float32
			for y := range outer {
				for x := range inner {
					ak := a[y*jump+x*step+i:][:2]
					bk := b[(y*inner+x)*ldb+j:][:4]
					r00 += ak[0] * bk[0]
					r01 += ak[0] * bk[1]
					r02 += ak[0] * bk[2]
					r03 += ak[0] * bk[3]
					r10 += ak[1] * bk[0]
					r11 += ak[1] * bk[1]
					r12 += ak[1] * bk[2]
					r13 += ak[1] * bk[3]
				}
			}
			store4(c[i*ldc+j:], r00, r01, r02, r03, add)
			store4(c[(i+1)*ldc+j:], r10, r11, r12, r13, add)
		}
	}
}

func store4(c []float32, r0, r1, r2, r3 float32, add bool) {
	c = c[:4]
	if add {
		r0, r1, r2, r3 = c[0]+r0, c[1]+r1, c[2]+r2, c[3]+r3
	}
	c[0], c[1], c[2], c[3] = r0, r1, r2, r3
}
