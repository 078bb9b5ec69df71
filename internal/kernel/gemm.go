package kernel

// Matrices are row-major; ld is the distance between rows in floats.

// depthBlock is how much of the sums' index is taken at once, so that a packed
// panel (16 KiB) and six rows of the left operand stay in the first-level
// cache.
const depthBlock = 256

// PackedLen returns the length of a packed depth x cols matrix.
func PackedLen(depth, cols int) int { return depth * RoundUp(cols) }

// Pack lays b, depth x cols, out in panels as wide as the tiles for MulPacked,
// the columns beyond cols zero. If trans is set, b is stored as cols x depth.
func Pack(dst, b []float32, ldb, depth, cols int, trans bool) {
	if depth < 1 || cols < 1 || len(dst) < PackedLen(depth, cols) {
		panic("kernel: packed matrix has the wrong length")
	}
	if trans {
		checkMatrix(b, ldb, cols, depth)
	} else {
		checkMatrix(b, ldb, depth, cols)
	}
	width := 0
	for n := 0; n < cols; n += width {
		width = tileWidth(cols - n)
		panel := dst[n*depth:][:depth*width]
		count := min(width, cols-n)
		if count < width {
			clear(panel)
		}
		if trans {
			for j := range count {
				for k, v := range b[(n+j)*ldb:][:depth] {
					panel[k*width+j] = v
				}
			}
			continue
		}
		for k := range depth {
			copy(panel[k*width:][:count], b[k*ldb+n:])
		}
	}
}

// MulPacked computes c = a·b + bias, or adds a·b to c if add is set (then bias
// must be nil). a is rows x depth, read in place; b is packed. bias has cols
// rounded up floats, nil means none. If padded is set, c has room for whole
// tiles (RoundUpRows(rows) rows of at least RoundUp(cols) floats) and a for
// RoundUpRows(rows) rows, and the floats outside rows x cols may be
// overwritten.
func MulPacked(c []float32, ldc int, a []float32, lda int, b []float32, rows, depth, cols int, bias []float32, add, padded bool) {
	if len(b) < PackedLen(depth, cols) || bias != nil && (add || len(bias) < RoundUp(cols)) {
		panic("kernel: packed matrix or bias has the wrong length")
	}
	outRows, outCols := rows, cols
	if padded {
		outRows, outCols = RoundUpRows(rows), RoundUp(cols)
	}
	checkMatrix(a, lda, outRows, depth)
	checkMatrix(c, ldc, outRows, outCols)
	var scratch [tileRows * Lanes]float32
	for k := 0; k < depth; k += depthBlock {
		count := min(depthBlock, depth-k)
		width := 0
		for n := 0; n < cols; n += width {
			width = tileWidth(cols - n)
			panel := b[n*depth+k*width:]
			init := zeros[:]
			if bias != nil && k == 0 {
				init = bias[n:]
			}
			for m := 0; m < rows; m += tileRows {
				var aoff, coff [1]offsets
				for i := range tileRows {
					aoff[0][i] = min(m+i, outRows-1)*lda + k
					coff[0][i] = (m+i)*ldc + n
				}
				if m+tileRows <= outRows && n+width <= outCols {
					rowTiles(width, c, coff[:], a, aoff[:], 1, count, 0, panel, init, add || k > 0)
					continue
				}
				rowTiles(width, scratch[:], scratchRows[:], a, aoff[:], 1, count, 0, panel, init, false)
				copyTile(c[m*ldc+n:], ldc, &scratch, min(tileRows, outRows-m), min(width, outCols-n), add || k > 0)
			}
		}
	}
}

// MulTransA computes c = transpose(a)·b, or adds it to c if add is set. a is
// depth x rows and b depth x cols, both read in place: a's rows must have room
// for RoundUpRows(rows) floats and b's for RoundUp(cols).
func MulTransA(c []float32, ldc int, a []float32, lda int, b []float32, ldb int, rows, depth, cols int, add bool) {
	checkMatrix(a, lda, depth, RoundUpRows(rows))
	checkMatrix(b, ldb, depth, RoundUp(cols))
	checkMatrix(c, ldc, rows, cols)
	var scratch [tileRows * Lanes]float32
	width := 0
	for n := 0; n < cols; n += width {
		width = tileWidth(cols - n)
		for m := 0; m < rows; m += tileRows {
			if m+tileRows <= rows && n+width <= cols {
				colTile(width, c[m*ldc+n:], ldc, a[m:], 1, depth, 0, lda, b[n:], ldb, add)
				continue
			}
			colTile(width, scratch[:], Lanes, a[m:], 1, depth, 0, lda, b[n:], ldb, false)
			copyTile(c[m*ldc+n:], ldc, &scratch, min(tileRows, rows-m), min(width, cols-n), add)
		}
	}
}

// scratchRows are the rows of a tile that stands alone.
var scratchRows = [1]offsets{{0, Lanes, 2 * Lanes, 3 * Lanes, 4 * Lanes, 5 * Lanes}}

// copyTile moves the part of a tile that lies within c.
func copyTile(c []float32, ldc int, tile *[tileRows * Lanes]float32, rows, cols int, add bool) {
	for i := range rows {
		dst, src := c[i*ldc:][:cols], tile[i*Lanes:][:cols]
		if !add {
			copy(dst, src)
			continue
		}
		for j, v := range src {
			dst[j] += v
		}
	}
}

// checkMatrix panics unless the matrix lies within m.
func checkMatrix(m []float32, ld, rows, cols int) {
	if rows < 1 || cols < 1 || ld < cols || len(m) < (rows-1)*ld+cols {
		panic("kernel: matrix is too short for its shape")
	}
}
