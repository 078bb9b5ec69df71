package kernel

// Conv is the geometry of one two-dimensional convolution, with everything
// that does not depend on data worked out. It is immutable.
//
// Images are channels-last, one at a time, and carry their padding: pixel
// (y, x) of the padded input begins at (y*PaddedW+x)*InC. The output has one
// row of OutLanes floats for each pixel; in a gradient the channels beyond OutC
// have no meaning. A window is Kernel runs of Kernel*InC contiguous floats, which the tiles read
// in place: no im2col.
type Conv struct {
	InC, PaddedH, PaddedW int
	Kernel, Stride        int
	OutC, OutH, OutW      int
	OutLanes              int // OutC rounded up

	run      int // floats in one row of a window
	runLanes int // run rounded up
	rowTiles int // 6-row tiles over a run
	// Tiles over the output's pixels, row by row: where they begin in the
	// output, and their windows in the input.
	rows, windows []offsets
	// Tiles over the output's pixels, column by column, so that the six windows
	// do not overlap (or hardly): where they begin in the output and the input.
	columnOut, columnIn []offsets
}

// slack is how far beyond its end the tiles may read or write an image; what
// they touch there has no meaning.
const slack = Lanes + tileRows

// NewConv works out a convolution of a padded image. The output's size follows
// from it. It panics unless all sizes are positive and the window fits.
func NewConv(inC, paddedH, paddedW, kernel, stride, outC int) *Conv {
	if inC < 1 || kernel < 1 || stride < 1 || outC < 1 || paddedH < kernel || paddedW < kernel {
		panic("kernel: convolution does not fit its image")
	}
	s := &Conv{
		InC: inC, PaddedH: paddedH, PaddedW: paddedW, Kernel: kernel, Stride: stride, OutC: outC,
		OutH: (paddedH-kernel)/stride + 1, OutW: (paddedW-kernel)/stride + 1, OutLanes: RoundUp(outC),
		run: kernel * inC,
	}
	s.runLanes = RoundUp(s.run)
	s.rowTiles = RoundUpRows(s.run) / tileRows
	pixels := s.OutH * s.OutW
	window := func(y, x int) int { return (y*stride*paddedW + x*stride) * inC }
	for p := 0; p < pixels; p += tileRows {
		var r, w, out, in offsets
		for i := range tileRows {
			q := min(p+i, pixels-1)
			r[i] = (p + i) * s.OutLanes
			w[i] = window(q/s.OutW, q%s.OutW)
			if p+i < pixels {
				y, x := q%s.OutH, q/s.OutH
				out[i], in[i] = (y*s.OutW+x)*s.OutLanes, window(y, x)
			} else {
				// A row behind the last pixel, added to the slack.
				out[i], in[i] = (p+i)*s.OutLanes, -1
			}
		}
		s.rows, s.windows = append(s.rows, r), append(s.windows, w)
		s.columnOut, s.columnIn = append(s.columnOut, out), append(s.columnIn, in)
	}
	return s
}

// InLen returns the floats of a padded input image, with the slack that must
// follow it.
func (s *Conv) InLen() int { return s.PaddedH*s.PaddedW*s.InC + slack }

// OutLen returns the floats of an output image. It has a whole number of
// tiles: the pixels behind the last have no meaning.
func (s *Conv) OutLen() int { return RoundUpRows(s.OutH*s.OutW) * s.OutLanes }

// ForwardLen returns the length of the weights as Forward takes them.
func (s *Conv) ForwardLen() int { return s.Kernel * s.run * s.OutLanes }

// BackwardLen returns the length of the weights as InputGradient takes them.
func (s *Conv) BackwardLen() int { return s.Kernel * s.runLanes * s.OutC }

// WeightsLen returns the length of the weights' gradient as WeightsGradient
// sums it.
func (s *Conv) WeightsLen() int { return s.Kernel * s.rowTiles * tileRows * s.OutLanes }

// weight returns where the weight lies in OutC x InC x Kernel x Kernel order.
func (s *Conv) weight(out, y, run int) int {
	x, in := run/s.InC, run%s.InC
	return ((out*s.InC+in)*s.Kernel+y)*s.Kernel + x
}

// PackForward lays weights, OutC x InC x Kernel x Kernel, out for Forward:
// panels of output channels, in each the window's floats in order.
func (s *Conv) PackForward(dst, weights []float32) {
	if len(dst) < s.ForwardLen() || len(weights) != s.OutC*s.Kernel*s.run {
		panic("kernel: convolution weights have the wrong length")
	}
	depth := s.Kernel * s.run
	width := 0
	for n := 0; n < s.OutLanes; n += width {
		width = tileWidth(s.OutLanes - n)
		for out := n; out < n+width; out++ {
			panel := dst[n*depth+out-n:]
			for y := range s.Kernel {
				for r := range s.run {
					v := float32(0)
					if out < s.OutC {
						v = weights[s.weight(out, y, r)]
					}
					panel[(y*s.run+r)*width] = v
				}
			}
		}
	}
}

