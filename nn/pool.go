package nn

import (
	"math"

	"github.com/spirt-ml/spirt/internal/kernel"
)

// outLine returns the first float of an output row inside its padding.
func (b *block) outLine(y int) int {
	return ((y+b.out.pad)*(b.out.w+2*b.out.pad) + b.out.pad) * b.out.c
}

// halves reports whether the pooling kernels serve this block.
func (b *block) halves() bool {
	return b.conv != nil && b.kernel == 2 && b.stride == 2 && b.padding == 0
}

// rows returns the two rows of mid that output row y is pooled from.
func (b *block) rows(mid []float32, y int) (top, bottom []float32) {
	line := b.mid.w * b.lanes
	return mid[2*y*line:][:line], mid[(2*y+1)*line:][:line]
}

// pool takes the maximum of each window, the first if several are equal (NaN
// counts as largest), and cuts off what is not above zero if the block has a
// ReLU.
func (b *block) pool(out []float32, codes []int32, mid []float32) {
	c := b.out.c
	for y := range b.out.h {
		line, code := out[b.outLine(y):], codes[y*b.out.w*c:]
		if b.halves() {
			// The kernel writes multiples of 8 channels, and so over the padding
			// behind the last pixel. What it writes over codes comes later.
			top, bottom := b.rows(mid, y)
			behind := (*[8]float32)(line[b.out.w*c:])
			padding := *behind
			kernel.MaxPool2(line, code, top, bottom, b.out.w, c, b.lanes, b.relu)
			*behind = padding
			continue
		}
		for x := range b.out.w {
			b.poolPixel(line[x*c:][:c], code[x*c:][:c], mid, y, x)
		}
	}
}

// poolPixel computes one output pixel.
func (b *block) poolPixel(best []float32, code []int32, mid []float32, y, x int) {
	top, left := y*b.stride-b.padding, x*b.stride-b.padding
	first := int32(max(-top, 0)*b.kernel + max(-left, 0))
	for i := range best {
		best[i], code[i] = float32(math.Inf(-1)), first
	}
	for ky := max(-top, 0); ky < b.kernel && top+ky < b.mid.h; ky++ {
		for kx := max(-left, 0); kx < b.kernel && left+kx < b.mid.w; kx++ {
			at := int32(ky*b.kernel + kx)
			for i, v := range mid[((top+ky)*b.mid.w+left+kx)*b.lanes:][:len(best)] {
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

// unpool brings the gradient of the outputs to where they were taken from. It
// adds it, channel by channel, to sum, which is nil if nobody wants it.
func (b *block) unpool(dmid, sum, dout []float32, codes []int32) {
	c := b.out.c
	if !b.halves() || b.mid.h%2 != 0 || b.mid.w%2 != 0 {
		clear(dmid)
	}
	for y := range b.out.h {
		line, code := dout[b.outLine(y):], codes[y*b.out.w*c:]
		if b.halves() {
			top, bottom := b.rows(dmid, y)
			kernel.MaxUnpool2(top, bottom, sum, code, line, b.out.w, c, b.lanes)
			continue
		}
		for x := range b.out.w {
			corner := (y*b.stride-b.padding)*b.mid.w + x*b.stride - b.padding
			g := line[x*c:][:c]
			for i, k := range code[x*c:][:c] {
				if k < 0 {
					continue
				}
				at := corner + int(k)/b.kernel*b.mid.w + int(k)%b.kernel
				dmid[at*b.lanes+i] += g[i]
				if sum != nil {
					sum[i] += g[i]
				}
			}
		}
	}
}
