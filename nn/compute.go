package nn

import (
	"math"
	"slices"

	"github.com/spirt-ml/spirt/internal/kernel"
)

// Workspace is the scratch memory of one computation at a time. Not safe for
// concurrent use.
type Workspace struct {
	model    *Model
	maxBatch int
	blocks   []blockSpace
	layers   []denseSpace

	// Inputs of the linear layers and, last, the logits: rows of ld floats, one
	// for each sample, and their gradients.
	x, dx [][]float32
	ld    []int

	pooled []float32 // output of the last block for one image, or its gradient
}

// blockSpace is the memory of one block. Where it says one image, the memory
// is used for one after the other and stays in the cache.
type blockSpace struct {
	in     []float32 // padded inputs: of the batch, but of one image in the first block
	inStep int       // from one image to the next; zero in the first block
	mid    []float32 // one image between convolution and pooling; then its gradient
	din    []float32 // gradient of one padded image
	// For each output of the batch which of the pooling window it is, counted
	// row by row, or -1 if ReLU cut it off.
	codes []int32

	forward, backward []float32 // packed weights
	bias              []float32 // rounded up
	dweight, dbias    []float32 // sums of the gradients, packed and rounded up
}

// denseSpace is the memory of one linear layer.
type denseSpace struct {
	packed []float32 // weights, as the product at hand needs them
	bias   []float32 // rounded up
}

// NewWorkspace allocates the scratch memory for batches of at most maxBatch
// samples.
func (m *Model) NewWorkspace(maxBatch int) *Workspace {
	if maxBatch < 1 {
		panic("nn: workspace for an empty batch")
	}
	return m.layout(maxBatch,
		func(n int64) []float32 { return make([]float32, n) },
		func(n int64) []int32 { return make([]int32, n) })
}

// WorkspaceSize returns how many bytes NewWorkspace(maxBatch) takes, for
// callers that bound memory.
func (m *Model) WorkspaceSize(maxBatch int) int64 {
	var total int64
	m.layout(maxBatch,
		func(n int64) []float32 { total += 4 * n; return nil },
		func(n int64) []int32 { total += 4 * n; return nil })
	return total
}

// codeSlack is how far beyond the end of a row of outputs the pooling kernel
// may read and write.
const codeSlack = kernel.Lanes

func (m *Model) layout(maxBatch int, floats func(int64) []float32, codes func(int64) []int32) *Workspace {
	ws := &Workspace{model: m, maxBatch: maxBatch}
	batch := int64(maxBatch)
	for i := range m.blocks {
		b := &m.blocks[i]
		var s blockSpace
		images := batch
		inLen := b.in.len() + codeSlack
		if b.conv != nil {
			inLen = b.conv.InLen() + codeSlack
			s.mid = floats(int64(b.conv.OutLen()))
			s.forward = floats(int64(b.conv.ForwardLen()))
			s.bias = floats(int64(b.conv.OutLanes))
			s.dweight = floats(int64(b.conv.WeightsLen()))
			s.dbias = floats(int64(b.conv.OutLanes))
		} else {
			s.mid = floats(int64(inLen))
		}
		s.inStep = inLen
		if i == 0 {
			images, s.inStep = 1, 0
		} else if b.conv != nil && m.trains(i) {
			s.backward = floats(int64(b.conv.BackwardLen()))
			s.din = floats(int64(inLen))
		}
		s.in = floats(images * int64(inLen))
		s.codes = codes(batch*int64(b.out.c*b.out.h*b.out.w) + codeSlack)
		ws.blocks = append(ws.blocks, s)
	}
	if len(m.blocks) > 0 {
		ws.pooled = floats(int64(m.final.len() + codeSlack))
	}
	rows := int64(kernel.RoundUpRows(maxBatch))
	for i := 0; i <= len(m.dense); i++ {
		width := m.spec.Classes
		if i < len(m.dense) {
			d := &m.dense[i]
			width = d.in
			ws.layers = append(ws.layers, denseSpace{
				// A product with the weights, and one with their transpose.
				packed: floats(max(int64(d.in)*int64(kernel.RoundUp(d.out)), int64(d.out)*int64(kernel.RoundUp(d.in)))),
				bias:   floats(int64(kernel.RoundUp(d.out))),
			})
		}
		ld := kernel.RoundUp(kernel.RoundUpRows(width))
		ws.ld = append(ws.ld, ld)
		ws.x = append(ws.x, floats(rows*int64(ld)))
		var dx []float32
		if i > 0 || m.trains(len(m.blocks)) {
			dx = floats(rows * int64(ld))
		}
		ws.dx = append(ws.dx, dx)
	}
	return ws
}

// trains reports whether a block before index i has parameters, so that the
// gradient of block i's input is of use.
func (m *Model) trains(i int) bool {
	for _, b := range m.blocks[:i] {
		if b.conv != nil {
			return true
		}
	}
	return false
}