// PackBackward lays weights out for InputGradient: for each row of the window
// panels of its floats, in each the output channels in order.
func (s *Conv) PackBackward(dst, weights []float32) {
	if len(dst) < s.BackwardLen() || len(weights) != s.OutC*s.Kernel*s.run {
		panic("kernel: convolution weights have the wrong length")
	}
	for y := range s.Kernel {
		width := 0
		for n := 0; n < s.runLanes; n += width {
			width = tileWidth(s.runLanes - n)
			for r := n; r < n+width; r++ {
				panel := dst[(y*s.runLanes+n)*s.OutC+r-n:]
				for out := range s.OutC {
					v := float32(0)
					if r < s.run {
						v = weights[s.weight(out, y, r)]
					}
					panel[out*width] = v
				}
			}
		}
	}
}

// UnpackWeights writes what WeightsGradient summed in OutC x InC x Kernel x
// Kernel order.
func (s *Conv) UnpackWeights(dst, packed []float32) {
	if len(packed) < s.WeightsLen() || len(dst) != s.OutC*s.Kernel*s.run {
		panic("kernel: convolution weights have the wrong length")
	}
	for y := range s.Kernel {
		for r := range s.run {
			row := packed[(y*s.rowTiles*tileRows+r)*s.OutLanes:]
			for out := range s.OutC {
				dst[s.weight(out, y, r)] = row[out]
			}
		}
	}
}

// Forward writes the convolution of one image, plus bias: OutLanes floats,
// zero beyond OutC.
func (s *Conv) Forward(out, in, packed, bias []float32) {
	if len(out) < s.OutLen() || len(in) < s.InLen() || len(packed) < s.ForwardLen() || len(bias) < s.OutLanes {
		panic("kernel: convolution operands have the wrong length")
	}
	depth := s.Kernel * s.run
	// As many rows of the window at once as let a panel of weights stay in the
	// first-level cache.
	rows := min(max(1, 320/s.run), s.Kernel)
	width := 0
	for n := 0; n < s.OutLanes; n += width {
		width = tileWidth(s.OutLanes - n)
		panel := packed[n*depth:][:depth*width]
		for y := 0; y < s.Kernel; y += rows {
			count := min(rows, s.Kernel-y)
			init := bias[n:]
			if y > 0 {
				init = zeros[:]
			}
			rowTiles(width, out[n:], s.rows, in[y*s.PaddedW*s.InC:], s.windows, count, s.run, s.PaddedW*s.InC, panel[y*s.run*width:], init, y > 0)
		}
	}
}

// WeightsGradient adds the gradient of the weights from one image to packed.
func (s *Conv) WeightsGradient(packed, in, dout []float32) {
	if len(packed) < s.WeightsLen() || len(in) < s.InLen() || len(dout) < s.OutLen() {
		panic("kernel: convolution operands have the wrong length")
	}
	line := s.PaddedW * s.InC
	// As many rows of pixels at once as let dout (64 KiB) and the window's rows
	// stay in the second-level cache while all tiles go over them.
	rows := max(1, 16384/(s.OutLanes*s.OutW))
	for top := 0; top < s.OutH; top += rows {
		count := min(rows, s.OutH-top)
		a, b := in[top*s.Stride*line:], dout[top*s.OutW*s.OutLanes:]
		width := 0
		for n := 0; n < s.OutLanes; n += width {
			width = tileWidth(s.OutLanes - n)
			for y := range s.Kernel {
				for t := range s.rowTiles {
					c := packed[(y*s.rowTiles+t)*tileRows*s.OutLanes+n:]
					colTile(width, c, s.OutLanes, a[y*line+t*tileRows:], count, s.OutW, line*s.Stride, s.Stride*s.InC, b[n:], s.OutLanes, true)
				}
			}
		}
	}
}

// InputGradient adds the gradient of one padded input image to din.
func (s *Conv) InputGradient(din, dout, packed []float32) {
	if len(din) < s.InLen() || len(dout) < s.OutLen() || len(packed) < s.BackwardLen() {
		panic("kernel: convolution operands have the wrong length")
	}
	line := s.PaddedW * s.InC
	end := s.PaddedH * line
	last := len(s.columnIn) - 1
	for y := range s.Kernel {
		width := 0
		for n := 0; n < s.runLanes; n += width {
			width = tileWidth(s.runLanes - n)
			b := packed[(y*s.runLanes+n)*s.OutC:]
			at := y*line + n
			rowTiles(width, din[at:], s.columnIn[:last], dout, s.columnOut[:last], 1, s.OutC, 0, b, zeros[:], true)
			tail := [1]offsets{s.columnIn[last]}
			for i, in := range tail[0] {
				if in < 0 {
					tail[0][i] = end - at
				}
			}
			rowTiles(width, din[at:], tail[:], dout, s.columnOut[last:], 1, s.OutC, 0, b, zeros[:], true)
		}
	}
}
