//go:build !amd64 || noasm

package kernel

func rowTileAVX2(c *float32, coff *offsets, a *float32, aoff *offsets, runs, length, step int, b *float32, bias *[Lanes]float32, add bool) {
	panic("kernel: no assembly")
}

func colTileAVX2(c *float32, ldc int, a *float32, outer, inner, jump, step int, b *float32, ldb int, add bool) {
	panic("kernel: no assembly")
}