// Gradient computes the mean loss over the batch and writes its gradient with
// respect to params into grad, overwriting it. x holds len(labels) samples.
// correct counts the samples whose largest logit, the first if several are
// equal, is that of the label. Numbers that are not finite go through: the
// gradient then is not finite either, and the caller must look.
//
// It panics if a length is wrong, a label is out of range, or the batch is
// empty or larger than the workspace.
func (m *Model) Gradient(grad, params, x []float32, labels []int32, ws *Workspace) (loss float64, correct int) {
	m.check(params, x, labels, ws)
	n := len(labels)
	if n == 0 || n > ws.maxBatch {
		panic("nn: the batch is empty or larger than the workspace")
	}
	if len(grad) != m.numParams {
		panic("nn: grad has the wrong length")
	}
	m.pack(params, ws)
	m.forward(x, n, ws)
	loss, correct = m.loss(labels, ws, true)
	m.denseBackward(grad, params, n, ws)
	m.blocksBackward(grad, params, x, n, ws)
	return loss / float64(n), correct
}

// Evaluate returns the sum of the losses and the number of correct samples.
// There may be more samples than the workspace takes at once, or none.
func (m *Model) Evaluate(params, x []float32, labels []int32, ws *Workspace) (lossSum float64, correct int) {
	m.check(params, x, labels, ws)
	m.pack(params, ws)
	for len(labels) > 0 {
		n := min(len(labels), ws.maxBatch)
		m.forward(x[:n*m.inputLen], n, ws)
		l, c := m.loss(labels[:n], ws, false)
		lossSum, correct = lossSum+l, correct+c
		x, labels = x[n*m.inputLen:], labels[n:]
	}
	return lossSum, correct
}

// Predict writes the probability of each class for the one sample x into dst,
// which has as many elements as there are classes: the softmax of the logits.
func (m *Model) Predict(dst []float64, params, x []float32, ws *Workspace) {
	if len(dst) != m.spec.Classes {
		panic("nn: length of dst is not the number of classes")
	}
	m.check(params, x, []int32{0}, ws)
	m.pack(params, ws)
	m.forward(x, 1, ws)
	z := ws.x[len(m.dense)][:m.spec.Classes]
	top := float64(slices.Max(z))
	total := 0.0
	for i, v := range z {
		dst[i] = math.Exp(float64(v) - top)
		total += dst[i]
	}
	for i := range dst {
		dst[i] /= total
	}
}

// pack lays the parameters out for the forward pass.
func (m *Model) pack(params []float32, ws *Workspace) {
	for i := range m.blocks {
		if b, s := &m.blocks[i], &ws.blocks[i]; b.conv != nil {
			b.conv.PackForward(s.forward, b.weight.Of(params))
			copy(s.bias, b.bias.Of(params))
		}
	}
	for i := range m.dense {
		d, s := &m.dense[i], &ws.layers[i]
		kernel.Pack(s.packed, d.weight.Of(params), d.in, d.in, d.out, true)
		copy(s.bias, d.bias.Of(params))
	}
}

// forward computes the logits of n samples.
func (m *Model) forward(x []float32, n int, ws *Workspace) {
	for i := range n {
		sample := x[i*m.inputLen:][:m.inputLen]
		row := ws.x[0][i*ws.ld[0]:][:m.inputWidth()]
		if len(m.blocks) == 0 {
			copy(row, sample)
			continue
		}
		m.load(sample, ws)
		for j := range m.blocks {
			b, s := &m.blocks[j], &ws.blocks[j]
			in := s.in[i*s.inStep:]
			mid := in
			if b.conv != nil {
				b.conv.Forward(s.mid, in, s.forward, s.bias)
				mid = s.mid
			}
			out := ws.pooled
			if j+1 < len(m.blocks) {
				next := &ws.blocks[j+1]
				out = next.in[i*next.inStep:]
			}
			b.pool(out, s.codes[i*b.out.c*b.out.h*b.out.w:], mid)
		}
		toPlanes(row, ws.pooled, m.final)
	}
	for i := range m.dense {
		d, s := &m.dense[i], &ws.layers[i]
		y := ws.x[i+1]
		kernel.MulPacked(y, ws.ld[i+1], ws.x[i], ws.ld[i], s.packed, n, d.in, d.out, s.bias, false, true)
		if d.relu {
			for j, v := range y[:n*ws.ld[i+1]] {
				if v < 0 { // not NaN
					y[j] = 0
				}
			}
		}
	}
}

// inputWidth is the width of the first linear layer.
func (m *Model) inputWidth() int { return m.dense[0].in }

