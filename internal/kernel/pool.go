package kernel

//go:generate sh -c "cd gen && go run ./pool -out ../pool_amd64.s -stubs ../pool_stubs_amd64.go -pkg kernel"

// MaxPool2 takes the maximum of 2x2 pixels for one row of outputs. dst and
// codes have channels numbers for each output, the two rows of the input lanes
// for each pixel. A code tells which of the four is the maximum, the first if
// several are equal (a NaN counts as largest); if relu is set, maxima that are
// not above zero become zero and their code -1.
//
// Both must have room for a multiple of 8 behind the last output's first
// channel: what it writes behind the last channel has no meaning. lanes must
// be a multiple of 8.
func MaxPool2(dst []float32, codes []int32, top, bottom []float32, pixels, channels, lanes int, relu bool) {
	checkPool(len(dst), len(codes), len(top), len(bottom), pixels, channels, lanes)
	if pixels == 0 {
		return
	}
	if avx2 {
		maxPool2AVX2(&dst[0], &codes[0], &top[0], &bottom[0], pixels, channels, lanes, relu)
		return
	}
	for p := range pixels {
		out, code := dst[p*channels:][:channels], codes[p*channels:][:channels]
		t0, t1 := top[2*p*lanes:][:channels], top[(2*p+1)*lanes:][:channels]
		b0, b1 := bottom[2*p*lanes:][:channels], bottom[(2*p+1)*lanes:][:channels]
		for i, best := range t0 {
			at := int32(0)
			if v := t1[i]; v > best || v != v {
				best, at = v, 1
			}
			if v := b0[i]; v > best || v != v {
				best, at = v, 2
			}
			if v := b1[i]; v > best || v != v {
				best, at = v, 3
			}
			if relu && best <= 0 {
				best, at = 0, -1
			}
			out[i], code[i] = best, at
		}
	}
}

// MaxUnpool2 is the gradient of MaxPool2: it writes each number of src to that
// pixel of its four that the code names and zero to the others, and adds those
// whose code is not -1 to sum, channel by channel. It too reads and writes
// behind the last channel; sum has room for channels rounded up to 8.
func MaxUnpool2(top, bottom, sum []float32, codes []int32, src []float32, pixels, channels, lanes int) {
	checkPool(len(src), len(codes), len(top), len(bottom), pixels, channels, lanes)
	if len(sum) < (channels+7)/8*8 {
		panic("kernel: pooling operands have the wrong length")
	}
	if pixels == 0 {
		return
	}
	if avx2 {
		maxUnpool2AVX2(&top[0], &bottom[0], &sum[0], &codes[0], &src[0], pixels, channels, lanes)
		return
	}
	for p := range pixels {
		g, code := src[p*channels:][:channels], codes[p*channels:][:channels]
		t0, t1 := top[2*p*lanes:][:channels], top[(2*p+1)*lanes:][:channels]
		b0, b1 := bottom[2*p*lanes:][:channels], bottom[(2*p+1)*lanes:][:channels]
		for i, v := range g {
			t0[i], t1[i], b0[i], b1[i] = 0, 0, 0, 0
			switch code[i] {
			case 0:
				t0[i] = v
			case 1:
				t1[i] = v
			case 2:
				b0[i] = v
			case 3:
				b1[i] = v
			default:
				continue
			}
			sum[i] += v
		}
	}
}

func checkPool(outputs, codes, top, bottom, pixels, channels, lanes int) {
	if pixels < 0 || channels < 1 || lanes%8 != 0 || lanes < channels {
		panic("kernel: pooling has the wrong shape")
	}
	n := 0
	if pixels > 0 {
		n = (pixels-1)*channels + (channels+7)/8*8
	}
	if outputs < n || codes < n || top < 2*pixels*lanes || bottom < 2*pixels*lanes {
		panic("kernel: pooling operands have the wrong length")
	}
}
