//go:build !amd64 || noasm

package kernel

func rowTiles16AVX2(c *float32, coff *offsets, a *float32, aoff *offsets, tiles, runs, length, step int, b, bias *float32, add bool) {
	panic("kernel: no assembly")
}

func colTile16AVX2(c *float32, ldc int, a *float32, outer, inner, jump, step int, b *float32, ldb int, add bool) {
	panic("kernel: no assembly")
}

func rowTiles8AVX2(c *float32, coff *offsets, a *float32, aoff *offsets, tiles, runs, length, step int, b, bias *float32, add bool) {
	panic("kernel: no assembly")
}

func colTile8AVX2(c *float32, ldc int, a *float32, outer, inner, jump, step int, b *float32, ldb int, add bool) {
	panic("kernel: no assembly")
}
