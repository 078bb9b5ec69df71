package nn

import "math"

// outLine returns the first float of an output row inside its padding.
func (b *block) outLine(y int) int {
	return ((y+b.out.pad)*(b.out.w+2*b.out.pad) + b.out.pad) * b.out.c
}

// window returns the part of the pooling window at an output that lies within
// the image: rows y0 to y1, columns x0 to x1.
func (b *block) window(y, x int) (y0, y1, x0, x1 int) {
	y0, x0 = y*b.stride-b.padding, x*b.stride-b.padding
	return max(y0, 0), min(y0+b.kernel, b.mid.h), max(x0, 0), min(x0+b.kernel, b.mid.w)
}

// pool takes the maximum of each window, the first if several are equal (NaN
// counts as largest), and cuts off what is negative if the block has a ReLU.
func (b *block) pool(out []float32, codes []int32, mid []float32) {
	c := b.out.c
	for y := range b.out.h {
		line := out[b.outLine(y):]
		for x := range b.out.w {
			best, code := line[x*c:][:c], codes[(y*b.out.w+x)*c:][:c]
			y0, y1, x0, x1 := b.window(y, x)
			first := int32((y0-(y*b.stride-b.padding))*b.kernel + x0 - (x*b.stride - b.padding))
			for i := range best {
				best[i], code[i] = float32(math.Inf(-1)), first
			}
			for yy := y0; yy < y1; yy++ {
				for xx := x0; xx < x1; xx++ {
					at := int32((yy-(y*b.stride-b.padding))*b.kernel + xx - (x*b.stride - b.padding))
					for i, v := range mid[(yy*b.mid.w+xx)*b.lanes:][:c] {
						if v > best[i] || v != v {
							best[i], code[i] = v, at
						}
					}
				}
			}
			if b.relu {
				for i, v := range best {
					if v <= 0 {
						best[i], code[i] = 0, -1
					}
				}
			}
		}
	}
}

// unpool brings the gradient of the outputs to where they were taken from.
func (b *block) unpool(dmid, dout []float32, codes []int32) {
	clear(dmid)
	c := b.out.c
	for y := range b.out.h {
		line := dout[b.outLine(y):]
		for x := range b.out.w {
			g := line[x*c:][:c]
			for i, code := range codes[(y*b.out.w+x)*c:][:c] {
				if code < 0 {
					continue
				}
				yy := y*b.stride - b.padding + int(code)/b.kernel
				xx := x*b.stride - b.padding + int(code)%b.kernel
				dmid[(yy*b.mid.w+xx)*b.lanes+i] += g[i]
			}
		}
	}
}

// sumBias adds the gradient of one image's convolution to the bias's.
func (b *block) sumBias(dbias, dmid []float32) {
	for p := range b.mid.h * b.mid.w {
		for i, v := range dmid[p*b.lanes:][:len(dbias)] {
			dbias[i] += v
		}
	}
}