// load writes one sample into the padded input of the first block.
func (m *Model) load(sample []float32, ws *Workspace) {
	d := m.blocks[0].in
	in := ws.blocks[0].in
	for c := range d.c {
		for y := range d.h {
			src := sample[(c*d.h+y)*d.w:][:d.w]
			dst := in[((y+d.pad)*(d.w+2*d.pad)+d.pad)*d.c+c:]
			if d.c == 1 {
				copy(dst, src)
				continue
			}
			for x, v := range src {
				dst[x*d.c] = v
			}
		}
	}
}

// toPlanes turns an unpadded channels-last image into planes, one for each
// channel.
func toPlanes(dst, src []float32, d imageDim) {
	pixels := d.h * d.w
	for c := range d.c {
		plane := dst[c*pixels:][:pixels]
		for p := range plane {
			plane[p] = src[p*d.c+c]
		}
	}
}

// fromPlanes is the inverse of toPlanes.
func fromPlanes(dst, src []float32, d imageDim) {
	pixels := d.h * d.w
	for c := range d.c {
		for p, v := range src[c*pixels:][:pixels] {
			dst[p*d.c+c] = v
		}
	}
}

// loss sums the cross-entropy of the logits' softmax over the batch, and
// replaces the logits' gradient if wanted: (softmax - one-hot) / batch.
func (m *Model) loss(labels []int32, ws *Workspace, gradient bool) (sum float64, correct int) {
	last := len(m.dense)
	ld := ws.ld[last]
	for i, label := range labels {
		z := ws.x[last][i*ld:][:m.spec.Classes]
		best := 0
		for j, v := range z {
			if v > z[best] || v != v {
				best = j
			}
		}
		if best == int(label) {
			correct++
		}
		top := float64(z[best])
		total := 0.0
		for _, v := range z {
			total += math.Exp(float64(v) - top)
		}
		sum += math.Log(total) + top - float64(z[label])
		if !gradient {
			continue
		}
		dz := ws.dx[last][i*ld:][:m.spec.Classes]
		scale := 1 / float64(len(labels))
		for j, v := range z {
			p := math.Exp(float64(v)-top) / total
			if j == int(label) {
				p--
			}
			dz[j] = float32(p * scale)
		}
	}
	return sum, correct
}

// denseBackward goes from the logits' gradient to that of the first linear
// layer's input, if something before it has parameters.
func (m *Model) denseBackward(grad, params []float32, n int, ws *Workspace) {
	for i := len(m.dense) - 1; i >= 0; i-- {
		d, s := &m.dense[i], &ws.layers[i]
		x, ldx, dy, ldy := ws.x[i], ws.ld[i], ws.dx[i+1], ws.ld[i+1]
		db := d.bias.Of(grad)
		clear(db)
		for r := range n {
			for j, v := range dy[r*ldy:][:d.out] {
				db[j] += v
			}
		}
		kernel.MulTransA(d.weight.Of(grad), d.in, dy, ldy, x, ldx, d.out, n, d.in, false)
		dx := ws.dx[i]
		if dx == nil {
			return
		}
		kernel.Pack(s.packed, d.weight.Of(params), d.in, d.out, d.in, false)
		kernel.MulPacked(dx, ldx, dy, ldy, s.packed, n, d.out, d.in, nil, false, true)
		if i > 0 && m.dense[i-1].relu {
			for j, v := range x[:n*ldx] {
				if v <= 0 {
					dx[j] = 0
				}
			}
		}
	}
}

// blocksBackward goes from the gradient of the first linear layer's input to
// the first convolution.
func (m *Model) blocksBackward(grad, params, x []float32, n int, ws *Workspace) {
	if !m.trains(len(m.blocks)) {
		return
	}
	for j := range m.blocks {
		b, s := &m.blocks[j], &ws.blocks[j]
		if b.conv == nil {
			continue
		}
		clear(s.dweight)
		clear(s.dbias)
		if s.backward != nil {
			b.conv.PackBackward(s.backward, b.weight.Of(params))
		}
	}
	for i := range n {
		fromPlanes(ws.pooled, ws.dx[0][i*ws.ld[0]:][:m.inputWidth()], m.final)
		m.load(x[i*m.inputLen:][:m.inputLen], ws)
		dout := ws.pooled
		for j := len(m.blocks) - 1; ; j-- {
			b, s := &m.blocks[j], &ws.blocks[j]
			b.unpool(s.mid, s.dbias, dout, s.codes[i*b.out.c*b.out.h*b.out.w:])
			if b.conv == nil {
				dout = s.mid
				continue
			}
			b.conv.WeightsGradient(s.dweight, s.in[i*s.inStep:], s.mid)
			if s.din == nil {
				break
			}
			clear(s.din)
			b.conv.InputGradient(s.din, s.mid, s.backward)
			dout = s.din
		}
	}
	for j := range m.blocks {
		if b, s := &m.blocks[j], &ws.blocks[j]; b.conv != nil {
			b.conv.UnpackWeights(b.weight.Of(grad), s.dweight)
			copy(b.bias.Of(grad), s.dbias)
		}
	}
}
